"""Results of an evaluation: one self-describing JSON file, written after every record, and tables of text."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("lcattn", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@dataclass
class Results:
    """Records of one evaluation, and the file that holds them.

    Attributes:
        path: the JSON file: {format, evaluation, model, options, versions, machine, started, records}.
        setup: format, evaluation, model, options and versions; results of another setup don't mix.
        records: one dict a measurement.
    """

    path: Path
    setup: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"))

    @classmethod
    def open(
        cls, folder: Path, evaluation: str, model: dict[str, Any], options: dict[str, Any], resume: bool
    ) -> Results:
        """Results at folder/eval-EVALUATION.json; with `resume`, the records that the file holds already.

        Raises:
            ValueError: the file to resume is not there to read, or is of another setup.
        """
        setup = {"format": FORMAT, "evaluation": evaluation, "model": model, "options": options, "versions": versions()}
        results = cls(folder / f"eval-{evaluation}.json", json.loads(json.dumps(setup)))
        if resume:
            results._take()
        return results

    def _take(self) -> None:
        try:
            held = json.loads(self.path.read_text())
            records, started = list(held["records"]), str(held["started"])
        except FileNotFoundError:
            raise ValueError(f"resume: there is no {self.path}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"resume: {self.path} holds no results: {error}") from None
        for part, now in self.setup.items():
            before = held.get(part)
            if before != now:
                raise ValueError(f"resume: {self.path} is of another {part}: {_difference(before, now)}")
        self.records, self.started = records, started

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The record with these values, if there is one."""
        return next((r for r in self.records if all(r.get(name) == value for name, value in key.items())), None)

    def add(self, record: dict[str, Any]) -> None:
        """Keeps a record and writes the file, which is whole at any time."""
        self.records.append(record)
        machine = {"platform": platform.platform(), "threads": torch.get_num_threads()}
        whole = {**self.setup, "machine": machine, "started": self.started, "records": self.records}
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(beside, self.path)


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                return f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
    return f"was {before!r}, now {now!r}"


def writable(folder: Path) -> None:
    """Makes the folder. ValueError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".lcattn-writes-here"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write into {folder}: {error.strerror or error}") from None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text side by side: the first column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )
