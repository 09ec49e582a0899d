"""What every position is: the terms it lowers to, how several join, and the checks they share.

A position is anything with `lower(q, k, v, q_pos, k_pos) -> Terms`; several are given as a sequence, and each term may
then come from one of them only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from ..layout import Layout
from ..ops import is_unwatched
from ..problem import PhaseMap

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Terms:
    """The part of a `Problem` that positions decide; fields as there. Itself a position, which lowers to itself."""

    q: tuple[Tensor, ...] | None = None
    k: tuple[Tensor, ...] | None = None
    v: tuple[Tensor, ...] | None = None
    phases: tuple[Layout, ...] = ()
    phase_map: PhaseMap = ((0, 0, 0),)
    offset_q_pos: Tensor | None = None
    offset_k_pos: Tensor | None = None
    turn_table: Tensor | None = None
    turn_at: Tensor | None = None
    bias: Tensor | None = None
    bias_min: int = 0
    slope: Tensor | None = None
    rel_key: Tensor | None = None
    rel_key_min: int = 0
    rel_query: Tensor | None = None
    rel_query_min: int = 0
    qr: Tensor | None = None
    kr: Tensor | None = None

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        return self


# read here, since a tracer can't ask a class for its fields
_DEFAULTS = tuple((field.name, field.default) for field in dataclasses.fields(Terms))


class Position(Protocol):
    """What `attention(position=...)` takes."""

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        """Terms for q [B, H, T, D], k and v [B, G, S, D] at coordinates q_pos [B or 1, T], k_pos [B or 1, S]."""
        ...


def lower(
    position: Position | Sequence[Position] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
) -> Terms:
    """The joined terms of a position, of several, or of none."""
    if position is None:
        return Terms()
    if not isinstance(position, (list, tuple)):
        if isinstance(position, (type, str)) or not hasattr(position, "lower"):
            got = f"the class {position.__name__}" if isinstance(position, type) else type(position).__name__
            raise TypeError(f"position must be a position such as RelativeBias(...), got {got}")
        return position.lower(q, k, v, q_pos, k_pos)  # type: ignore[union-attr]
    joined: dict[str, Any] = {}
    for part in position:
        terms = lower(part, q, k, v, q_pos, k_pos)
        for name, default in _DEFAULTS:
            value = getattr(terms, name)
            if value is default or (name == "phase_map" and value == default):
                continue
            if name in joined:
                raise ValueError(f"position: two positions both give the term {name!r}")
            joined[name] = value
    return Terms(**joined)


def remembered(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keeps the latest results of a function; for training too, which can save no tensor made in inference mode.

    What is made while a compiler or a mode watches is its own: while a model is exported, tensors have no values.
    """

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        kept = functools.lru_cache(maxsize)(torch.inference_mode(False)(make))

        @functools.wraps(make)
        def recall(*args: P.args, **kwargs: P.kwargs) -> R:
            return kept(*args, **kwargs) if is_unwatched(()) else make(*args, **kwargs)  # type: ignore[arg-type]

        return recall

    return decorate


def check_table(owner: str, name: str, table: Any, dims: str) -> None:
    if not isinstance(table, Tensor) or table.dim() != dims.count(",") + 1 or not table.is_floating_point():
        what = f"{tuple(table.shape)} {table.dtype}" if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"{owner}: {name} must be a {dims} floating-point tensor, got {what}")


def check_offset(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 31) < value < 1 << 31:
        raise ValueError(f"{owner}: {name} must be an integer of 32 bits, got {value!r}")


def check_positive(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{owner}: {name} must be a positive number, got {value!r}")


def check_heads(owner: str, name: str, heads: int, q: Tensor) -> None:
    if heads not in (1, q.shape[1]):
        raise ValueError(f"{owner}: {name} must have {q.shape[1]} heads (or 1), got {heads}")
