"""Positions: how distance changes a score. Each lowers to the terms of a `Problem`.

A position is anything with `lower(q, k, v, q_pos, k_pos) -> Terms`; several are given as a sequence, and each term may
then come from one of them only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .layout import Layout
from .problem import PhaseMap


@dataclass(frozen=True)
class Terms:
    """The part of a `Problem` that positions decide; fields as there. Itself a position, which lowers to itself."""

    q: tuple[Tensor, ...] | None = None
    k: tuple[Tensor, ...] | None = None
    v: tuple[Tensor, ...] | None = None
    phases: tuple[Layout, ...] = ()
    phase_map: PhaseMap = ((0, 0, 0),)
    offset_q_pos: Tensor | None = None
    offset_k_pos: Tensor | None = None
    bias: Tensor | None = None
    bias_min: int = 0
    slope: Tensor | None = None
    rel_key: Tensor | None = None
    rel_key_min: int = 0
    rel_query: Tensor | None = None
    rel_query_min: int = 0
    qr: Tensor | None = None
    kr: Tensor | None = None

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        return self


# read here, since a tracer can't ask a class for its fields
_DEFAULTS = tuple((field.name, field.default) for field in dataclasses.fields(Terms))


class Position(Protocol):
    """What `attention(position=...)` takes."""

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        """Terms for q [B, H, T, D], k and v [B, G, S, D] at coordinates q_pos [B or 1, T], k_pos [B or 1, S]."""
        ...


def lower(
    position: Position | Sequence[Position] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
) -> Terms:
    """The joined terms of a position, of several, or of none."""
    if position is None:
        return Terms()
    if not isinstance(position, (list, tuple)):
        if not hasattr(position, "lower"):
            raise TypeError(f"position must be a position such as RelativeBias(...), got {type(position).__name__}")
        return position.lower(q, k, v, q_pos, k_pos)  # type: ignore[union-attr]
    joined: dict[str, Any] = {}
    for part in position:
        terms = lower(part, q, k, v, q_pos, k_pos)
        for name, default in _DEFAULTS:
            value = getattr(terms, name)
            if value is default or (name == "phase_map" and value == default):
                continue
            if name in joined:
                raise ValueError(f"position: two positions both give the term {name!r}")
            joined[name] = value
    return Terms(**joined)


def _check_table(owner: str, name: str, table: Any, dims: str) -> None:
    if not isinstance(table, Tensor) or table.dim() != dims.count(",") + 1 or not table.is_floating_point():
        what = f"{tuple(table.shape)} {table.dtype}" if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"{owner}: {name} must be a {dims} floating-point tensor, got {what}")


def _check_heads(owner: str, name: str, heads: int, q: Tensor) -> None:
    if heads not in (1, q.shape[1]):
        raise ValueError(f"{owner}: {name} must have {q.shape[1]} heads (or 1), got {heads}")


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
        _check_table("RelativeBias", "table", self.table, "[H, L]")

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        _check_heads("RelativeBias", "table", self.table.shape[0], q)
        return Terms(bias=self.table[None], bias_min=self.min_offset)


@functools.lru_cache(maxsize=64)
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
        _check_table("T5Bias", "weight", self.weight, "[n_buckets, H]")
        exact = self.weight.shape[0] // (4 if self.bidirectional else 2)
        if exact < 1 or self.max_distance <= exact:
            raise ValueError(
                f"T5Bias: max_distance must exceed the {exact} exact buckets of {self.weight.shape[0]},"
                f" got {self.max_distance}"
            )

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        _check_heads("T5Bias", "weight", self.weight.shape[1], q)
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
        _check_table("Alibi", "slopes", self.slopes, "[H]")

    @classmethod
    def for_heads(cls, heads: int) -> Alibi:
        """The paper's slopes: 2^(-8 i / n) for the power of two n at or below `heads`, then every other of 2n's."""
        n = 1 << (heads.bit_length() - 1)
        slopes = [2 ** (-8 * (i + 1) / n) for i in range(n)]
        slopes += [2 ** (-4 * (2 * i + 1) / n) for i in range(heads - n)]
        return cls(torch.tensor(slopes))

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        if self.slopes.shape[0] != q.shape[1]:
            raise ValueError(f"Alibi: slopes must have {q.shape[1]} heads, got {self.slopes.shape[0]}")
        return Terms(slope=-self.slopes)


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding: q and k are turned by their coordinates, so that q . k depends on k_pos - q_pos.

    Pair (d, d + D/2) turns by angle pos * base^(-2 d / D) (the half-split convention of GPT-NeoX and Llama).

    Args:
        base: of the frequencies.
        rope_parameters: transformers' dictionary (rope_type default, linear, dynamic, yarn, longrope, llama3, with
            rope_theta and, where the type needs it, max_position_embeddings) instead of base.

    Source: Su et al. 2021 (RoFormer), equation 34.
    """

    base: float = 10000.0
    rope_parameters: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.base > 0:
            raise ValueError(f"Rotary: base must be positive, got {self.base}")

    def frequencies(self, D: int, length: int, device: torch.device) -> tuple[Tensor, float]:
        """Angles per unit of coordinate, [D / 2] float32, and the factor on cos and sin."""
        if self.rope_parameters is None:
            exponent = torch.arange(0, D, 2, device=device, dtype=torch.float32) / D
            return self.base**-exponent, 1.0
        return _rope_frequencies(self.rope_parameters, D, length, device)

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        T, S, D = q.shape[2], k.shape[2], q.shape[3]
        if D % 2:
            raise ValueError(f"Rotary: the head dim must be even, got {D}")
        if q_pos is None:
            q_pos = torch.arange(S - T, S, device=q.device)[None]
        if k_pos is None:
            k_pos = torch.arange(S, device=q.device)[None]
        frequency, factor = self.frequencies(D, S, q.device)
        return Terms(q=(_rotate(q, q_pos, frequency, factor),), k=(_rotate(k, k_pos, frequency, factor),))


def _rotate(x: Tensor, position: Tensor, frequency: Tensor, factor: float) -> Tensor:
    # angles of long documents need float64 before their cosine: float32 loses 1e-3 at a million
    angle = (position[:, None, :, None].double() * frequency.double()).to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = angle.cos() * factor, angle.sin() * factor
    a, b = x.chunk(2, dim=3)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], 3).to(x.dtype)


def _rope_frequencies(parameters: Mapping[str, Any], D: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    theta = parameters.get("rope_theta", 10000.0)
    if kind == "default":
        return Rotary(theta).frequencies(D, length, device)
    if kind not in ROPE_INIT_FUNCTIONS:
        expected = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise ValueError(f"Rotary: rope_type must be one of {expected}, got {kind!r}")
    known = parameters.get("max_position_embeddings", parameters.get("original_max_position_embeddings", length))
    config = PreTrainedConfig()
    needed = {"head_dim": D, "hidden_size": D, "num_attention_heads": 1, "max_position_embeddings": known}
    for name, value in {**needed, "rope_parameters": dict(parameters)}.items():
        setattr(config, name, value)
    frequency, factor = ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=length)
    return frequency.to(device), factor
