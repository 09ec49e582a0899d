"""Positions: how distance changes a score. Each lowers to the terms of a `Problem`."""

from .base import Position, Terms, lower
from .bias import Alibi, RelativeBias, T5Bias
from .rotary import Rotary

__all__ = ["Alibi", "Position", "RelativeBias", "Rotary", "T5Bias", "Terms", "lower"]
