"""What every layout is: the base class, the joins, and the registry of constructors.

A layout is defined by `visible(q_pos, k_pos, ctx)`, a broadcasting predicate on integer coordinates. `bounds` answers
the same question for whole rectangles of coordinates, so that `lowering.py` can class blocks without looking at their
elements, and `tile_key` names rectangles that must have equal bit patterns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..lowering import BlockTable, Region

Bounds = tuple[Tensor, Tensor]

# tile keys of rectangles that are full or empty, outside the range of any coordinate
ALL_KEY, NONE_KEY = 1 << 40, -(1 << 40)


@dataclass(frozen=True)
class Context:
    """What a layout may ask beside coordinates: batch, head, lengths and the plain indices, all broadcastable."""

    b: Tensor | int
    h: Tensor | int
    T: int
    S: int
    q_idx: Tensor
    k_idx: Tensor


class Layout:
    """Base of all layouts.

    Attributes:
        spec: a string that `from_spec` turns back into this layout, given `tensors`.
        tensors: tensors the layout reads (`Documents`, `Blocks`); they travel beside the spec.
        per_batch, per_head: whether the pattern differs between batch rows or heads.
        by_index: whether the pattern reads plain indices or lengths, not only coordinates.
        scattered: whether a query may see blocks that do not form a few runs, as a rule.
        by_content: whether the pattern depends on q and k and must first be selected (`TopKBlocks`).
    """

    spec: str
    tensors: tuple[Tensor, ...] = ()
    per_batch: bool = False
    per_head: bool = False
    by_index: bool = False
    scattered: bool = False
    by_content: bool = False

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        """Whether query coordinates see key coordinates: bool, of the broadcast shape of all arguments."""
        raise NotImplementedError

    def bounds(self, region: Region) -> Bounds:
        """For each rectangle: (some pair may be visible, every pair is visible). Either may err to (True, False)."""
        raise NotImplementedError

    def tile_key(self, region: Region) -> list[Tensor]:
        """Integers that agree only where the rectangles' bit patterns agree (coordinates stepping by one)."""
        some, every = self.bounds(region)
        return [torch.where(every, ALL_KEY, torch.where(some, key, NONE_KEY)) for key in self._mixed_key(region)]

    def _mixed_key(self, region: Region) -> list[Tensor]:
        """`tile_key` of rectangles that are neither empty nor full; by default no two agree."""
        return [region.identity]

    def check(self, B: int, H: int, T: int, S: int) -> None:
        """Raises ValueError if the layout cannot serve these sizes."""

    def own_sizes(self) -> tuple[int, int]:
        """B and H as the layout's tensors or parts say them, 1 where they say nothing."""
        return 1, 1

    def map_leaves(self, change: Callable[[Layout], Layout]) -> Layout:
        """The same expression with every layout that is not made of layouts changed."""
        return change(self)

    def block_table(
        self,
        T: int,
        S: int,
        block_q: int = 64,
        block_k: int = 64,
        device: torch.device | str = "cpu",
        batch: int = 1,
        heads: int = 1,
    ) -> BlockTable:
        """The lowered table for T queries that stand at the end of S keys; cost O(entries) in time and memory.

        Args:
            block_q, block_k: queries and keys in a block.
            batch, heads: B and H; at 1, as many as the layout's own tensors or parts say.

        Raises:
            ValueError: a size is no positive integer, or the layout is for other sizes.
        """
        from ..lowering import lower

        given = {"T": T, "S": S, "block_q": block_q, "block_k": block_k, "batch": batch, "heads": heads}
        for name, value in given.items():
            check_int("block_table", name, value, 1)
        B, H = (own if asked == 1 else asked for own, asked in zip(self.own_sizes(), (batch, heads), strict=True))
        try:
            self.check(B, H, T, S)
        except ValueError as error:
            raise ValueError(f"block_table of T={T}, S={S}, batch={B}, heads={H}: {error}") from None
        return lower(self, T=T, S=S, batch=B, heads=H, block_q=block_q, block_k=block_k).to(device)

    def __and__(self, other: Layout) -> Layout:
        return join(And, self, other)

    def __or__(self, other: Layout) -> Layout:
        return join(Or, self, other)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Layout)
            and self.spec == other.spec
            and ([id(t) for t in self.tensors] == [id(t) for t in other.tensors])
        )

    def __hash__(self) -> int:
        return hash(self.spec)

    def __reduce__(self) -> tuple[Any, ...]:
        # made anew where it is loaded or copied, since a spec may name functions that only this process holds
        made_of: Any = self
        return type(self), tuple(getattr(self, f.name) for f in fields(made_of))

    def __repr__(self) -> str:
        return self.spec

    def __str__(self) -> str:
        return self.spec


AnyLayout = TypeVar("AnyLayout", bound="Layout")
KINDS: dict[str, Callable[..., Layout]] = {}


def register(cls: type[AnyLayout]) -> type[AnyLayout]:
    """Makes a layout known to `from_spec` under its class name."""
    KINDS[cls.__name__] = cls
    return cls


def set_fields(layout: Layout, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(layout, name, value)


def check_int(owner: str, name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{owner}: {name} must be an integer >= {low}, got {value!r}")


def interval_bounds(low: Tensor, high: Tensor, first: int | None, last: int | None) -> Bounds:
    """Bounds of first <= x <= last for x ranging over [low, high]."""
    some = torch.ones_like(low, dtype=torch.bool)
    every = some
    if last is not None:
        some, every = some & (low <= last), every & (high <= last)
    if first is not None:
        some, every = some & (high >= first), every & (low >= first)
    return some, every


class Joined(Layout):
    """Shared plumbing of layouts made of layouts."""

    parts: tuple[Layout, ...]
    sign: str

    def _finish(self, spec: str) -> None:
        tensors = tuple(t for part in self.parts for t in part.tensors)
        set_fields(self, spec=spec, tensors=tensors, by_index=any(p.by_index for p in self.parts))
        set_fields(self, per_batch=any(p.per_batch for p in self.parts), per_head=any(p.per_head for p in self.parts))
        set_fields(self, by_content=any(p.by_content for p in self.parts))
        set_fields(self, scattered=any(p.scattered for p in self.parts))

    def own_sizes(self) -> tuple[int, int]:
        batches, heads = zip(*(part.own_sizes() for part in self.parts), strict=True)
        return max(batches), max(heads)

    def map_leaves(self, change: Callable[[Layout], Layout]) -> Layout:
        kind: Any = type(self)
        return kind(tuple(part.map_leaves(change) for part in self.parts))

    def check(self, B: int, H: int, T: int, S: int) -> None:
        for part in self.parts:
            part.check(B, H, T, S)

    def tile_key(self, region: Region) -> list[Tensor]:
        return [key for part in self.parts for key in part.tile_key(region)]


def join(kind: Any, a: Layout, b: Layout) -> Layout:
    if not isinstance(b, Layout):
        raise TypeError(f"a layout joins with a layout, got {type(b).__name__}")
    parts = [p for x in (a, b) for p in (x.parts if isinstance(x, kind) else (x,))]
    return kind(tuple(parts))


@dataclass(frozen=True, repr=False, eq=False)
class And(Joined):
    """Visible where every part is."""

    parts: tuple[Layout, ...] = field(default=())

    def __post_init__(self) -> None:
        self._finish("(" + " & ".join(p.spec for p in self.parts) + ")")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return functools.reduce(torch.logical_and, (p.visible(q_pos, k_pos, ctx) for p in self.parts))

    def bounds(self, region: Region) -> Bounds:
        somes, everys = zip(*(p.bounds(region) for p in self.parts), strict=True)
        return functools.reduce(torch.logical_and, somes), functools.reduce(torch.logical_and, everys)


@dataclass(frozen=True, repr=False, eq=False)
class Or(Joined):
    """Visible where any part is."""

    parts: tuple[Layout, ...] = field(default=())

    def __post_init__(self) -> None:
        self._finish("(" + " | ".join(p.spec for p in self.parts) + ")")

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return functools.reduce(torch.logical_or, (p.visible(q_pos, k_pos, ctx) for p in self.parts))

    def bounds(self, region: Region) -> Bounds:
        somes, everys = zip(*(p.bounds(region) for p in self.parts), strict=True)
        return functools.reduce(torch.logical_or, somes), functools.reduce(torch.logical_or, everys)


@register
@dataclass(frozen=True, repr=False, eq=False)
class Not(Layout):
    """Visible where the other layout is not: what is left for a second phase."""

    part: Layout

    def __post_init__(self) -> None:
        set_fields(self, spec=f"Not({self.part.spec})", tensors=self.part.tensors, by_index=self.part.by_index)
        set_fields(self, per_batch=self.part.per_batch, per_head=self.part.per_head)
        set_fields(self, by_content=self.part.by_content, scattered=self.part.scattered)

    def own_sizes(self) -> tuple[int, int]:
        return self.part.own_sizes()

    def map_leaves(self, change: Callable[[Layout], Layout]) -> Layout:
        return Not(self.part.map_leaves(change))

    def check(self, B: int, H: int, T: int, S: int) -> None:
        self.part.check(B, H, T, S)

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        return ~self.part.visible(q_pos, k_pos, ctx)

    def bounds(self, region: Region) -> Bounds:
        some, every = self.part.bounds(region)
        return ~every, ~some

    def tile_key(self, region: Region) -> list[Tensor]:
        return self.part.tile_key(region)
