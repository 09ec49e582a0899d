"""BigBird and BigBirdPegasus on lcattn: windows of blocks, global blocks, and the random blocks that they draw.

Source: Zaheer et al. 2020 (BigBird), section 2 and appendix D.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.big_bird import modeling_big_bird
from transformers.models.bigbird_pegasus import modeling_bigbird_pegasus

from ...api import attention, attention_with_lse, merge
from ...layout import Chunked, Context, Full, Global, Layout
from ...layout.base import Bounds, check_int, register, set_fields
from ..masks import Mask
from ..models import attention_forward
from . import SWAPS, replaces
from .base import conversion_of, dropout_of, join_heads, positions_of, real_keys, refuse_weights, split_heads, view_of

if TYPE_CHECKING:
    from ...lowering import Region


@register
@dataclass(frozen=True, repr=False, eq=False)
class ListedBlocks(Layout):
    """Blocks by lists, by plain indices from 0: query block r of head h sees the key blocks picks[h, r].

    Args:
        picks: [H or 1, ceil(T / block), n] int; negative for none, repeats count once.
        block: their size.
    """

    picks: Tensor
    block: int = 64

    def __post_init__(self) -> None:
        check_int("ListedBlocks", "block", self.block, 1)
        if self.picks.dim() != 3 or self.picks.dtype != torch.long:
            what = f"{list(self.picks.shape)} {self.picks.dtype}"
            raise ValueError(f"ListedBlocks: picks must be [H or 1, blocks, n] int64, got {what}")
        set_fields(self, spec=f"ListedBlocks(@, {self.block})", tensors=(self.picks,), by_index=True)
        set_fields(self, per_head=self.picks.shape[0] > 1)

    def check(self, B: int, H: int, T: int, S: int) -> None:
        h, rows, _ = self.picks.shape
        if h not in (1, H) or rows != -(-T // self.block):
            raise ValueError(
                f"ListedBlocks: picks must be [{H} or 1, {-(-T // self.block)}, n] for blocks of {self.block}, got"
                f" {list(self.picks.shape)}"
            )

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        picks = self.picks.to(q_pos.device)
        row = torch.div(ctx.q_idx, self.block, rounding_mode="floor").clamp(0, picks.shape[1] - 1)
        column = torch.div(ctx.k_idx, self.block, rounding_mode="floor")
        head = torch.as_tensor(ctx.h if self.per_head else 0, device=q_pos.device)
        return (picks[head, row] == column[..., None]).any(-1)

    def _occupied(self, h: int, level: int) -> Tensor:
        """Sorted ids row * 2^31 + column of the nodes of the grid that hold a pick, after `level` halvings."""
        column = self.picks[h].cpu()
        row = torch.arange(len(column))[:, None].expand_as(column)[column >= 0]
        return torch.unique((row >> level << 31) + (column[column >= 0] >> level))

    def bounds(self, region: Region) -> Bounds:
        ends = (region.q_first, region.q_last, region.k_first, region.k_last)
        row_lo, row_hi, col_lo, col_hi = (torch.div(x, self.block, rounding_mode="floor") for x in ends)
        span = int(torch.maximum(row_hi - row_lo, col_hi - col_lo).max()) if row_lo.numel() else 0
        # at this level a rectangle touches at most two nodes a side
        level = span.bit_length()
        h = region.h if self.per_head else 0
        occupied = region.memo(("ListedBlocks", id(self.picks), level), lambda: self._occupied(h, level))
        some = torch.zeros_like(row_lo, dtype=torch.bool)
        if len(occupied):
            for row in (row_lo, row_hi):
                for column in (col_lo, col_hi):
                    node = (row >> level << 31) + (column >> level)
                    at = torch.searchsorted(occupied, node).clamp(max=len(occupied) - 1)
                    some = some | (occupied[at] == node)
        return some, some & (level == 0)


@dataclass(frozen=True)
class _Plan:
    """Blocks of one length: who sees whom, and what is counted more than once, as (how often more, where)."""

    layout: Layout
    again: tuple[tuple[int, Layout], ...]


# plans that need not be drawn again, with what they were drawn for
_plans: weakref.WeakKeyDictionary[nn.Module, tuple[Any, _Plan]] = weakref.WeakKeyDictionary()


class _BlockSparse(nn.Module):
    """Self-attention over blocks: three of a window, the first and the last, and random ones by head.

    The random blocks are those that the original draws, by its own functions and from the same seed (in evaluation it
    draws none and takes block 0 each time). Where a random block repeats another, or one of the window or a global one,
    the original counts it as often as it stands there; so do we, by a second call over those blocks alone, whose lse
    grows by the logarithm of the count. There is no dropout of weights, as in the original.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    num_attention_heads: int
    num_random_blocks: int
    block_size: int
    max_seqlen: int
    seed: int | None

    def forward(
        self,
        hidden_states: Tensor,
        band_mask: Tensor | None = None,
        from_mask: Tensor | None = None,
        to_mask: Tensor | None = None,
        from_blocked_mask: Tensor | None = None,
        to_blocked_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of hidden_states [B, T, C], T a multiple of the block and of at least five of them.

        Args:
            to_mask: [B, 1, 1, T] of 0 and 1, which keys are real; None for all. The other masks say the same.

        Returns:
            (out [B, T, C], None); 0 at padding.

        Raises:
            NotImplementedError: output_attentions; ValueError: no such length.
        """
        refuse_weights(self, kwargs.get("output_attentions"))
        heads = self.num_attention_heads
        q, k, v = (split_heads(of(hidden_states), heads) for of in (self.query, self.key, self.value))
        real = None if to_mask is None else real_keys(to_mask[:, 0, 0] > 0)
        if conversion_of(self) is None:
            out = self._own(q, k, v, real)
        else:
            position = positions_of(self)
            view = view_of(self, hidden_states, Full(), real, relative=position is not None)
            out = attention(
                q,
                k,
                v,
                layout=view.layout,
                position=position,
                key_mask=real,
                q_pos=view.q_pos,
                k_pos=view.k_pos,
            )
        out = join_heads(out)
        return (out if real is None else out * real[..., None]), None

    def _own(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        plan = self._plan(q.shape[2])
        parts = [attention_with_lse(q, k, v, layout=plan.layout, key_mask=real)]
        for times, layout in plan.again:
            out, lse = attention_with_lse(q, k, v, layout=layout, key_mask=real)
            parts.append((out, lse + float(np.log(times))))
        return parts[0][0] if len(parts) == 1 else merge(parts)[0]

    def _plan(self, T: int) -> _Plan:
        block, heads = self.block_size, self.num_attention_heads
        n_blocks = T // block
        if T % block or n_blocks < 5:
            raise ValueError(
                f"{type(self).__name__}: hidden_states: expected a multiple of {block} tokens, {5 * block} at least,"
                f" got {T}"
            )
        key = (T, block, heads, self.num_random_blocks, self.max_seqlen, self.seed, self.training)
        known = _plans.get(self)
        if known is not None and known[0] == key and (self.seed is not None or not self.training):
            return known[1]
        drawn = torch.tensor(np.stack(self._draw(T)), dtype=torch.long)
        picks = torch.full((heads, n_blocks, drawn.shape[2]), -1)
        picks[:, 1:-1] = drawn
        layout = Chunked(block, 1, 1) | Global(block) | Global(indices=tuple(range(T - block, T)))
        plan = _Plan(layout | ListedBlocks(picks, block), self._repeated(picks))
        _plans[self] = (key, plan)
        return plan

    def _repeated(self, picks: Tensor) -> tuple[tuple[int, Layout], ...]:
        """What the picks count again: (times, the blocks that count so many times more)."""
        n_blocks = picks.shape[1]
        if bool((picks == picks[:1]).all()):
            picks = picks[:1]
        row = torch.arange(n_blocks)[:, None]
        base = ((picks - row).abs() <= 1) | (picks == 0) | (picks == n_blocks - 1)
        same = picks[..., None] == picks[..., None, :]
        # a block outside window and global ones counts once already
        times = same.sum(-1) - (~base).long()
        # each block is told by the first of its picks
        first = ~torch.tril(same, -1).any(-1) & (picks >= 0)
        found = []
        for n in torch.unique(times[first & (times > 0)]).tolist():
            found.append((n, ListedBlocks(picks.where(first & (times == n), -1), self.block_size)))
        return tuple(found)

    def _draw(self, T: int) -> Any:
        """The random blocks of each head, [n_blocks - 2, n] each, by the original's own functions."""
        original: Any = self
        state = np.random.get_state()
        try:
            if self.training:
                np.random.seed(self.seed)
            block, n_random = self.block_size, self.num_random_blocks
            if T in (1024, 3072, 4096):
                draw = original._bigbird_block_rand_mask
                return [
                    draw(self.max_seqlen, self.max_seqlen, block, block, n_random, last_idx=1024)[: T // block - 2]
                    for _ in range(self.num_attention_heads)
                ]
            lengths, counts = original._get_rand_attn_plan(T, block, n_random)
            return original._bigbird_block_rand_mask_with_head(
                from_seq_length=T,
                to_seq_length=T,
                from_block_size=block,
                to_block_size=block,
                num_heads=self.num_attention_heads,
                plan_from_length=lengths,
                plan_num_rand_blocks=counts,
            )
        finally:
            # the caller's own random numbers are not ours to rewind
            np.random.set_state(state)


class _Dense(nn.Module):
    """BigBird's full attention: over its own tokens, causal in a decoder, or over an encoder's."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    dropout: nn.Dropout
    num_attention_heads: int
    is_decoder: bool
    layer_idx: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask | Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Mask | Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of hidden_states [B, T, C], to encoder_hidden_states [B, S, C] or to themselves and the cache.

        Returns:
            (out [B, T, C], None).

        Raises:
            NotImplementedError: output_attentions.
        """
        refuse_weights(self, kwargs.get("output_attentions"))
        cross = encoder_hidden_states is not None
        heads = self.num_attention_heads
        if cross and past_key_values is not None and past_key_values.get_seq_length(self.layer_idx) > 0:
            k, v = past_key_values.layers[self.layer_idx].keys, past_key_values.layers[self.layer_idx].values
        else:
            states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            k, v = split_heads(self.key(states), heads), split_heads(self.value(states), heads)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
        out, _ = attention_forward(
            self,
            split_heads(self.query(hidden_states), heads),
            k,
            v,
            encoder_attention_mask if cross else attention_mask,
            dropout=dropout_of(self, self.dropout.p),
            is_causal=self.is_decoder and not cross,
        )
        return out.flatten(2), None


class _Switch(nn.Module):
    """Goes over to full attention for good at the first short text, as the original does, and stays on lcattn."""

    def set_attention_type(self, value: str, *args: Any, **kwargs: Any) -> None:
        super().set_attention_type(value, *args, **kwargs)  # type: ignore[misc]
        inner: Any = self.self
        inner.__class__ = SWAPS.get(inner.__class__, inner.__class__)
        conversion = conversion_of(self)
        if conversion is not None:
            inner.__dict__["_lcattn"] = conversion


@replaces(modeling_big_bird.BigBirdBlockSparseAttention)
class BigBirdBlockSparseAttention(_BlockSparse, modeling_big_bird.BigBirdBlockSparseAttention):
    __doc__ = _BlockSparse.__doc__


@replaces(modeling_bigbird_pegasus.BigBirdPegasusBlockSparseAttention)
class BigBirdPegasusBlockSparseAttention(_BlockSparse, modeling_bigbird_pegasus.BigBirdPegasusBlockSparseAttention):
    __doc__ = _BlockSparse.__doc__


@replaces(modeling_big_bird.BigBirdSelfAttention)
class BigBirdSelfAttention(_Dense, modeling_big_bird.BigBirdSelfAttention):
    __doc__ = _Dense.__doc__


@replaces(modeling_bigbird_pegasus.BigBirdPegasusSelfAttention)
class BigBirdPegasusSelfAttention(_Dense, modeling_bigbird_pegasus.BigBirdPegasusSelfAttention):
    __doc__ = _Dense.__doc__


@replaces(modeling_big_bird.BigBirdAttention)
class BigBirdAttention(_Switch, modeling_big_bird.BigBirdAttention):
    __doc__ = _Switch.__doc__


@replaces(modeling_bigbird_pegasus.BigBirdPegasusEncoderAttention)
class BigBirdPegasusEncoderAttention(_Switch, modeling_bigbird_pegasus.BigBirdPegasusEncoderAttention):
    __doc__ = _Switch.__doc__
