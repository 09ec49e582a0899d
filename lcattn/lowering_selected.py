"""Tables of layouts that hold blocks chosen afresh in each call: what is static is lowered once, the rest merged in.

At each block of the table a layout with one `SelectedBlocks` in it is one of two static layouts: the expression with
nothing selected, or with everything. Both are lowered and cached as ever, and a call takes each block from the one or
the other, in a few dozen tensor operations, whatever the number of heads, on the device on which the selection lies.
What this cannot say (blocks that are no multiple of the table's, coordinates of one's own, documents while decoding, a
selection under `Not`, several selections), or at a price (a scattered layout in `&` with the selection), is lowered
head by head. Neither kind is remembered: the next call selects anew.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Full, Layout, Not, SelectedBlocks
from .layout.base import Joined, Or
from .lowering import BlockTable, cached_table, lower, on_cpu, run_start, to_segments

# rows and columns of a block of the table
_BLOCK = 64


def call_table(
    layout: Layout,
    phases: tuple[Layout, ...],
    B: int,
    H: int,
    G: int,
    T: int,
    S: int,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    transposed: bool = True,
) -> tuple[BlockTable, int, bool]:
    """`cached_table` for any layout: the table, the row of its first query, whether coordinates stay the defaults.

    Its tables are 1, G or H for each batch row: heads of a group that share all they see share one. A forward reads
    no transposed side, so one that would be built for this call alone may be left empty.
    """
    if not any(_selections(part) for part in (layout, *phases)):
        return cached_table(layout, phases, B, H, T, S, q_pos, k_pos)
    start = run_start(T, S, q_pos, k_pos)
    if start is not None and start >= 0 and _splits(layout, phases):
        (selected,) = _selections(layout)
        nothing, everything = _with(layout, Not(Full())), _with(layout, Full())
        # only coordinates let rows of the table be counted from a block's edge
        if start == 0 or not any(part.by_index for part in (nothing, *phases)):
            base, full = (cached_table(part, phases, B, H, T, S, q_pos, k_pos)[0] for part in (nothing, everything))
            heads = _n_tables(layout, phases, H, G)
            table = _merge(base, full, selected, (B, H, T, S), start, heads, transposed)
            return table, start % _BLOCK, start < _BLOCK
    heads = _n_tables(layout, phases, H, G)
    if heads == G < H:
        layout, phases = _by_list(layout), tuple(map(_by_list, phases))
    given = lower(layout, T=T, S=S, phases=phases, batch=B, heads=heads, q_pos=q_pos, k_pos=k_pos)
    return given, 0, start == 0


def _n_tables(layout: Layout, phases: Sequence[Layout], H: int, G: int) -> int:
    """How many tables tell the heads apart: 1, G or H."""
    parts = (layout, *phases)
    if not any(part.per_head for part in parts):
        return 1
    lists = {found.blocks.shape[1] for part in parts for found in _selections(part)}
    static = [_with(part, put) for part in parts for put in (Full(), Not(Full()))]
    return G if lists <= {1, G} and not any(part.per_head for part in static) else H


def _by_list(layout: Layout) -> Layout:
    """The layout with a list of each selection for a head."""

    def ungrouped(leaf: Layout) -> Layout:
        return SelectedBlocks(leaf.blocks, leaf.first, leaf.block) if isinstance(leaf, SelectedBlocks) else leaf

    return layout.map_leaves(ungrouped)


def _selections(layout: Layout) -> list[SelectedBlocks]:
    found: list[SelectedBlocks] = []

    def note(leaf: Layout) -> Layout:
        if isinstance(leaf, SelectedBlocks):
            found.append(leaf)
        return leaf

    if layout.tensors:
        layout.map_leaves(note)
    return found


def _with(layout: Layout, instead: Layout) -> Layout:
    return layout.map_leaves(lambda leaf: instead if isinstance(leaf, SelectedBlocks) else leaf)


def _splits(layout: Layout, phases: Sequence[Layout]) -> bool:
    """Whether blocks of the table are wholly selected or not, selecting hides nothing, and tables of all stay small."""

    def hides(part: Layout) -> bool:
        if isinstance(part, Not):
            return bool(_selections(part))
        return any(hides(inner) for inner in getattr(part, "parts", ()))

    found = _selections(layout)
    return (
        len(found) == 1
        and found[0].block % _BLOCK == 0
        and not hides(layout)
        and not any(_selections(phase) for phase in phases)
        and not _is_scattered(_with(layout, Full()))
    )


def _is_scattered(layout: Layout) -> bool:
    """Whether a table of all that a layout with everything selected shows may take many entries a row."""
    parts = layout.parts if isinstance(layout, Joined) else ()
    if isinstance(layout, Or) and any(isinstance(part, Full) for part in parts):
        return False
    return any(map(_is_scattered, parts)) if parts else layout.scattered


@dataclass(frozen=True)
class _Keys:
    """(table, row, block) as one number."""

    n_rows: int
    n_columns: int

    def of(self, table: Tensor | int, row: Tensor, block: Tensor) -> Tensor:
        return (table * self.n_rows + row) * self.n_columns + block

    def split(self, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = key // self.n_columns
        return rows // self.n_rows, rows % self.n_rows, key % self.n_columns


@dataclass(frozen=True)
class _Entries:
    """Entries of one phase of some tables' rows, runs and tiles apart, in order of their keys.

    Attributes:
        run_key, run_count: [n]; tile_key, tile: [m] int64; n_blocks: in all runs.
    """

    n_blocks: int
    run_key: Tensor
    run_count: Tensor
    tile_key: Tensor
    tile: Tensor

    @functools.cached_property
    def block_key(self) -> Tensor:
        """Of each block of each run."""
        which = torch.repeat_interleave(self.run_count, output_size=self.n_blocks)
        before = self.run_count.cumsum(0) - self.run_count
        return self.run_key[which] + torch.arange(self.n_blocks, device=which.device) - before[which]

    def runs_over(self, key: Tensor) -> Tensor:
        """Whether each key lies in a run."""
        if not len(self.run_key):
            return torch.zeros_like(key, dtype=torch.bool)
        at = torch.searchsorted(self.run_key, key, right=True) - 1
        return (at >= 0) & (key < (self.run_key + self.run_count)[at.clamp(min=0)])

    def tile_of(self, key: Tensor) -> Tensor:
        """The tile of each key, or -1."""
        if not len(self.tile_key):
            return torch.full_like(key, -1)
        at = torch.searchsorted(self.tile_key, key).clamp(max=len(self.tile_key) - 1)
        return torch.where(self.tile_key[at] == key, self.tile[at], -1)


def _among(key: Tensor, others: Tensor) -> Tensor:
    """Whether each key is one of others, which are sorted."""
    if not len(others):
        return torch.zeros_like(key, dtype=torch.bool)
    return others[torch.searchsorted(others, key).clamp(max=len(others) - 1)] == key


# the kinds of segment of `BlockTable`
_RUN, _TILE = 0, 1


class _Side:
    """Entries of one direction of a table, on their way to it."""

    def __init__(self, keys: _Keys, n_tables: int, n_phases: int, transpose: bool) -> None:
        self.keys, self.transpose, self.n_phases = keys, transpose, n_phases
        n_rows, n_columns = keys.n_rows, keys.n_columns
        self.n_rows, self.n_blocks = (n_columns, n_rows) if transpose else (n_rows, n_columns)
        self.n_rows_in_all = n_tables * self.n_rows
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, phase: int, kind: int, key: Tensor, payload: Tensor, live: Tensor | None = None) -> None:
        """Entries of one segment, those that are not live for nothing but their room."""
        table, row, block = self.keys.split(key)
        if self.transpose:
            row, block = block, row
        segment = (table * self.n_rows + row) * 2 * self.n_phases + 2 * phase + kind
        if live is not None:
            segment = torch.where(live, segment, self.n_rows_in_all * 2 * self.n_phases)
        self.parts.append((segment, block, payload))

    def to_segments(self) -> tuple[Tensor, Tensor]:
        segment, block, payload = map(torch.cat, zip(*self.parts, strict=True))
        return to_segments(segment, block, payload, self.n_rows_in_all, self.n_blocks, self.n_phases)


def _merge(
    base: BlockTable,
    everything: BlockTable,
    selected: SelectedBlocks,
    problem: tuple[int, int, int, int],
    start: int,
    Ht: int,
    transposed: bool,
) -> BlockTable:
    """The table of T queries from coordinate `start`, its first row the one in which that stands.

    It is built where the selection lies. Its sizes follow from those of the selection and of the static tables, never
    from what is selected, so that no step waits for the device.

    Args:
        base: the table with nothing selected; everything: with everything selected.
        problem: B, H, T, S; Ht: tables for each batch row, 1, G or H.
        transposed: whether to build the transposed side, which is empty otherwise.
    """
    B, H, T, S = problem
    device = selected.blocks.device
    first_row, n_rows = start // _BLOCK, (start + T - 1) // _BLOCK - start // _BLOCK + 1
    Bt = B if selected.per_batch or base.seg_ptr.shape[0] > 1 or everything.seg_ptr.shape[0] > 1 else 1
    n_phases, n_tables = base.seg_ptr.shape[3] // 2, Bt * Ht
    keys = _Keys(n_rows, base.seg_ptr_t.shape[2])
    none = n_tables * n_rows * keys.n_columns
    chosen = _chosen(selected, Bt, Ht, H, first_row, -(-S // _BLOCK), keys, none)
    fresh = chosen < none
    fresh[1:] &= chosen[1:] != chosen[:-1]
    table, row, block = keys.split(chosen)
    # heads and batch rows that the static part does not tell apart share one of its tables
    n_b, n_h = everything.seg_ptr.shape[:2]
    shared = (table // Ht if n_b > 1 else 0) * n_h + (table % Ht if n_h > 1 else 0)
    looked = keys.of(shared, row, block)
    old_parts = _entries(base, first_row, Bt, Ht, keys, device)
    new_parts = _entries(everything, first_row, n_b, n_h, keys, device)
    sides = [_Side(keys, n_tables, n_phases, transpose) for transpose in ((False, True) if transposed else (False,))]
    for phase, (old, new) in enumerate(zip(old_parts, new_parts, strict=True)):
        # where all is visible with nothing selected, selecting changes nothing
        added = fresh & ~old.runs_over(chosen)
        tile = new.tile_of(looked)
        for side in sides:
            if side.transpose:
                side.add(phase, _RUN, old.block_key, torch.ones_like(old.block_key))
            else:
                side.add(phase, _RUN, old.run_key, old.run_count)
            side.add(phase, _RUN, chosen, torch.ones_like(chosen), added & new.runs_over(looked))
            side.add(phase, _TILE, chosen, tile + len(base.mask_tiles), added & (tile >= 0))
            side.add(phase, _TILE, old.tile_key, old.tile, ~_among(old.tile_key, chosen))
    (seg_ptr, entries), *by_key = (side.to_segments() for side in sides)
    seg_ptr_t, entries_t = by_key[0] if by_key else (seg_ptr[:0], entries[:0])
    return BlockTable(
        seg_ptr.reshape(Bt, Ht, n_rows, -1),
        entries,
        seg_ptr_t.reshape(Bt, Ht, len(seg_ptr_t) // n_tables, seg_ptr.shape[1]),
        entries_t,
        _tiles(base, everything, device),
        _BLOCK,
        _BLOCK,
    )


def _chosen(
    selected: SelectedBlocks, Bt: int, Ht: int, H: int, first_row: int, n_blocks: int, keys: _Keys, none: int
) -> Tensor:
    """Sorted keys of every selected block of Bt * Ht tables, `none` where a list names no block."""
    lists, first, device = selected.blocks.long(), selected.first.long(), selected.blocks.device
    _, n_lists, n_listed, k = lists.shape
    of_table = torch.arange(keys.n_rows, device=device)
    row = ((of_table + first_row) * _BLOCK // selected.block - first[:, None]).expand(Bt, -1)
    listed = lists.expand(Bt, -1, -1, -1).gather(
        2, row.clamp(0, n_listed - 1)[:, None, :, None].expand(Bt, n_lists, keys.n_rows, k)
    )
    listed = torch.where(((row >= 0) & (row < n_listed))[:, None, :, None], listed, -1)
    if n_lists == 1:
        listed = listed.expand(Bt, Ht, -1, -1)
    elif n_lists != Ht:
        listed = listed[:, torch.arange(H, device=device) // selected.group]
    share = selected.block // _BLOCK
    block = (listed * share)[..., None] + torch.arange(share, device=device)
    table = torch.arange(Bt * Ht, device=device).reshape(Bt, Ht, 1, 1, 1)
    key = keys.of(table, of_table[:, None, None], block)
    return torch.where((block >= 0) & (block < n_blocks), key, none).flatten().sort().values


@functools.lru_cache(maxsize=16)
@on_cpu
def _entries(
    table: BlockTable, first_row: int, Bt: int, Ht: int, keys: _Keys, device: torch.device
) -> tuple[_Entries, ...]:
    """Each phase of a table's rows from first_row on, repeated for Bt * Ht tables."""
    seg_ptr = table.seg_ptr[:, :, first_row : first_row + keys.n_rows].long()
    # the rows of the table that serve each of the rows asked for
    rows = torch.arange(seg_ptr.shape[0] * seg_ptr.shape[1] * keys.n_rows).reshape(*seg_ptr.shape[:3])
    source = rows.expand(Bt, Ht, -1).flatten()
    phases = []
    for phase in range(seg_ptr.shape[3] // 2):
        found = []
        for kind in range(2):
            starts, ends = (seg_ptr[..., 2 * phase + kind + side].flatten()[source] for side in range(2))
            counts = ends - starts
            row = torch.repeat_interleave(torch.arange(len(counts)), counts)
            within = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
            block, payload = table.entries[starts[row] + within].long().unbind(1)
            found += [row * keys.n_columns + block, payload]
        phases.append(_Entries(int(found[1].sum()), *(x.to(device) for x in found)))
    return tuple(phases)


@functools.lru_cache(maxsize=16)
def _tiles(base: BlockTable, everything: BlockTable, device: torch.device) -> Tensor:
    return torch.cat([base.mask_tiles, everything.mask_tiles]).to(device)
