"""Rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Terms


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
