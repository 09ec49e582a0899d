"""The forward pass in Triton.

    score = softcap(scale q_i . k_j + bias[clamp(o)] + slope |o|),   out_i = sum_j p_ij v_j

Grid: (rows of the block table that hold queries, H, B). A program owns the 64 queries of one row and walks the key
blocks that the row names: for each phase its full runs, then its bit tiles. float32 accumulation; the softmax is in
units of log2.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import KernelInputs

# rows and columns of a block of the table
_BLOCK = 64
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_rows(base, strides, b, head, row, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a [B, heads, n_rows, D] tensor, [len(row), BLOCK_D]; those outside it are zeros."""
    feature = tl.arange(0, BLOCK_D)
    start = base + b.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    inside = (row >= 0) & (row < n_rows)
    wanted = inside[:, None] & (feature < D)[None, :]
    return tl.load(start + row.to(tl.int64)[:, None] * strides[2] + feature[None, :], mask=wanted, other=0.0)


@triton.jit
def _of_phase(tensors, phase, PHASES: tl.constexpr):
    """One of a tuple of pointers, chosen while the kernel runs, so that its code is not repeated for each phase."""
    chosen = tensors[0]
    for other in tl.static_range(1, PHASES):
        chosen = tl.where(phase == other, tensors[other], chosen)
    return chosen


@triton.jit
def _coordinates(positions, phase_stride, batch_stride, phase, b, index, n, default):
    """Coordinates of the offset, those given or the default; int64, so that no difference overflows."""
    if positions is not None:
        start = positions + phase * phase_stride + b * batch_stride
        default = tl.load(start + index, mask=(index >= 0) & (index < n), other=0)
    return default.to(tl.int64)


@triton.jit
def _visible(k_block, tile, mask_tiles, key_bits, b, S, BLOCK: tl.constexpr, TILED: tl.constexpr):
    """Who sees whom in one block, [BLOCK, BLOCK] or [1, BLOCK] bool."""
    column = tl.arange(0, BLOCK)
    k_idx = k_block * BLOCK + column
    seen = k_idx < S
    if key_bits is not None:
        word = tl.load(key_bits + b * tl.cdiv(S, 32) + k_idx // 32, mask=seen, other=0)
        seen &= ((word >> (k_idx % 32)) & 1) != 0
    seen = seen[None, :]
    if TILED:
        row = tile.to(tl.int64) * BLOCK + column
        word = tl.load(mask_tiles + row[:, None] * (BLOCK // 32) + (column // 32)[None, :])
        seen &= ((word >> (column % 32)[None, :]) & 1) != 0
    return seen


@triton.jit
def _attend(
    acc,
    row_max,
    row_sum,
    q,
    q_pos,
    k_block,
    tile,
    phase,
    b,
    h,
    k,
    k_strides,
    v,
    v_strides,
    mask_tiles,
    key_bits,
    k_pos,
    k_pos_phase_stride,
    k_pos_batch_stride,
    bias,
    bias_phase_stride,
    bias_head_stride,
    bias_min,
    bias_length,
    slope,
    S,
    scale,
    softcap,
    group,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILED: tl.constexpr,
):
    """One block of keys: scores, softmax, and p v added to the sums."""
    k_idx = k_block * BLOCK + tl.arange(0, BLOCK)
    k_tile = _load_rows(k, k_strides, b, h // group, k_idx, S, D, BLOCK_D)
    # [BLOCK, BLOCK]
    score = tl.dot(q, tl.trans(k_tile)) * scale
    if bias is not None or slope is not None:
        there = _coordinates(k_pos, k_pos_phase_stride, k_pos_batch_stride, phase, b, k_idx, S, k_idx)
        offset = there[None, :] - q_pos[:, None]
        if bias is not None:
            index = tl.minimum(tl.maximum(offset - bias_min, 0), bias_length - 1)
            score += tl.load(bias + phase * bias_phase_stride + h * bias_head_stride + index)
        if slope is not None:
            score += tl.load(slope + h) * tl.abs(offset).to(tl.float32)
    if softcap > 0:
        # tanh, saturating where the power of two overflows
        score = softcap * (1 - 2 / (1 + tl.exp2(score * (2 * _LOG2E / softcap))))
    seen = _visible(k_block, tile, mask_tiles, key_bits, b, S, BLOCK, TILED)
    score = tl.where(seen, score * _LOG2E, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(score, 1))
    # nothing seen so far: any finite reference gives weights of zero
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp2(score - reference[:, None])
    keep = tl.exp2(row_max - reference)
    v_tile = _load_rows(v, v_strides, b, h // group, k_idx, S, D, BLOCK_D)
    acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * keep[:, None])
    return acc, new_max, row_sum * keep + tl.sum(weight, 1)


# what differs from call to call gets no kernel of its own for ones and multiples of 16
@triton.jit(
    do_not_specialize=[
        "seg_ptr_batch_stride", "seg_ptr_head_stride", "seg_ptr_row_stride", "row_start", "q_pos_phase_stride",
        "q_pos_batch_stride", "k_pos_phase_stride", "k_pos_batch_stride", "bias_phase_stride", "bias_head_stride",
        "bias_min", "bias_length", "T", "S", "group", "table_group",
    ]
)  # fmt: skip
def _forward(
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    out,
    out_strides,
    lse,
    seg_ptr,
    seg_ptr_batch_stride,
    seg_ptr_head_stride,
    seg_ptr_row_stride,
    entries,
    mask_tiles,
    row_start,
    key_bits,
    q_pos,
    q_pos_phase_stride,
    q_pos_batch_stride,
    k_pos,
    k_pos_phase_stride,
    k_pos_batch_stride,
    bias,
    bias_phase_stride,
    bias_head_stride,
    bias_min,
    bias_length,
    slope,
    sink,
    T,
    S,
    scale,
    softcap,
    group,
    table_group,
    PHASES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    h, b = tl.program_id(1), tl.program_id(2)
    q_row = row_start // BLOCK + tl.program_id(0)
    # the first block may begin before the first query
    q_idx = q_row * BLOCK - row_start + tl.arange(0, BLOCK)
    segments = seg_ptr + b * seg_ptr_batch_stride + h // table_group * seg_ptr_head_stride
    segments += q_row * seg_ptr_row_stride
    n_k_blocks = tl.cdiv(S, BLOCK)

    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    for phase in range(PHASES):
        k_phase, v_phase = _of_phase(k, phase, PHASES), _of_phase(v, phase, PHASES)
        # [BLOCK, BLOCK_D]
        q_tile = _load_rows(_of_phase(q, phase, PHASES), q_strides, b, h, q_idx, T, D, BLOCK_D)
        here = _coordinates(q_pos, q_pos_phase_stride, q_pos_batch_stride, phase, b, q_idx, T, row_start + q_idx)
        runs, tiled = tl.load(segments + 2 * phase), tl.load(segments + 2 * phase + 1)
        end = tl.load(segments + 2 * phase + 2)
        for entry in range(runs, tiled):
            first, count = tl.load(entries + 2 * entry), tl.load(entries + 2 * entry + 1)
            # a table of larger capacity names blocks at or beyond S
            for k_block in range(first, tl.minimum(first + count, n_k_blocks)):
                acc, row_max, row_sum = _attend(
                    acc, row_max, row_sum, q_tile, here, k_block, 0, phase, b, h,
                    k_phase, k_strides, v_phase, v_strides, mask_tiles, key_bits, k_pos, k_pos_phase_stride,
                    k_pos_batch_stride, bias, bias_phase_stride, bias_head_stride, bias_min, bias_length, slope, S,
                    scale, softcap, group, D, BLOCK_D, BLOCK, False,
                )  # fmt: skip
        for entry in range(tiled, end):
            k_block, tile = tl.load(entries + 2 * entry), tl.load(entries + 2 * entry + 1)
            if k_block < n_k_blocks:
                acc, row_max, row_sum = _attend(
                    acc, row_max, row_sum, q_tile, here, k_block, tile, phase, b, h,
                    k_phase, k_strides, v_phase, v_strides, mask_tiles, key_bits, k_pos, k_pos_phase_stride,
                    k_pos_batch_stride, bias, bias_phase_stride, bias_head_stride, bias_min, bias_length, slope, S,
                    scale, softcap, group, D, BLOCK_D, BLOCK, True,
                )  # fmt: skip

    sink_score = tl.load(sink + h) * _LOG2E
    new_max = tl.maximum(row_max, sink_score)
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    keep = tl.exp2(row_max - reference)
    row_sum = row_sum * keep + tl.exp2(sink_score - reference)
    acc *= keep[:, None]
    row_max = new_max
    # a row that sees nothing is zero
    empty = row_sum == 0
    row_sum = tl.where(empty, 1.0, row_sum)
    result = acc / row_sum[:, None]
    row_lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * _LN2)

    inside = (q_idx >= 0) & (q_idx < T)
    feature = tl.arange(0, BLOCK_D)
    start = out + b.to(tl.int64) * out_strides[0] + h.to(tl.int64) * out_strides[1]
    to = start + q_idx.to(tl.int64)[:, None] * out_strides[2] + feature[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=inside[:, None] & (feature < D)[None, :])
    first = (b.to(tl.int64) * tl.num_programs(1) + h) * T
    tl.store(lse + first + q_idx, row_lse, mask=inside)


def arguments(inputs: KernelInputs, out: Tensor, lse: Tensor) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid of a launch and the arguments of the kernel by name, options of the compiler among them."""
    B, H, T, D = out.shape
    G, S = inputs.k[0].shape[1:3]
    grid = (-(-(inputs.row_start + T) // _BLOCK) - inputs.row_start // _BLOCK, H, B)
    values: dict[str, Any] = {
        "out": out,
        "out_strides": out.stride()[:3],
        "lse": lse,
        "seg_ptr": inputs.seg_ptr,
        "entries": inputs.entries,
        "mask_tiles": inputs.mask_tiles,
        "row_start": inputs.row_start,
        "key_bits": inputs.key_bits,
        "q_pos": inputs.q_pos,
        "k_pos": inputs.k_pos,
        "bias": inputs.bias,
        "bias_min": inputs.bias_min,
        "bias_length": 0 if inputs.bias is None else inputs.bias.shape[2],
        "slope": inputs.slope,
        "sink": _no_sink(H, out.device) if inputs.sink is None else inputs.sink,
        "T": T,
        "S": S,
        "scale": inputs.scale,
        "softcap": inputs.softcap,
        "group": H // G,
        "table_group": H // inputs.seg_ptr.shape[1],
        "PHASES": len(inputs.phase_map) // 3,
        "D": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "BLOCK": _BLOCK,
        # what fits into the shared memory of every architecture, 99 KiB a block on some
        "num_warps": 4 if D <= 64 else 8,
        "num_stages": 2,
    }
    for i, name in enumerate(("q", "k", "v")):
        tensors = _alike(getattr(inputs, name))
        # one for each phase, the same tensor where phases share it
        values[name] = tuple(tensors[at] for at in inputs.phase_map[i::3])
        values[f"{name}_strides"] = tensors[0].stride()[:3]
    for name, tensor, dimensions in (
        ("seg_ptr", inputs.seg_ptr, ("batch", "head", "row")),
        ("q_pos", inputs.q_pos, ("phase", "batch")),
        ("k_pos", inputs.k_pos, ("phase", "batch")),
        ("bias", inputs.bias, ("phase", "head")),
    ):
        for at, dimension in enumerate(dimensions):
            # what is shared over a dimension has size 1 in it
            shared = tensor is None or tensor.shape[at] == 1
            values[f"{name}_{dimension}_stride"] = 0 if shared else tensor.stride(at)
    return grid, values


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of equal strides: the same, or all contiguous."""
    same = all(t.stride() == tensors[0].stride() for t in tensors)
    return tensors if same else [t.contiguous() for t in tensors]


@functools.lru_cache(maxsize=64)
def _no_sink(H: int, device: torch.device) -> Tensor:
    """[H] sinks of no weight."""
    return torch.full((H,), -math.inf, device=device)


def launch(inputs: KernelInputs, out: Tensor, lse: Tensor) -> None:
    """Fills out [B, H, T, D] and lse [B, H, T] float32."""
    grid, values = arguments(inputs, out, lse)
    _forward[grid](**values)
