"""From a `Problem` to what the kernels of every backend read, with its layout lowered to a block table."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .lowering import BlockTable
from .lowering_selected import call_table
from .problem import Problem

# kMaxPhases of csrc/common/problem.h
MAX_PHASES = 5
# kernels compute offsets in 32 bits
_FARTHEST = 1 << 30


class KernelInputs(NamedTuple):
    """The inputs of a forward, in the order in which the C++ operators take them; terms as in `Problem`.

    Attributes:
        phase_map: (q, k, v) of each phase, one after the other.
        seg_ptr, entries, mask_tiles: as in `BlockTable`; query i stands in row row_start + i of the table.
        key_bits: [B, ceil(S / 32)] int32, bit j % 32 of word j / 32.
        q_pos, k_pos: [P or 1, B or 1, T] and [..., S] int32 coordinates of the offset; None means row_start + i and j.
        turn_at: int32; bias, slope, rel_key, rel_query, sink, turn_table: float32, contiguous.
    """

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    phase_map: list[int]
    seg_ptr: Tensor
    entries: Tensor
    mask_tiles: Tensor
    row_start: int
    key_bits: Tensor | None
    q_pos: Tensor | None
    k_pos: Tensor | None
    turn_table: Tensor | None
    turn_at: Tensor | None
    scale: float
    softcap: float
    bias: Tensor | None
    bias_min: int
    slope: Tensor | None
    rel_key: Tensor | None
    rel_key_min: int
    rel_query: Tensor | None
    rel_query_min: int
    qr: Tensor | None
    kr: Tensor | None
    sink: Tensor | None
    dropout: float
    seed: int


def kernel_inputs(problem: Problem, transposed: bool = True) -> tuple[BlockTable, KernelInputs]:
    """The block table of a problem, on the device of its tensors, and the inputs of its kernels.

    Without `transposed` the table may lack its transposed side, which only a backward reads.
    """
    B, H, G, T, S, _ = problem.sizes
    device = problem.q[0].device
    table, row_start, default = call_table(
        problem.layout, problem.phases, B, H, G, T, S, problem.q_pos, problem.k_pos, transposed
    )
    if table.seg_ptr.device != device:
        table = _on_device(table, device)
    q_pos = k_pos = None
    if not default or problem.offset_q_pos is not None:
        q_pos, k_pos = (
            _coordinates(name, p) for name, p in zip(("q_pos", "k_pos"), problem.offset_coordinates(), strict=True)
        )
    return table, KernelInputs(
        list(problem.q),
        list(problem.k),
        list(problem.v),
        [at for phase in problem.phase_map for at in phase],
        table.seg_ptr,
        table.entries,
        table.mask_tiles,
        row_start,
        None if problem.key_mask is None else pack_bits(problem.key_mask.expand(B, S)),
        q_pos,
        k_pos,
        _table(problem.turn_table),
        None if problem.turn_at is None else problem.turn_at.int(),
        problem.scale,
        problem.softcap,
        _table(problem.bias),
        problem.bias_min,
        _table(problem.slope),
        _table(problem.rel_key),
        problem.rel_key_min,
        _table(problem.rel_query),
        problem.rel_query_min,
        problem.qr,
        problem.kr,
        _table(problem.sink),
        problem.dropout,
        0 if problem.seed is None else int(problem.seed),
    )


def _coordinates(name: str, position: Tensor) -> Tensor:
    # to ask a GPU would be to wait for it
    if position.device.type == "cpu" and position.numel():
        low, high = (int(value) for value in position.aminmax())
        if not -_FARTHEST < low <= high < _FARTHEST:
            raise ValueError(f"{name}: expected coordinates between -2^30 and 2^30, got {low} to {high}")
    return position.int().contiguous()


@functools.lru_cache(maxsize=64)
def _on_device(table: BlockTable, device: torch.device) -> BlockTable:
    return table.to(device)


def _table(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().float().contiguous()


def pack_bits(mask: Tensor) -> Tensor:
    """[B, S] bool as [B, ceil(S / 32)] int32, bit j % 32 of word j / 32."""
    n_words = -(-mask.shape[1] // 32)
    padded = torch.nn.functional.pad(mask, (0, n_words * 32 - mask.shape[1])).unflatten(1, (n_words, 32))
    weights = torch.tensor([1 << i for i in range(31)] + [-(1 << 31)], dtype=torch.int32, device=mask.device)
    return (padded * weights).sum(2, dtype=torch.int32)


def strided_like(model: Tensor, value: Tensor) -> Tensor:
    """value in the strides of `empty_like(model)`, which is what every backend promises to compiled callers."""
    promised = torch.empty_like(model)
    return value if value.stride() == promised.stride() else promised.copy_(value)
