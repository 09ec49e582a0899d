"""The project's GPU kernels, executed: drawn cases within the error budget, on every route there is without a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lcattn.triton_kernels import forward as triton_forward

import lcattn
from lcattn import cases, dispatch, inputs, tolerance
from lcattn.cases import Case, Draw, Shape
from tests.conftest import SEED
from tests.gpu_emulation import sweep
from tests.gpu_emulation.backends import EmulatedCuda, EmulatedTriton
from tests.gpu_emulation.interpret import interpret

# a CUDA kernel for each dtype and head dim serves every case, Triton compiles nearly every case anew
N_CUDA, N_TRITON = 60, 16


def _accepted(backend: EmulatedCuda | EmulatedTriton, wanted: int) -> list[int]:
    """Cases that a backend takes, spread over all that are drawn."""
    makers = sweep.draw_cases(SEED)
    order = torch.randperm(len(makers), generator=torch.Generator().manual_seed(SEED)).tolist()
    found: list[int] = []
    for index in order:
        if len(found) < wanted and backend.reject_reason(makers[index]().problem, differentiable=False) is None:
            found.append(index)
    return found


@pytest.mark.parametrize(
    "backend, wanted", [(EmulatedCuda(), N_CUDA), (EmulatedTriton(), N_TRITON)], ids=lambda b: getattr(b, "name", "")
)
def test_drawn_cases_within_the_budget_and_clean(backend: EmulatedCuda | EmulatedTriton, wanted: int) -> None:
    # every other one without the checker, which is how they run fastest, in an order of its own
    jobs = [(index, backend.name, at, at % 2 == 0) for at, index in enumerate(_accepted(backend, wanted), start=2)]
    outcomes = list(sweep.run_all(SEED, jobs))
    assert len(outcomes) == wanted and all(o.rejected is None for o in outcomes)
    assert not [f"{o.case}: {'; '.join(o.over)}" for o in outcomes if o.over]
    assert all(o.instructions > 0 for o in outcomes)


def test_report_is_of_these_kernels_and_clean() -> None:
    report = json.loads(sweep.REPORT.read_text())
    assert report["kernels"] == sweep.kernels_hash(), "kernels changed: run `make emulate` and commit its report"
    assert set(report["backends"]) == set(sweep.BACKENDS)
    for name, found in report["backends"].items():
        assert found["cases"] > 0 and not found["over"], name
        accounted = found["cases"] + sum(found["rejected"].values())
        assert accounted == len(sweep.draw_cases(report["seed"])), name


def _case(seed: int, variant: str = "plain", D: int = 64, dtype: torch.dtype = torch.bfloat16) -> Case:
    return cases.make(Draw(seed), "chunked", "bias", variant, Shape(1, 4, 2, 130, 150, D), dtype)


@pytest.fixture(params=[EmulatedCuda, EmulatedTriton], ids=lambda b: b.name)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> EmulatedCuda | EmulatedTriton:
    backend = request.param()
    monkeypatch.setitem(dispatch.BACKENDS, backend.name, backend)
    return backend


def test_every_thread_order_gives_equal_bits(emulated: EmulatedCuda | EmulatedTriton, seed: int) -> None:
    problem = _case(seed).problem
    results = []
    for order in ("forward", "reverse", seed + 2):
        emulated.order, emulated.check = order, False
        out, lse, _ = emulated.forward(problem, differentiable=False)
        results.append((out, lse))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_a_planted_defect_of_the_tables_is_found(
    emulated: EmulatedCuda | EmulatedTriton, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # entries of which every one is reached
    table = Draw(seed).normal(1, 4, 200, std=1.5)
    problem = dataclasses.replace(_case(seed).problem, bias=table, bias_min=-100)
    assert all(c.ok for c in tolerance.verify(problem, emulated.name))

    def off_by_one(*args: Any, **options: Any) -> tuple[object, inputs.KernelInputs]:
        table, found = inputs.kernel_inputs(*args, **options)
        return table, found._replace(bias_min=found.bias_min + 1)

    monkeypatch.setattr("lcattn.gpu.kernel_inputs", off_by_one)
    assert not all(c.ok for c in tolerance.verify(problem, emulated.name))


def test_triton_interpreted_equals_emulated(seed: int) -> None:
    problem = _case(seed, dtype=torch.float16).problem
    emulated = EmulatedTriton()
    out, lse, _ = emulated.forward(problem, differentiable=False)
    _, given = inputs.kernel_inputs(problem.turned())
    results = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
    grid, values = triton_forward.arguments(given, *results)
    interpret(triton_forward._forward, grid=grid, **values)
    truth = tolerance.to_dtype(problem, torch.float64)
    expected = lcattn.reference.attention(truth)
    eager = lcattn.reference.attention(problem)
    for name, got in (("emulated", (out, lse)), ("interpreted", results)):
        for part, value, right, near in zip(("out", "lse"), got, expected, eager, strict=True):
            compared = tolerance.compare(f"{name} {part}", value, right, near.to(problem.q[0].dtype))
            assert compared.ok, str(compared)


REJECTED: dict[str, tuple[Callable[[Case], Case], str]] = {
    "float32": (lambda c: dataclasses.replace(c, problem=tolerance.to_dtype(c.problem, torch.float32)), "dtype is"),
    "dropout": (
        lambda c: dataclasses.replace(
            c, problem=dataclasses.replace(c.problem, dropout=0.5, seed=torch.zeros(1, dtype=torch.int64))
        ),
        "has no dropout",
    ),
}


@pytest.mark.parametrize("what", REJECTED)
def test_what_they_do_not_do_is_refused_with_a_reason(
    emulated: EmulatedCuda | EmulatedTriton, what: str, seed: int
) -> None:
    change, reason = REJECTED[what]
    case = change(_case(seed))
    assert reason in (emulated.reject_reason(case.problem, differentiable=False) or "")
    with pytest.raises(RuntimeError, match=reason):
        tolerance.run(case.problem, emulated.name)


def test_head_dims_and_gradients_are_refused_with_a_reason(emulated: EmulatedCuda | EmulatedTriton, seed: int) -> None:
    case = _case(seed, D=160)
    assert "head dim is 160" in (emulated.reject_reason(case.problem, differentiable=False) or "")
    case = _case(seed)
    with pytest.raises(RuntimeError, match="no backward yet"):
        tolerance.run(case.problem, emulated.name, case.dout)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_real_backends_say_why_not_here(name: str, seed: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    reason = dispatch.BACKENDS[name].reject_reason(_case(seed).problem, differentiable=False) or ""
    assert reason.startswith("no CUDA device")
    q = torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"{name}: no CUDA device"):
        lcattn.attention(q, q, q, backend=name)


def test_launch_plan_checks_what_would_crash() -> None:
    problem = _case(0).problem
    _, given = inputs.kernel_inputs(problem)
    B, H, _, T, _, _ = problem.sizes
    out, lse = torch.empty_like(problem.q[0]), torch.empty(B, H, T)
    launch = torch.empty(lcattn._C.cuda_plan_bytes, dtype=torch.uint8)
    torch.ops.lcattn.cuda_forward_plan(*given, out, lse, launch)
    unaligned = torch.empty(out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)
    with pytest.raises(RuntimeError, match="q must have rows of adjacent elements"):
        torch.ops.lcattn.cuda_forward_plan(*given._replace(q=[unaligned]), out, lse, launch)
    with pytest.raises(RuntimeError, match="lse must be"):
        torch.ops.lcattn.cuda_forward_plan(*given, out, lse[..., :-1], launch)
    with pytest.raises(RuntimeError, match="no unturned keys, relative keys or queries, or dropout"):
        torch.ops.lcattn.cuda_forward_plan(*given._replace(dropout=0.5), out, lse, launch)
