"""From a layout to the block table that kernels walk, in O(entries) time and memory.

The grid of blocks is classed top-down: a rectangle of blocks in which nothing can be visible is dropped, one in which
everything is becomes full runs, any other is split in four. What is still mixed at one block is a tile; tiles whose
layouts promise equal bits (`Layout.tile_key`) are evaluated once. The same full rectangles and tiles give the
transposed table.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .layout import Context, Layout

P = ParamSpec("P")
R = TypeVar("R")

# tiles evaluated at once: 1024 of 64 x 64 int64 coordinates are 32 MB
_TILES_AT_ONCE = 1024


# compared by identity, so that a table can be remembered by
@dataclass(frozen=True, eq=False)
class BlockTable:
    """A lowered layout. Bt in {1, B}, Ht in {1, H}; P phases; block sizes block_q x block_k.

    Row r of (b, h) has, for phase f, the full runs entries[seg_ptr[2f] : seg_ptr[2f + 1]] as (first block, count) and
    the tiled entries [seg_ptr[2f + 1] : seg_ptr[2f + 2]] as (block, tile). Bits outside T x S are unspecified: kernels
    cut at the lengths themselves.

    Attributes:
        seg_ptr: [Bt, Ht, n_q_blocks, 2 P + 1] int32, by query block; entries: [n, 2] int32, naming key blocks.
        seg_ptr_t: [Bt, Ht, n_k_blocks, 2 P + 1] int32, by key block; entries_t: [n_t, 2] int32, naming query blocks.
        mask_tiles: [n_tiles, block_q, ceil(block_k / 32)] int32, bit j % 32 of word [i, j / 32].
    """

    seg_ptr: Tensor
    entries: Tensor
    seg_ptr_t: Tensor
    entries_t: Tensor
    mask_tiles: Tensor
    block_q: int
    block_k: int

    def to(self, device: torch.device | str) -> BlockTable:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: v.to(device) for n, v in values.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)

    @property
    def nbytes(self) -> int:
        """Memory of all five tensors, in bytes."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def n_pairs(self) -> int:
        """How many (query block, key block) pairs the table visits, over all of Bt, Ht and phases."""
        edges = self.seg_ptr.reshape(-1, self.seg_ptr.shape[-1]).long()
        ahead = torch.nn.functional.pad(self.entries[:, 1].cumsum(0), (1, 0))
        runs = ahead[edges[:, 1::2]] - ahead[edges[:, :-1:2]]
        return int(runs.sum() + (edges[:, 2::2] - edges[:, 1::2]).sum())

    def to_dense(self, T: int, S: int, phase: int | None = None) -> Tensor:
        """The pattern, [Bt, Ht, T, S] bool, of one phase or of all joined; for tests and pictures, O(T * S)."""
        Bt, Ht, n_rows, width = self.seg_ptr.shape
        n_cols = -(-S // self.block_k)
        dense = torch.zeros(Bt, Ht, n_rows, n_cols, self.block_q, self.block_k, dtype=torch.bool)
        shifts = torch.arange(32, dtype=torch.int32)
        for b, h, r in itertools.product(range(Bt), range(Ht), range(n_rows)):
            seg = self.seg_ptr[b, h, r].tolist()
            for f in range(width // 2) if phase is None else (phase,):
                for block, count in self.entries[seg[2 * f] : seg[2 * f + 1]].tolist():
                    dense[b, h, r, block : block + count] = True
                for block, tile in self.entries[seg[2 * f + 1] : seg[2 * f + 2]].tolist():
                    if block < n_cols:
                        bits = (self.mask_tiles[tile][..., None] >> shifts) & 1
                        dense[b, h, r, block] |= bits.flatten(1)[:, : self.block_k].bool()
        return dense.transpose(3, 4).reshape(Bt, Ht, n_rows * self.block_q, -1)[:, :, :T, :S]


class Axis:
    """One side of the grid: n coordinates, in blocks, with the extent of any aligned power-of-two group of blocks."""

    def __init__(self, n: int, block: int, positions: Tensor | None, start: int) -> None:
        self.n, self.block, self.positions, self.start = n, block, positions, start
        self.n_blocks = -(-n // block)
        self.pyramids: dict[Any, list[tuple[Tensor, Tensor]]] = {}

    def span(self, level: int, node: Tensor) -> tuple[Tensor, Tensor]:
        """First and last index (inclusive) of each group."""
        first = node * (self.block << level)
        return first, (first + (self.block << level) - 1).clamp(max=self.n - 1)

    def coordinates(self, level: int, node: Tensor) -> tuple[Tensor, Tensor]:
        if self.positions is None:
            first, last = self.span(level, node)
            return first + self.start, last + self.start
        return self.extent("coordinates", self.positions, level, node)

    def extent(self, key: Any, values: Tensor, level: int, node: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest of `values` [n] in each group."""
        pyramid = self.pyramids.get(key)
        if pyramid is None:
            padded = torch.cat([values, values[-1:].expand(self.n_blocks * self.block - self.n)])
            blocks = padded.reshape(self.n_blocks, self.block)
            pyramid = self.pyramids[key] = [(blocks.amin(1), blocks.amax(1))]
        while len(pyramid) <= level:
            low, high = pyramid[-1]
            if len(low) % 2:
                low, high = torch.cat([low, low[-1:]]), torch.cat([high, high[-1:]])
            pyramid.append((low.reshape(-1, 2).amin(1), high.reshape(-1, 2).amax(1)))
        low, high = pyramid[level]
        return low[node], high[node]

    def indices(self, block: Tensor) -> Tensor:
        """Indices of every element of each block, [len(block), self.block], running past n in the last."""
        return block[:, None] * self.block + torch.arange(self.block)

    def position_of(self, index: Tensor) -> Tensor:
        return index + self.start if self.positions is None else self.positions[index.clamp(max=self.n - 1)]

    def steps(self, block: Tensor) -> Tensor:
        """Whether a block's coordinates step by one, so that its tile keys may be trusted."""
        if self.positions is None:
            return torch.ones_like(block, dtype=torch.bool)
        positions = self.position_of(self.indices(block))
        return (positions.diff(dim=1) == 1).all(1)


class Region:
    """Rectangles of the grid at one level, as `Layout.bounds` sees them; ranges are inclusive."""

    def __init__(self, grid: Grid, level: int, q_node: Tensor, k_node: Tensor) -> None:
        self.grid, self.level, self.q_node, self.k_node = grid, level, q_node, k_node
        self.q_lo, self.q_hi = grid.q.coordinates(level, q_node)
        self.k_lo, self.k_hi = grid.k.coordinates(level, k_node)
        self.q_first, self.q_last = grid.q.span(level, q_node)
        self.k_first, self.k_last = grid.k.span(level, k_node)
        self.b, self.h, self.T, self.S = grid.b, grid.h, grid.q.n, grid.k.n
        self.block_q, self.block_k = grid.q.block, grid.k.block

    @property
    def identity(self) -> Tensor:
        return self.q_node * self.grid.k.n_blocks + self.k_node

    @property
    def max_coordinate(self) -> int:
        zero = torch.zeros(1, dtype=torch.long)
        top = max(self.grid.q.n_blocks, self.grid.k.n_blocks).bit_length()
        return int(max(self.grid.q.coordinates(top, zero)[1], self.grid.k.coordinates(top, zero)[1]))

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.grid.memo:
            self.grid.memo[key] = make()
        return self.grid.memo[key]

    def query_extent(self, key: Any, values: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        return self.grid.q.extent(key, self.memo(key, lambda: values(self.b)), self.level, self.q_node)

    def key_extent(self, key: Any, values: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        return self.grid.k.extent(key, self.memo(key, lambda: values(self.b)), self.level, self.k_node)


class Grid:
    """The blocks of one (b, h): both axes and what layouts remember while it is classed."""

    def __init__(self, q: Axis, k: Axis, b: int, h: int) -> None:
        self.q, self.k, self.b, self.h = q, k, b, h
        self.memo: dict[Any, Any] = {}

    def classify(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Full rectangles [n, 4] as (q_block, rows, k_block, columns); mixed blocks as q_block, k_block."""
        full = [torch.zeros(0, 4, dtype=torch.long)]
        level = (max(self.q.n_blocks, self.k.n_blocks) - 1).bit_length()
        q_node = k_node = torch.zeros(1, dtype=torch.long)
        while True:
            some, every = layout.bounds(Region(self, level, q_node, k_node))
            every = every & some
            if bool(every.any()):
                q_block, k_block = q_node[every] << level, k_node[every] << level
                rows = (self.q.n_blocks - q_block).clamp(max=1 << level)
                columns = (self.k.n_blocks - k_block).clamp(max=1 << level)
                full.append(torch.stack([q_block, rows, k_block, columns], 1))
            mixed = some & ~every
            q_node, k_node = q_node[mixed], k_node[mixed]
            if level == 0 or not len(q_node):
                return torch.cat(full), q_node, k_node
            level -= 1
            q_node = (q_node[:, None] * 2 + torch.tensor([0, 0, 1, 1])).flatten()
            k_node = (k_node[:, None] * 2 + torch.tensor([0, 1, 0, 1])).flatten()
            inside = (q_node << level < self.q.n_blocks) & (k_node << level < self.k.n_blocks)
            q_node, k_node = q_node[inside], k_node[inside]

    def pack(self, seen: Tensor) -> Tensor:
        """[n, block_q, block_k] bool as [n, block_q, ceil(block_k / 32)] int32 bits."""
        words = -(-self.k.block // 32)
        weights = torch.tensor([1 << i for i in range(31)] + [-(1 << 31)], dtype=torch.int32)
        seen = torch.nn.functional.pad(seen, (0, words * 32 - self.k.block))
        return (seen.unflatten(2, (words, 32)) * weights).sum(3, dtype=torch.int32)

    def inside(self, q_block: Tensor, k_block: Tensor) -> Tensor:
        """Bits of the elements of blocks [n] that lie inside T x S."""
        inside_q = (self.q.indices(q_block) < self.q.n)[:, :, None]
        return self.pack(inside_q & (self.k.indices(k_block) < self.k.n)[:, None, :])

    def evaluate(self, layout: Layout, q_block: Tensor, k_block: Tensor) -> Tensor:
        """Bit tiles [n, block_q, ceil(block_k / 32)] int32 of the given blocks."""
        tiles = torch.empty(len(q_block), self.q.block, -(-self.k.block // 32), dtype=torch.int32)
        for at in range(0, len(q_block), _TILES_AT_ONCE):
            q_idx = self.q.indices(q_block[at : at + _TILES_AT_ONCE])[:, :, None]
            k_idx = self.k.indices(k_block[at : at + _TILES_AT_ONCE])[:, None, :]
            ctx = Context(self.b, self.h, self.q.n, self.k.n, q_idx, k_idx)
            seen = layout.visible(self.q.position_of(q_idx), self.k.position_of(k_idx), ctx)
            tiles[at : at + _TILES_AT_ONCE] = self.pack(seen.expand(len(q_idx), self.q.block, self.k.block))
        return tiles

    def tile_ids(self, layout: Layout, q_block: Tensor, k_block: Tensor) -> Tensor:
        """Ids that agree only where the bits of the blocks agree."""
        region = Region(self, 0, q_block, k_block)
        trusted = self.q.steps(q_block) & self.k.steps(k_block)
        ids = torch.where(trusted, -1, region.identity)
        for key in layout.tile_key(region):
            _, key = torch.unique(torch.where(trusted, key, 0), return_inverse=True)
            _, ids = torch.unique(ids * (key.max() + 1) + key, return_inverse=True)
        return ids


@dataclass(frozen=True)
class Found:
    """What classing found of one phase: full rectangles and tiled blocks, each with the table (b, h) it is of.

    Attributes:
        phase: the phase; full: [n, 4] (q_block, rows, k_block, columns), full_table: [n]; q_block, k_block, tile,
            table: [m].
    """

    phase: int
    full_table: Tensor
    full: Tensor
    table: Tensor
    q_block: Tensor
    k_block: Tensor
    tile: Tensor


def _find_tiles(grid: Grid, layout: Layout, q_block: Tensor, k_block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed blocks by their elements: which are full, the tile number of each (-1: full or empty), and the tiles."""
    words = -(-grid.k.block // 32)
    if not len(q_block):
        return q_block > 0, q_block, torch.empty(0, grid.q.block, words, dtype=torch.int32)
    ids = grid.tile_ids(layout, q_block, k_block)
    n_ids = int(ids.max()) + 1
    # a block that the lengths cut is judged by its inside alone, so it stands for itself
    cut = (q_block == grid.q.n_blocks - 1) & (grid.q.n % grid.q.block != 0)
    cut |= (k_block == grid.k.n_blocks - 1) & (grid.k.n % grid.k.block != 0)
    _, ids = torch.unique(torch.where(cut, n_ids + torch.arange(len(ids)), ids), return_inverse=True)
    of_id = torch.empty(int(ids.max()) + 1, dtype=torch.long).scatter_(0, ids, torch.arange(len(ids)))
    tiles = grid.evaluate(layout, q_block[of_id], k_block[of_id])
    whole = torch.ones(1, grid.q.block, grid.k.block, dtype=torch.bool)
    inside = grid.pack(whole).repeat(len(of_id), 1, 1)
    inside[cut[of_id]] = grid.inside(q_block[of_id][cut[of_id]], k_block[of_id][cut[of_id]])
    tiles &= inside
    empty = (tiles == 0).flatten(1).all(1)[ids]
    solid = (tiles == inside).flatten(1).all(1)[ids]
    keep = ~empty & ~solid
    used, number = torch.unique(ids[keep], return_inverse=True)
    return solid, torch.full_like(ids, -1).masked_scatter_(keep, number), tiles[used]


def _single_blocks(q_block: Tensor, k_block: Tensor) -> Tensor:
    """Blocks as rectangles [n, 4]."""
    one = torch.ones_like(q_block)
    return torch.stack([q_block, one, k_block, one], 1)


def _expand(full: Tensor, first_row: Tensor, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rectangles as runs: row, first block, count."""
    first, rows, block, count = (full[:, i] for i in ((2, 3, 0, 1) if transpose else (0, 1, 2, 3)))
    which = torch.repeat_interleave(torch.arange(len(full)), rows)
    within = torch.arange(len(which)) - torch.repeat_interleave(rows.cumsum(0) - rows, rows)
    return (first_row + first)[which] + within, block[which], count[which]


def to_segments(
    segment: Tensor, block: Tensor, payload: Tensor, n_rows: int, n_blocks: int, n_phases: int
) -> tuple[Tensor, Tensor]:
    """seg_ptr [n_rows, 2 P + 1] and entries [n, 2] of one direction, from entries [n] in any order.

    Entry i lies in segment[i] = row * 2 P + 2 phase + kind, kind 0 a run of payload[i] blocks and 1 a tile; one of
    segment n_rows * 2 P is left out. Runs that touch are joined. Sizes follow from those of the arguments alone, on any
    device, so the last entries may be unused.
    """
    order = torch.argsort(segment * n_blocks + block)
    segment, block, payload = segment[order], block[order], payload[order]
    is_run = segment % 2 == 0
    end = torch.where(is_run, block + payload, -1)
    opens = torch.ones_like(is_run)
    opens[1:] = (segment[1:] != segment[:-1]) | (end[:-1] != block[1:])
    place = opens.cumsum(0) - 1

    def joined(values: Tensor, reduce: str, unused: int) -> Tensor:
        result = torch.full_like(values, unused)
        return result.scatter_reduce_(0, place, values, reduce, include_self=False)

    width = 2 * n_phases
    first = joined(block, "amin", 0)
    last = joined(torch.where(is_run, end, payload), "amax", 0)
    segment = joined(segment, "amin", n_rows * width)
    entries = torch.stack([first, torch.where(segment % 2 == 0, last - first, last)], 1)
    edges = torch.searchsorted(segment, torch.arange(n_rows * width + 1, device=segment.device))
    seg_ptr = torch.cat([edges[:-1].reshape(n_rows, width), edges[width::width, None]], 1)
    return seg_ptr.int(), entries.int()


def _assemble(
    found: Sequence[Found], n_tables: int, n_rows: int, n_blocks: int, n_phases: int, transpose: bool
) -> tuple[Tensor, Tensor]:
    """seg_ptr [n_tables * n_rows, 2 P + 1] and entries of one direction."""
    segments, blocks, payloads = [], [], []
    for part in found:
        tile_row, tile_block = (part.k_block, part.q_block) if transpose else (part.q_block, part.k_block)
        runs = _expand(part.full, part.full_table * n_rows, transpose)
        tiled = (part.table * n_rows + tile_row, tile_block, part.tile)
        for kind, (row, block, payload) in enumerate((runs, tiled)):
            segments.append(row * (2 * n_phases) + 2 * part.phase + kind)
            blocks.append(block)
            payloads.append(payload)
    parts = (torch.cat(segments), torch.cat(blocks), torch.cat(payloads))
    seg_ptr, entries = to_segments(*parts, n_tables * n_rows, n_blocks, n_phases)
    return seg_ptr, entries[: int(seg_ptr[-1, -1])].clone()


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """The function with tensors that it makes on the CPU, whatever torch.set_default_device says."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapped


@on_cpu
def lower(
    layout: Layout,
    *,
    T: int,
    S: int,
    phases: Sequence[Layout] = (),
    batch: int = 1,
    heads: int = 1,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> BlockTable:
    """Lowers a layout to its block table.

    Args:
        T, S: query and key counts; rows of the table are query indices from 0.
        phases: disjoint layouts that split what is visible; none means one phase.
        batch, heads: B and H, used only where the pattern differs between them.
        q_pos, k_pos: [B or 1, T] and [B or 1, S] integer coordinates; by default S - T + i and j.
        block_q, block_k: block sizes.
    """
    if T < 1 or S < 1:
        raise ValueError(f"lower: T and S must be at least 1, got T={T}, S={S}")
    positions = [None if p is None else p.detach().cpu().long() for p in (q_pos, k_pos)]
    split = [layout & phase for phase in phases] or [layout]
    by_position = any(p is not None and p.shape[0] > 1 for p in positions)
    Bt = batch if by_position or any(part.per_batch for part in split) else 1
    Ht = heads if any(part.per_head for part in split) else 1
    found: list[Found] = []
    tiles = [torch.empty(0, block_q, -(-block_k // 32), dtype=torch.int32)]
    n_tiles = 0
    for b in range(Bt):
        q_row, k_row = (None if p is None else p[b if p.shape[0] > 1 else 0] for p in positions)
        for h in range(Ht):
            grid = Grid(Axis(T, block_q, q_row, S - T), Axis(S, block_k, k_row, 0), b, h)
            for phase, part in enumerate(split):
                full, q_block, k_block = grid.classify(part)
                solid, tile, new = _find_tiles(grid, part, q_block, k_block)
                full = torch.cat([full, _single_blocks(q_block, k_block)[solid]])
                kept = tile >= 0
                q_block, k_block, tile = q_block[kept], k_block[kept], tile[kept] + n_tiles
                table = b * Ht + h
                found.append(
                    Found(
                        phase,
                        torch.full((len(full),), table),
                        full,
                        torch.full_like(tile, table),
                        q_block,
                        k_block,
                        tile,
                    )
                )
                tiles.append(new)
                n_tiles += len(new)
    mask_tiles, renumber = _unique_tiles(torch.cat(tiles))
    found = [dataclasses.replace(piece, tile=renumber[piece.tile]) for piece in found]
    n_q, n_k = -(-T // block_q), -(-S // block_k)
    seg_ptr, entries = _assemble(found, Bt * Ht, n_q, n_k, len(split), transpose=False)
    seg_ptr_t, entries_t = _assemble(found, Bt * Ht, n_k, n_q, len(split), transpose=True)
    return BlockTable(
        seg_ptr.reshape(Bt, Ht, n_q, -1),
        entries,
        seg_ptr_t.reshape(Bt, Ht, n_k, -1),
        entries_t,
        mask_tiles,
        block_q,
        block_k,
    )


def _unique_tiles(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct tiles, and for each given one its number among them."""
    if len(tiles) < 2:
        return tiles.contiguous(), torch.zeros(len(tiles), dtype=torch.long)
    seen: dict[bytes, int] = {}
    number = [seen.setdefault(tile.tobytes(), len(seen)) for tile in tiles.numpy()]
    renumber = torch.tensor(number)
    first = torch.full((len(seen),), len(tiles)).scatter_reduce_(0, renumber, torch.arange(len(tiles)), "amin")
    return tiles[first].contiguous(), renumber


class Cache:
    """Least-recently-used tables, bounded by their bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.n_bytes, self.n_dropped = limit_bytes, 0, 0
        self.tables: OrderedDict[Any, BlockTable] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], BlockTable]) -> BlockTable:
        with self._lock:
            if (table := self.tables.get(key)) is not None:
                self.tables.move_to_end(key)
                return table
        made = make()
        with self._lock:
            # another thread may have made it meanwhile
            table = self.tables.setdefault(key, made)
            if table is made:
                self.n_bytes += table.nbytes
            while self.n_bytes > self.limit_bytes and len(self.tables) > 1:
                self.n_bytes -= self.tables.popitem(last=False)[1].nbytes
                self.n_dropped += 1
        return table


cache = Cache(limit_bytes=256 << 20)


def _digest(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    values = tensor.detach().cpu().contiguous()
    return hashlib.blake2b(values.numpy().tobytes(), digest_size=16).digest() + str(tuple(values.shape)).encode()


@functools.lru_cache(maxsize=4096)
def _capacity(n: int) -> int:
    """The power of two at or above n, 64 at least: one table serves all lengths up to it."""
    return max(64, 1 << (n - 1).bit_length())


def run_start(T: int, S: int, q_pos: Tensor | None, k_pos: Tensor | None) -> int | None:
    """The first query's coordinate where keys stand at 0, 1, ... and queries in one run; None where they do not."""
    if k_pos is not None:
        return None
    if q_pos is None:
        return S - T
    start = int(q_pos[0, 0])
    run = q_pos.shape[0] == 1 and bool((q_pos[0] == torch.arange(start, start + T, device=q_pos.device)).all())
    return start if run else None


def cached_table(
    layout: Layout,
    phases: tuple[Layout, ...],
    B: int,
    H: int,
    T: int,
    S: int,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
) -> tuple[BlockTable, int, bool]:
    """The table of a call, the row in which its first query stands, and whether coordinates stay the defaults.

    A layout that reads coordinates alone, with keys at 0, 1, ... and queries in a run, uses a square table of
    power-of-two capacity shared by all lengths and by every step of decoding. Anything else is lowered as given and
    remembered by content.
    """
    start = run_start(T, S, q_pos, k_pos)
    split = (layout, *phases)
    n = _capacity(max(S, T if start is None else start + T))
    # far beyond the keys most of a square table would be rows that nobody asks for
    near = n <= 4 * _capacity(max(S, T))
    if near and start is not None and start >= 0 and not any(part.by_index for part in split):
        key: tuple[Any, ...] = (tuple(part.spec for part in split), n, H if any(p.per_head for p in split) else 1)
        return cache.get(key, lambda: lower(layout, T=n, S=n, phases=phases, heads=H)), start, True
    if start is not None and q_pos is None and start < 0:
        q_pos = torch.arange(start, S, device="cpu")[None]
    tensors = [t for part in split for t in part.tensors]
    content = tuple(_digest(t) for t in (*tensors, q_pos, k_pos))
    key = (tuple(part.spec for part in split), B, H, T, S, content)
    make = functools.partial(lower, layout, T=T, S=S, phases=phases, batch=B, heads=H, q_pos=q_pos, k_pos=k_pos)
    return cache.get(key, make), 0, start == 0
