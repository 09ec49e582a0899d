"""The command line of the benchmarks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from . import compare as comparing
from . import measure, report
from .providers import PROVIDERS
from .records import Results, Row, append, blank, read
from .workloads import DECODE, WORKLOADS

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Times lcattn and its peers, each round beside a matrix product timed in the same moment. Without a"
        " command it measures everything, appends rows to a CSV and shows what they say: 15 minutes or so,"
        " --quick a few."
    ),
)

OTHER = ("decode", "lower", "memory")
# timed in a child process only
HELD_BACK = "avx2"
Csv = Annotated[Path, typer.Option("--csv", help="Where rows are appended, or read from.")]
Plots = Annotated[Path | None, typer.Option("--plots", help="Folder of the plots; by default the CSV's.")]
Seed = Annotated[int | None, typer.Option(help="Of the inputs; fresh by default, and printed.")]


def _fail(message: object) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def _check_names(option: str, names: list[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise _fail(f"{option}: expected one of {', '.join(known)}, got {name!r}")


def _write(rows: Iterator[Row], total: int, what: str, path: Path) -> None:
    """Appends each row as it comes, behind a progress bar."""
    with tqdm(total=total, desc=what, leave=False, disable=None) as bar:
        for row in rows:
            append(path, [row])
            bar.set_postfix_str(f"{row.workload} {row.provider}")
            bar.update()


def _show(path: Path, run: str | None, plots: Path | None) -> None:
    results = Results(read(path, run))
    typer.echo(report.summary(results))
    written = report.plots(results, plots or path.parent)
    typer.echo("\nrows: " + str(path) + "".join(f"\nplot: {p}" for p in written))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="3 rounds, the main workload, the closest peers.")] = False,
    workload: Annotated[
        list[str], typer.Option(help=f"Repeatable. {', '.join([*WORKLOADS, *OTHER])}; all by default.")
    ] = [],  # noqa: B006
    provider: Annotated[
        list[str], typer.Option(help=f"Repeatable. {', '.join(PROVIDERS)}; each workload's own by default.")
    ] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are shown.")] = 9,
    csv: Csv = Path("out/bench.csv"),
    plots: Plots = None,
    seed: Seed = None,
    run: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure."""
    if context.invoked_subcommand:
        return
    _check_names("--workload", workload, [*WORKLOADS, *OTHER])
    _check_names("--provider", provider, PROVIDERS)
    try:
        append(csv, [])
    except (OSError, ValueError) as error:
        raise _fail(error) from None
    silent = run is not None
    if quick:
        rounds = min(rounds, 3)
        workload = workload or ["main", HELD_BACK, *OTHER]
        provider = provider or ["lcattn", "sdpa-folded", "sdpa-folded-fixed", "sdpa-padded", "sdpa-causal"]
    seed = time.time_ns() % 2**31 if seed is None else seed
    chosen = workload or [*WORKLOADS, *OTHER]
    row = blank(run)
    if not silent:
        typer.echo(f"seed {seed}, run {row.run}")
    timed = [w for w in WORKLOADS.values() if w.name in chosen and (silent or w.name != HELD_BACK)]
    with tqdm(desc="checking answers", leave=False, disable=None, bar_format="{desc}: {postfix} {elapsed}") as bar:
        entries, skipped = measure.prepare(timed, provider or None, report.MEASURES, seed, bar.set_postfix_str)
    for item in skipped if not silent else ():
        kind = "WRONG" if item.wrong else "note"
        typer.echo(f"{kind}: {item.workload}, {item.provider}, {item.measure}: {item.reason}")
    if entries:
        _write(measure.interleaved(entries, rounds, row), rounds * len(entries), "timing", csv)
    del entries
    if HELD_BACK in chosen and not silent:
        _avx2(row, rounds, seed, csv)
    if "decode" in chosen:
        _write(measure.decode_rounds(rounds, seed, row), rounds * 4, "decoding", csv)
    few = min(rounds, 3)
    if "lower" in chosen:
        _write(measure.lower_rows(few, row), few * 4, "lowering", csv)
    if "memory" in chosen:
        _write(measure.memory_rows(few, row), few * 8, "memory", csv)
    if not silent:
        _show(csv, row.run, plots)
    if any(item.wrong for item in skipped):
        raise typer.Exit(1)


def _avx2(row: Row, rounds: int, seed: int, csv: Path) -> None:
    """The workload of a child process held to AVX2, its matrix product too."""
    if row.isa != "avx512":
        typer.echo(f"note: avx2: nothing to hold back, this machine uses {row.isa}")
        return
    options = ["--rounds", str(rounds), "--csv", str(csv), "--seed", str(seed), "--run", row.run]
    with tqdm(desc="AVX2, in a child process", leave=False, disable=None, bar_format="{desc} {elapsed}"):
        measure.child(["--workload", HELD_BACK, *options], measure.AVX2)


@app.command("report")
def show(
    csv: Csv = Path("out/bench.csv"),
    run: Annotated[str | None, typer.Option(help="The run to show; the last by default.")] = None,
    plots: Plots = None,
) -> None:
    """Show a measured run again, tables and plots, from the CSV alone."""
    try:
        _show(csv, run, plots)
    except (OSError, ValueError) as error:
        raise _fail(error) from None


@app.command("list")
def list_() -> None:
    """List workloads and providers, and why a provider cannot run here."""
    rows = [(w.name, w.about) for w in WORKLOADS.values()]
    rows += [(DECODE.name, DECODE.about), ("lower", "a block table for 1,048,576 tokens: time and memory")]
    rows += [
        ("memory", "of forward+backward, beyond inputs, output and gradients"),
    ]
    for name, about in rows:
        typer.echo(f"{name:8} {about}")
    for name, found in PROVIDERS.items():
        reason = found.supports(WORKLOADS["main"], "forward")
        typer.echo(f"\n{name}\n    {found.label}: {found.note}" + (f"\n    not here: {reason}" if reason else ""))


@app.command()
def compare(
    revision: Annotated[str, typer.Argument(help="A commit, tag or branch; built in a temporary folder.")],
    workload: Annotated[list[str], typer.Option(help="Repeatable.")] = ["main"],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Time lcattn as it is here against another commit, in turns."""
    _check_names("--workload", workload, [name for name in WORKLOADS if name != HELD_BACK])
    try:
        with tqdm(desc="comparing", leave=False, disable=None, bar_format="{desc}: {postfix} {elapsed}") as bar:
            rows = comparing.compare(revision, workload, rounds, bar.set_postfix_str)
    except (ValueError, RuntimeError) as error:
        raise _fail(error) from None
    header = ("workload", "pass", f"sgemm share, {revision}", "here", "time here / there", "range")
    typer.echo(report.table(header, rows))


def _print_json(found: dict[str, Any]) -> None:
    typer.echo(json.dumps(found))


@app.command(hidden=True)
def memory_child(workload: str, provider: str, seed: int = 0) -> None:
    """One measurement of memory, for a process of its own."""
    _print_json(measure.memory_once(measure.workload(workload), provider, seed))


@app.command(hidden=True)
def lower_child() -> None:
    """One measurement of lowering, for a process of its own."""
    _print_json(measure.lower_once())


@app.command(hidden=True)
def serve_child(workload: list[str], seed: int = 0) -> None:
    """Answers `compare`."""
    comparing.serve(workload, seed)


if __name__ == "__main__":
    app(prog_name=f"python -m {__package__}")
