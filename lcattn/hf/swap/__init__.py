"""Attention modules of transformers that bypass its attention interface, and the class that replaces each.

A model is converted by giving its attention modules another class, derived from their own: parameters, names, hooks and
configuration stay, and giving the class back restores the model. Each class has the name of the one it replaces, since
transformers looks classes up by name (saved architectures, `_no_split_modules`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=type[nn.Module])

# the class of a transformers module -> ours, derived from it, with the forward of its own; filled by `find`
SWAPS: dict[type[nn.Module], type[nn.Module]] = {}

# folder of transformers.models -> our module, imported when a model of that folder is first seen
_FOLDERS = {
    "big_bird": "bigbird",
    "bigbird_pegasus": "bigbird",
    "deberta": "deberta",
    "deberta_v2": "deberta",
    "led": "longformer",
    "longformer": "longformer",
    "longt5": "longt5",
    "xlnet": "xlnet",
}


def replaces(original: type[nn.Module]) -> Callable[[Module], Module]:
    """Enters the class it decorates, derived from `original`, into `SWAPS`."""

    def enter(ours: Module) -> Module:
        SWAPS[original] = ours
        return ours

    return enter


def find(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that replaces `kind`, exactly that class, or None."""
    prefix, _, folder = kind.__module__.rpartition(".")[0].rpartition(".")
    name = f"{__name__}.{_FOLDERS.get(folder)}"
    if prefix == "transformers.models" and folder in _FOLDERS and importlib.util.find_spec(name) is not None:
        importlib.import_module(name)
    return SWAPS.get(kind)


def original(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that `kind` replaces, None if it is none of ours."""
    return next((theirs for theirs, ours in SWAPS.items() if ours is kind), None)
