"""Attention as torch modules: a drop-in for MultiheadAttention, chunked self-attention, an encoder layer.

All of them train and evaluate, compile with `torch.compile(fullgraph=True)` and dynamic shapes, export with
`torch.export`, and keep whatever they learn in their state_dict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops, reference
from .api import attention, check_dropout, check_tensor, make_problem, merge
from .dispatch import check_name
from .layout import Blocks, Causal, Chunked, Full, Global, Layout
from .layout.data import HIDDEN
from .position import Position, RelativeBias, Terms
from .position import lower as lower_positions

__all__ = ["ChunkedSelfAttention", "EncoderLayer", "MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with a layout and a position, its parameters and calls unchanged.

    out = concat_h(attention(x_q W_q, x_k W_k, x_v W_v)_h) W_o + b_o, with `lcattn.attention` of the given
    layout and position inside.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as in torch. The keys that add_bias_kv and add_zero_attn append are seen by every query,
            whatever the layout, and have no position.
        layout: who sees whom, in coordinates where the queries stand at the end of the keys.
        position: one position or a sequence of them; what an `nn.Parameter` holds in it is learned and saved
            here (as `position.table` and the like), any other tensor moves with the module and is not saved.

    It takes the place of torch's, in `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` too: their
    fused inference path, which would compute dense attention from these parameters, is not taken. Two things
    differ from torch: a query that sees nothing gives zeros before the output projection (torch: NaN), and a
    float mask must hold only 0 and -inf (or at most -1e4, which hides as -inf does).

    Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layout: Layout = Full(),  # noqa: B008 - frozen
        position: Position | Sequence[Position] | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            check_dropout(dropout),
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        # torch reads this flag from outside: encoder layers that find it set bypass forward() in eval mode
        self._qkv_same_embed_dim = False
        self.layout = _check_layout(layout)
        self.position = _position_module(position, num_heads, self.head_dim)

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, layout={self.layout}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query over key and value.

        Args:
            query: [T, B, embed_dim], with batch_first [B, T, embed_dim], without a batch [T, embed_dim]; key
                and value: likewise, with S, kdim and vdim.
            key_padding_mask: [B, S] ([S] without a batch); True, or at most -1e4 where it is float, hides a key.
            need_weights: also return the weights. True by default, as in torch, so that a call returns what
                it did; it costs O(B H T S) memory and time whatever the layout, so pass False on anything
                long.
            attn_mask: [T, S] or [B * H, T, S]; True, or at most -1e4 where it is float, hides a key from a
                query. It is joined to the layout, and costs O(T S) to read: prefer a layout.
            average_attn_weights: average the weights over heads.
            is_causal: hide later keys. Where T = S it stands for attn_mask, which is then not read; otherwise
                attn_mask decides, if there is one.

        Returns:
            out, of query's shape, and the weights [B, T, S] ([B, H, T, S] if not averaged, no B without a
            batch; one or two more keys with add_bias_kv and add_zero_attn), dropped out as out was, or None.

        Raises:
            ValueError, TypeError: a shape or dtype is wrong, or a float mask holds anything but 0 and values
                of at most -1e4 (an additive term is a `position`). Under torch.compile the latter is a
                RuntimeError of the running graph.
        """
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            check_tensor(name, tensor)
        if query.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None
            if masked or query is not key or key is not value or need_weights or not self.batch_first:
                raise ValueError(
                    "query: a nested tensor must also be key and value, with batch_first=True,"
                    " need_weights=False and no masks"
                )
            return self._forward_nested(query, is_causal), None
        batched, B, T, S = self._check_inputs(query, key, value)
        q, k, v = (self._split_heads(x, batched) for x in self._project(query, key, value))

        layout = self.layout
        if is_causal and (attn_mask is None or T == S):
            layout = _and(layout, Causal())
        elif attn_mask is not None:
            layout = _and(layout, Blocks(~self._hidden_pairs(attn_mask, B, T, S), 1))
        key_mask = None
        if key_padding_mask is not None:
            expected = (B, S) if batched else (S,)
            check_tensor("key_padding_mask", key_padding_mask)
            if key_padding_mask.shape != expected:
                raise ValueError(f"key_padding_mask: expected {list(expected)}, got {list(key_padding_mask.shape)}")
            key_mask = ~_hidden("key_padding_mask", key_padding_mask).reshape(B, S)

        dropout = self.dropout if self.training else 0.0
        out, lse, weights = _attend(q, k, v, layout, self.position, key_mask, dropout, need_weights)
        more = self._more_keys(k, v)
        if more is not None:
            more_out, more_lse, more_weights = _attend(q, *more, Full(), None, None, dropout, need_weights)
            out, total = merge([(out, lse), (more_out, more_lse)])
            if weights is not None and more_weights is not None:
                parts = ((weights, lse), (more_weights, more_lse))
                weights = torch.cat([w * torch.exp(part - total)[..., None].to(w.dtype) for w, part in parts], 3)

        out = self.out_proj(self._join_heads(out, batched))
        if weights is None:
            return out, None
        if average_attn_weights:
            weights = weights.mean(1)
        return out, weights if batched else weights[0]

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[bool, int, int, int]:
        """Whether there is a batch, B (1 if not), T and S."""
        if query.dim() not in (2, 3):
            raise ValueError(f"query: expected 2 dimensions, or 3 with a batch, got {list(query.shape)}")
        for name, tensor, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if tensor.dim() != query.dim() or tensor.shape[-1] != width:
                expected = f"{query.dim()} dimensions, the last of {width}"
                raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value: expected length and batch of key {list(key.shape)}, got {list(value.shape)}")
        if query.dim() == 2:
            return False, 1, query.shape[0], key.shape[0]
        batch, length = (0, 1) if self.batch_first else (1, 0)
        if key.shape[batch] != query.shape[batch]:
            expected = f"batch {query.shape[batch]} in dimension {batch}, as query"
            raise ValueError(f"key: expected {expected}, got {list(key.shape)}")
        return True, query.shape[batch], query.shape[length], key.shape[length]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self.in_proj_weight is None:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _split_heads(self, x: Tensor, batched: bool) -> Tensor:
        """[B, H, length, D], a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _join_heads(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x[0].transpose(0, 1).flatten(-2)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)

    def _hidden_pairs(self, attn_mask: Tensor, B: int, T: int, S: int) -> Tensor:
        """attn_mask as [1, 1, T, S] or [B, H, T, S] bool."""
        H = self.num_heads
        check_tensor("attn_mask", attn_mask)
        if attn_mask.shape == (T, S):
            return _hidden("attn_mask", attn_mask)[None, None]
        if attn_mask.shape == (B * H, T, S):
            return _hidden("attn_mask", attn_mask).reshape(B, H, T, S)
        raise ValueError(f"attn_mask: expected {[T, S]} or {[B * H, T, S]}, got {list(attn_mask.shape)}")

    def _more_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """The keys and values of add_bias_kv and add_zero_attn, [B, H, 1 or 2, D]."""
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            shape = (1, self.num_heads, 1, self.head_dim)
            keys.append(self.bias_k.reshape(shape).to(k.dtype).expand(k.shape[0], -1, -1, -1))
            values.append(self.bias_v.reshape(shape).to(v.dtype).expand(v.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            keys.append(torch.zeros_like(k[:, :, :1]))
            values.append(torch.zeros_like(v[:, :, :1]))
        return (torch.cat(keys, 2), torch.cat(values, 2)) if keys else None

    def _forward_nested(self, x: Tensor, is_causal: bool) -> Tensor:
        """Self-attention of a nested [B, *, embed_dim], as `nn.TransformerEncoder` makes in eval mode."""
        rows = x.unbind()
        padded = torch.nested.to_padded_tensor(x, 0.0)
        lengths = torch.tensor([len(row) for row in rows], device=x.device)
        padding = torch.arange(padded.shape[1], device=x.device) >= lengths[:, None]
        out, _ = self.forward(padded, padded, padded, padding, need_weights=False, is_causal=is_causal)
        cut = [padded_row[: len(row)] for padded_row, row in zip(out, rows, strict=True)]
        return torch.nested.as_nested_tensor(cut, layout=x.layout)


class ChunkedSelfAttention(nn.Module):
    """Self-attention in which a token sees its own chunk and the neighbouring ones, with a learned bias.

    out = attention(x W_q, x W_k, x W_v) W_o + b_o, of layout
    (Chunked(chunk, lookback, lookahead) | Global(n_global) | also) & Causal(), the last three where asked for

    Args:
        embed_dim: width of the tokens; num_heads: query heads H, of embed_dim / H features each.
        chunk, lookback, lookahead: a token of chunk c sees chunks c - lookback to c + lookahead; None, with a
            position of your own, leaves a side open.
        causal: and no later token.
        num_kv_heads: key and value heads G, dividing H; H by default.
        n_global: the first n_global tokens see all and are seen by all (but for causality).
        also: a layout of further pairs, such as TopKBlocks(16) or Bridge(chunk).
        position: one position, a sequence of them, or None. By default a learned `RelativeBias`, the
            parameter `position.table` [H, L], zero at first, with an entry for each offset that chunks can
            reach; what global tokens reach beyond takes the entry at its end. In a position of your own, what
            an `nn.Parameter` holds is learned and saved here, any other tensor moves with the module and is
            not saved.
        dropout: probability of dropping a weight in training.
        bias: biases in the projections.

    Cost: O(T * chunk) time, O(T) memory, and what `also` adds.
    Source: Beltagy et al. 2020 (Longformer), section 3.1; the bias, Raffel et al. 2020 (T5), section 2.1.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        chunk: int,
        lookback: int | None = 1,
        lookahead: int | None = 0,
        causal: bool = False,
        num_kv_heads: int | None = None,
        n_global: int = 0,
        also: Layout | None = None,
        position: Position | Sequence[Position] | str | None = "learned",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}")
        if n_global < 0:
            raise ValueError(f"n_global: expected 0 or more, got {n_global}")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = check_dropout(dropout)

        layout: Layout = Chunked(chunk, lookback, lookahead)
        if n_global:
            layout = layout | Global(n_global)
        if also is not None:
            layout = layout | _check_layout(also, "also")
        self.layout = layout & Causal() if causal else layout
        if isinstance(position, str):
            if position != "learned":
                raise ValueError(f'position: expected a position, None or "learned", got {position!r}')
            last_chunk = 0 if causal else lookahead
            if lookback is None or last_chunk is None:
                name = "lookback" if lookback is None else "lookahead"
                raise ValueError(f"{name}: expected the number of chunks that the learned bias covers, got None")
            first = 1 - (lookback + 1) * chunk
            last = 0 if causal else (last_chunk + 1) * chunk - 1
            table = nn.Parameter(torch.zeros(num_heads, last - first + 1, device=device, dtype=dtype))
            position = RelativeBias(table, first)
        self.position = _position_module(position, num_heads, self.head_dim)

        width = (num_heads + 2 * num_kv_heads) * self.head_dim
        self.qkv = nn.Linear(embed_dim, width, bias, device, dtype)
        self.out = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections as torch.nn.MultiheadAttention draws them."""
        nn.init.xavier_uniform_(self.qkv.weight)
        for linear in (self.qkv, self.out):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        return f"embed_dim={self.embed_dim}, {heads}, layout={self.layout}, dropout={self.dropout}"

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
    ) -> Tensor:
        """Attention of every token of x.

        Args:
            x: [B, T, embed_dim].
            key_mask: [B or 1, T] bool, False hides a token from every query.
            q_pos, k_pos: [T] or [B or 1, T] integer coordinates of the tokens as queries and as keys, both or
                neither; 0, 1, ... by default. Chunks, offsets and causality go by them.

        Returns:
            [B, T, embed_dim]. A token that sees nothing gives the output projection's bias.

        Raises:
            ValueError: an argument has the wrong shape or dtype; the message names it.
        """
        check_tensor("x", x)
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x: expected [batch, length, {self.embed_dim}], got {list(x.shape)}")
        if (q_pos is None) != (k_pos is None):
            given, absent = ("k_pos", "q_pos") if q_pos is None else ("q_pos", "k_pos")
            raise ValueError(f"{absent}: expected coordinates beside {given}, got None")
        G = self.num_kv_heads
        heads = self.qkv(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, G, G), 1)
        out = attention(
            q,
            k,
            v,
            layout=self.layout,
            position=self.position,
            key_mask=key_mask,
            q_pos=q_pos,
            k_pos=k_pos,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out(out.transpose(1, 2).flatten(2))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class EncoderLayer(nn.Module):
    """A transformer layer on `ChunkedSelfAttention`.

    norm_first:  x = x + drop(attention(norm1(x)));  x = x + drop(feed_forward(norm2(x)))
    otherwise:   x = norm1(x + drop(attention(x)));  x = norm2(x + drop(feed_forward(x)))
    feed_forward(x) = linear2(drop(activation(linear1(x))))

    Args:
        embed_dim, num_heads, chunk: as in ChunkedSelfAttention.
        dim_feedforward: width inside the feed-forward, 4 * embed_dim by default.
        dropout: of the attention weights, of both residual branches and inside the feed-forward, in training.
        activation: "gelu", "relu", "silu", or a function of a tensor.
        norm_first: normalise before each branch rather than after each sum.
        layer_norm_eps: of both LayerNorms.
        bias: biases in all linears and norms.
        attention: further arguments of ChunkedSelfAttention: lookback, lookahead, causal, num_kv_heads,
            n_global, also, position.

    Source: Vaswani et al. 2017, section 3.1; norm_first, Xiong et al. 2020.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        chunk: int,
        *,
        dim_feedforward: int | None = None,
        dropout: float = 0.0,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        norm_first: bool = True,
        layer_norm_eps: float = 1e-5,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        if isinstance(activation, str):
            if activation not in _ACTIVATIONS:
                known = ", ".join(_ACTIVATIONS)
                raise ValueError(f"activation: expected one of {known} or a function, got {activation!r}")
            activation = _ACTIVATIONS[activation]
        width = 4 * embed_dim if dim_feedforward is None else dim_feedforward
        self.attention = ChunkedSelfAttention(
            embed_dim, num_heads, chunk, dropout=dropout, bias=bias, device=device, dtype=dtype, **attention
        )
        self.norm1 = nn.LayerNorm(embed_dim, layer_norm_eps, bias=bias, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(embed_dim, layer_norm_eps, bias=bias, device=device, dtype=dtype)
        self.linear1 = nn.Linear(embed_dim, width, bias, device, dtype)
        self.linear2 = nn.Linear(width, embed_dim, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation
        self.norm_first = norm_first

    def extra_repr(self) -> str:
        return f"norm_first={self.norm_first}"

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        q_pos: Tensor | None = None,
        k_pos: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, embed_dim] to the same shape; keywords and errors as in `ChunkedSelfAttention.forward`."""

        def attend(x: Tensor) -> Tensor:
            return self.dropout(self.attention(x, key_mask=key_mask, q_pos=q_pos, k_pos=k_pos))

        def feed_forward(x: Tensor) -> Tensor:
            return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))

        if self.norm_first:
            x = x + attend(self.norm1(x))
            return x + feed_forward(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + feed_forward(x))


class _PositionModule(nn.Module):
    """A position whose tensors are this module's: parameters where they were, unsaved buffers otherwise."""

    def __init__(self, position: Any) -> None:
        super().__init__()
        self.kind = type(position)
        self.fixed: dict[str, Any] = {}
        self.tensor_names: tuple[str, ...] = ()
        for field in dataclasses.fields(position):
            value = getattr(position, field.name)
            if isinstance(value, nn.Parameter):
                self.register_parameter(field.name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(field.name, value, persistent=False)
            else:
                self.fixed[field.name] = value
                continue
            self.tensor_names += (field.name,)

    def extra_repr(self) -> str:
        values = {name: list(getattr(self, name).shape) for name in self.tensor_names} | self.fixed
        return ", ".join([self.kind.__name__, *(f"{name}={value}" for name, value in values.items())])

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        tensors = {name: getattr(self, name) for name in self.tensor_names}
        return self.kind(**self.fixed, **tensors).lower(q, k, v, q_pos, k_pos)


class _PositionList(nn.ModuleList):
    """Several positions, as one."""

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        parts: list[Any] = list(self)
        return lower_positions(parts, q, k, v, q_pos, k_pos)


def _position_module(position: Any, H: int, D: int) -> Any:
    """The position, for H heads of D features, as a module that holds its tensors; None, and a module, stay."""
    if position is None or isinstance(position, nn.Module):
        return position
    if isinstance(position, (list, tuple)):
        return _PositionList([_position_module(part, H, D) for part in position])
    if not hasattr(position, "lower"):
        what = type(position).__name__
        raise TypeError(f"position: expected a position such as RelativeBias(...), got {what}")
    if hasattr(position, "check"):
        position.check(torch.empty(1, H, 1, D, device="meta"))
    return _PositionModule(position) if dataclasses.is_dataclass(position) else position


def _check_layout(layout: Any, name: str = "layout") -> Layout:
    if not isinstance(layout, Layout):
        raise TypeError(f"{name}: expected a layout such as Causal(), got {type(layout).__name__}")
    return layout


def _and(layout: Layout, other: Layout) -> Layout:
    return other if isinstance(layout, Full) else layout & other


def _hidden(name: str, mask: Tensor) -> Tensor:
    """What a torch mask hides, bool: a bool mask as it is, a float one where it is -inf or next to it."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise TypeError(f"{name}: expected bool or float, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError(
            f"{name}: a mask that requires a gradient would not get one; give a term that depends on distance as"
            " position=RelativeBias(...) or Alibi(...)"
        )
    hidden = mask <= HIDDEN
    plain = (hidden | (mask == 0)).all()
    message = (
        f"{name}: a float mask may hold only 0 and -inf (or at most -1e4) here, got other values;"
        " give a term that depends on distance as position=RelativeBias(...) or Alibi(...)"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(plain, message)
    elif not plain:
        raise ValueError(message)
    return hidden


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    position: Position | None,
    key_mask: Tensor | None,
    dropout: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse, and if needed the weights [B, H, T, S] that made out; q, k and v [B, H, T or S, D]."""
    problem = make_problem(q, k, v, layout, position, None, None, None, key_mask, None, None, dropout)
    if not need_weights:
        return *ops.attention(problem, check_name("auto")), None
    phases, lse = reference.weights(problem)
    if problem.seed is not None:
        B, H, _, T, S, _ = problem.sizes
        keep = reference.dropout_keep(B, H, T, S, dropout, problem.seed)
        phases = [p * keep / (1 - dropout) for p in phases]
    # out comes from the weights themselves: one path for the gradients of both, as in torch
    parts = [p @ problem.v[v_at] for p, (_, _, v_at) in zip(phases, problem.phase_map, strict=True)]
    return torch.stack(parts).sum(0), lse, torch.stack(phases).sum(0)
