"""Tables and plots of results, from nothing but their records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .. import plot
from . import loss
from .report import Results, table

OWN = "own"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _values(results: Results, name: str) -> list[Any]:
    """The different values of a name among the records, in their order."""
    return list(dict.fromkeys(record[name] for record in results.records))


def loss_table(results: Results) -> str:
    """A reading a row: losses up to and past the trained length, and over the tokens compared; seconds, shares of time.

    What claims to extend a model should read on no worse than the same tokens are read alone; a star says where it is.
    """
    length, trained = results.setup["options"]["length"], results.setup["model"]["trained"]
    header = ["reading", f"up to {trained:,}", f"{trained:,} to {length:,}"]
    compared = f"from {loss.own_start(length, trained) + 1:,}"
    rows = []
    alone = min((r["compared"] for r in results.records if r["reading"] == OWN), default=math.inf)
    for record in results.records:
        cells = [record["within_trained"], record["past_trained"], record["compared"]]
        numbers = ["" if cell is None else f"{cell:.4f}" for cell in cells]
        numbers[-1] += " *" if cells[-1] is not None and cells[-1] > alone else ""
        share = record["seconds"] / results.records[0]["seconds"]
        rows.append([record["reading"], *numbers, f"{record['seconds']:.1f}", f"{share:.2f}"])
    note = f"{OWN} reads tokens {loss.own_start(length, trained):,} to {length:,} alone, as a document of their own"
    header += [compared, "seconds", "of the first"]
    return table(header, rows) + f"\n{note}; * is above it; losses in nats"


def loss_plot(results: Results, folder: Path) -> list[Path]:
    """Running means of the loss by position, a line a reading, the trained length marked."""
    trained = results.setup["model"]["trained"]
    lines = {record["reading"]: loss.curve(record) for record in results.records}
    width = 8 * loss.CURVE_STEP
    path = folder / "eval-loss.png"
    labels = "position in the text (tokens)", f"next-token loss (nats), mean of {width}"
    title = f"{results.setup['model']['name']} past its trained length"
    return [plot.save_lines(lines, *labels, title, path, mark=(trained, "trained length"))]


def needle_table(results: Results) -> str:
    """A reading and task a row: mean score by length, and times at the longest."""
    lengths = sorted(_values(results, "length"))
    rows = []
    for reading in _values(results, "reading"):
        for task in _values(results, "task"):
            mine = [r for r in results.records if (r["reading"], r["task"]) == (reading, task)]
            by_length = [[r for r in mine if r["length"] == length] for length in lengths]
            if not mine:
                continue
            scores = [f"{_mean([r['score'] for r in some]):.2f}" if some else "" for some in by_length]
            times = []
            for name in ("first_token_s", "next_token_s", "seconds"):
                found = [r[name] for r in mine if r["length"] == lengths[-1] and r.get(name) is not None]
                times.append(f"{_mean(found):.3f}" if found else "")
            rows.append([reading, task, *scores, *times])
    header = ["reading", "task", *(f"{length:,}" for length in lengths), "first token s", "next token s", "prompt s"]
    kept = [c for c in range(len(header)) if c < 2 + len(lengths) or any(row[c] for row in rows)]
    what = {
        "recall": "share of the expected strings in the greedy answer",
        "loglik": "share of the wrong answers that are less likely than the right one; chance is 0.50",
    }[results.setup["options"]["score"]]
    lines = table([header[c] for c in kept], [[row[c] for c in kept] for row in rows])
    return f"{lines}\nscore: {what}; seconds at {lengths[-1]:,} tokens"


def needle_plots(results: Results, folder: Path) -> list[Path]:
    """A heat map a task: score by length and depth, a panel a reading."""
    lengths = sorted(_values(results, "length"))
    written = []
    for task in _values(results, "task"):
        mine = [r for r in results.records if r["task"] == task]
        depths = sorted({r["depth"] for r in mine}, key=lambda depth: -1 if depth is None else depth)
        panels = {}
        for reading in dict.fromkeys(r["reading"] for r in mine):
            grid = np.full((len(depths), len(lengths)), math.nan)
            for row, depth in enumerate(depths):
                for column, length in enumerate(lengths):
                    key = (reading, length, depth)
                    scores = [r["score"] for r in mine if (r["reading"], r["length"], r["depth"]) == key]
                    if scores:
                        grid[row, column] = _mean(scores)
            panels[reading] = grid
        rows = ["anywhere" if depth is None else f"{depth:.0%}" for depth in depths]
        columns = [f"{length:,}" for length in lengths]
        path = folder / f"eval-needle-{task}.png"
        title = f"{task}, {results.setup['model']['name']}"
        written.append(plot.save_heatmaps(panels, columns, rows, "length (tokens)", "depth", title, path))
    return written


def mqar_table(results: Results) -> str:
    """A layout a row: accuracy by gap, last training loss, seconds."""
    gaps = results.setup["options"]["gaps"]
    rows = [
        [
            record["layout"],
            *(f"{found['accuracy']:.2f}" for found in record["accuracy"]),
            f"{record['final_loss']:.3f}",
            f"{record['seconds']:.1f}",
        ]
        for record in results.records
    ]
    header = ["layout", *(f"gap {gap}" for gap in gaps), "last loss", "seconds"]
    chance = 1 / results.setup["options"]["symbols"]
    return table(header, rows) + f"\naccuracy of the likeliest token; chance is {chance:.2f}"


def mqar_plot(results: Results, folder: Path) -> list[Path]:
    """Accuracy by gap, a line a layout."""
    lines = {
        record["layout"]: [(found["gap"], found["accuracy"]) for found in record["accuracy"]]
        for record in results.records
    }
    labels = "gap from key to query (tokens)", "accuracy"
    return [plot.save_lines(lines, *labels, "associative recall across a gap", folder / "eval-mqar.png")]
