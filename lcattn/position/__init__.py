"""Positions: how distance changes a score. Each lowers to the terms of a `Problem`."""

from .base import Position, Terms, lower
from .bias import Alibi, RelativeBias, T5Bias
from .content import Disentangled, Shaw, TransformerXL
from .extend import DualChunk, ReRoPE, SelfExtend
from .rotary import Rotary

__all__ = [
    "Alibi",
    "Disentangled",
    "DualChunk",
    "Position",
    "ReRoPE",
    "RelativeBias",
    "Rotary",
    "SelfExtend",
    "Shaw",
    "T5Bias",
    "Terms",
    "TransformerXL",
    "lower",
]
