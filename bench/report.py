"""What a run of the CSV says: a table of shares, what was asked and what was measured, and plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lcattn import plot

from .providers import PROVIDERS
from .records import Results
from .workloads import WORKLOADS

FORWARD, BOTH = "forward", "forward+backward"
MEASURES = (FORWARD, BOTH)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns; the first flush left, the others flush right."""
    cells = [list(map(str, header)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[c]) for row in cells) for c in range(len(header))]
    lines = [
        "  ".join(x.ljust(w) if c == 0 else x.rjust(w) for c, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def shares(results: Results) -> str:
    """A row a workload, provider and pass: median share of sgemm, its range, time, and time over lcattn's."""
    keys = dict.fromkeys((r.workload, r.provider, r.measure) for r in results.rows if r.work)
    rows = []
    for workload, provider, measure in keys:
        found = results.of(workload, provider, measure)
        of_sgemm = [row.share for row in found]
        own = {row.round: row.relative for row in results.of(workload, "lcattn", measure)}
        leads = [row.relative / own[row.round] for row in found if row.round in own]
        rows.append(
            (
                f"{workload}, {PROVIDERS[provider].label}",
                found[0].isa,
                measure,
                f"{statistics.median(of_sgemm):.1%}",
                f"{min(of_sgemm):.1%} to {max(of_sgemm):.1%}",
                f"{statistics.median(row.value for row in found):.1f}",
                f"{statistics.median(leads):.2f}" if leads else "",
            )
        )
    return table(("workload, provider", "isa", "pass", "of sgemm", "range", "ms", "time / lcattn's"), rows)


@dataclass(frozen=True)
class Target:
    """A figure that was asked for: `asked` is a least value, or with `at_most` a greatest."""

    name: str
    asked: float
    measured: float | None
    unit: str = ""
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.asked if self.at_most else self.measured >= self.asked

    def cells(self) -> tuple[str, str, str, str]:
        def text(value: float | None) -> str:
            if value is None:
                return "not measured"
            return f"{value:.1%}" if self.unit == "%" else f"{value:.3g}{self.unit}"

        verdict = {True: "yes", False: "no", None: ""}[self.met]
        return (
            self.name,
            ("at most " if self.at_most else "") + text(self.asked),
            text(self.measured),
            verdict,
        )


def targets(results: Results) -> list[Target]:
    """Every figure asked for, and what the run measured."""
    found = []
    for workload, what in (("main", "head dim 64"), ("d128", "head dim 128")):
        for measure in MEASURES:
            ours = (workload, "lcattn", measure)
            found.append(Target(f"{what}, {measure}, share of sgemm", 0.72, results.share(*ours), "%"))
            factor = 4.5 if measure == FORWARD else 5.0
            peers = ("sdpa-folded-fixed", "sdpa-padded", *(() if measure == FORWARD else ("sdpa-folded",)))
            for peer in peers:
                ratio = results.ratio((workload, peer, measure), ours)
                found.append(Target(f"{what}, {measure}, speed over {PROVIDERS[peer].label}", factor, ratio, "x"))
        ratio = results.ratio((workload, "flex-bias", FORWARD), (workload, "lcattn", FORWARD))
        found.append(Target(f"{what}, forward, speed over flex_attention with the bias", 5.0, ratio, "x"))
    for measure in MEASURES:
        ours = ("main", "lcattn", measure)
        ratio = results.ratio(("bf16", "lcattn", measure), ours)
        found.append(Target(f"bfloat16, {measure}, time over float32", 1.15, ratio, "x", at_most=True))
        share = results.share("avx2", "lcattn", measure)
        found.append(Target(f"AVX2, {measure}, share of AVX2's sgemm", 0.72, share, "%"))
        ratio = results.ratio(("long", "lcattn", measure), ours)
        found.append(Target(f"65,536 tokens, {measure}, time over 8,192", 8.8, ratio, "x", at_most=True))
    shaw = ("main", "lcattn-shaw", BOTH)
    ratio = results.ratio(shaw, ("main", "lcattn-plain", BOTH))
    found.append(Target("relative keys (Shaw), forward+backward, time over no position", 2.0, ratio, "x", at_most=True))
    ratio = results.ratio(("long", "lcattn-shaw", BOTH), shaw)
    found.append(
        Target("relative keys, forward+backward, 65,536 tokens, time over 8,192", 8.8, ratio, "x", at_most=True)
    )
    extra, io = (results.value("main", "lcattn", f"{kind} memory") for kind in ("extra", "io"))
    ratio = extra / io if extra is not None and io else None
    found.append(Target("memory beyond inputs, output and gradients, over theirs", 0.25, ratio, "x", at_most=True))
    for name, asked, unit in (("first", 500.0, " ms"), ("peak", 200.0, " MiB")):
        value = results.value("lower", "lcattn", f"lower, {name}")
        found.append(Target(f"lowering 1,048,576 tokens, {name}", asked, value, unit, at_most=True))
    for state in ("warm", "cold"):
        ratio = results.relative("decode", "lcattn", f"decode {state}")
        found.append(
            Target(
                f"decoding against 65,536 keys, caches {state}, time over reading K and V",
                1.5,
                ratio,
                "x",
                at_most=True,
            )
        )
    return found


def summary(results: Results) -> str:
    """Both tables of a run, headed by what ran."""
    first = results.rows[0]
    head = f"{first.cpu}, {first.threads} threads, torch {first.torch}, lcattn {first.commit}, {first.date}"
    asked = table(("asked", "target", "measured", "met"), [target.cells() for target in targets(results)])
    rounds = 1 + max(row.round for row in results.rows)
    return f"{head}\nmedians of {rounds} rounds\n\n{shares(results)}\n\n{asked}"


def plots(results: Results, folder: Path) -> list[Path]:
    """Writes the run's plots: shares of sgemm a workload, and time by length."""
    written = []
    for name in dict.fromkeys(row.workload for row in results.rows if row.work):
        bars = []
        for provider, found in PROVIDERS.items():
            for measure in MEASURES:
                values = [100 * row.share for row in results.of(name, provider, measure)]
                if values:
                    bars.append(plot.Bar(found.label, measure, statistics.median(values), min(values), max(values)))
        if len(bars) > 2:
            w = WORKLOADS[name]
            dtype = str(w.dtype).removeprefix("torch.")
            title = f"{w.N:,} tokens, {w.H} heads of {w.D}, {dtype}, chunk {w.chunk} + 1 back"
            xlabel = "useful flops, % of the float32 matrix product's rate (more is better)"
            written.append(plot.save_bars(bars, xlabel, title, folder / f"bench-{name}.png"))
    lengths = sorted((WORKLOADS[name].N, name) for name in ("short", "main", "long"))
    lines = {}
    for provider in ("lcattn", "sdpa-folded-fixed", "sdpa-causal"):
        points = [(N, t) for N, name in lengths if (t := results.relative(name, provider, BOTH)) is not None]
        if len(points) > 1:
            lines[PROVIDERS[provider].label] = points
    if lines:
        written.append(
            plot.save_lines(
                lines,
                "tokens",
                "time, in matrix products of 2048³",
                "forward+backward by length",
                folder / "bench-lengths.png",
                log=True,
            )
        )
    return written
