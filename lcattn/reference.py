"""The dense oracle: a `Problem` computed whole, differentiably, in the dtype of its inputs (float64 for truth)."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Context
from .problem import TERMS, Gradients, Problem


def philox_words(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al. 2011): four 32-bit words, in int64, for broadcastable 32-bit counters."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = (c.long() & low for c in counter)
    key0, key1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & low) ^ c1 ^ key0,
            product1 & low,
            ((product0 >> 32) & low) ^ c3 ^ key1,
            product0 & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def dropout_keep(B: int, H: int, T: int, S: int, dropout: float, seed: Tensor) -> Tensor:
    """Which elements stay, [B, H, T, S] bool: counter (j >> 2, i, h, b), word j & 3, keep iff word >= floor(p 2^32)."""
    device = seed.device
    groups = -(-S // 4)
    counter = (
        torch.arange(groups, device=device),
        torch.arange(T, device=device)[:, None],
        torch.arange(H, device=device)[:, None, None],
        torch.arange(B, device=device)[:, None, None, None],
    )
    words = torch.stack(torch.broadcast_tensors(*philox_words(counter, seed.reshape(()))), -1)
    # kernels are given the probability as a float32
    (probability,) = struct.unpack("f", struct.pack("f", dropout))
    return words.reshape(B, H, T, groups * 4)[..., :S] >= math.floor(probability * 2**32)


def visible(problem: Problem) -> list[Tensor]:
    """Visibility of each phase, [B, H, T, S] bool, key_mask included."""
    B, H, _, T, S, _ = problem.sizes
    device = problem.q[0].device
    q_pos, k_pos = problem.coordinates()
    ctx = Context(
        torch.arange(B, device=device)[:, None, None, None],
        torch.arange(H, device=device)[:, None, None],
        T,
        S,
        torch.arange(T, device=device)[:, None],
        torch.arange(S, device=device),
    )
    q_pos, k_pos = q_pos[:, None, :, None], k_pos[:, None, None, :]
    seen = problem.layout.visible(q_pos, k_pos, ctx).expand(B, H, T, S)
    if problem.key_mask is not None:
        seen = seen & problem.key_mask[:, None, None, :]
    return [seen & phase.visible(q_pos, k_pos, ctx) for phase in problem.phases] or [seen]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as products of ordinary size are computed: few rows or columns have BLAS kernels that round otherwise."""
    rows, columns, least = a.shape[-2], b.shape[-1], 16
    if rows < least:
        a = F.pad(a, (0, 0, 0, least - rows))
    if columns < least:
        b = F.pad(b, (0, least - columns))
    return (a @ b)[..., :rows, :columns]


def scores(problem: Problem) -> list[Tensor]:
    """Scores of each phase before masking, [B, H, T, S]."""
    problem = problem.turned()
    B, H, G, T, S, _ = problem.sizes
    q_pos, k_pos = problem.offset_coordinates()
    offset = k_pos[:, :, None, None, :] - q_pos[:, :, None, :, None]

    def at(phase: int) -> Tensor:
        return offset[phase if len(offset) > 1 else 0]

    def index(phase: int, low: int, length: int) -> Tensor:
        return (at(phase) - low).clamp(0, length - 1).expand(B, H, T, S)

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(H // G, dim=1)

    result = []
    for f, (q_at, k_at, _) in enumerate(problem.phase_map):
        content = _product(problem.q[q_at], per_query_head(problem.k[k_at]).mT)
        if problem.rel_key is not None and problem.qr is not None:
            by_offset = _product(problem.qr, problem.rel_key.to(content.dtype).mT)
            content = content + by_offset.gather(3, index(f, problem.rel_key_min, by_offset.shape[3]))
        if problem.rel_query is not None and problem.kr is not None:
            by_offset = _product(per_query_head(problem.kr), problem.rel_query.to(content.dtype).mT)
            keyed = index(f, problem.rel_query_min, by_offset.shape[3]).mT
            content = content + by_offset.gather(3, keyed).mT
        score = content * problem.scale
        if problem.bias is not None:
            bias = problem.bias[f if problem.bias.shape[0] > 1 else 0].to(score.dtype).expand(H, -1)
            which = index(f, problem.bias_min, bias.shape[1]).flatten(2)
            score = score + bias.expand(B, H, -1).gather(2, which).unflatten(2, (T, S))
        if problem.slope is not None:
            score = score + problem.slope.to(score.dtype)[:, None, None] * at(f).abs()
        if problem.softcap:
            score = problem.softcap * torch.tanh(score / problem.softcap)
        result.append(score)
    return result


def weights(problem: Problem, by_lse: bool = False) -> tuple[list[Tensor], Tensor]:
    """Softmax weights of each phase, [B, H, T, S], before dropout, and lse [B, H, T] (float32 at least).

    `by_lse` rounds them as p = 2^(score - lse) does, in units of log2 and even from an lse without error.
    """
    B, H, _, T, S, _ = problem.sizes
    seen = torch.cat(visible(problem), 3)
    score = torch.cat(scores(problem), 3)
    # rows that see nothing are computed as if they saw zeros, then erased, so that no gradient meets an infinity
    some = seen.any(3, keepdim=True)
    if problem.sink is not None:
        some = torch.ones_like(some)
    score = torch.where(some, score.masked_fill(~seen, -math.inf), 0)
    if problem.sink is not None:
        sink = problem.sink.to(score.dtype)[:, None, None].expand(B, H, T, 1)
        score = torch.cat([score, sink], 3)
    lse = torch.logsumexp(score if score.dtype == torch.float64 else score.float(), 3)
    lse = torch.where(some[..., 0], lse, -math.inf)
    if by_lse:
        exact = score.double()
        exponent = (exact - exact.logsumexp(3, keepdim=True)) * math.log2(math.e)
        p = torch.exp2(exponent.to(lse.dtype)).to(score.dtype)
    else:
        p = torch.softmax(score, 3)
    return list((p[..., : seen.shape[3]] * seen).split(S, 3)), lse


# keys a tile, on every backend
_BLOCK = 64


def attention(problem: Problem, rounding: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """out [B, H, T, D] and lse [B, H, T] of a problem; memory O(B H T S).

    `rounding` draws an order of keys, and values are summed one block of these after the other, in the dtype of the
    inputs, as tiled kernels sum them.
    """
    B, H, G, T, S, _ = problem.sizes
    phases, lse = weights(problem)
    if problem.dropout:
        assert problem.seed is not None
        keep = dropout_keep(B, H, T, S, problem.dropout, problem.seed)
        phases = [p * keep / (1 - problem.dropout) for p in phases]
    out = torch.zeros_like(problem.q[0])
    for p, (_, _, v_at) in zip(phases, problem.phase_map, strict=True):
        values = problem.v[v_at].repeat_interleave(H // G, dim=1)
        block = S
        if rounding is not None:
            block, order = _BLOCK, torch.randperm(S, generator=rounding).to(p.device)
            p, values = p[..., order], values[:, :, order]
        for weight, value in zip(p.split(block, 3), values.split(block, 2), strict=True):
            out = out + _product(weight, value)
    return out, lse


def gradients(problem: Problem, dout: Tensor, dlse: Tensor | None) -> Gradients:
    """Gradients of sum(dout * out) + sum(dlse * lse), by autograd through `attention`."""

    def total(problem: Problem) -> Tensor:
        out, lse = attention(problem)
        if dlse is None:
            return (out * dout).sum()
        # an empty row's lse is a constant, whatever gradient arrives
        return (out * dout).sum() + torch.where(lse.isfinite(), lse * dlse, 0).sum()

    return _differentiate(problem, total)


def recomputed_gradients(
    problem: Problem, dout: Tensor, dlse: Tensor | None, rounding: torch.Generator | None = None
) -> Gradients:
    """The same gradients by the formulas of fused kernels, which keep out and lse and not p.

    delta_i = sum_d dout_i out_i - dlse_i;  ds_ij = p_ij (drop'(dout_i . v_j) - delta_i);  dsink = -sum p_sink delta.

    In a narrow dtype they round where any such kernel must: out once, and both sides of the difference in ds, which
    cancel where a row sees one key. `rounding` draws which way out rounds, and how it is summed, and p is recomputed
    from lse; None takes both as they come.

    Source: Dao 2023 (FlashAttention-2), algorithm 2.
    """
    B, H, G, T, S, _ = problem.sizes
    with torch.no_grad():
        out, lse = attention(problem, rounding)
        phases, _ = weights(problem, by_lse=rounding is not None)
        if rounding is not None:
            half = torch.finfo(out.dtype).eps / 2
            either_way = 1 + half * (2 * torch.rand(out.shape, generator=rounding, dtype=torch.float64) - 1)
            delta = (out.double() * either_way * dout.double()).sum(3).to(lse.dtype)
        else:
            delta = (out * dout).sum(3)
        if dlse is not None:
            delta = (delta - dlse).to(delta.dtype)
        factor: Tensor | float = 1.0
        if problem.dropout:
            assert problem.seed is not None
            factor = dropout_keep(B, H, T, S, problem.dropout, problem.seed).to(out.dtype) / (1 - problem.dropout)

    def total(problem: Problem) -> Tensor:
        result = torch.zeros((), dtype=lse.dtype, device=out.device)
        for score, p, (_, _, v_at) in zip(scores(problem), phases, problem.phase_map, strict=True):
            values = problem.v[v_at].repeat_interleave(H // G, dim=1)
            dp = _product(dout, values.detach().mT) * factor
            ds = (p * (dp - delta[..., None])).to(p.dtype)
            result = result + (score * ds).sum() + (((p * factor) @ values) * dout).sum()
        if problem.sink is not None:
            sink = problem.sink[:, None]
            result = result - (sink * torch.exp(sink - lse).detach().to(delta.dtype) * delta).sum()
        return result

    return _differentiate(problem, total)


def _differentiate(problem: Problem, total: Callable[[Problem], Tensor]) -> Gradients:
    """Gradients of total(problem) with respect to every differentiable tensor of the problem."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_()

    lists: dict[str, Any] = {name: tuple(map(leaf, getattr(problem, name))) for name in ("q", "k", "v")}
    terms: dict[str, Any] = {n: leaf(t) for n in TERMS if (t := getattr(problem, n)) is not None}
    with torch.enable_grad():
        value = total(dataclasses.replace(problem, **lists, **terms))
    leaves = [t for name in ("q", "k", "v") for t in lists[name]] + list(terms.values())
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
    result: dict[str, Any] = {}
    at = 0
    for name in ("q", "k", "v"):
        result[name] = tuple(filled[at : at + len(lists[name])])
        at += len(lists[name])
    result |= zip(terms, filled[at:], strict=True)
    return Gradients(**result)
