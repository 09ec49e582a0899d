"""The committed table of what GPU kernels cost, and what is worse than it says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("gpu_model.json")
# how far a figure may rise before it is called worse
SLACK = 1.02

Figures = Mapping[str, float]
# compiler -> kernel -> architecture or workload -> figures: compilers differ, and so do their figures
Table = dict[str, dict[str, dict[str, Figures]]]

# for the reader: not worse in itself, whichever way it goes
INFORMATION = ("registers", "stack", "shared bytes", "warps per multiprocessor")


@dataclass(frozen=True)
class Entry:
    """What one kernel was found to cost.

    Attributes:
        place: the architecture, as sm_80, or what it was executed on.
    """

    compiler: str
    kernel: str
    place: str
    figures: Figures


def is_worse(name: str, before: float, now: float) -> bool:
    if name in INFORMATION:
        return False
    if name == "blocks per multiprocessor":
        # none: the kernel cannot be launched at all, whatever the table says
        return now < before or now == 0
    if name == "spills":
        return now > before
    return now > before * SLACK


def compare(entry: Entry, recorded: Table) -> list[str]:
    """What is worse than recorded, or cannot be compared; one line each."""
    where = f"{entry.kernel}, {entry.place}"
    if entry.compiler not in recorded:
        known = ", ".join(sorted(recorded)) or "nothing"
        return [
            f"{where}: not comparable: compiled by {entry.compiler}, the table is of {known}; "
            "add figures of this compiler with --write"
        ]
    old = recorded[entry.compiler].get(entry.kernel, {}).get(entry.place)
    if old is None:
        return [f"{where}: absent from the table of {entry.compiler}; add it with --write"]
    lines = [f"{where}: {name}: not in the table; add it with --write" for name in entry.figures if name not in old]
    lines += [f"{where}: {name}: in the table, not found now; --write" for name in old if name not in entry.figures]
    lines += [
        f"{where}: {name}: {old[name]:g} before, {now:g} now"
        for name, now in entry.figures.items()
        if name in old and is_worse(name, old[name], now)
    ]
    return lines


def read(path: Path = PATH) -> Table:
    return json.loads(path.read_text()) if path.is_file() else {}


def write(table: Table, path: Path = PATH) -> None:
    """A line for each set of figures."""
    compilers = []
    for compiler, kernels in sorted(table.items()):
        by_kernel = []
        for kernel, places in sorted(kernels.items()):
            # sm_90 before sm_100
            order = sorted(places, key=lambda place: (len(place), place))
            lines = [f"   {json.dumps(place)}: {json.dumps(places[place])}" for place in order]
            by_kernel.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
        compilers.append(f" {json.dumps(compiler)}: {{\n" + ",\n".join(by_kernel) + "\n }")
    path.write_text("{\n" + ",\n".join(compilers) + "\n}\n")


def merged(recorded: Table, entries: Iterable[Entry], kernels: Iterable[str]) -> Table:
    """The table with these entries in it, without kernels that are no more."""
    kernels = set(kernels)
    found: Table = {
        compiler: {name: dict(places) for name, places in by_kernel.items() if name in kernels}
        for compiler, by_kernel in recorded.items()
    }
    for entry in entries:
        found.setdefault(entry.compiler, {}).setdefault(entry.kernel, {})[entry.place] = dict(entry.figures)
    return found
