"""Tables of layouts that hold blocks chosen afresh in each call: what is static is lowered once, the rest merged in.

At each block of the table a layout with one `SelectedBlocks` in it is one of two static layouts: the expression with
nothing selected, or with everything. The first is lowered and cached as ever. The second is looked at only where
something is selected, for all heads at once. So a table costs O(entries) in a few dozen tensor operations, whatever the
number of heads. What this cannot say (blocks that are no multiple of the table's, coordinates of one's own, a selection
under `Not`, several selections) is lowered head by head. Neither kind is remembered: the next call selects anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Full, Layout, Not, SelectedBlocks
from .lowering import (
    Axis,
    BlockTable,
    Found,
    Grid,
    Region,
    assemble,
    cached_table,
    find_tiles,
    lower,
    run_start,
    single_blocks,
)

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
) -> tuple[BlockTable, int, bool]:
    """`cached_table` for any layout: the table, the row of its first query, whether coordinates stay the defaults.

    Its tables are 1, G or H for each batch row: heads of a group that share all they see share one.
    """
    if not any(_selections(part) for part in (layout, *phases)):
        return cached_table(layout, phases, B, H, T, S, q_pos, k_pos)
    start = run_start(T, S, q_pos, k_pos)
    if start is not None and start >= 0 and _splits(layout, phases):
        (selected,) = _selections(layout)
        nothing, everything = _with(layout, Not(Full())), _with(layout, Full())
        # only coordinates let rows of the table be counted from a block's edge
        if start == 0 or not any(part.by_index for part in (nothing, *phases)):
            base, _, _ = cached_table(nothing, phases, B, H, T, S, q_pos, k_pos)
            parts = [everything & phase for phase in phases] or [everything]
            by_index = any(part.by_index for part in parts)
            sizes = (T, S) if by_index else (base.seg_ptr.shape[2] * _BLOCK,) * 2
            table = _merge(base, parts, selected, (B, H, T, S), start, sizes, _n_tables(layout, phases, H, G))
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
    """Whether blocks of the table are wholly selected or wholly not, and a selection never hides anything."""

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
    )


@dataclass(frozen=True)
class _Entries:
    """Entries of one phase of some tables' rows, runs and tiles apart; keys are (table, row, block) as one number."""

    run_key: Tensor
    run_count: Tensor
    tile_key: Tensor
    tile: Tensor


@dataclass(frozen=True)
class _Keys:
    """(table, row, block) as one number."""

    n_rows: int
    n_columns: int

    def of(self, table: Tensor, row: Tensor, block: Tensor) -> Tensor:
        return (table * self.n_rows + row) * self.n_columns + block

    def table(self, key: Tensor) -> Tensor:
        return key // (self.n_rows * self.n_columns)

    def row(self, key: Tensor) -> Tensor:
        return key // self.n_columns % self.n_rows

    def block(self, key: Tensor) -> Tensor:
        return key % self.n_columns


def _merge(
    base: BlockTable,
    parts: Sequence[Layout],
    selected: SelectedBlocks,
    problem: tuple[int, int, int, int],
    start: int,
    sizes: tuple[int, int],
    Ht: int,
) -> BlockTable:
    """The table of T queries from coordinate `start`, its first row the one in which that stands.

    Args:
        base: the table with nothing selected; parts: for each phase, the layout with everything selected.
        problem: B, H, T, S; sizes: queries and keys of the grid on which parts are classed.
        Ht: tables for each batch row, 1, G or H.
    """
    B, H, T, S = problem
    first_row, n_rows = start // _BLOCK, (start + T - 1) // _BLOCK - start // _BLOCK + 1
    Bt = B if base.seg_ptr.shape[0] > 1 or selected.per_batch or any(part.per_batch for part in parts) else 1
    keys = _Keys(n_rows, base.seg_ptr_t.shape[2])
    chosen = _chosen(selected, Bt, Ht, H, first_row, -(-S // _BLOCK), keys)
    table = keys.table(chosen)
    grids = _Grids(sizes, first_row, keys)
    found, tiles, n_tiles = [], [base.mask_tiles], len(base.mask_tiles)
    for phase, part in enumerate(parts):
        old = _entries(base, phase, first_row, Bt, Ht, keys)
        state = torch.empty_like(chosen)
        # heads and batch rows that the static part does not tell apart are classed as one
        variant = (table // Ht if part.per_batch else 0) * Ht + (table % Ht if part.per_head else 0)
        variant = variant + torch.zeros_like(table)
        for which in torch.unique(variant).tolist():
            mine = variant == which
            state[mine], new = grids.classify(part, which // Ht, which % Ht, chosen[mine], n_tiles)
            tiles.append(new)
            n_tiles += len(new)
        # where all is visible with nothing selected, selecting changes nothing
        at = torch.searchsorted(old.run_key, chosen, right=True) - 1
        covered = torch.zeros_like(chosen, dtype=torch.bool)
        if len(old.run_key):
            covered = (at >= 0) & (chosen < (old.run_key + old.run_count)[at.clamp(min=0)])
        solid, tiled = chosen[(state == _FULL) & ~covered], (state >= 0) & ~covered
        kept = ~torch.isin(old.tile_key, chosen, assume_unique=True)
        tile_key = torch.cat([old.tile_key[kept], chosen[tiled]])
        one = torch.ones_like(old.run_count)
        runs = torch.stack([keys.row(old.run_key), one, keys.block(old.run_key), old.run_count], 1)
        found.append(
            Found(
                phase,
                keys.table(torch.cat([old.run_key, solid])),
                torch.cat([runs, single_blocks(keys.row(solid), keys.block(solid))]),
                keys.table(tile_key),
                keys.row(tile_key),
                keys.block(tile_key),
                torch.cat([old.tile[kept], state[tiled]]),
            )
        )
    seg_ptr, entries = assemble(found, Bt * Ht, n_rows, len(parts), transpose=False)
    seg_ptr_t, entries_t = assemble(found, Bt * Ht, keys.n_columns, len(parts), transpose=True)
    return BlockTable(
        seg_ptr.reshape(Bt, Ht, n_rows, -1),
        entries,
        seg_ptr_t.reshape(Bt, Ht, keys.n_columns, -1),
        entries_t,
        torch.cat(tiles),
        _BLOCK,
        _BLOCK,
    )


def _chosen(selected: SelectedBlocks, Bt: int, Ht: int, H: int, first_row: int, n_blocks: int, keys: _Keys) -> Tensor:
    """Sorted keys of every selected block of Bt * Ht tables."""
    lists, first = selected.blocks.cpu().long(), selected.first.cpu().long()
    _, n_lists, n_listed, k = lists.shape
    coordinate = torch.arange(first_row, first_row + keys.n_rows) * _BLOCK
    row = (coordinate // selected.block - first[:, None]).expand(Bt, -1)
    listed = lists.expand(Bt, -1, -1, -1).gather(
        2, row.clamp(0, n_listed - 1)[:, None, :, None].expand(Bt, n_lists, keys.n_rows, k)
    )
    listed = torch.where(((row >= 0) & (row < n_listed))[:, None, :, None], listed, -1)
    if n_lists == 1:
        listed = listed.expand(Bt, Ht, -1, -1)
    elif n_lists != Ht:
        listed = listed[:, torch.arange(H) // selected.group]
    share = selected.block // _BLOCK
    block = torch.where(listed >= 0, listed * share, n_blocks)[..., None] + torch.arange(share)
    table = torch.arange(Bt * Ht).reshape(Bt, Ht, 1, 1, 1)
    key = keys.of(table, torch.arange(keys.n_rows)[:, None, None], block)
    return torch.unique(key[block < n_blocks])


def _entries(base: BlockTable, phase: int, first_row: int, Bt: int, Ht: int, keys: _Keys) -> _Entries:
    """One phase of the base's rows from first_row on, repeated for Bt * Ht tables."""
    seg_ptr = base.seg_ptr[:, :, first_row : first_row + keys.n_rows].long()
    found = []
    for kind in range(2):
        starts, ends = seg_ptr[..., 2 * phase + kind], seg_ptr[..., 2 * phase + kind + 1]
        counts = (ends - starts).flatten()
        where = torch.repeat_interleave(torch.arange(len(counts)), counts)
        within = torch.arange(len(where)) - (counts.cumsum(0) - counts)[where]
        block, payload = base.entries[starts.flatten()[where] + within].long().unbind(1)
        of_table, row = where // keys.n_rows, where % keys.n_rows
        per_table = torch.bincount(of_table, minlength=seg_ptr.shape[0] * seg_ptr.shape[1]).tolist()
        pieces = [
            torch.stack(columns) for columns in zip(*(x.split(per_table) for x in (row, block, payload)), strict=True)
        ]
        key, payloads = [], []
        for table in range(Bt * Ht):
            b, h = table // Ht % seg_ptr.shape[0], table % Ht % seg_ptr.shape[1]
            row, block, payload = pieces[b * seg_ptr.shape[1] + h]
            key.append(keys.of(torch.tensor(table), row, block))
            payloads.append(payload)
        found += [torch.cat(key), torch.cat(payloads)]
    return _Entries(*found)


# what a block of the table is, where it is no tile
_EMPTY, _FULL = -2, -1


@dataclass(frozen=True)
class _Grids:
    """Classes given blocks of the table rather than all."""

    sizes: tuple[int, int]
    first_row: int
    keys: _Keys

    def classify(self, layout: Layout, b: int, h: int, key: Tensor, first_tile: int) -> tuple[Tensor, Tensor]:
        """For each key _EMPTY, _FULL or its tile's number, and the new tiles."""
        n_blocks = self.keys.n_rows * self.keys.n_columns
        place, back = torch.unique(key % n_blocks, return_inverse=True)
        q_block, k_block = self.keys.row(place) + self.first_row, self.keys.block(place)
        grid = Grid(Axis(self.sizes[0], _BLOCK, None, 0), Axis(self.sizes[1], _BLOCK, None, 0), b, h)
        some, every = layout.bounds(Region(grid, 0, q_block, k_block))
        state = torch.where(every & some, _FULL, _EMPTY)
        mixed = some & ~every
        solid, tile, tiles = find_tiles(grid, layout, q_block[mixed], k_block[mixed])
        state[mixed] = torch.where(solid, _FULL, torch.where(tile >= 0, tile + first_tile, _EMPTY))
        return state[back], tiles
