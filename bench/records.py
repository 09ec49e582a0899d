"""Rows of the CSV: a measured round each, with the versions of what ran. All that is shown comes from it."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import lcattn


@dataclass(frozen=True)
class Row:
    """One measured round.

    Attributes:
        run: one call of the program; date, commit, torch, cpu, isa, threads: what ran.
        workload, provider, measure: what was measured; round: which round of the run.
        value, unit: time in ms, or memory in MiB.
        beside_ms, beside: the time of what was timed beside it, and what that was; 0 and "" for none.
        work: useful GFLOP of a time; 0 for none. beside_work: GFLOP of what was timed beside it.
    """

    run: str
    date: str
    commit: str
    torch: str
    cpu: str
    isa: str
    threads: int
    workload: str
    provider: str
    measure: str
    round: int
    value: float
    unit: str
    beside_ms: float = 0.0
    beside: str = ""
    work: float = 0.0
    beside_work: float = 0.0

    @property
    def share(self) -> float:
        """Useful flops per second as a share of the paired product's."""
        return self.work / self.value / (self.beside_work / self.beside_ms)

    @property
    def relative(self) -> float:
        """Time in units of what was timed beside it."""
        return self.value / self.beside_ms


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_isa() -> str:
    """The instruction set that lcattn's CPU kernels use here."""
    try:
        from lcattn import _C
    except ImportError:
        return "none"
    return _C.cpu_isa()


def commit() -> str:
    """The commit of lcattn's source tree, + where files differ from it; its version outside a source tree."""
    root = Path(lcattn.__file__).resolve().parents[1]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "lcattn", "csrc", "bench"],
            cwd=root,
            capture_output=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return lcattn.__version__
    return head + ("+" if changed.strip() else "")


def blank(run: str | None = None) -> Row:
    """A row with the versions filled in; `dataclasses.replace` gives it its measurement."""
    return Row(
        run=run or uuid.uuid4().hex[:8],
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        commit=commit(),
        torch=torch.__version__,
        cpu=cpu_name(),
        isa=cpu_isa(),
        threads=torch.get_num_threads(),
        workload="",
        provider="",
        measure="",
        round=0,
        value=0.0,
        unit="ms",
    )


_NAMES = [f.name for f in fields(Row)]


def _whole_lines(path: Path) -> tuple[list[str], str]:
    """The lines of a CSV of rows, and what follows the last line's end. ValueError if its columns are others."""
    *lines, torn = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    header = [*lines, torn][0]
    if header and header != ",".join(_NAMES):
        raise ValueError(f"{path} has other columns; give another file with --csv")
    return lines, torn


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a CSV, which gets its header when it is made or empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # a line that a killed process left unfinished would swallow the first row
    if path.exists() and (torn := _whole_lines(path)[1]):
        os.truncate(path, path.stat().st_size - len(torn.encode(errors="surrogateescape")))
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _NAMES)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path, run: str | None = None) -> list[Row]:
    """Rows of one run, by default the last; ValueError if there is none."""
    kinds = {"int": int, "float": float, "str": str}
    if not path.is_file():
        raise ValueError(f"{path} does not exist; measure first")
    lines, torn = _whole_lines(path)
    if torn:
        print(f"note: {path}: the last line is incomplete and left out", file=sys.stderr)
    rows = [Row(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Row)}) for line in csv.DictReader(lines)]
    if not rows:
        raise ValueError(f"{path} is empty; measure first")
    run = run or rows[-1].run
    found = [row for row in rows if row.run == run]
    if not found:
        raise ValueError(f"{path} holds no rows of run {run!r}; it has {sorted({row.run for row in rows})}")
    return found


class Results:
    """Medians and ratios of one run's rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def of(self, workload: str, provider: str, measure: str) -> list[Row]:
        """Rows of one measurement, by round."""
        asked = (workload, provider, measure)
        found = [row for row in self.rows if (row.workload, row.provider, row.measure) == asked]
        return sorted(found, key=lambda row: row.round)

    def share(self, workload: str, provider: str, measure: str) -> float | None:
        """Median share of the paired product's rate."""
        rows = self.of(workload, provider, measure)
        return statistics.median(row.share for row in rows) if rows else None

    def value(self, workload: str, provider: str, measure: str) -> float | None:
        """Median of the measured value itself."""
        rows = self.of(workload, provider, measure)
        return statistics.median(row.value for row in rows) if rows else None

    def relative(self, workload: str, provider: str, measure: str) -> float | None:
        """Median time in units of what was timed beside it."""
        rows = self.of(workload, provider, measure)
        return statistics.median(row.relative for row in rows) if rows else None

    def ratio(self, slow: tuple[str, str, str], fast: tuple[str, str, str]) -> float | None:
        """Median over rounds of the paired times of (workload, provider, measure) `slow` over `fast`."""
        pairs = {row.round: row.relative for row in self.of(*fast)}
        found = [row.relative / pairs[row.round] for row in self.of(*slow) if row.round in pairs]
        return statistics.median(found) if found else None
