"""Block-sparse relative-position attention across chunk boundaries, as drop-in torch modules."""

from . import modules
from .api import attention, attention_with_lse, merge
from .layout import (
    Blocks,
    Bridge,
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
    SelectedBlocks,
    TopKBlocks,
    Window,
)
from .position import (
    Alibi,
    Disentangled,
    DualChunk,
    RelativeBias,
    ReRoPE,
    Rotary,
    SelfExtend,
    Shaw,
    T5Bias,
    TransformerXL,
)

__version__ = "0.1.0"

__all__ = [
    "Alibi",
    "Blocks",
    "Bridge",
    "Causal",
    "Chunked",
    "Dilated",
    "Disentangled",
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
    "SelectedBlocks",
    "SelfExtend",
    "Shaw",
    "T5Bias",
    "TopKBlocks",
    "TransformerXL",
    "Window",
    "attention",
    "attention_with_lse",
    "merge",
    "modules",
]
