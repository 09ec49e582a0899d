"""Layouts: who sees whom, as small frozen objects that know no sequence length.

They join with `|` and `&`. Patterns are two-sided: causality is `& Causal()`.
"""

from .base import And, Context, Joined, Layout, Not, Or
from .data import Blocks, Documents, FromBlockMask, FromMaskMod
from .patterns import Causal, Chunked, Dilated, Full, Global, PerHead, Random, Window
from .spec import from_spec

__all__ = [
    "And",
    "Blocks",
    "Causal",
    "Chunked",
    "Context",
    "Dilated",
    "Documents",
    "FromBlockMask",
    "FromMaskMod",
    "Full",
    "Global",
    "Joined",
    "Layout",
    "Not",
    "Or",
    "PerHead",
    "Random",
    "Window",
    "from_spec",
]
