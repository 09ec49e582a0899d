"""Attention in plain Triton, without layouts, positions or bias: what our GPU kernels are measured against."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend(
    accumulator,
    row_max,
    row_sum,
    query,
    key_base,
    value_base,
    key_row,
    value_row,
    query_index,
    first,
    last,
    n_keys,
    scale_log2,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the keys of [first, last), a block at a time."""
    feature = tl.arange(0, HEAD_DIM)
    for start in range(first, last, BLOCK_N):
        key_index = start + tl.arange(0, BLOCK_N)
        key_pointer = key_base + key_index[None, :] * key_row + feature[:, None]
        value_pointer = value_base + key_index[:, None] * value_row + feature[None, :]
        key = tl.load(key_pointer, mask=key_index[None, :] < n_keys, other=0.0) if MASKED else tl.load(key_pointer)
        score = tl.dot(query, key) * scale_log2
        if MASKED:
            visible = (query_index[:, None] >= key_index[None, :]) & (key_index[None, :] < n_keys)
            score = tl.where(visible, score, -1.0e6)
        new_max = tl.maximum(row_max, tl.max(score, 1))
        probability = tl.exp2(score - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(probability, 1)
        accumulator = accumulator * correction[:, None]
        value = (
            tl.load(value_pointer, mask=key_index[:, None] < n_keys, other=0.0) if MASKED else tl.load(value_pointer)
        )
        accumulator = tl.dot(probability.to(value.dtype), value, accumulator)
        row_max = new_max
    return accumulator, row_max, row_sum


@triton.jit
def causal_attention(
    query,
    key,
    value,
    out,
    lse,
    query_head,
    query_row,
    key_head,
    key_row,
    value_head,
    value_row,
    n_rows,
    scale_log2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Causal self-attention of contiguous [heads, rows, HEAD_DIM]; full blocks first, then those on the diagonal."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = tl.arange(0, HEAD_DIM)
    tile = row[:, None] * query_row + feature[None, :]
    inside = row[:, None] < n_rows
    q = tl.load(query + head * query_head + tile, mask=inside, other=0.0)
    accumulator = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    key_base, value_base = key + head * key_head, value + head * value_head
    diagonal = block * BLOCK_M
    accumulator, row_max, row_sum = _attend(
        accumulator,
        row_max,
        row_sum,
        q,
        key_base,
        value_base,
        key_row,
        value_row,
        row,
        0,
        diagonal,
        n_rows,
        scale_log2,
        BLOCK_N,
        HEAD_DIM,
        False,
    )
    accumulator, row_max, row_sum = _attend(
        accumulator,
        row_max,
        row_sum,
        q,
        key_base,
        value_base,
        key_row,
        value_row,
        row,
        diagonal,
        tl.minimum(diagonal + BLOCK_M, n_rows),
        n_rows,
        scale_log2,
        BLOCK_N,
        HEAD_DIM,
        True,
    )
    accumulator = accumulator / row_sum[:, None]
    tl.store(lse + head * n_rows + row, (row_max + tl.log2(row_sum)) * 0.6931471805599453, mask=row < n_rows)
    tl.store(out + head * query_head + tile, accumulator.to(out.dtype.element_ty), mask=inside)
