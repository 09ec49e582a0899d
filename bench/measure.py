"""How things are measured: paired and interleaved times, and memory in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import lcattn
from lcattn.layout import from_spec
from lcattn.lowering import lower

from .providers import PROVIDERS, Prepared, gate
from .records import Row
from .workloads import DECODE, LOWER_LAYOUT, LOWER_TOKENS, WORKLOADS, Workload, visible_pairs

SGEMM_SIZE = 2048
_SGEMM_GFLOP = 2 * SGEMM_SIZE**3 / 1e9
# a call shorter than this is repeated within a round
_MIN_SECONDS = 0.02
# a call longer than this is warm after one execution
_LONG_SECONDS = 0.5
# more than the last-level cache of any machine this is likely to run on
_FLUSH_BYTES = 512 << 20

Progress = Callable[[str], None]


class Sgemm:
    """The yardstick: a float32 matrix product, timed beside everything else."""

    def __init__(self) -> None:
        self.a, self.b, self.out = (torch.randn(SGEMM_SIZE, SGEMM_SIZE) for _ in range(3))
        self.seconds()

    def seconds(self) -> float:
        start = time.perf_counter()
        torch.mm(self.a, self.b, out=self.out)
        return time.perf_counter() - start


@dataclass
class Entry:
    """One thing to be timed.

    Attributes:
        workload, provider, measure: its names in the CSV; call: one execution; work: its useful GFLOP.
        repeats: executions in a round.
    """

    workload: str
    provider: str
    measure: str
    call: Callable[[], object]
    work: float
    repeats: int = 1

    def warm(self) -> None:
        """Executes it until caches are filled, and finds how often a round repeats it."""
        for _ in range(2):
            start = time.perf_counter()
            self.call()
            took = time.perf_counter() - start
            if took > _LONG_SECONDS:
                break
        self.repeats = max(1, round(_MIN_SECONDS / took))

    def seconds(self) -> float:
        """Time of one execution, the mean of a few where it is short."""
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        return (time.perf_counter() - start) / self.repeats


def useful_gflop(w: Workload, prepared: Prepared, measure: str) -> float:
    """4 D flops a visible score forward (two products), 3.5 times that forward and backward (seven)."""
    pairs = visible_pairs(prepared.counted or prepared.answers, w.H, w.N)
    return pairs * 4 * w.D * (3.5 if measure == "forward+backward" else 1.0) / 1e9


def entry(w: Workload, name: str, measure: str, seed: int) -> Entry:
    """A provider prepared on a workload, and warm."""
    inputs = w.draw(seed)
    grad = measure == "forward+backward"
    prepared = PROVIDERS[name].prepare(w, inputs, grad)
    dout = prepared.own(inputs.dout)
    forward = torch.no_grad()(prepared.forward)
    call = (lambda: prepared.backward(dout)) if grad else forward
    item = Entry(w.name, name, measure, call, useful_gflop(w, prepared, measure))
    item.warm()
    return item


@dataclass(frozen=True)
class Skipped:
    """Something that was not timed, or whose answer deserves a remark, and why."""

    workload: str
    provider: str
    measure: str
    reason: str
    wrong: bool = False


def prepare(
    workloads: Sequence[Workload],
    providers: Sequence[str] | None,
    measures: Sequence[str],
    seed: int,
    progress: Progress,
) -> tuple[list[Entry], list[Skipped]]:
    """Every supported entry whose answer is right, and what else there is to say."""
    entries, skipped = [], []
    for w in workloads:
        for name in w.providers:
            if providers is not None and name not in providers:
                continue
            for measure in (m for m in w.passes if m in measures):
                progress(f"{w.name}: {name}, {measure}")
                reason = PROVIDERS[name].supports(w, measure)
                if reason:
                    skipped.append(Skipped(w.name, name, measure, reason))
                    continue
                verdict = gate(PROVIDERS[name], w, measure, seed)
                if verdict.remark:
                    skipped.append(Skipped(w.name, name, measure, verdict.remark, wrong=not verdict.ok))
                if verdict.ok:
                    entries.append(entry(w, name, measure, seed))
    return entries, skipped


def paired(item: Entry, sgemm: Sgemm, row: Row) -> Row:
    """One round of an entry, between two rounds of the yardstick."""
    before = sgemm.seconds()
    value = item.seconds()
    beside = (before + sgemm.seconds()) / 2
    return replace(
        row,
        workload=item.workload,
        provider=item.provider,
        measure=item.measure,
        value=value * 1e3,
        beside_ms=beside * 1e3,
        beside=f"sgemm {SGEMM_SIZE}",
        work=item.work,
        beside_work=_SGEMM_GFLOP,
    )


def interleaved(entries: Sequence[Entry], rounds: int, row: Row) -> Iterator[Row]:
    """Rounds of all entries in turn, each round starting one entry later than the last."""
    sgemm = Sgemm()
    for number in range(rounds):
        at = number % max(len(entries), 1)
        for item in (*entries[at:], *entries[:at]):
            yield paired(item, sgemm, replace(row, round=number))


def decode_rounds(rounds: int, seed: int, row: Row) -> Iterator[Row]:
    """One query against cached keys, beside reading once what it sees; processor caches warm, then cold."""
    w = DECODE
    inputs = w.draw(seed)
    q, k, v = inputs.q[:, :, -1:], inputs.k, inputs.v
    layout, position = w.layout, w.position(inputs.table)
    seen = 2 * w.chunk
    k_seen, v_seen = k[:, :, -seen:], v[:, :, -seen:]
    bias = inputs.table[:, None].clone()

    def ours() -> Tensor:
        return lcattn.attention(q, k, v, layout=layout, position=position)

    def peer() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k_seen, v_seen, attn_mask=bias[None])

    # the faster of two plain ways to read everything once
    readers = (lambda: (k_seen.sum(2), v_seen.sum(2)), lambda: (k_seen.sum(), v_seen.sum()))
    torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-4)
    flush = torch.ones(_FLUSH_BYTES // 4)

    def seconds(call: Callable[[], object], cold: bool) -> float:
        if cold:
            flush.sum()
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        times = []
        for _ in range(50):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2]

    with torch.no_grad():
        for number in range(rounds):
            for cold in (False, True):
                for name, call in (("lcattn", ours), ("sdpa-folded", peer)):
                    value = seconds(call, cold)
                    read = min(seconds(reader, cold) for reader in readers)
                    yield replace(
                        row,
                        workload=w.name,
                        provider=name,
                        measure="decode cold" if cold else "decode warm",
                        round=number,
                        value=value * 1e3,
                        beside_ms=read * 1e3,
                        beside="reading visible K and V once",
                    )


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


class PeakGrowth:
    """Growth of this process's resident memory from here to its peak, by the kernel's own count of pages."""

    def __init__(self) -> None:
        # 5 sets the peak back to what is resident now
        Path("/proc/self/clear_refs").write_text("5")
        self.start = _status("VmRSS")

    def bytes(self) -> int:
        return _status("VmHWM") - self.start


def lower_once() -> dict[str, float]:
    """Time and memory of lowering the million-token layout in this process: the first time, and again."""
    lower(from_spec(LOWER_LAYOUT), T=1024, S=1024)
    growth = PeakGrowth()
    start = time.perf_counter()
    table = lower(from_spec(LOWER_LAYOUT), T=LOWER_TOKENS, S=LOWER_TOKENS)
    first = time.perf_counter() - start
    peak = growth.bytes()
    start = time.perf_counter()
    lower(from_spec(LOWER_LAYOUT), T=LOWER_TOKENS, S=LOWER_TOKENS)
    again = time.perf_counter() - start
    return {
        "first_ms": first * 1e3,
        "again_ms": again * 1e3,
        "peak_mib": peak / 2**20,
        "table_mib": table.nbytes / 2**20,
    }


def memory_once(w: Workload, name: str, seed: int) -> dict[str, float]:
    """Peak memory of a forward and backward beyond q, k, v, out and their gradients, and the bytes of those.

    Thread pools are started by a tiny call beforehand. What the provider keeps for later calls counts, and so
    do lowered tables, saved tensors, and pages of code that only the large call touches.
    """
    tiny = dataclasses.replace(w, N=32, H=1, D=8, chunk=8)
    inputs = tiny.draw(seed)
    prepared = PROVIDERS[name].prepare(tiny, inputs, True)
    prepared.backward(prepared.own(inputs.dout))
    inputs = w.draw(seed)
    prepared = PROVIDERS[name].prepare(w, inputs, True)
    dout = prepared.own(inputs.dout)
    growth = PeakGrowth()
    prepared.backward(dout)
    peak = growth.bytes()
    tensor = inputs.q.nbytes
    # out, dq, dk and dv were made since; q, k, v and dout were there
    return {"extra_mib": (peak - 4 * tensor) / 2**20, "io_mib": 8 * tensor / 2**20}


# buffers of 64 KiB or more come from the system and go back to it, so that resident memory follows them
_EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
AVX2 = {"LCATTN_CPU_ISA": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def child(arguments: Sequence[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Runs this program in a process of its own and returns what it prints; RuntimeError with its errors."""
    command = [sys.executable, "-m", str(__package__), *arguments]
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def memory_rows(rounds: int, row: Row) -> Iterator[Row]:
    """Memory of forward+backward of lcattn and its closest peers, each in a child process."""
    for number in range(rounds):
        for name in ("lcattn", "sdpa-folded", "sdpa-folded-fixed", "sdpa-causal"):
            found = json.loads(child(["memory-child", "main", name], _EXACT_MALLOC))
            for measure, value in (("extra memory", found["extra_mib"]), ("io memory", found["io_mib"])):
                yield replace(
                    row,
                    workload="main",
                    provider=name,
                    measure=measure,
                    round=number,
                    value=value,
                    unit="MiB",
                )


def lower_rows(rounds: int, row: Row) -> Iterator[Row]:
    """Time and memory of lowering, each in child processes of their own: exact memory costs time."""
    for number in range(rounds):
        memory = json.loads(child(["lower-child"], _EXACT_MALLOC))
        found = json.loads(child(["lower-child"])) | {"peak_mib": memory["peak_mib"]}
        for measure, key, unit in (
            ("lower, first", "first_ms", "ms"),
            ("lower, again", "again_ms", "ms"),
            ("lower, peak", "peak_mib", "MiB"),
            ("lower, table", "table_mib", "MiB"),
        ):
            yield replace(
                row,
                workload="lower",
                provider="lcattn",
                measure=measure,
                round=number,
                value=found[key],
                unit=unit,
            )


def workload(name: str) -> Workload:
    """A workload by name; ValueError if there is none."""
    if name not in WORKLOADS:
        raise ValueError(f"workload: expected one of {', '.join(WORKLOADS)}, got {name!r}")
    return WORKLOADS[name]
