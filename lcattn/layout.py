"""Layouts: who sees whom, as small frozen objects that know no sequence length.

A layout is defined by `visible(q_pos, k_pos, ctx)`, a broadcasting predicate on integer coordinates; `&` and `|`
join layouts. `bounds` answers the same question for whole rectangles of coordinates, so that `lowering.py` can
class blocks without looking at their elements, and `tile_key` names rectangles that must have equal bit patterns.
Patterns are two-sided: causality is `& Causal()`.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .lowering import BlockTable, Region

Bounds = tuple[Tensor, Tensor]

# tile keys of rectangles that are full or empty, outside the range of any coordinate
_ALL, _NONE = 1 << 40, -(1 << 40)


@dataclass(frozen=True)
class Context:
    """What a layout may ask beside coordinates: batch, head, lengths and the plain indices, all broadcastable."""

    b: Tensor | int
    h: Tensor | int
    T: int
    S: int
    q_idx: Tensor
    k_idx: Tensor


class Layout:
    """Base of all layouts.

    Attributes:
        spec: a string that `from_spec` turns back into this layout, given `tensors`.
        tensors: tensors the layout reads (`Documents`, `Blocks`); they travel beside the spec.
        per_batch, per_head: whether the pattern differs between batch rows or heads.
        by_index: whether the pattern reads plain indices or lengths, not only coordinates.
    """

    spec: str
    tensors: tuple[Tensor, ...] = ()
    per_batch: bool = False
    per_head: bool = False
    by_index: bool = False

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        """Whether query coordinates see key coordinates: bool, of the broadcast shape of all arguments."""
        raise NotImplementedError

    def bounds(self, region: Region) -> Bounds:
        """For each rectangle: (some pair may be visible, every pair is visible). Either may err to (True, False)."""
        raise NotImplementedError

    def tile_key(self, region: Region) -> list[Tensor]:
        """Integers that agree only where the rectangles' bit patterns agree (coordinates stepping by one)."""
        some, every = self.bounds(region)
        return [torch.where(every, _ALL, torch.where(some, key, _NONE)) for key in self._mixed_key(region)]

    def _mixed_key(self, region: Region) -> list[Tensor]:
        """`tile_key` of rectangles that are neither empty nor full; by default no two agree."""
        return [region.identity]

    def check(self, B: int, H: int, T: int, S: int) -> None:
        """Raises ValueError if the layout cannot serve these sizes."""

    def block_table(
        self, T: int, S: int, block_q: int = 64, block_k: int = 64, device: torch.device | str = "cpu"
    ) -> BlockTable:
        """The lowered table for T queries that stand at the end of S keys; cost O(entries) in time and memory."""
        from .lowering import lower

        return lower(self, T=T, S=S, block_q=block_q, block_k=block_k).to(device)

    def __and__(self, other: Layout) -> Layout:
        return _join(And, self, other)

    def __or__(self, other: Layout) -> Layout:
        return _join(Or, self, other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.spec == other.spec and (
            [id(t) for t in self.tensors] == [id(t) for t in other.tensors]
        )

    def __hash__(self) -> int:
        return hash(self.spec)

    def __repr__(self) -> str:
        return self.spec

    def __str__(self) -> str:
        return self.spec


_KINDS: dict[str, Callable[..., Layout]] = {}


def _layout(cls: Any) -> Any:
    """Frozen dataclass whose spec is its constructor call, registered for `from_spec`."""
    cls = dataclass(frozen=True, repr=False, eq=False)(cls)
    _KINDS[cls.__name__] = cls
    return cls


def _set(layout: Layout, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(layout, name, value)


def _check_int(owner: str, name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{owner}: {name} must be an integer >= {low}, got {value!r}")


def _interval(low: Tensor, high: Tensor, first: int | None, last: int | None) -> Bounds:
    """Bounds of first <= x <= last for x ranging over [low, high]."""
    some = torch.ones_like(low, dtype=torch.bool)
    every = some
    if last is not None:
        some, every = some & (low <= last), every & (high <= last)
    if first is not None:
        some, every = some & (high >= first), every & (low >= first)
    return some, every


@_layout
class Full(Layout):
    """Everything sees everything."""

    def __post_init__(self) -> None:
        _set(self, spec="Full()")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return torch.ones(torch.broadcast_shapes(q_pos.shape, k_pos.shape), dtype=torch.bool, device=q_pos.device)

    def bounds(self, region: Region) -> Bounds:
        every = torch.ones_like(region.q_lo, dtype=torch.bool)
        return every, every

    def _mixed_key(self, region: Region) -> list[Tensor]:
        return []


@_layout
class Window(Layout):
    """A query sees keys with -left <= k_pos - q_pos <= right; None leaves a side open."""

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for name, value in (("left", self.left), ("right", self.right)):
            if value is not None:
                _check_int("Window", name, value, 0)
        _set(self, spec=f"Window({self.left}, {self.right})")

    @property
    def _first(self) -> int | None:
        return None if self.left is None else -self.left

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        offset = k_pos - q_pos
        inside = torch.ones_like(offset, dtype=torch.bool)
        if self.left is not None:
            inside = inside & (offset >= -self.left)
        if self.right is not None:
            inside = inside & (offset <= self.right)
        return inside

    def bounds(self, region: Region) -> Bounds:
        return _interval(region.k_lo - region.q_hi, region.k_hi - region.q_lo, self._first, self.right)

    def _mixed_key(self, region: Region) -> list[Tensor]:
        return [region.k_lo - region.q_lo]


@_layout
class Causal(Layout):
    """A query sees keys at or before its own coordinate."""

    def __post_init__(self) -> None:
        _set(self, spec="Causal()")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return k_pos <= q_pos

    def bounds(self, region: Region) -> Bounds:
        return _interval(region.k_lo - region.q_hi, region.k_hi - region.q_lo, None, 0)

    def _mixed_key(self, region: Region) -> list[Tensor]:
        return [region.k_lo - region.q_lo]


@_layout
class Chunked(Layout):
    """Whole chunks across the boundary: a query in chunk c sees chunks c - lookback to c + lookahead.

    The chunk of coordinate x is (x + shift) // chunk.
    """

    chunk: int
    lookback: int = 1
    lookahead: int = 0
    shift: int = 0

    def __post_init__(self) -> None:
        _check_int("Chunked", "chunk", self.chunk, 1)
        _check_int("Chunked", "lookback", self.lookback, 0)
        _check_int("Chunked", "lookahead", self.lookahead, 0)
        if isinstance(self.shift, bool) or not isinstance(self.shift, int):
            raise ValueError(f"Chunked: shift must be an integer, got {self.shift!r}")
        _set(self, spec=f"Chunked({self.chunk}, {self.lookback}, {self.lookahead}, {self.shift})")

    def _chunk_of(self, position: Tensor) -> Tensor:
        return torch.div(position + self.shift, self.chunk, rounding_mode="floor")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        offset = self._chunk_of(k_pos) - self._chunk_of(q_pos)
        return (offset >= -self.lookback) & (offset <= self.lookahead)

    def bounds(self, region: Region) -> Bounds:
        low = self._chunk_of(region.k_lo) - self._chunk_of(region.q_hi)
        high = self._chunk_of(region.k_hi) - self._chunk_of(region.q_lo)
        return _interval(low, high, -self.lookback, self.lookahead)

    def _mixed_key(self, region: Region) -> list[Tensor]:
        q_chunk, k_chunk = self._chunk_of(region.q_lo), self._chunk_of(region.k_lo)
        inside = (region.q_lo + self.shift - q_chunk * self.chunk, region.k_lo + self.shift - k_chunk * self.chunk)
        return [k_chunk - q_chunk, *inside]


@_layout
class Global(Layout):
    """Global tokens see all, and all see them.

    `Global(n)`: the first n coordinates; `Global(indices=(...))`: those coordinates; `Global(every=n)`: coordinates
    divisible by n.
    """

    first: int | None = None
    indices: tuple[int, ...] | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("first", "indices", "every") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"Global: give exactly one of first, indices, every; got {given or 'none'}")
        if self.first is not None:
            _check_int("Global", "first", self.first, 1)
        if self.every is not None:
            _check_int("Global", "every", self.every, 1)
        if self.indices is not None:
            if not isinstance(self.indices, Sequence) or not all(isinstance(i, int) for i in self.indices):
                raise ValueError(f"Global: indices must be a sequence of integers, got {self.indices!r}")
            _set(self, indices=tuple(sorted(set(self.indices))))
        _set(self, spec=f"Global({given[0]}={getattr(self, given[0])})")

    def _below(self, position: Tensor) -> Tensor:
        """How many global coordinates lie below `position` (from any fixed start)."""
        if self.first is not None:
            return position.clamp(0, self.first)
        if self.every is not None:
            return torch.div(position + self.every - 1, self.every, rounding_mode="floor")
        return torch.searchsorted(torch.tensor(self.indices, device=position.device), position.contiguous())

    def _is_global(self, position: Tensor) -> Tensor:
        return self._below(position + 1) > self._below(position)

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return self._is_global(q_pos) | self._is_global(k_pos)

    def bounds(self, region: Region) -> Bounds:
        n_q = self._below(region.q_hi + 1) - self._below(region.q_lo)
        n_k = self._below(region.k_hi + 1) - self._below(region.k_lo)
        all_q, all_k = n_q > region.q_hi - region.q_lo, n_k > region.k_hi - region.k_lo
        return (n_q > 0) | (n_k > 0), all_q | all_k

    def _mixed_key(self, region: Region) -> list[Tensor]:
        return [self._side_key(region.q_lo, region.block_q), self._side_key(region.k_lo, region.block_k)]

    def _side_key(self, low: Tensor, size: int) -> Tensor:
        if self.first is not None:
            return (self.first - low).clamp(0, size)
        where = low if self.every is None else torch.remainder(low, self.every)
        return torch.where(self._below(low + size) > self._below(low), where, _NONE)


@_layout
class Dilated(Layout):
    """A query sees keys at offsets -left * step, ..., -step, 0, step, ..., right * step (Longformer's dilation)."""

    left: int
    right: int
    step: int

    def __post_init__(self) -> None:
        _check_int("Dilated", "left", self.left, 0)
        _check_int("Dilated", "right", self.right, 0)
        _check_int("Dilated", "step", self.step, 1)
        _set(self, spec=f"Dilated({self.left}, {self.right}, {self.step})")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        offset = k_pos - q_pos
        inside = (offset >= -self.left * self.step) & (offset <= self.right * self.step)
        return inside & (torch.remainder(offset, self.step) == 0)

    def bounds(self, region: Region) -> Bounds:
        low, high = region.k_lo - region.q_hi, region.k_hi - region.q_lo
        some, every = _interval(low, high, -self.left * self.step, self.right * self.step)
        return some, every & (self.step == 1)

    def _mixed_key(self, region: Region) -> list[Tensor]:
        return [region.k_lo - region.q_lo]


@_layout
class Random(Layout):
    """Random blocks on a grid of `block` coordinates, the same for every length, batch row and head.

    Grid row r picks `blocks_per_row` grid columns at or before r (repeats possible); a pair of grid blocks is visible
    if either picked the other. So `Random(...) & Causal()` reads blocks_per_row earlier blocks whatever the length, and
    decoding agrees with prefill. Negative coordinates see nothing.
    """

    block: int
    blocks_per_row: int
    seed: int = 0

    def __post_init__(self) -> None:
        _check_int("Random", "block", self.block, 1)
        _check_int("Random", "blocks_per_row", self.blocks_per_row, 1)
        _check_int("Random", "seed", self.seed, 0)
        _set(self, spec=f"Random({self.block}, {self.blocks_per_row}, {self.seed})")

    def _picks(self, row: Tensor) -> Tensor:
        """Columns picked by each grid row, [..., blocks_per_row], by a 64-bit mixing hash (splitmix64's finaliser)."""
        pick = torch.arange(self.blocks_per_row, device=row.device)
        x = row[..., None] * 0x9E3779B97F4A7C1 + pick * 0x2545F4914F6CDD1D + self.seed * 0x632BE59BD9B4E019 % 2**62
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
            x = (x ^ (x >> shift)) * factor
        x = (x ^ (x >> 31)) & 0x7FFFFFFF
        return torch.remainder(x, row[..., None].clamp(min=0) + 1)

    def _picked(self, row: Tensor, column: Tensor) -> Tensor:
        return (self._picks(row) == column[..., None]).any(-1)

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        row = torch.div(q_pos, self.block, rounding_mode="floor")
        column = torch.div(k_pos, self.block, rounding_mode="floor")
        row, column = torch.broadcast_tensors(row, column)
        late, early = torch.maximum(row, column), torch.minimum(row, column)
        return self._picked(late, early) & (early >= 0)

    def _occupied(self, n_rows: int, level: int) -> Tensor:
        """Sorted ids row * 2^31 + column of the visible grid nodes after `level` halvings."""
        row = torch.arange(n_rows)
        column = self._picks(row) >> level
        row = (row >> level)[:, None].expand_as(column)
        return torch.unique(torch.cat([(row << 31) + column, (column << 31) + row]))

    def bounds(self, region: Region) -> Bounds:
        row_lo, row_hi = (torch.div(x, self.block, rounding_mode="floor") for x in (region.q_lo, region.q_hi))
        col_lo, col_hi = (torch.div(x, self.block, rounding_mode="floor") for x in (region.k_lo, region.k_hi))
        span = int(torch.maximum(row_hi - row_lo, col_hi - col_lo).max()) if row_lo.numel() else 0
        level = span.bit_length()
        # at this level a rectangle touches at most two nodes a side
        n_rows = region.max_coordinate // self.block + 1
        occupied = region.memo(("Random", self.spec, level), lambda: self._occupied(n_rows, level))
        some = torch.zeros_like(row_lo, dtype=torch.bool)
        for row in (row_lo, row_hi):
            for column in (col_lo, col_hi):
                node = ((row.clamp(min=0) >> level) << 31) + (column.clamp(min=0) >> level)
                at = torch.searchsorted(occupied, node).clamp(max=occupied.numel() - 1)
                some = some | (occupied[at] == node)
        single = (row_lo == row_hi) & (col_lo == col_hi) & (row_lo >= 0) & (col_lo >= 0)
        return some, some & single & (level == 0)


@_layout
class Documents(Layout):
    """Tokens see only tokens of their own document.

    Args:
        ids: [B or 1, S] int, the document of every key; a negative id marks padding, which sees and is seen by nothing.
        cu_seqlens: [n + 1] int, document edges 0 = c_0 < ... < c_n = S, instead of ids, the same for every batch row.
        q_ids: [B or 1, T] int, the documents of the queries; by default those of the last T keys.
    """

    ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    q_ids: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.cu_seqlens is None):
            raise ValueError("Documents: give either ids or cu_seqlens, not both and not neither")
        if self.cu_seqlens is not None:
            edges = torch.as_tensor(self.cu_seqlens)
            if edges.dim() != 1 or edges.numel() < 2 or edges.is_floating_point():
                raise ValueError(f"Documents: cu_seqlens must be [n + 1] integers, got {tuple(edges.shape)} {edges.dtype}")
            if torch.compiler.is_compiling():
                # the number of ids is data, which a tracer cannot read: they are expanded where the operator runs
                given = (edges,) if self.q_ids is None else (edges, self.q_ids)
                _set(self, cu_seqlens=edges, tensors=given, by_index=True, per_batch=len(given) > 1)
                _set(self, spec="Documents(cu_seqlens=@)" if len(given) < 2 else "Documents(cu_seqlens=@, q_ids=@)")
                return
            ids = torch.repeat_interleave(torch.arange(len(edges) - 1, device=edges.device), edges.diff())[None]
        else:
            ids = torch.as_tensor(self.ids)
            ids = ids[None] if ids.dim() == 1 else ids
        for name, value in (("ids", ids), ("q_ids", self.q_ids)):
            if value is not None and (value.dim() != 2 or value.is_floating_point()):
                raise ValueError(f"Documents: {name} must be [B, length] integers, got {tuple(value.shape)} {value.dtype}")
        tensors = (ids,) if self.q_ids is None else (ids, self.q_ids)
        _set(self, ids=ids, cu_seqlens=None, tensors=tensors, by_index=True)
        _set(self, per_batch=any(t.shape[0] > 1 for t in tensors))
        _set(self, spec="Documents(ids=@)" if self.q_ids is None else "Documents(ids=@, q_ids=@)")

    def check(self, B: int, H: int, T: int, S: int) -> None:
        for name, value, length in (("ids", self.ids, S), ("q_ids", self.q_ids, T)):
            if value is not None and (value.shape[1] != length or value.shape[0] not in (1, B)):
                raise ValueError(f"Documents: {name} must be [{B} or 1, {length}], got {tuple(value.shape)}")
        if self.q_ids is None and T > S:
            raise ValueError(f"Documents: {T} queries stand at the end of {S} keys; give q_ids where T > S")

    def _query_ids(self, ctx_T: int) -> Tensor:
        assert self.ids is not None
        return self.q_ids if self.q_ids is not None else self.ids[:, self.ids.shape[1] - ctx_T :]

    def _look_up(self, table: Tensor, b: Tensor | int, idx: Tensor) -> Tensor:
        row = torch.as_tensor(b, device=table.device) if table.shape[0] > 1 else torch.zeros((), dtype=torch.long)
        return table[row.to(table.device), idx.to(table.device).clamp(0, table.shape[1] - 1)]

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        assert self.ids is not None
        q_doc = self._look_up(self._query_ids(ctx.T), ctx.b, ctx.q_idx)
        k_doc = self._look_up(self.ids, ctx.b, ctx.k_idx)
        return ((q_doc == k_doc) & (k_doc >= 0)).to(q_pos.device)

    def bounds(self, region: Region) -> Bounds:
        assert self.ids is not None
        q_lo, q_hi = region.query_extent(("Documents.q", id(self)), lambda b: self._row(self._query_ids(region.T), b))
        k_lo, k_hi = region.key_extent(("Documents.k", id(self)), lambda b: self._row(self.ids, b))
        some = (q_lo <= k_hi) & (k_lo <= q_hi) & (q_hi >= 0) & (k_hi >= 0)
        return some, (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo) & (q_lo >= 0)

    @staticmethod
    def _row(table: Tensor | None, b: int) -> Tensor:
        assert table is not None
        return table[b if table.shape[0] > 1 else 0].cpu().long()


@_layout
class Blocks(Layout):
    """An explicit block mask, by plain indices from 0: query i sees key j iff mask[b, h, i // block, j // block].

    Args:
        mask: [B or 1, H or 1, ceil(T / block), ceil(S / block)] bool; with block = 1 an ordinary attention mask.
    """

    mask: Tensor
    block: int = 64

    def __post_init__(self) -> None:
        _check_int("Blocks", "block", self.block, 1)
        if not isinstance(self.mask, Tensor) or self.mask.dim() != 4 or self.mask.dtype != torch.bool:
            what = f"{tuple(self.mask.shape)} {self.mask.dtype}" if isinstance(self.mask, Tensor) else repr(self.mask)
            raise ValueError(f"Blocks: mask must be a [B, H, T / block, S / block] bool tensor, got {what}")
        _set(self, spec=f"Blocks(@, {self.block})", tensors=(self.mask,), by_index=True)
        _set(self, per_batch=self.mask.shape[0] > 1, per_head=self.mask.shape[1] > 1)

    def check(self, B: int, H: int, T: int, S: int) -> None:
        rows, columns = -(-T // self.block), -(-S // self.block)
        b, h, *grid = self.mask.shape
        if b not in (1, B) or h not in (1, H) or grid != [rows, columns]:
            raise ValueError(
                f"Blocks: mask must be [{B} or 1, {H} or 1, {rows}, {columns}] for blocks of {self.block},"
                f" got {list(self.mask.shape)}"
            )

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        b = ctx.b if self.per_batch else 0
        h = ctx.h if self.per_head else 0
        row = torch.div(ctx.q_idx, self.block, rounding_mode="floor").clamp(0, self.mask.shape[2] - 1)
        column = torch.div(ctx.k_idx, self.block, rounding_mode="floor").clamp(0, self.mask.shape[3] - 1)
        at = [torch.as_tensor(x, device=self.mask.device) for x in (b, h, row, column)]
        return self.mask[tuple(at)].to(q_pos.device)

    def bounds(self, region: Region) -> Bounds:
        def count_table() -> Tensor:
            grid = self.mask[region.b if self.per_batch else 0, region.h if self.per_head else 0].cpu()
            counts = torch.zeros(grid.shape[0] + 1, grid.shape[1] + 1, dtype=torch.int32)
            counts[1:, 1:] = grid.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
            return counts

        counts = region.memo(("Blocks", id(self.mask)), count_table)
        r0, r1 = region.q_first // self.block, region.q_last // self.block + 1
        c0, c1 = region.k_first // self.block, region.k_last // self.block + 1
        count = counts[r1, c1] - counts[r0, c1] - counts[r1, c0] + counts[r0, c0]
        return count > 0, count == (r1 - r0) * (c1 - c0)


_CALLABLES: list[Callable[..., Any]] = []


@_layout
class FromMaskMod(Layout):
    """FlexAttention's `mask_mod(b, h, q_idx, kv_idx) -> bool`, with its own indices, both from 0.

    Lowering it costs O(T * S) time (every tile may differ), in strips of bounded memory; joined by `&` with a
    bounded layout it costs the blocks of that layout. Create one per function and keep it: tables are cached by it.
    """

    mask_mod: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.mask_mod):
            raise ValueError(f"FromMaskMod: mask_mod must be callable as f(b, h, q_idx, kv_idx), got {self.mask_mod!r}")
        known = next((i for i, f in enumerate(_CALLABLES) if f is self.mask_mod), None)
        if known is None:
            known = len(_CALLABLES)
            _CALLABLES.append(self.mask_mod)
        per_batch, per_head = _reads_batch_and_head(self.mask_mod)
        _set(self, spec=f"FromMaskMod({known})", by_index=True, per_batch=per_batch, per_head=per_head)

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        device = q_pos.device
        q_idx, k_idx = ctx.q_idx.clamp(0, max(ctx.T - 1, 0)), ctx.k_idx.clamp(0, max(ctx.S - 1, 0))
        b, h = (torch.as_tensor(x, device=device) for x in (ctx.b, ctx.h))
        shape = torch.broadcast_shapes(b.shape, h.shape, q_idx.shape, k_idx.shape)
        seen = torch.as_tensor(self.mask_mod(b, h, q_idx, k_idx), device=device)
        if seen.dtype != torch.bool:
            raise ValueError(f"FromMaskMod: mask_mod must return bool, got {seen.dtype}")
        return seen.expand(shape)

    def bounds(self, region: Region) -> Bounds:
        some = torch.ones_like(region.q_lo, dtype=torch.bool)
        return some, ~some


def _reads_batch_and_head(mask_mod: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a mask_mod uses b and h, from its traced graph; both when it cannot be traced."""
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        # distinct tensors, or the tracer would take b and h for one
        b, h, q_idx, k_idx = (torch.zeros(shape, dtype=torch.long) for shape in ((), (), (2, 1), (1, 2)))
        graph = make_fx(mask_mod)(b, h, q_idx, k_idx).graph
    except Exception:
        return True, True
    b_node, h_node = [node for node in graph.nodes if node.op == "placeholder"][:2]
    return bool(b_node.users), bool(h_node.users)


def FromBlockMask(block_mask: Any) -> Layout:
    """The layout of a FlexAttention `BlockMask`: its full blocks, and its mask_mod in its partial blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise ValueError(f"FromBlockMask: expected a torch BlockMask, got {type(block_mask).__name__}")
    block_q, block_k = block_mask.BLOCK_SIZE
    if block_q != block_k:
        raise ValueError(f"FromBlockMask: expected square blocks, got {block_mask.BLOCK_SIZE}")

    def grid(num_blocks: Tensor, indices: Tensor) -> Tensor:
        listed = torch.arange(indices.shape[-1], device=indices.device) < num_blocks[..., None]
        counts = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
        return counts.scatter_add_(-1, indices.long(), listed.int()) > 0

    partial = Blocks(grid(block_mask.kv_num_blocks, block_mask.kv_indices), block_q)
    layout: Layout = partial & FromMaskMod(block_mask.mask_mod)
    if block_mask.full_kv_num_blocks is not None:
        layout = layout | Blocks(grid(block_mask.full_kv_num_blocks, block_mask.full_kv_indices), block_q)
    return layout


class _Joined(Layout):
    """Shared plumbing of layouts made of layouts."""

    parts: tuple[Layout, ...]
    sign: str

    def _finish(self, spec: str) -> None:
        tensors = tuple(t for part in self.parts for t in part.tensors)
        _set(self, spec=spec, tensors=tensors, by_index=any(p.by_index for p in self.parts))
        _set(self, per_batch=any(p.per_batch for p in self.parts), per_head=any(p.per_head for p in self.parts))

    def check(self, B: int, H: int, T: int, S: int) -> None:
        for part in self.parts:
            part.check(B, H, T, S)

    def tile_key(self, region: Region) -> list[Tensor]:
        return [key for part in self.parts for key in part.tile_key(region)]


def _join(kind: Any, a: Layout, b: Layout) -> Layout:
    if not isinstance(b, Layout):
        raise TypeError(f"a layout joins with a layout, got {type(b).__name__}")
    parts = [p for x in (a, b) for p in (x.parts if isinstance(x, kind) else (x,))]
    return kind(tuple(parts))


@dataclass(frozen=True, repr=False, eq=False)
class And(_Joined):
    """Visible where every part is."""

    parts: tuple[Layout, ...] = field(default=())

    def __post_init__(self) -> None:
        self._finish("(" + " & ".join(p.spec for p in self.parts) + ")")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return functools.reduce(torch.logical_and, (p.visible(q_pos, k_pos, ctx) for p in self.parts))

    def bounds(self, region: Region) -> Bounds:
        somes, everys = zip(*(p.bounds(region) for p in self.parts), strict=True)
        return functools.reduce(torch.logical_and, somes), functools.reduce(torch.logical_and, everys)


@dataclass(frozen=True, repr=False, eq=False)
class Or(_Joined):
    """Visible where any part is."""

    parts: tuple[Layout, ...] = field(default=())

    def __post_init__(self) -> None:
        self._finish("(" + " | ".join(p.spec for p in self.parts) + ")")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return functools.reduce(torch.logical_or, (p.visible(q_pos, k_pos, ctx) for p in self.parts))

    def bounds(self, region: Region) -> Bounds:
        somes, everys = zip(*(p.bounds(region) for p in self.parts), strict=True)
        return functools.reduce(torch.logical_or, somes), functools.reduce(torch.logical_or, everys)


@_layout
class Not(Layout):
    """Visible where the other layout is not: what is left for a second phase."""

    part: Layout

    def __post_init__(self) -> None:
        _set(self, spec=f"Not({self.part.spec})", tensors=self.part.tensors, by_index=self.part.by_index)
        _set(self, per_batch=self.part.per_batch, per_head=self.part.per_head)

    def check(self, B: int, H: int, T: int, S: int) -> None:
        self.part.check(B, H, T, S)

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return ~self.part.visible(q_pos, k_pos, ctx)

    def bounds(self, region: Region) -> Bounds:
        some, every = self.part.bounds(region)
        return ~every, ~some

    def tile_key(self, region: Region) -> list[Tensor]:
        return self.part.tile_key(region)


@_layout
class PerHead(_Joined):
    """Head h follows parts[h]."""

    parts: tuple[Layout, ...]

    def __post_init__(self) -> None:
        parts = tuple(self.parts)
        if not parts or not all(isinstance(p, Layout) for p in parts):
            raise ValueError(f"PerHead: expected a non-empty sequence of layouts, got {self.parts!r}")
        _set(self, parts=parts)
        self._finish("PerHead((" + ", ".join(p.spec for p in parts) + ",))")
        _set(self, per_head=len(set(p.spec for p in parts)) > 1 or any(p.per_head or p.tensors for p in parts))

    def check(self, B: int, H: int, T: int, S: int) -> None:
        if len(self.parts) != H:
            raise ValueError(f"PerHead: expected {H} layouts, one a query head, got {len(self.parts)}")
        super().check(B, H, T, S)

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        if isinstance(ctx.h, int):
            return self.parts[ctx.h].visible(q_pos, k_pos, ctx)
        seen = torch.zeros((), dtype=torch.bool, device=q_pos.device)
        for h, part in enumerate(self.parts):
            seen = torch.where(ctx.h == h, part.visible(q_pos, k_pos, ctx), seen)
        return seen

    def bounds(self, region: Region) -> Bounds:
        return self.parts[region.h].bounds(region)

    def tile_key(self, region: Region) -> list[Tensor]:
        return self.parts[region.h].tile_key(region)


_ALLOWED = (ast.Expression, ast.BinOp, ast.BitAnd, ast.BitOr, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Tuple)
_LITERAL = (ast.Constant, ast.UnaryOp, ast.USub)


def from_spec(spec: str, tensors: Sequence[Tensor] = ()) -> Layout:
    """The layout that a spec string names; each `@` in it stands for the next of `tensors`."""
    return _evaluate(spec, tuple(tensors)) if tensors else _from_plain_spec(spec)


@functools.lru_cache(maxsize=1024)
def _from_plain_spec(spec: str) -> Layout:
    return _evaluate(spec, ())


def _evaluate(spec: str, tensors: tuple[Tensor, ...]) -> Layout:
    pieces = spec.split("@")
    if len(pieces) != len(tensors) + 1:
        raise ValueError(f"layout spec {spec!r} needs {len(pieces) - 1} tensors, got {len(tensors)}")
    source = pieces[0] + "".join(f"_tensor({i})" + piece for i, piece in enumerate(pieces[1:]))
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"layout spec {spec!r} is not a layout expression") from error
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED + _LITERAL):
            raise ValueError(f"layout spec {spec!r}: {type(node).__name__} is not allowed")
    names: dict[str, Any] = {**_KINDS, "_tensor": tensors.__getitem__}
    names["FromMaskMod"] = lambda index: FromMaskMod(_callable_at(index, spec))
    unknown = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(names)
    if unknown:
        raise ValueError(f"layout spec {spec!r}: unknown {sorted(unknown)}, expected one of {sorted(_KINDS)}")
    layout = eval(compile(tree, "<layout spec>", "eval"), {"__builtins__": {}}, names)
    if not isinstance(layout, Layout):
        raise ValueError(f"layout spec {spec!r} gives {type(layout).__name__}, expected a layout")
    return layout


def _callable_at(index: int, spec: str) -> Callable[..., Any]:
    if index >= len(_CALLABLES):
        raise ValueError(f"layout spec {spec!r} names a Python function that this process does not hold")
    return _CALLABLES[index]
