"""Holds the emulated GPU backends to the error budget, case by case, in processes side by side.

`python -m tests.gpu_emulation.sweep` runs every case that the kernels accept and writes bench/gpu_emulation.json, which
names the kernels by the hash of their sources: a report of other kernels than the tree's fails the tests.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from lcattn import cases, dispatch, tolerance
from lcattn.cases import Case

from .backends import EmulatedCuda, EmulatedTriton
from .tools import find_tool, tool_version

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "bench" / "gpu_emulation.json"
# what the results of a kernel depend on
SOURCES = ("csrc/cuda", "csrc/common", "csrc/bindings.cpp", "triton_kernels", "lcattn/inputs.py", "lcattn/gpu.py")
BACKENDS = {backend.name: backend for backend in (EmulatedCuda(), EmulatedTriton())}
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)


def kernels_hash() -> str:
    """The hash of all sources of the kernels and of their launches."""
    digest = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".cu", ".cuh", ".cpp", ".h", ".py"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def draw_cases(seed: int) -> list[Callable[[], Case]]:
    """Makers of all cases, of the dtypes and head dims that the kernels take."""
    return list(cases.draw_cases(seed, DTYPES, HEAD_DIMS))


@dataclass(frozen=True)
class Outcome:
    """What became of one case on one backend.

    Attributes:
        rejected: the backend's reason, or None if it ran; over: results over the error budget, or what the checker
            found; used: the largest part of its budget that a result used; instructions: executed by all threads.
    """

    backend: str
    case: str
    rejected: str | None = None
    over: tuple[str, ...] = ()
    used: float = 0.0
    instructions: int = 0
    seconds: float = 0.0


def run(seed: int, index: int, name: str, order: str | int = "forward", check: bool = True) -> Outcome:
    """One case of a seed on one emulated backend; without the checker, tensor cores sum as inexactly as they may."""
    case = draw_cases(seed)[index]()
    backend = BACKENDS[name]
    if (reason := backend.reject_reason(case.problem, differentiable=False)) is not None:
        return Outcome(name, case.name, rejected=reason)
    backend.order, backend.check, backend.counts = order, check, None
    backend.mma = "exact" if check else "truncating"
    # the public operator finds backends by name
    dispatch.BACKENDS[name] = backend
    try:
        found = tolerance.verify(case.problem, name)
    except Exception as error:
        return Outcome(name, case.name, over=(f"{type(error).__name__}: {error}",))
    finally:
        del dispatch.BACKENDS[name]
    used = max(c.error / c.budget if c.budget else float(c.error > 0) for c in found)
    counts = backend.counts
    assert counts is not None, f"{name} launched nothing"
    over = tuple(str(c) for c in found if not c.ok)
    return Outcome(name, case.name, None, over, used, counts.total, counts.seconds)


def _alone() -> None:
    torch.set_num_threads(1)


def run_all(seed: int, jobs: Iterable[tuple[int, str, str | int, bool]]) -> Iterator[Outcome]:
    """`run` for each (index, backend, order, check), as many at once as there are processors, as they end."""
    context = multiprocessing.get_context("spawn")
    # a new process inherits the path; this module may have been found by other means
    sys.path.insert(0, str(ROOT))
    try:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_alone) as pool:
            waiting = [pool.submit(run, seed, *job) for job in jobs]
            for done in as_completed(waiting):
                yield done.result()
    finally:
        sys.path.remove(str(ROOT))


def summary(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """What the report says of one backend."""
    ran = [o for o in outcomes if o.rejected is None]
    executed = sum(o.instructions for o in ran)
    return {
        "cases": len(ran),
        "rejected": dict(sorted(Counter(o.rejected for o in outcomes if o.rejected).items())),
        "over": {o.case: o.over for o in ran if o.over},
        "largest_part_of_budget_used": round(max((o.used for o in ran), default=0.0), 3),
        "thread_instructions": executed,
        "million_thread_instructions_a_second": round(executed / 1e6 / max(sum(o.seconds for o in ran), 1e-9), 1),
    }


def speed(name: str) -> dict[str, float]:
    """Million thread instructions a second on one processor, the best of three launches of one case of some size."""
    backend = BACKENDS[name]
    problem = cases.make(
        cases.Draw(0), "causal", "bias", "plain", cases.Shape(1, 4, 2, 512, 512, 64), DTYPES[0]
    ).problem
    backend.order, backend.mma = "forward", "exact"
    found = {}
    for what, backend.check in (("with the checker", True), ("without", False)):
        rates = []
        for _ in range(3):
            backend.forward(problem, differentiable=False)
            assert backend.counts is not None
            rates.append(backend.counts.total / 1e6 / backend.counts.seconds)
        found[what] = round(max(rates), 1)
    return found


def main(
    seed: Annotated[int, typer.Option(help="Seed of the cases.")] = 0,
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend; may be repeated. Writes no report unless all are.")
    ] = None,
    write: Annotated[bool, typer.Option(help="Write bench/gpu_emulation.json.")] = True,
) -> None:
    """Run every case of lcattn/cases.py that the emulated GPU kernels accept, under the checker."""
    names = backend or list(BACKENDS)
    for name in names:
        if name not in BACKENDS:
            raise typer.BadParameter(f"expected one of {', '.join(BACKENDS)}, got {name!r}", param_hint="--backend")
    # a report of some backends would stand in the place of one of all
    write = write and set(names) == set(BACKENDS)
    n_cases = len(draw_cases(seed))
    # orders take turns, so that each layout and position meets several
    orders: tuple[str | int, ...] = ("forward", "reverse", 2, 3)
    jobs = [(i, name, orders[i % len(orders)], True) for name in names for i in range(n_cases)]
    outcomes = []
    for outcome in tqdm(run_all(seed, jobs), total=len(jobs), unit="case"):
        outcomes.append(outcome)
        if outcome.over:
            tqdm.write(f"{outcome.backend} {outcome.case}: {'; '.join(outcome.over)}")
    report = {
        "verified": "by PTX-level emulation, not on hardware",
        "kernels": kernels_hash(),
        "nvcc": tool_version(find_tool("nvcc")),
        "triton": importlib.metadata.version("triton"),
        "seed": seed,
        "backends": {name: summary([o for o in outcomes if o.backend == name]) for name in names},
        "million_thread_instructions_a_second_alone": {name: speed(name) for name in names},
    }
    text = json.dumps(report, indent=1)
    typer.echo(text)
    if write:
        REPORT.write_text(text + "\n")
    if any(o.over for o in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
