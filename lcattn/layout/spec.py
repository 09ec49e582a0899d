"""From a spec string back to its layout."""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import KINDS, Layout
from .data import CALLABLES, FromMaskMod

_ALLOWED = (
    ast.Expression,
    ast.BinOp,
    ast.BitAnd,
    ast.BitOr,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Load,
    ast.Tuple,
)
_LITERAL = (ast.Constant, ast.UnaryOp, ast.USub)


def from_spec(spec: str, tensors: Sequence[Tensor] = ()) -> Layout:
    """The layout that a spec string names; each `@` in it stands for the next of `tensors`."""
    return _evaluate(spec, tuple(tensors)) if tensors else _from_plain_spec(spec)


@functools.lru_cache(maxsize=1024)
def _from_plain_spec(spec: str) -> Layout:
    return _evaluate(spec, ())


def _evaluate(spec: str, tensors: tuple[Tensor, ...]) -> Layout:
    pieces = spec.split("@")
    if len(pieces) != len(tensors) + 1:
        raise ValueError(f"layout spec {spec!r} needs {len(pieces) - 1} tensors, got {len(tensors)}")
    source = pieces[0] + "".join(f"_tensor({i})" + piece for i, piece in enumerate(pieces[1:]))
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"layout spec {spec!r} is not a layout expression") from error
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED + _LITERAL):
            raise ValueError(f"layout spec {spec!r}: {type(node).__name__} is not allowed")
    names: dict[str, Any] = {**KINDS, "_tensor": tensors.__getitem__}
    names |= {"FromMaskMod": _from_mask_mod, "_callable": CALLABLES.__getitem__}
    unknown = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(names)
    if unknown:
        raise ValueError(f"layout spec {spec!r}: unknown {sorted(unknown)}, expected one of {sorted(KINDS)}")
    try:
        layout = eval(compile(tree, "<layout spec>", "eval"), {"__builtins__": {}}, names)
    except KeyError:
        raise ValueError(f"layout spec {spec!r} names a Python function that this process does not hold") from None
    except TypeError as error:
        raise TypeError(f"layout spec {spec!r}: {str(error).replace('.__init__', '')}") from None
    if not isinstance(layout, Layout):
        raise ValueError(f"layout spec {spec!r} gives {type(layout).__name__}, expected a layout")
    return layout


def _from_mask_mod(number: int) -> FromMaskMod:
    return FromMaskMod(CALLABLES[number])


_from_mask_mod.__qualname__ = FromMaskMod.__name__
