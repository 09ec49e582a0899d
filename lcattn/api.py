"""`attention`, `attention_with_lse` and `merge`: check, lower positions, dispatch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, plan
from . import position as positions
from .dispatch import check_name
from .layout import Full, Layout, TopKBlocks
from .position import Position
from .problem import Problem


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = Full(),  # noqa: B008 - frozen
    position: Position | Sequence[Position] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Block-sparse attention with relative positions: out_i = sum over visible j of softmax_j(score_ij) v_j.

    score_ij = scale * q_i . k_j + the position's terms, then softcap * tanh(score / softcap) if softcap is given.

    Args:
        q: [B, H, T, D] float; k, v: [B, G, S, D], same dtype and device, G dividing H (head h reads h G / H).
        layout: who sees whom; layouts join with `|` and `&`.
        position: one position, or a sequence of them.
        scale: of the content term and of the vectors of Shaw, TransformerXL, Disentangled; 1 / sqrt(D) by default.
        softcap: bound of the scores, None for none.
        sink: [H], a logit per head that takes part in the softmax and has no value.
        key_mask: [B or 1, S] bool, False hides a key from every query.
        q_pos, k_pos: [T] or [B or 1, T], and likewise for S: integer coordinates; S - T + i and j by default.
        dropout: probability in [0, 1) of dropping a weight; drawn from torch's default generator.
        backend: "auto", or the name of one (`lcattn doctor` lists them), which then raises rather than falls back.

    Returns:
        out [B, H, T, D] in q's dtype. A row that sees nothing is zero, and so are its gradients. Hidden keys and values
        must be finite, as in torch's own attention: a weight of 0 times NaN is NaN.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: no backend can compute the call.
    """
    call = (q, k, v, layout, position, scale, softcap, sink, key_mask, q_pos, k_pos, dropout)
    return _attention(call, backend, with_lse=False)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout = Full(),  # noqa: B008 - frozen
    position: Position | Sequence[Position] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    key_mask: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attention`, and the logarithm of each row's denominator: lse [B, H, T], float32 (float64 for float64 inputs).

    lse_i = log(exp(sink) + sum_j exp(score_ij)), natural, differentiable; -inf for a row that sees nothing and has no
    sink. Parts computed over disjoint keys join with `merge`.
    """
    call = (q, k, v, layout, position, scale, softcap, sink, key_mask, q_pos, k_pos, dropout)
    return _attention(call, backend, with_lse=True)


def _attention(call: tuple[Any, ...], backend: str, with_lse: bool) -> tuple[Tensor, Tensor]:
    backend = check_name(backend)
    if (found := plan.attention(make_problem, call, backend, with_lse)) is not None:
        return found
    return ops.attention(make_problem(*call), backend)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins attention over disjoint sets of keys: out = sum_p exp(lse_p - lse) out_p, lse = log sum_p exp(lse_p).

    Args:
        parts: (out [B, H, T, D], lse [B, H, T]) of each set; a sink goes to one part only.

    Returns:
        (out, lse) over all keys, differentiable; rows that see nothing anywhere give 0 and -inf.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("merge: parts must hold at least one (out, lse), got none")
    for out, lse in parts:
        if out.shape[:-1] != lse.shape or out.shape != parts[0][0].shape:
            got = f"{list(out.shape)} and {list(lse.shape)}"
            raise ValueError(f"merge: parts must share out [B, H, T, D] and lse [B, H, T], got {got}")
    lses = torch.stack([lse for _, lse in parts])
    top = lses.amax(0).detach()
    top = torch.where(top.isfinite(), top, 0)
    shares = torch.exp(lses - top)
    total = shares.sum(0)
    some = total > 0
    safe = torch.where(some, total, 1)
    out = sum(share[..., None] * part.to(lses.dtype) for share, (part, _) in zip(shares, parts, strict=True))
    merged = torch.where(some[..., None], out / safe[..., None], 0)
    return merged.to(parts[0][0].dtype), torch.where(some, top + torch.log(safe), -math.inf)


def make_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    position: Position | Sequence[Position] | None,
    scale: float | None,
    softcap: float | None,
    sink: Tensor | None,
    key_mask: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    dropout: float,
) -> Problem:
    """The `Problem` of a call, every argument checked."""
    q, k, v = _autocast(q, k, v)
    _check_tensors(q, k, v)
    B, H, T, D = q.shape
    S = k.shape[2]
    if not isinstance(layout, Layout):
        raise TypeError(f"layout: expected a layout such as Causal(), got {type(layout).__name__}")
    layout.check(B, H, T, S)
    if not q.is_meta and any(t.is_meta for t in layout.tensors):
        raise ValueError(f"layout: the tensors of {layout} are on meta, expected values, as on {q.device}")
    scale = _check_number("scale", D**-0.5 if scale is None else scale)
    softcap = _check_number("softcap", 0.0 if softcap is None else softcap)
    if softcap < 0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    dropout = check_dropout(dropout)
    for name, tensor in (("sink", sink), ("key_mask", key_mask), ("q_pos", q_pos), ("k_pos", k_pos)):
        if tensor is not None:
            check_tensor(name, tensor)
            if tensor.device != q.device:
                raise ValueError(f"{name}: expected device {q.device}, as q, got {tensor.device}")
    if sink is not None and (sink.shape != (H,) or not sink.is_floating_point()):
        raise ValueError(f"sink: expected [{H}] floats, one a query head, got {list(sink.shape)} {sink.dtype}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape not in ((B, S), (1, S))):
        raise ValueError(f"key_mask: expected [{B} or 1, {S}] bool, got {list(key_mask.shape)} {key_mask.dtype}")
    q_pos = _check_coordinates("q_pos", q_pos, B, T)
    k_pos = _check_coordinates("k_pos", k_pos, B, S)
    if layout.by_content:
        layout = layout.map_leaves(
            lambda leaf: leaf.select(q, k, q_pos, k_pos, key_mask) if isinstance(leaf, TopKBlocks) else leaf
        )
    terms = positions.lower(position, q, k, v, q_pos, k_pos)
    return Problem(
        q=terms.q or (q,),
        k=terms.k or (k,),
        v=terms.v or (v,),
        layout=layout,
        phases=terms.phases,
        phase_map=terms.phase_map,
        q_pos=q_pos,
        k_pos=k_pos,
        offset_q_pos=terms.offset_q_pos,
        offset_k_pos=terms.offset_k_pos,
        turn_table=terms.turn_table,
        turn_at=terms.turn_at,
        key_mask=key_mask,
        bias=_on_device("bias", terms.bias, q),
        bias_min=terms.bias_min,
        slope=_on_device("slope", terms.slope, q),
        rel_key=_on_device("rel_key", terms.rel_key, q),
        rel_key_min=terms.rel_key_min,
        rel_query=_on_device("rel_query", terms.rel_query, q),
        rel_query_min=terms.rel_query_min,
        qr=terms.qr,
        kr=terms.kr,
        sink=sink,
        scale=scale,
        softcap=softcap,
        dropout=dropout,
        seed=torch.randint(2**63 - 1, (1,), device=q.device) if dropout else None,
    )


def _on_device(name: str, table: Tensor | None, q: Tensor) -> Tensor | None:
    if table is not None and table.device != q.device:
        raise ValueError(f"position: its {name} is on {table.device}, expected {q.device}, as q")
    return table


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch's own attention does inside `torch.autocast`: float32 goes to the region's dtype."""
    kind = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    narrow = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(narrow) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
        if tensor.is_nested or tensor.layout is not torch.strided:
            got = "nested" if tensor.is_nested else tensor.layout
            raise ValueError(f"{name}: expected a dense tensor (torch.strided), got one that is {got}")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [batch, heads, length, dim], got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: expected dtype {q.dtype}, as q, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected device {q.device}, as q, got {tensor.device}")
    B, H, T, D = q.shape
    for name, tensor in (("k", k), ("v", v)):
        b, _, _, d = tensor.shape
        if b != B or d != D:
            raise ValueError(f"{name}: expected [{B}, G, S, {D}] to match q {list(q.shape)}, got {list(tensor.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k, {list(k.shape)}, got {list(v.shape)}")
    G, S = k.shape[1], k.shape[2]
    for name, size in (("batch", B), ("query heads", H), ("T", T), ("head dim", D)):
        if size < 1:
            raise ValueError(f"q: expected at least one of {name}, got {list(q.shape)}")
    if G < 1 or S < 1:
        raise ValueError(f"k: expected at least one head and one key, got {list(k.shape)}")
    if H % G:
        raise ValueError(f"k: its {G} heads must divide the {H} heads of q")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        # expanded batches and heads are read as they are; a repeated row or feature is a broadcast gone wrong
        for dim, what in ((2, "length"), (3, "head dim")):
            if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
                raise ValueError(
                    f"{name}: its {what} dimension has stride 0 (one value expanded to {tensor.shape[dim]}); "
                    "call .contiguous() if the repetition is meant"
                )


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _check_number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name}: expected a number, got a tensor that requires a gradient, which it would not get")
    try:
        number = None if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"{name}: expected a number, got {value!r}")
    # compared rather than asked, since a tracer may hold a symbol here
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def check_dropout(value: float) -> float:
    value = _check_number("dropout", value)
    # kernels take it as a float32, of which this is the last below 1
    if not 0 <= value <= 1 - 2**-24:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {value}")
    return value


def _check_coordinates(name: str, position: Tensor | None, B: int, n: int) -> Tensor | None:
    if position is None:
        return None
    if position.is_floating_point() or position.dtype == torch.bool or position.shape not in ((n,), (1, n), (B, n)):
        got = f"{list(position.shape)} {position.dtype}"
        raise ValueError(f"{name}: expected [{n}] or [{B} or 1, {n}] integers, got {got}")
    return position[None] if position.dim() == 1 else position
