"""Layouts that are patterns of coordinates alone, and the layout that gives each head its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import NONE_KEY, Bounds, Context, Joined, Layout, check_int, interval_bounds, register, set_fields

if TYPE_CHECKING:
    from ..lowering import Region


@register
@dataclass(frozen=True, repr=False, eq=False)
class Full(Layout):
    """Everything sees everything."""

    def __post_init__(self) -> None:
        set_fields(self, spec="Full()")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return torch.ones(torch.broadcast_shapes(q_pos.shape, k_pos.shape), dtype=torch.bool, device=q_pos.device)

    def bounds(self, region: Region) -> Bounds:
        every = torch.ones_like(region.q_lo, dtype=torch.bool)
        return every, every

    def _mixed_key(self, region: Region) -> list[Tensor]:
        return []


@register
@dataclass(frozen=True, repr=False, eq=False)
class Window(Layout):
    """A query sees keys with -left <= k_pos - q_pos <= right; None leaves a side open."""

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for name, value in (("left", self.left), ("right", self.right)):
            if value is not None:
                check_int("Window", name, value, 0)
        set_fields(self, spec=f"Window({self.left}, {self.right})")

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
        return interval_bounds(region.k_lo - region.q_hi, region.k_hi - region.q_lo, self._first, self.right)

    def _mixed_key(self, region: Region) -> list[Tensor]:
        return [region.k_lo - region.q_lo]


@register
@dataclass(frozen=True, repr=False, eq=False)
class Causal(Layout):
    """A query sees keys at or before its own coordinate."""

    def __post_init__(self) -> None:
        set_fields(self, spec="Causal()")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return k_pos <= q_pos

    def bounds(self, region: Region) -> Bounds:
        return interval_bounds(region.k_lo - region.q_hi, region.k_hi - region.q_lo, None, 0)

    def _mixed_key(self, region: Region) -> list[Tensor]:
        return [region.k_lo - region.q_lo]


@register
@dataclass(frozen=True, repr=False, eq=False)
class Chunked(Layout):
    """Whole chunks across the boundary: a query in chunk c sees chunks c - lookback to c + lookahead.

    The chunk of coordinate x is (x + shift) // chunk; None leaves a side open.
    """

    chunk: int
    lookback: int | None = 1
    lookahead: int | None = 0
    shift: int = 0

    def __post_init__(self) -> None:
        check_int("Chunked", "chunk", self.chunk, 1)
        for name, value in (("lookback", self.lookback), ("lookahead", self.lookahead)):
            if value is not None:
                check_int("Chunked", name, value, 0)
        if isinstance(self.shift, bool) or not isinstance(self.shift, int):
            raise ValueError(f"Chunked: shift must be an integer, got {self.shift!r}")
        set_fields(self, spec=f"Chunked({self.chunk}, {self.lookback}, {self.lookahead}, {self.shift})")

    def _chunk_of(self, position: Tensor) -> Tensor:
        return torch.div(position + self.shift, self.chunk, rounding_mode="floor")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        offset = self._chunk_of(k_pos) - self._chunk_of(q_pos)
        seen = torch.ones_like(offset, dtype=torch.bool)
        if self.lookback is not None:
            seen = seen & (offset >= -self.lookback)
        if self.lookahead is not None:
            seen = seen & (offset <= self.lookahead)
        return seen

    def bounds(self, region: Region) -> Bounds:
        low = self._chunk_of(region.k_lo) - self._chunk_of(region.q_hi)
        high = self._chunk_of(region.k_hi) - self._chunk_of(region.q_lo)
        first = None if self.lookback is None else -self.lookback
        return interval_bounds(low, high, first, self.lookahead)

    def _mixed_key(self, region: Region) -> list[Tensor]:
        q_chunk, k_chunk = self._chunk_of(region.q_lo), self._chunk_of(region.k_lo)
        inside = (
            region.q_lo + self.shift - q_chunk * self.chunk,
            region.k_lo + self.shift - k_chunk * self.chunk,
        )
        return [k_chunk - q_chunk, *inside]


@register
@dataclass(frozen=True, repr=False, eq=False)
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
            check_int("Global", "first", self.first, 1)
        if self.every is not None:
            check_int("Global", "every", self.every, 1)
        if self.indices is not None:
            if not isinstance(self.indices, Sequence) or not all(isinstance(i, int) for i in self.indices):
                raise ValueError(f"Global: indices must be a sequence of integers, got {self.indices!r}")
            set_fields(self, indices=tuple(sorted(set(self.indices))))
        set_fields(self, spec=f"Global({given[0]}={getattr(self, given[0])})", scattered=self.first is None)

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
            # where they begin in the block, and where they end
            return (-low).clamp(0, size) * (size + 1) + (self.first - low).clamp(0, size)
        where = low if self.every is None else torch.remainder(low, self.every)
        return torch.where(self._below(low + size) > self._below(low), where, NONE_KEY)


@register
@dataclass(frozen=True, repr=False, eq=False)
class Bridge(Layout):
    """Bridge tokens carry what their chunk says across its joins: the last token of each chunk of `every`.

    Coordinate x is a bridge iff (x + 1) % every == 0; its chunk is x // every. Tokens see the bridges of their own
    chunk and of all earlier ones, and a bridge sees its own chunk. So in `(Chunked(512, 0) | Bridge(512)) & Causal()` a
    chunk hears of earlier ones through their bridges only.
    """

    every: int

    scattered = True

    def __post_init__(self) -> None:
        check_int("Bridge", "every", self.every, 1)
        set_fields(self, spec=f"Bridge({self.every})")

    def _chunk_of(self, position: Tensor) -> Tensor:
        return torch.div(position, self.every, rounding_mode="floor")

    def _bridges(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """First and last chunk whose bridge lies in [low, high]; first > last where there is none."""
        return self._chunk_of(low), self._chunk_of(high + 1) - 1

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        q_bridge, k_bridge = (torch.remainder(x + 1, self.every) == 0 for x in (q_pos, k_pos))
        q_chunk, k_chunk = self._chunk_of(q_pos), self._chunk_of(k_pos)
        return (k_bridge & (k_chunk <= q_chunk)) | (q_bridge & (k_chunk == q_chunk))

    def _own(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Tensor:
        """Whether keys may lie in the chunk of a bridge among the queries."""
        first, last = self._bridges(q_lo, q_hi)
        return torch.maximum(first, self._chunk_of(k_lo)) <= torch.minimum(last, self._chunk_of(k_hi))

    def bounds(self, region: Region) -> Bounds:
        q_lo, q_hi, k_lo, k_hi = region.q_lo, region.q_hi, region.k_lo, region.k_hi
        (q_first, q_last), (k_first, k_last) = self._bridges(q_lo, q_hi), self._bridges(k_lo, k_hi)
        all_q, all_k = q_last - q_first == q_hi - q_lo, k_last - k_first == k_hi - k_lo
        one_chunk = (self._chunk_of(k_lo) == self._chunk_of(k_hi)) & (q_first == q_last)
        own = self._own(q_lo, q_hi, k_lo, k_hi)
        some = k_first <= torch.minimum(k_last, self._chunk_of(q_hi))
        return some | own, (all_k & (k_last <= self._chunk_of(q_lo))) | (all_q & own & one_chunk)

    def _mixed_key(self, region: Region) -> list[Tensor]:
        q_lo, k_lo = region.q_lo, region.k_lo
        q_hi, k_hi = q_lo + region.block_q - 1, k_lo + region.block_k - 1
        k_first, k_last = self._bridges(k_lo, k_hi)
        some = k_first <= torch.minimum(k_last, self._chunk_of(q_hi))
        # whether what is seen depends on where queries stand
        by_query = self._own(q_lo, q_hi, k_lo, k_hi) | (some & (k_last > self._chunk_of(q_lo)))
        return [
            torch.where(some, torch.remainder(k_lo, self.every), NONE_KEY),
            torch.where(by_query, torch.remainder(q_lo, self.every), NONE_KEY),
            torch.where(by_query, k_lo - q_lo, NONE_KEY),
        ]


@register
@dataclass(frozen=True, repr=False, eq=False)
class Dilated(Layout):
    """A query sees keys at offsets -left * step, ..., -step, 0, step, ..., right * step (Longformer's dilation)."""

    left: int
    right: int
    step: int

    scattered = True

    def __post_init__(self) -> None:
        check_int("Dilated", "left", self.left, 0)
        check_int("Dilated", "right", self.right, 0)
        check_int("Dilated", "step", self.step, 1)
        set_fields(self, spec=f"Dilated({self.left}, {self.right}, {self.step})")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        offset = k_pos - q_pos
        inside = (offset >= -self.left * self.step) & (offset <= self.right * self.step)
        return inside & (torch.remainder(offset, self.step) == 0)

    def bounds(self, region: Region) -> Bounds:
        low, high = region.k_lo - region.q_hi, region.k_hi - region.q_lo
        some, every = interval_bounds(low, high, -self.left * self.step, self.right * self.step)
        return some, every & (self.step == 1)

    def _mixed_key(self, region: Region) -> list[Tensor]:
        return [region.k_lo - region.q_lo]


@register
@dataclass(frozen=True, repr=False, eq=False)
class Random(Layout):
    """Random blocks on a grid of `block` coordinates, the same for every length, batch row and head.

    Grid row r picks `blocks_per_row` grid columns at or before r (repeats possible); a pair of grid blocks is visible
    if either picked the other. So `Random(...) & Causal()` reads blocks_per_row earlier blocks whatever the length, and
    decoding agrees with prefill. Negative coordinates see nothing.
    """

    block: int
    blocks_per_row: int
    seed: int = 0

    scattered = True

    def __post_init__(self) -> None:
        check_int("Random", "block", self.block, 1)
        check_int("Random", "blocks_per_row", self.blocks_per_row, 1)
        check_int("Random", "seed", self.seed, 0)
        set_fields(self, spec=f"Random({self.block}, {self.blocks_per_row}, {self.seed})")

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


@register
@dataclass(frozen=True, repr=False, eq=False)
class PerHead(Joined):
    """Head h follows parts[h]."""

    parts: tuple[Layout, ...]

    def __post_init__(self) -> None:
        parts = tuple(self.parts)
        if not parts or not all(isinstance(p, Layout) for p in parts):
            raise ValueError(f"PerHead: expected a non-empty sequence of layouts, got {self.parts!r}")
        set_fields(self, parts=parts)
        self._finish("PerHead((" + ", ".join(p.spec for p in parts) + ",))")
        set_fields(self, per_head=len(set(p.spec for p in parts)) > 1 or any(p.per_head or p.tensors for p in parts))

    def own_sizes(self) -> tuple[int, int]:
        return super().own_sizes()[0], len(self.parts)

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
