"""Layouts: who sees whom, as small frozen objects that know no sequence length.

They join with `|` and `&`. Patterns are two-sided: causality is `& Causal()`.
"""

from .base import And, Context, Joined, Layout, Not, Or
from .data import Blocks, Documents, FromBlockMask, FromMaskMod
from .patterns import Bridge, Causal, Chunked, Dilated, Full, Global, PerHead, Random, Window
from .selected import Scorer, SelectedBlocks, TopKBlocks
from .spec import from_spec

__all__ = [
    "And",
    "Blocks",
    "Bridge",
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
    "Scorer",
    "SelectedBlocks",
    "TopKBlocks",
    "Window",
    "from_spec",
]
