"""Translations of PTX instructions to C++ statements, one module for each family."""

from tests.gpu_emulation.instructions import (
    async_copy,
    compare,
    control,
    convert,
    floating,
    half,
    integer,
    matrix,
    memory,
    warp,
)
from tests.gpu_emulation.instructions.registry import translation

__all__ = [
    "async_copy",
    "compare",
    "control",
    "convert",
    "floating",
    "half",
    "integer",
    "matrix",
    "memory",
    "translation",
    "warp",
]
