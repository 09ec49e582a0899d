"""Block-sparse relative-position attention across chunk boundaries, as drop-in torch modules."""

from . import modules
from .api import attention, attention_with_lse, merge
from .layout import (
    Blocks,
    Causal,
    Chunked,
    Dilated,
    Documents,
    FromBlockMask,
    FromMaskMod,
    Full,
    Global,
    Layout,
    PerHead,
    Random,
    Window,
)
from .position import Alibi, DualChunk, RelativeBias, ReRoPE, Rotary, SelfExtend, T5Bias

__version__ = "0.1.0"

__all__ = [
    "Alibi",
    "Blocks",
    "Causal",
    "Chunked",
    "Dilated",
    "Documents",
    "DualChunk",
    "FromBlockMask",
    "FromMaskMod",
    "Full",
    "Global",
    "Layout",
    "PerHead",
    "Random",
    "ReRoPE",
    "RelativeBias",
    "Rotary",
    "SelfExtend",
    "T5Bias",
    "Window",
    "attention",
    "attention_with_lse",
    "merge",
    "modules",
]
