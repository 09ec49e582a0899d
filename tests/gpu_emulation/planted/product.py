"""Triton kernels whose results are exact for small integers, whatever order and precision they are summed in."""

import triton
import triton.language as tl


@triton.jit
def product(
    a,
    b,
    out,
    rows,
    columns,
    depth,
    a_row,
    a_column,
    b_row,
    b_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = a b, a block of ROWS x COLUMNS a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        a_at = a + row * a_row + inner[None, :] * a_column
        b_at = b + inner[:, None] * b_row + column * b_column
        a_tile = tl.load(a_at, mask=(row < rows) & (inner[None, :] < depth), other=0.0)
        b_tile = tl.load(b_at, mask=(inner[:, None] < depth) & (column < columns), other=0.0)
        total = tl.dot(a_tile, b_tile, total, input_precision=PRECISION)
    tl.store(out + row * columns + column, total, mask=(row < rows) & (column < columns))


@triton.jit
def double_product(a, b, c, out, ROWS: tl.constexpr, INNER: tl.constexpr):
    """out = (a b + 1) c, where the first product's accumulators become the second one's operand."""
    row = tl.arange(0, ROWS)[:, None]
    inner = tl.arange(0, INNER)
    square = inner[:, None] * INNER + inner[None, :]
    first = tl.dot(tl.load(a + row * INNER + inner[None, :]), tl.load(b + square)) + 1
    second = tl.dot(first.to(c.dtype.element_ty), tl.load(c + square))
    tl.store(out + row * INNER + inner[None, :], second)


@triton.jit
def weighted_rows(parts, weights, bias, out, largest, rows, columns, row_stride, scale, COLUMNS: tl.constexpr):
    """out = scale * (the weighted sum of parts) + bias, and each row's largest element; a row a program.

    Args:
        parts: a tuple of matrices, of which any may be None.
        weights: a tuple of as many integers.
        bias: a row, or None.
    """
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros([COLUMNS], tl.float32)
    for i in tl.static_range(len(parts)):
        if parts[i] is not None:
            total += weights[i] * tl.load(parts[i] + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    total *= scale
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0)
    tl.store(out + row * columns + column, total, mask=inside)
    tl.store(largest + row, tl.max(tl.where(inside, total, float("-inf")), 0))


@triton.jit
def doubled(x, SIZE: tl.constexpr):
    """x += x in its own dtype."""
    at = x + tl.arange(0, SIZE)
    value = tl.load(at)
    tl.store(at, value + value)
