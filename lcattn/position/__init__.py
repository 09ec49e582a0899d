"""Positions: how distance changes a score. Each lowers to the terms of a `Problem`."""

from .base import Position, Terms, lower
from .bias import Alibi, RelativeBias, T5Bias
from .content import Disentangled, Shaw, TransformerXL
from .rotary import Rotary

__all__ = [
    "Alibi",
    "Disentangled",
    "Position",
    "RelativeBias",
    "Rotary",
    "Shaw",
    "T5Bias",
    "Terms",
    "TransformerXL",
    "lower",
]
