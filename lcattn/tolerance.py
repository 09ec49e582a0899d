"""The one error budget: error <= 2 * (error of the same-dtype eager computation + one rounding band).

Truth is the float64 reference, its gradients by autograd; the eager computation is the same reference run in the
inputs' own dtype, its gradients by the formulas of a kernel that keeps out and lse and not p; the band is the dtype's
epsilon times the size of the truth. Eager error is the worst of several runs that differ in how they round, since
one run is now and then too lucky to tell. The rule must hold in two norms: the largest element, and the root
mean square, so that a small error everywhere counts as well as a large one somewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

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


# a weight may underflow float32 without leaving an error above this, however small everything else is
_UNDERFLOW = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps


def compare(name: str, got: Tensor, truth: Tensor, *eagers: Tensor) -> Comparison:
    """Holds one result against its truth; the eager runs' worst error and their dtype's rounding are the budget.

    Infinities must agree exactly.
    """
    if got.shape != truth.shape:
        raise AssertionError(f"{name}: expected shape {list(truth.shape)}, got {list(got.shape)}")
    if not torch.equal(got.isinf(), truth.isinf()):
        return Comparison(f"{name} (infinities)", float("inf"), 0.0)
    if truth.isnan().any():
        raise AssertionError(f"{name}: the truth itself is NaN")
    finite = truth.isfinite()
    got, truth, *wide = (x.detach().double()[finite] for x in (got, truth, *eagers))
    eps = torch.finfo(eagers[0].dtype).eps
    worst = Comparison(name, 0.0, 0.0)
    for norm in (_largest, _root_mean_square):
        error = norm(got - truth)
        found = Comparison(name, error, 2 * (max(norm(w - truth) for w in wide) + eps * norm(truth) + _UNDERFLOW))
        if not found.ok:
            return found
        if error > 0 and (worst.error == 0 or error / found.budget > worst.error / worst.budget):
            worst = found
    return worst


def compare_all(
    got: dict[str, Tensor], truth: dict[str, Tensor], eagers: Iterable[dict[str, Tensor]]
) -> list[Comparison]:
    """`compare` for every result. Eager runs are taken from `eagers` only until the budget, which grows, holds."""
    if set(got) != set(truth):
        raise AssertionError(f"expected results {sorted(truth)}, got {sorted(got)}")
    taken = []
    comparisons: list[Comparison] = []
    for eager in eagers:
        taken.append(eager)
        comparisons = [compare(name, got[name], truth[name], *(run[name] for run in taken)) for name in truth]
        # no growth that rounding can bring would make it hold
        hopeless = len(taken) >= 8 and not all(c.error <= 8 * c.budget for c in comparisons)
        if hopeless or all(c.ok for c in comparisons):
            break
    return comparisons


class _OtherRounding(TorchDispatchMode):
    """Computes the same, rounding otherwise: matrix products sum in a random other order, a softmax works in base two.

    Kernels fold log2(e) into scores, and what is 1.44 times as large rounds more.
    """

    # where in the arguments the two factors stand
    _FACTORS = {  # noqa: RUF012 - never changed
        torch.ops.aten.mm.default: 0,
        torch.ops.aten.bmm.default: 0,
        torch.ops.aten.addmm.default: 1,
        torch.ops.aten.baddbmm.default: 1,
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (at := self._FACTORS.get(func)) is not None:
            left, right = args[at : at + 2]
            order = torch.randperm(left.shape[-1])
            args = (*args[:at], left[..., order], right[..., order, :], *args[at + 2 :])
        softmax = func in (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
        if softmax and args[0].dtype == torch.float32:
            score = args[0] * math.log2(math.e)
            weight = torch.exp2(score - score.amax(args[1], keepdim=True))
            found = weight / weight.sum(args[1], keepdim=True)
            if func is torch.ops.aten._safe_softmax.default:
                # in which a row of nothing is zero
                found = found.masked_fill((score == -math.inf).all(args[1], keepdim=True), 0.0)
            return found
        return func(*args, **(kwargs or {}))


# the eager error is the worst of this many runs of a whole model
_MODEL_RUNS = 32


def check(got: dict[str, Tensor], truth: dict[str, Tensor], eager: Callable[[], dict[str, Tensor]]) -> None:
    """Holds a module's results against their truth; AssertionError names those over budget.

    Args:
        got, truth: tensors by name, of the module under test and of the trusted one in float64.
        eager: runs the trusted one in the dtype of the one under test; called again, rounding otherwise, while the
            budget does not hold.
    """

    def runs() -> Iterator[dict[str, Tensor]]:
        yield eager()
        for _ in range(_MODEL_RUNS - 1):
            # torch's fused attention would be one operation, in which nothing can be done otherwise
            with _OtherRounding(), sdpa_kernel(SDPBackend.MATH):
                found = eager()
            yield found

    wrong = [str(c) for c in compare_all(got, truth, runs()) if not c.ok]
    if wrong:
        raise AssertionError(f"over the error budget: {'; '.join(wrong)}")


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


# the eager error is the worst of this many equivalent computations: one is now and then too lucky
_EAGER_RUNS = 256


def _eager_again(
    problem: Problem, dout: Tensor | None, dlse: Tensor | None, draw: torch.Generator
) -> dict[str, Tensor]:
    """The eager results once more, by a computation that differs in nothing but how it rounds.

    Features and keys stand in another order, and `out` rounds either way. In float32, where kernels fold scale and
    log2(e) into the queries and so hold scores 1.44 times as large, a factor is folded in here, scores of that size
    come from a constant added to all of them, which no weight notices, and the sum whose logarithm lse is has another
    last bit: by that a logarithm is off, however small it is.
    """
    D = problem.q[0].shape[3]
    qk, v = (torch.randperm(D, generator=draw) for _ in range(2))
    turn_table = problem.turn_table
    if turn_table is not None:
        # features that turn together stay pairs
        pairs = turn_table.shape[1] // 2
        pair = torch.randperm(pairs, generator=draw)
        qk = torch.cat([pair, pair + pairs, torch.randperm(D - 2 * pairs, generator=draw) + 2 * pairs])
        turn_table = turn_table[:, torch.cat([pair, pair + pairs])]
    fold, shift = 1.0, 0.0
    if problem.q[0].dtype == torch.float32:
        fold = float(problem.scale * (1 + torch.rand((), generator=draw)))
    if problem.q[0].dtype == torch.float32 and not problem.softcap:
        largest = max(float(score.abs().max()) for score in reference.scores(problem))
        shift = largest * (math.log2(math.e) - 1) * (1 - 2 * int(torch.randint(2, (), generator=draw)))
    changed: dict[str, Any] = {
        "q": tuple(t[..., qk] * fold for t in problem.q),
        "k": tuple(t[..., qk] for t in problem.k),
        "v": tuple(t[..., v] for t in problem.v),
        "scale": problem.scale / fold,
        "turn_table": turn_table,
    }
    if shift:
        changed["bias"] = shift + (problem.q[0].new_zeros(1, 1, 1) if problem.bias is None else problem.bias)
        changed["sink"] = None if problem.sink is None else problem.sink + shift
    for name in ("rel_key", "rel_query", "qr", "kr"):
        if (t := getattr(problem, name)) is not None:
            changed[name] = t[..., qk] * (fold if name in ("qr", "kr") else 1.0)
    again = _dense(
        dataclasses.replace(problem, **changed),
        functools.partial(reference.recomputed_gradients, rounding=draw),
        None if dout is None else dout[..., v],
        dlse,
        draw,
    )
    again["lse"] = again["lse"] - shift
    if fold != 1.0:
        last_bit = torch.finfo(torch.float32).eps * (1 - 2 * int(torch.randint(2, (), generator=draw)))
        again["lse"] = again["lse"] + last_bit
    for name, t in again.items():
        kind = name.rstrip("0123456789")
        if kind in ("out", "dv"):
            again[name] = t[..., v.argsort()]
        elif kind in ("dq", "dk", "drel_key", "drel_query", "dqr", "dkr"):
            again[name] = t[..., qk.argsort()] * (fold if kind in ("dq", "dqr", "dkr") else 1.0)
    return again


def verify(problem: Problem, backend: str, dout: Tensor | None = None, dlse: Tensor | None = None) -> list[Comparison]:
    """Every output and gradient of a backend against truth; those over budget have `ok` False.

    Outputs are computed twice where gradients are asked for: with a backward to follow, and for inference.
    """
    results = run(problem, backend, dout, dlse).named()
    if dout is not None:
        results |= {f"{name} (inference)": t for name, t in run(problem, backend).named().items()}
    dtype = problem.q[0].dtype
    narrow = to_dtype(problem, dtype)
    # Kernels hold scores in float32 whatever the dtype, so lse is held to what float32 makes of the same queries and
    # keys. The reference computes in the problem's dtype throughout.
    wide = narrow
    if dispatch.check_name(backend) != "reference":
        wide = to_dtype(problem.turned(), torch.promote_types(dtype, torch.float32))

    def twice(found: dict[str, Tensor]) -> dict[str, Tensor]:
        again = {} if dout is None else {f"{name} (inference)": found[name] for name in ("out", "lse")}
        return found | again

    def eagers() -> Iterator[dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(0)
        for run_number in range(_EAGER_RUNS):
            if run_number == 0:
                eager = _dense(narrow, reference.recomputed_gradients, dout, dlse)
                lse = eager["lse"] if wide.q[0].dtype == dtype else _dense(wide, reference.recomputed_gradients)["lse"]
            elif run_number == 1 and wide.q[0].dtype != dtype:
                # keys turned in the narrow dtype are off, for which rounded scores may make up by luck
                eager = _dense(wide, reference.recomputed_gradients, dout, dlse)
                lse = eager["lse"]
            else:
                eager = _eager_again(narrow, dout, dlse, draw)
                lse = eager["lse"] if wide.q[0].dtype == dtype else _eager_again(wide, None, None, draw)["lse"]
            yield twice({name: t.to(dtype) for name, t in eager.items()} | {"lse": lse})

    truth = _dense(to_dtype(problem, torch.float64), reference.gradients, dout, dlse)
    return compare_all(results, twice(truth), eagers())


def _dense(
    problem: Problem,
    differentiate: Callable[..., Gradients],
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    rounding: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The reference's results in the problem's dtype."""
    with torch.no_grad():
        out, lse = reference.attention(problem, rounding)
    if dout is None:
        return Results(out, lse, None).named()
    dlse = None if dlse is None else dlse.to(lse.dtype)
    return Results(out, lse, differentiate(problem, dout.to(out.dtype), dlse)).named()
