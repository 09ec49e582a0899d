"""The one error budget: error <= 2 * (error of the same-dtype eager computation + one rounding band).

Truth is the float64 reference, its gradients by autograd; the eager computation is the same reference run in the
inputs' own dtype, its gradients by the formulas of a kernel that keeps out and lse and not p; the band is the dtype's
epsilon times the size of the truth. The rule must hold in two norms: the largest element, and the root mean
square, so that a small error everywhere counts as well as a large one somewhere.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch, ops, reference
from .problem import TERMS, Gradients, Problem


def _norms(x: Tensor) -> tuple[float, float]:
    if not x.numel():
        return 0.0, 0.0
    return float(x.abs().max()), float(x.square().mean().sqrt())


@dataclass(frozen=True)
class Comparison:
    """Error and budget of one tensor, in the norm in which it uses most of its budget."""

    name: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        # a NaN compares false
        return self.error <= self.budget

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g}, budget {self.budget:.3g}"


def compare(name: str, got: Tensor, truth: Tensor, eager: Tensor) -> Comparison:
    """Holds one result against its truth; `eager`'s dtype sets the rounding band. Infinities must agree exactly."""
    if got.shape != truth.shape:
        raise AssertionError(f"{name}: expected shape {list(truth.shape)}, got {list(got.shape)}")
    if not torch.equal(got.isinf(), truth.isinf()):
        return Comparison(f"{name} (infinities)", float("inf"), 0.0)
    finite = truth.isfinite()
    got, truth, wide = (x.detach().double()[finite] for x in (got, truth, eager))
    eps = torch.finfo(eager.dtype).eps
    worst = Comparison(name, 0.0, 0.0)
    for error, other, size in zip(_norms(got - truth), _norms(wide - truth), _norms(truth), strict=True):
        found = Comparison(name, error, 2 * (other + eps * size))
        if not found.ok:
            return found
        if error > 0 and (worst.error == 0 or error / found.budget > worst.error / worst.budget):
            worst = found
    return worst


def check(name: str, got: Tensor, truth: Tensor, eager: Tensor) -> None:
    """`compare`, raising AssertionError over budget."""
    found = compare(name, got, truth, eager)
    if not found.ok:
        raise AssertionError(f"over the error budget: {found}")


def to_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """The problem with every floating tensor converted."""
    lists: dict[str, Any] = {n: tuple(t.detach().to(dtype) for t in getattr(problem, n)) for n in ("q", "k", "v")}
    terms: dict[str, Any] = {n: t.detach().to(dtype) for n in TERMS if (t := getattr(problem, n)) is not None}
    return dataclasses.replace(problem, **lists, **terms)


@dataclass(frozen=True)
class Results:
    """Everything a backend gives for a problem: outputs, and gradients for one pair of incoming gradients."""

    out: Tensor
    lse: Tensor
    gradients: Gradients | None

    def named(self) -> dict[str, Tensor]:
        tensors = {"out": self.out, "lse": self.lse}
        if self.gradients is not None:
            for name in ("q", "k", "v"):
                tensors |= {f"d{name}{i or ''}": t for i, t in enumerate(getattr(self.gradients, name))}
            tensors |= {f"d{n}": t for n in TERMS if (t := getattr(self.gradients, n)) is not None}
        return tensors


def run(problem: Problem, backend: str, dout: Tensor | None = None, dlse: Tensor | None = None) -> Results:
    """One backend's results through the public operator and its autograd; gradients when dout is given."""

    def leaf(t: Tensor) -> Tensor:
        # a view of a leaf keeps the strides of the original, which detach() and requires_grad_() share
        return t.detach().requires_grad_(dout is not None)

    lists: dict[str, Any] = {name: tuple(leaf(t) for t in getattr(problem, name)) for name in ("q", "k", "v")}
    terms: dict[str, Any] = {n: leaf(t) for n in TERMS if (t := getattr(problem, n)) is not None}
    out, lse = ops.attention(dataclasses.replace(problem, **lists, **terms), dispatch.check_name(backend))
    if dout is None:
        return Results(out, lse, None)
    leaves = [t for name in ("q", "k", "v") for t in lists[name]] + list(terms.values())
    into = [(out, dout)] if dlse is None else [(out, dout), (lse, dlse)]
    found = torch.autograd.grad([t for t, _ in into], leaves, [g for _, g in into])
    parts: dict[str, Any] = {}
    at = 0
    for name in ("q", "k", "v"):
        parts[name] = tuple(found[at : at + len(lists[name])])
        at += len(lists[name])
    parts |= zip(terms, found[at:], strict=True)
    return Results(out, lse, Gradients(**parts))


def verify(problem: Problem, backend: str, dout: Tensor | None = None, dlse: Tensor | None = None) -> list[Comparison]:
    """Every output and gradient of a backend against truth; those over budget have `ok` False."""
    got = run(problem, backend, dout, dlse).named()
    dtype = problem.q[0].dtype
    results = []
    for kind in (torch.float64, dtype):
        same = to_dtype(problem, kind)
        with torch.no_grad():
            out, lse = reference.attention(same)
        grads = None
        if dout is not None:
            differentiate = reference.gradients if kind == torch.float64 else reference.recomputed_gradients
            grads = differentiate(same, dout.to(kind), None if dlse is None else dlse.to(lse.dtype))
        results.append(Results(out, lse, grads).named())
    truth, eager = results
    if set(got) != set(truth):
        raise AssertionError(f"expected results {sorted(truth)}, got {sorted(got)}")
    # what the eager computation keeps in float32 (lse) still came from inputs and scores of the problem's dtype
    return [compare(name, got[name], truth[name], eager[name].to(dtype)) for name in truth]
