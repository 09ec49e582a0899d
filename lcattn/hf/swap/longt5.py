"""LongT5's encoder on lcattn: a local window, and with transient-global attention the sums of blocks as side keys.

Source: Guo et al. 2022 (LongT5), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.longt5 import modeling_longt5

from ...api import attention_with_lse, merge
from ...layout import Window
from ...position import Position
from . import replaces
from .base import BucketTable, dropout_of, join_heads, positions_of, real_keys, refuse_weights, split_heads, view_of


@dataclass(frozen=True)
class _Biases:
    """What the first layer hands to the others in place of a dense position bias."""

    local: BucketTable
    side: BucketTable | None = None


class _Local(nn.Module):
    """Self-attention over the keys at most local_radius away, with T5's bias by offset, at any length."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    relative_attention_bias: nn.Embedding
    global_relative_attention_bias: nn.Embedding
    has_relative_attention_bias: bool
    is_decoder: bool
    relative_attention_max_distance: int
    n_heads: int
    local_radius: int
    block_len: int
    dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        position_bias: Any = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, _Biases | None]:
        """Attention of hidden_states [B, T, C].

        Args:
            mask: who is real, as transformers gives it: [B, T] of 0 and 1, or [B, 1, n, block_len, 3 block_len] bool.
            position_bias: what the first layer returned; None in the first.

        Returns:
            (out [B, T, C], the biases), out being at padding whatever its keys give.

        Raises:
            NotImplementedError: output_attentions, or a dense position_bias.
        """
        refuse_weights(self, output_attentions)
        if position_bias is not None and not isinstance(position_bias, _Biases):
            raise NotImplementedError(
                f"{type(self).__name__}: position_bias: expected what the first layer returned, got"
                f" {type(position_bias).__name__}"
            )
        biases = self._biases() if position_bias is None else position_bias
        real = self._real(hidden_states, mask)
        q, k, v = (split_heads(of(hidden_states), self.n_heads) for of in (self.q, self.k, self.v))
        position = positions_of(self, *(() if biases is None else (biases.local,)))
        window = Window(self.local_radius, self.local_radius)
        view = view_of(self, hidden_states, window, real_keys(real), relative=position is not None)
        local = attention_with_lse(
            q,
            k,
            v,
            layout=view.layout,
            position=position,
            scale=1.0,
            key_mask=real_keys(real),
            q_pos=view.q_pos,
            k_pos=view.k_pos,
            dropout=dropout_of(self, self.dropout),
        )
        side = self._side(q, hidden_states, real, biases)
        out, _ = merge([local, *side]) if side else local
        return self.o(join_heads(out)), biases

    def _biases(self) -> _Biases | None:
        if not self.has_relative_attention_bias:
            return None
        return _Biases(self._bias(self.relative_attention_bias))

    def _bias(self, table: nn.Embedding) -> BucketTable:
        return BucketTable(table, not self.is_decoder, self.relative_attention_max_distance)

    def _real(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """Who is real, [B, T] bool."""
        B, T, _ = hidden_states.shape
        if mask is None:
            return torch.ones(B, T, dtype=torch.bool, device=hidden_states.device)
        if mask.dim() == 2:
            return mask > 0
        # a token that sees itself
        return mask[:, 0].diagonal(self.block_len, 2, 3).flatten(1)[:, :T] > 0

    def _side(
        self, q: Tensor, hidden_states: Tensor, real: Tensor, biases: _Biases | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Attention to what is not in the window."""
        return []


@replaces(modeling_longt5.LongT5LocalAttention)
class LongT5LocalAttention(_Local, modeling_longt5.LongT5LocalAttention):
    __doc__ = _Local.__doc__


@replaces(modeling_longt5.LongT5TransientGlobalAttention)
class LongT5TransientGlobalAttention(_Local, modeling_longt5.LongT5TransientGlobalAttention):
    """The local window, and side keys: the normalised sum of each block of global_block_size tokens.

    All of a row's blocks are seen by its real tokens, with a bias of their own by offset in blocks. Tokens after the
    last whole block count to that block; a row without a whole block has no side keys.
    """

    def _biases(self) -> _Biases | None:
        if not self.has_relative_attention_bias:
            return None
        return _Biases(self._bias(self.relative_attention_bias), self._bias(self.global_relative_attention_bias))

    def _side(
        self, q: Tensor, hidden_states: Tensor, real: Tensor, biases: _Biases | None
    ) -> list[tuple[Tensor, Tensor]]:
        # the original's own numbering, float32 as it has it: [B, T], -1 for none, and [B, n_blocks] of 0 and 1
        block_of, taken = modeling_longt5._make_global_fixed_block_ids(real.float(), self.global_block_size)
        B, n_blocks = taken.shape
        if n_blocks == 0:
            return []
        # one more sum takes what belongs to no block
        slot = torch.where(block_of < 0, n_blocks, block_of).long()
        slot = slot + torch.arange(B, device=slot.device)[:, None] * (n_blocks + 1)
        sums = hidden_states.new_zeros(B * (n_blocks + 1), hidden_states.shape[2])
        sums = sums.index_add(0, slot.flatten(), hidden_states.flatten(0, 1)).unflatten(0, (B, n_blocks + 1))
        keys = self.global_input_layer_norm(sums[:, :-1])
        side: Position | None = None if biases is None else biases.side
        return [
            attention_with_lse(
                q,
                *(split_heads(of(keys), self.n_heads) for of in (self.k, self.v)),
                position=side,
                scale=1.0,
                key_mask=real_keys(taken > 0),
                q_pos=block_of,
                dropout=dropout_of(self, self.dropout),
            )
        ]
