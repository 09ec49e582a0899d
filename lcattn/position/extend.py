"""Reading past the trained length: rotary positions remapped so that no distance exceeds what training saw.

Each splits the visible pairs into phases by distance or by chunk, and turns queries and keys to other coordinates in
each. One softmax spans all phases, so these are exact, and trainable. Coordinates count from the start of the text:
chunks and groups begin there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..layout import Chunked, Layout, Not, Window
from ..layout.base import check_int
from .rotary import Rotary, Turning


def _check(owner: str, rotary: Any, two_sided: Any, what: str, reach: int) -> None:
    """A rotary, a truth value, and a reach that the model was trained for, as far as the rotary knows."""
    if not isinstance(rotary, Rotary):
        raise ValueError(f"{owner}: rotary must be a Rotary, got {rotary!r}")
    if not isinstance(two_sided, bool):
        raise ValueError(f"{owner}: two_sided must be True or False, got {two_sided!r}")
    trained = (rotary.rope_parameters or {}).get("max_position_embeddings")
    if trained is not None and reach > trained:
        raise ValueError(f"{owner}: {what} must be at most the trained length, {trained}, got {reach}")


@dataclass(frozen=True)
class DualChunk(Turning):
    """Distances inside a chunk and to the chunk before are kept; earlier chunks all stand just beyond them.

    With s = chunk and w = local, key j is turned to j mod s, and query i

        to i mod s                          for keys of its own chunk
        to min(i mod s + s, s + w - 1)      for keys of the chunk before
        to s + w - 1                        for keys of all earlier chunks

    so that neighbours across a chunk's edge keep their distance up to w, and no distance exceeds s + w - 1. Two-sided,
    chunks after are the mirror image: max(i mod s - s, -w), then -w; else their keys are not seen.

    Args:
        chunk, local: s and w, 1 <= w <= s; s + w at most the trained length.
        rotary: frequencies of the model.
        two_sided: whether keys of later chunks are read.

    Source: An et al. 2024 (Training-free long-context scaling of large language models), section 3, equations 2 to 7.
    """

    chunk: int
    local: int
    rotary: Rotary = field(default_factory=Rotary)
    two_sided: bool = False

    def __post_init__(self) -> None:
        check_int("DualChunk", "chunk", self.chunk, 1)
        check_int("DualChunk", "local", self.local, 1)
        if self.local > self.chunk:
            raise ValueError(f"DualChunk: local must be at most chunk, {self.chunk}, got {self.local}")
        _check("DualChunk", self.rotary, self.two_sided, "chunk + local", self.chunk + self.local)

    @property
    def frequencies_of(self) -> Rotary:
        return self.rotary

    def reach(self, length: Callable[[], int]) -> int:
        return self.chunk + self.local

    def queries(self, i: Tensor) -> list[Tensor]:
        s, w = self.chunk, self.local
        inside = torch.remainder(i, s)
        before = [inside, (inside + s).clamp(max=s + w - 1), torch.full_like(inside, s + w - 1)]
        after = [(inside - s).clamp(min=-w), torch.full_like(inside, -w)]
        return before + after if self.two_sided else before

    def keys(self, j: Tensor) -> list[Tensor | None]:
        return [torch.remainder(j, self.chunk)]

    def phases(self) -> dict[str, Any]:
        s = self.chunk
        own = Chunked(s, 0, 0)
        parts: tuple[Layout, ...] = (own, Chunked(s, 1, 0) & Not(own), Not(Chunked(s, 1, None)))
        if self.two_sided:
            parts = (*parts, Chunked(s, 0, 1) & Not(own), Not(Chunked(s, None, 1)))
        return {"phases": parts, "phase_map": tuple((f, 0, 0) for f in range(len(parts)))}


@dataclass(frozen=True)
class SelfExtend(Turning):
    """Distances below the window are kept; farther ones are counted in groups.

    With G = group and W = window: |i - j| < W keeps query i and key j; beyond, key j is turned to j // G and query i
    to i // G + W - W // G, so that no distance exceeds (length - 1) // G + W - W // G. Two-sided, keys after are the
    mirror image: i // G - W + W // G; else keys at W or more after their query are not seen.

    Args:
        group, window: G and W.
        rotary: frequencies of the model.
        two_sided: whether keys far after their query are read.

    Source: Jin et al. 2024 (LLM maybe LongLM: Self-Extend), section 3.2, equations 3 and 4.
    """

    group: int
    window: int
    rotary: Rotary = field(default_factory=Rotary)
    two_sided: bool = False

    def __post_init__(self) -> None:
        check_int("SelfExtend", "group", self.group, 1)
        check_int("SelfExtend", "window", self.window, 1)
        _check("SelfExtend", self.rotary, self.two_sided, "window", self.window)

    @property
    def frequencies_of(self) -> Rotary:
        return self.rotary

    def reach(self, length: Callable[[], int]) -> int:
        n = length()
        return min(n, n // self.group + self.window)

    def queries(self, i: Tensor) -> list[Tensor]:
        shift = self.window - self.window // self.group
        group = torch.div(i, self.group, rounding_mode="floor")
        return [i, group + shift, group - shift] if self.two_sided else [i, group + shift]

    def keys(self, j: Tensor) -> list[Tensor | None]:
        return [j, torch.div(j, self.group, rounding_mode="floor")]

    def phases(self) -> dict[str, Any]:
        return _by_distance(self.window, self.two_sided)


@dataclass(frozen=True)
class ReRoPE(Turning):
    """Distances below the window are kept; all farther ones count as the window.

    With W = window: |i - j| < W keeps query i and key j; beyond, key j is as it is and query i is turned to W, so that
    no distance exceeds W. Two-sided, keys after are the mirror image: -W; else keys at W or more after their query are
    not seen.

    Args:
        window: W, less than the trained length.
        rotary: frequencies of the model.
        two_sided: whether keys far after their query are read.

    Source: Su 2023 (Rectified Rotary Position Embeddings, https://github.com/bojone/rerope); no equation numbers.
    """

    window: int
    rotary: Rotary = field(default_factory=Rotary)
    two_sided: bool = False
    absolute = False

    def __post_init__(self) -> None:
        check_int("ReRoPE", "window", self.window, 1)
        _check("ReRoPE", self.rotary, self.two_sided, "window", self.window)

    @property
    def frequencies_of(self) -> Rotary:
        return self.rotary

    def reach(self, length: Callable[[], int]) -> int:
        return min(length(), self.window)

    def queries(self, i: Tensor) -> list[Tensor]:
        edge = torch.full_like(i, self.window)
        return [i, edge, -edge] if self.two_sided else [i, edge]

    def keys(self, j: Tensor) -> list[Tensor | None]:
        return [j, None]

    def phases(self) -> dict[str, Any]:
        return _by_distance(self.window, self.two_sided)


def _by_distance(window: int, two_sided: bool) -> dict[str, Any]:
    """Phases |o| < window, o <= -window, and two-sided o >= window."""
    reach = window - 1
    phases: tuple[Layout, ...] = (Window(reach, reach), Not(Window(reach, None)))
    phase_map: tuple[tuple[int, int, int], ...] = ((0, 0, 0), (1, 1, 0))
    if two_sided:
        phases, phase_map = (*phases, Not(Window(None, reach))), (*phase_map, (2, 1, 0))
    return {"phases": phases, "phase_map": phase_map}
