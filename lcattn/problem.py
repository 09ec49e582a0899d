"""The plain data of one attention call: what positions and layouts lower to, and what every backend computes.

For batch b, query head h, kv head g = h // (H / G), query i, key j, phase f:

    o     = k_pos[f, j] - q_pos[f, i]
    score = scale * (q_f[i] . k_f[j] + qr[i] . rel_key[clamp(o)] + kr[j] . rel_query[clamp(o)])
          + bias[f, h, clamp(o)] + slope[h] * |o|
    score = softcap * tanh(score / softcap)                      if softcap
    p     = softmax over visible j of all phases, and the sink logit of head h if there is one
    out_i = sum_j drop(p_ij) v_f[j];   lse_i = log(exp(sink_h) + sum_j exp(score_ij))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout

PhaseMap = tuple[tuple[int, int, int], ...]


def turn_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, n, D] whose first R features turn, in halves, by cos and sin [B or 1, 1, n, R / 2]."""
    a, b = x[..., : 2 * cos.shape[-1]].chunk(2, dim=3)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * cos.shape[-1] :]], 3).to(x.dtype)


@dataclass(frozen=True)
class Problem:
    """One attention call.

    Attributes:
        q: tuple of [B, H, T, D]; k, v: tuples of [B, G, S, D]; distinct tensors, shared by phases through phase_map.
        layout: who sees whom; phases: disjoint layouts that split it, empty for one phase.
        phase_map: for each phase the positions of its q, k, v in the tuples above.
        q_pos, k_pos: [B or 1, T] and [B or 1, S] int coordinates of visibility; None means S - T + i and j.
        offset_q_pos, offset_k_pos: [P or 1, B or 1, T] and [..., S] int coordinates of the offset o where it is not
            k_pos - q_pos; both or neither.
        turn_table, turn_at: [n, R] float, cos then sin of some coordinates, and for each tensor in k the rows of
            it, [len(k), B or 1, S] int, that its first R features are still to be turned by, in halves; -1 leaves a
            key as it is. Both or neither.
        key_mask: [B or 1, S] bool, False hides a key.
        bias: [P or 1, H or 1, L]; slope: [H]; rel_key, rel_query: [H or 1, L, D]; entry c is for offset min + c.
        qr: [B, H, T, D], with rel_key; kr: [B, G, S, D], with rel_query; sink: [H].
        scale; softcap, 0 for none; dropout in [0, 1); seed: int64 [1], with dropout.
    """

    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    layout: Layout
    phases: tuple[Layout, ...] = ()
    phase_map: PhaseMap = ((0, 0, 0),)
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    offset_q_pos: Tensor | None = None
    offset_k_pos: Tensor | None = None
    turn_table: Tensor | None = None
    turn_at: Tensor | None = None
    key_mask: Tensor | None = None
    bias: Tensor | None = None
    bias_min: int = 0
    slope: Tensor | None = None
    rel_key: Tensor | None = None
    rel_key_min: int = 0
    rel_query: Tensor | None = None
    rel_query_min: int = 0
    qr: Tensor | None = None
    kr: Tensor | None = None
    sink: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout: float = 0.0
    seed: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, H, G, T, S, D."""
        B, H, T, D = self.q[0].shape
        return B, H, self.k[0].shape[1], T, self.k[0].shape[2], D

    def differentiables(self) -> Iterator[Tensor]:
        """Every tensor that has a gradient."""
        yield from (*self.q, *self.k, *self.v)
        yield from (t for name in TERMS if (t := getattr(self, name)) is not None)

    def turned(self) -> Problem:
        """The same problem with every key turned."""
        if self.turn_table is None:
            return self
        return dataclasses.replace(self, k=self.turn_keys(self.k, 1), turn_table=None, turn_at=None)

    def turn_keys(self, keys: tuple[Tensor, ...], direction: int) -> tuple[Tensor, ...]:
        """Tensors that stand in for k turned by what is due, or back by it if direction is -1."""
        assert self.turn_table is not None and self.turn_at is not None
        cos, sin = self.turn_table.to(torch.promote_types(keys[0].dtype, torch.float32)).chunk(2, dim=1)
        result = []
        for k, at in zip(keys, self.turn_at.long(), strict=True):
            rows = at.clamp(min=0)[:, None]
            there = turn_by(k, cos[rows], direction * sin[rows])
            result.append(torch.where(at[:, None, :, None] < 0, k, there))
        return tuple(result)

    def offset_coordinates(self) -> tuple[Tensor, Tensor]:
        """Coordinates of the offset, [P or 1, B or 1, T] and [P or 1, B or 1, S] int64, defaults filled in."""
        if self.offset_q_pos is not None and self.offset_k_pos is not None:
            return self.offset_q_pos.long(), self.offset_k_pos.long()
        q_pos, k_pos = self.coordinates()
        return q_pos[None], k_pos[None]

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Coordinates of visibility, [B or 1, T] and [B or 1, S] int64, defaults filled in."""
        _, _, _, T, S, _ = self.sizes
        device = self.q[0].device
        q_pos = torch.arange(S - T, S, device=device)[None] if self.q_pos is None else self.q_pos.long()
        k_pos = torch.arange(S, device=device)[None] if self.k_pos is None else self.k_pos.long()
        return q_pos, k_pos


@dataclass(frozen=True)
class Gradients:
    """Gradients of a `Problem`'s differentiable tensors, None where there is none or none was asked for."""

    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    bias: Tensor | None = None
    slope: Tensor | None = None
    rel_key: Tensor | None = None
    rel_query: Tensor | None = None
    qr: Tensor | None = None
    kr: Tensor | None = None
    sink: Tensor | None = None


# the single tensors a gradient can be asked for, in the order in which operators take and return them
TERMS = ("bias", "slope", "rel_key", "rel_query", "qr", "kr", "sink")
