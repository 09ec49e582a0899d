"""The one error budget: error <= 2 * (error of the same-dtype eager computation + one rounding band).

Truth is the float64 reference, its gradients by autograd; the eager computation is the same reference run in the
inputs' own dtype, its gradients by the formulas of a kernel that keeps out and lse and not p; the band is the dtype's
epsilon times the size of the truth. Eager error is the worst of several runs that differ in the order of features,
since one run is now and then too lucky to tell. The rule must hold in two norms: the largest element, and the root
mean square, so that a small error everywhere counts as well as a large one somewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch, ops, reference
from .problem import TERMS, Gradients, Problem


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


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


def compare(name: str, got: Tensor, truth: Tensor, *eagers: Tensor) -> Comparison:
    """Holds one result against its truth; the eager runs' worst error and their dtype's rounding are the budget.

    Infinities must agree exactly.
    """
    if got.shape != truth.shape:
        raise AssertionError(f"{name}: expected shape {list(truth.shape)}, got {list(got.shape)}")
    if not torch.equal(got.isinf(), truth.isinf()):
        return Comparison(f"{name} (infinities)", float("inf"), 0.0)
    finite = truth.isfinite()
    got, truth, *wide = (x.detach().double()[finite] for x in (got, truth, *eagers))
    eps = torch.finfo(eagers[0].dtype).eps
    worst = Comparison(name, 0.0, 0.0)
    for norm in (_largest, _root_mean_square):
        error = norm(got - truth)
        found = Comparison(name, error, 2 * (max(norm(w - truth) for w in wide) + eps * norm(truth)))
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


def _reordered(problem: Problem, dout: Tensor | None, draw: torch.Generator) -> tuple[Problem, Tensor | None, _Orders]:
    """The same problem with its features in another order, which changes nothing but rounding."""
    D = problem.q[0].shape[3]
    qk, v = (torch.randperm(D, generator=draw) for _ in range(2))
    changed: dict[str, Any] = {n: tuple(t[..., qk] for t in getattr(problem, n)) for n in ("q", "k")}
    changed["v"] = tuple(t[..., v] for t in problem.v)
    # query . rel_key and key . rel_query are products of their own, but share one order here
    for name in ("rel_key", "rel_query", "qr", "kr"):
        if (t := getattr(problem, name)) is not None:
            changed[name] = t[..., qk]
    orders = {name: v.argsort() if name in ("out", "dv") else qk.argsort() for name in _BY_FEATURE}
    return dataclasses.replace(problem, **changed), None if dout is None else dout[..., v], orders


_Orders = dict[str, Tensor]
_BY_FEATURE = ("out", "dq", "dk", "dv", "drel_key", "drel_query", "dqr", "dkr")

# a single eager run is now and then too lucky to measure its own rounding by
_EAGER_RUNS = 3


def verify(problem: Problem, backend: str, dout: Tensor | None = None, dlse: Tensor | None = None) -> list[Comparison]:
    """Every output and gradient of a backend against truth; those over budget have `ok` False.

    Outputs are computed twice where gradients are asked for: with a backward to follow, and for inference.
    """
    results = run(problem, backend, dout, dlse).named()
    if dout is not None:
        results |= {f"{name} (inference)": t for name, t in run(problem, backend).named().items()}
    truth = _dense(to_dtype(problem, torch.float64), reference.gradients, dout, dlse)
    draw = torch.Generator().manual_seed(0)
    dtype = problem.q[0].dtype
    narrow = to_dtype(problem, dtype)
    eagers = [_dense(narrow, reference.recomputed_gradients, dout, dlse)]
    for _ in range(_EAGER_RUNS - 1):
        other, other_dout, orders = _reordered(narrow, dout, draw)
        found = _dense(other, reference.recomputed_gradients, other_dout, dlse)
        eagers.append(
            {
                n: t[..., orders[n.rstrip("0123456789")]] if n.rstrip("0123456789") in orders else t
                for n, t in found.items()
            }
        )
    comparisons = []
    for name, got in results.items():
        of = name.removesuffix(" (inference)")
        # what the eager computation keeps in float32 (lse) still came from inputs and scores of the problem's dtype
        comparisons.append(compare(name, got, truth[of], *(eager[of].to(dtype) for eager in eagers)))
    if {name.removesuffix(" (inference)") for name in results} != set(truth):
        raise AssertionError(f"expected results {sorted(truth)}, got {sorted(results)}")
    return comparisons


def _dense(
    problem: Problem, differentiate: Callable[..., Gradients], dout: Tensor | None, dlse: Tensor | None
) -> dict[str, Tensor]:
    """The reference's results in the problem's dtype."""
    with torch.no_grad():
        out, lse = reference.attention(problem)
    if dout is None:
        return Results(out, lse, None).named()
    dlse = None if dlse is None else dlse.to(lse.dtype)
    return Results(out, lse, differentiate(problem, dout.to(out.dtype), dlse)).named()
