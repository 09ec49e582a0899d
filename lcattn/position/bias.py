"""Additive positions: a bias or a slope by offset."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Terms, check_heads, check_offset, check_table, remembered


@dataclass(frozen=True)
class RelativeBias:
    """Learned bias by offset: score += table[h, clamp(k_pos - q_pos - min_offset, 0, L - 1)].

    Args:
        table: [H or 1, L] float; entry c is for offset key - query = min_offset + c, both ends clamp.
        min_offset: the offset of entry 0.

    Source: Raffel et al. 2020 (T5), section 2.1, without the buckets.
    """

    table: Tensor
    min_offset: int

    def __post_init__(self) -> None:
        check_table("RelativeBias", "table", self.table, "[H, L]")
        if 0 in self.table.shape:
            got = list(self.table.shape)
            raise ValueError(f"RelativeBias: table must hold at least one head and one entry, got {got}")
        check_offset("RelativeBias", "min_offset", self.min_offset)

    def check(self, q: Tensor) -> None:
        """Raises ValueError if the position cannot serve the heads of q [B, H, T, D]."""
        check_heads("RelativeBias", "table", self.table.shape[0], q)

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        self.check(q)
        return Terms(bias=self.table[None], bias_min=self.min_offset)


@remembered(64)
def _t5_buckets(bidirectional: bool, n_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """Bucket of every offset from -max_distance to max_distance, beyond which buckets no longer change."""
    offset = torch.arange(-max_distance, max_distance + 1, device=device)
    bucket = torch.zeros_like(offset)
    if bidirectional:
        n_buckets //= 2
        bucket = bucket + n_buckets * (offset > 0)
        distance = offset.abs()
    else:
        distance = (-offset).clamp(min=0)
    n_exact = n_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / n_exact) / math.log(max_distance / n_exact)
    far = (n_exact + (ratio * (n_buckets - n_exact)).long()).clamp(max=n_buckets - 1)
    return bucket + torch.where(distance < n_exact, distance, far)


@dataclass(frozen=True)
class T5Bias:
    """T5's bucketed bias: score += weight[bucket(k_pos - q_pos), h].

    Buckets are exact up to a quarter (one-sided: half) of their number, then logarithmic up to max_distance, where they
    saturate: the lowered table has 2 max_distance + 1 entries whatever the length.

    Args:
        weight: [n_buckets, H] float, as `relative_attention_bias.weight` of transformers' T5.
        bidirectional: True in encoders, False in decoders.
        max_distance: distance of the last bucket.

    Source: Raffel et al. 2020 (T5), section 2.1.
    """

    weight: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        check_table("T5Bias", "weight", self.weight, "[n_buckets, H]")
        check_offset("T5Bias", "max_distance", self.max_distance)
        exact = self.weight.shape[0] // (4 if self.bidirectional else 2)
        if exact < 1 or self.max_distance <= exact:
            raise ValueError(
                f"T5Bias: max_distance must exceed the {exact} exact buckets of {self.weight.shape[0]},"
                f" got {self.max_distance}"
            )

    def check(self, q: Tensor) -> None:
        """Raises ValueError if the position cannot serve the heads of q [B, H, T, D]."""
        check_heads("T5Bias", "weight", self.weight.shape[1], q)

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        self.check(q)
        buckets = _t5_buckets(self.bidirectional, self.weight.shape[0], self.max_distance, self.weight.device)
        return Terms(bias=self.weight[buckets].T[None], bias_min=-self.max_distance)


@dataclass(frozen=True)
class Alibi:
    """Linear bias: score -= slopes[h] * |k_pos - q_pos|.

    Args:
        slopes: [H] float, the paper's positive slopes; `Alibi.for_heads(H)` gives the paper's own.

    Source: Press et al. 2022 (ALiBi), section 3.
    """

    slopes: Tensor

    def __post_init__(self) -> None:
        check_table("Alibi", "slopes", self.slopes, "[H]")

    @classmethod
    def for_heads(cls, heads: int) -> Alibi:
        """The paper's slopes: 2^(-8 i / n) for the power of two n at or below `heads`, then every other of 2n's."""
        n = 1 << (heads.bit_length() - 1)
        slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
        slopes += [2 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)]
        return cls(torch.tensor(slopes))

    def check(self, q: Tensor) -> None:
        """Raises ValueError if the position cannot serve the heads of q [B, H, T, D]."""
        if self.slopes.shape[0] != q.shape[1]:
            raise ValueError(f"Alibi: slopes must have {q.shape[1]} heads, got {self.slopes.shape[0]}")

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        self.check(q)
        return Terms(slope=-self.slopes)
