"""What GPU kernels cost by their machine code: `python -m bench.gpu_model` in the source tree, without a GPU.

Registers, spills and occupancy, and for each loop with tensor-core instructions the instructions and the least cycles
that a multiprocessor can run them in, beside a plain attention of the same size. These are lower bounds, not
predictions: no latency, no bank conflicts, no L2 and no memory outside the multiprocessor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from tests.gpu_emulation import EmulationError
from tests.gpu_emulation.tools import MissingTool

from . import gpu_executed, gpu_table
from .gpu_kernels import KERNELS, Compiled, Kernel
from .gpu_rates import ARCHITECTURES, SCHEDULERS, SHARED_BYTES_PER_CLOCK, WARP, architecture, occupancy
from .gpu_sass import Instruction, Loop, SassError, by_class
from .gpu_table import Entry
from .report import table

DEFAULT_ARCHITECTURES = tuple(ARCHITECTURES)
# figures are given for so many scores, a score being a pair of a query and a key
SCORES = 1024

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@dataclass(frozen=True)
class LoopFigures:
    """One loop, per 1,024 scores.

    Attributes:
        least: warp instructions on the shortest way around that leaves out no tensor-core work.
        whole: warp instructions if every one of the loop runs.
        bound: cycles in which a multiprocessor can run `least`.
        pipe: what sets the bound; `issue` is the schedulers, one instruction a clock each.
        cycles: that each pipe takes.
        instructions: those of `least` by their class, the most first.
    """

    least: float
    whole: float
    bound: float
    pipe: str
    cycles: dict[str, float]
    instructions: dict[str, float]


@dataclass(frozen=True)
class Figures:
    registers: int
    spills: int
    stack: int
    shared_bytes: int
    blocks_per_multiprocessor: int
    warps_per_multiprocessor: int
    limit: str
    loops: tuple[LoopFigures, ...]


def pipe_cycles(number: int, instructions: Iterable[Instruction], warps: int) -> dict[str, float]:
    """Cycles of a multiprocessor for each pipe, tensor cores apart, if `warps` warps execute the instructions once."""
    instructions = list(instructions)
    counts = by_class(instructions)
    cycles = {"issue": len(instructions) * warps / SCHEDULERS}
    for pipe, rates in architecture(number).pipes.items():
        cycles[pipe] = sum(counts[name] * warps * WARP / rate for name, rate in rates.items())
    shared = sum(i.bytes_per_thread for i in instructions if i.kind == "shared")
    cycles["shared memory"] = shared * warps * WARP / SHARED_BYTES_PER_CLOCK
    return {pipe: value for pipe, value in cycles.items() if value}


def multiply_adds(kernel: Kernel, instructions: Iterable[Instruction], warps: int) -> dict[str, Fraction]:
    """Tensor-core multiply-adds of a block by kind of instruction, if it executes the instructions once."""
    found: dict[str, Fraction] = {}
    for instruction in instructions:
        if instruction.kind == "tensor":
            name = instruction.opcode.split(".")[0]
            own = instruction.tensor_fma()
            # tcgen05: one thread issues it for the whole block, and its shape is in a register
            added = Fraction(own * warps) if own is not None else kernel.multiply_adds_of_tcgen05
            found[name] = found.get(name, Fraction()) + added
    return found


def loop_figures(number: int, kernel: Kernel, compiled: Compiled, loop: Loop) -> LoopFigures:
    warps = -(-compiled.threads // WARP)
    work = multiply_adds(kernel, loop.least, warps)
    total = sum(work.values(), Fraction())
    rounds, rest = divmod(total, kernel.multiply_adds)
    if rest or not rounds:
        raise SassError(
            f"{compiled.code.name}: the loop at 0x{loop.whole[0].address:x} does {total} multiply-adds, "
            f"expected a multiple of {kernel.multiply_adds} (a tile of {kernel.tile} with head dim {kernel.head_dim})"
        )
    scores = rounds * kernel.tile[0] * kernel.tile[1] / SCORES
    cycles = pipe_cycles(number, loop.least, warps)
    rates = architecture(number).tensor
    if all(name in rates for name in work):
        cycles["tensor"] = sum(float(count) / rates[name] for name, count in work.items())
    cycles = {pipe: round(value / scores, 2) for pipe, value in cycles.items()}
    pipe = max(cycles, key=lambda name: cycles[name])
    return LoopFigures(
        round(len(loop.least) * warps / scores, 2),
        round(len(loop.whole) * warps / scores, 2),
        cycles[pipe],
        pipe,
        cycles,
        {name: round(count * warps / scores, 2) for name, count in by_class(loop.least).most_common()},
    )


def figures(number: int, kernel: Kernel, compiled: Compiled) -> Figures:
    code = compiled.code
    shared = code.static_shared + compiled.dynamic_shared
    fit = occupancy(number, compiled.threads, code.registers, shared)
    loops = tuple(loop_figures(number, kernel, compiled, loop) for loop in code.tensor_loops)
    if not loops:
        raise SassError(f"{code.name}: no loop with tensor-core instructions on sm_{number}")
    return Figures(code.registers, code.spills, code.stack, shared, fit.blocks, fit.warps, fit.limit, loops)


def without_rate(number: int, code: Iterable[Instruction]) -> dict[str, str]:
    """The classes of the instructions that take their issue slot and nothing else, with an opcode of each."""
    limits = architecture(number)
    known = {name for rates in limits.pipes.values() for name in rates} | {"shared"}
    found = {}
    for instruction in code:
        opcode = instruction.opcode.split(".")[0]
        if instruction.kind == "tensor" and opcode not in limits.tensor:
            found[f"tensor ({opcode})"] = opcode
        elif instruction.kind != "tensor" and instruction.kind not in known:
            found.setdefault(instruction.kind, opcode)
    return found


@dataclass(frozen=True)
class Result:
    kernel: str
    number: int
    compiler: str
    figures: Figures
    unrated: Mapping[str, str]

    @property
    def architecture(self) -> str:
        return f"sm_{self.number}"

    @property
    def entry(self) -> Entry:
        """As the table has it."""
        found = self.figures
        recorded: dict[str, float] = {
            "registers": found.registers,
            "spills": found.spills,
            "stack": found.stack,
            "shared bytes": found.shared_bytes,
            "blocks per multiprocessor": found.blocks_per_multiprocessor,
            "warps per multiprocessor": found.warps_per_multiprocessor,
        }
        for index, loop in enumerate(found.loops):
            recorded |= {f"loop {index} {name}": getattr(loop, name) for name in ("least", "whole", "bound")}
        return Entry(self.compiler, self.kernel, self.architecture, recorded)


def measure(kernels: Mapping[str, Kernel], numbers: Iterable[int]) -> Iterator[Result]:
    """Compiles each kernel for each architecture and reads the result."""
    for number in numbers:
        for name, kernel in kernels.items():
            compiled = kernel.compile(number)
            yield Result(
                name,
                number,
                compiled.compiler,
                figures(number, kernel, compiled),
                without_rate(number, compiled.code.instructions),
            )


def _ratio(own: float, other: float) -> str:
    return f"{own / other:.2f}" if other else "n/a"


def report(results: Iterable[Result]) -> str:
    """A row for each loop; ratios are to the like loop of the yardstick: cheapest to cheapest, dearest to dearest."""
    found = {(result.kernel, result.number): result for result in results}
    rows = []
    for (name, number), result in found.items():
        own = result.figures
        yardstick = found.get((KERNELS[name].yardstick or "", number))
        for index, loop in enumerate(own.loops):
            ratios = ["", ""]
            if yardstick:
                others = yardstick.figures.loops
                other = others[-1] if index and index == len(own.loops) - 1 else others[min(index, len(others) - 1)]
                ratios = [_ratio(loop.least, other.least), _ratio(loop.bound, other.bound)]
            kernel_columns = (
                f"{name}, {result.architecture}",
                str(own.registers),
                str(own.spills),
                str(own.stack),
                f"{own.shared_bytes / 1024:.1f}",
                f"{own.blocks_per_multiprocessor} ({own.limit})",
                f"{own.warps_per_multiprocessor}",
            )
            tensor = f"{loop.cycles['tensor']:.0f}" if "tensor" in loop.cycles else "no rate"
            loop_columns = (f"{loop.least:.0f}", f"{loop.whole:.0f}", tensor, f"{loop.bound:.0f} ({loop.pipe})")
            rows.append((*(kernel_columns if index == 0 else [""] * len(kernel_columns)), *loop_columns, *ratios))
    header = (
        "kernel",
        "regs",
        "spills",
        "stack",
        "KiB",
        "blocks",
        "warps",
        "least",
        "whole",
        "tensor",
        "bound",
        "least /",
        "bound /",
    )
    lines = [table(header, rows), "", f"warp instructions of `least` for {SCORES:,} scores, by class:"]
    for result in found.values():
        for index, loop in enumerate(result.figures.loops):
            which = f", loop {index}" if len(result.figures.loops) > 1 else ""
            classes = ", ".join(f"{kind} {count:.0f}" for kind, count in loop.instructions.items())
            lines.append(f"{result.kernel}, {result.architecture}{which}: {classes}")
    lines.append("")
    lines += [
        f"least, whole: warp instructions for {SCORES:,} scores, on the shortest way around the loop and of all of it",
        f"tensor, bound: cycles of a multiprocessor for {SCORES:,} scores, the least possible, and what sets it",
        "least /, bound /: as a multiple of the yardstick's, plain attention with the same tile and head dim",
    ]
    for number in sorted({number for _, number in found}):
        lines += [f"sm_{number}: {remark}" for remark in ARCHITECTURES[number].remarks]
        unrated = {kind: opcode for (_, n), r in found.items() if n == number for kind, opcode in r.unrated.items()}
        if unrated:
            named = ", ".join(kind if "(" in kind else f"{kind} ({opcode})" for kind, opcode in sorted(unrated.items()))
            lines.append(f"sm_{number}: no sourced rate: {named}")
    return "\n".join(lines)


def _fail(message: object) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def _execute(wanted: Iterable[str]) -> list[gpu_executed.Executed]:
    names = {*wanted, *gpu_executed.YARDSTICKS}
    chosen = {name: entry for name, entry in gpu_executed.EXECUTABLES.items() if name in names}
    found = []
    with tqdm(total=len(chosen) * len(gpu_executed.LAYOUTS), desc="executing", leave=False, disable=None) as bar:
        for executed in gpu_executed.execute(chosen):
            found.append(executed)
            bar.set_postfix_str(f"{executed.kernel}, {executed.layout}")
            bar.update()
    return found


@app.command()
def main(
    arch: Annotated[
        list[int], typer.Option(help=f"Repeatable, as 80; {', '.join(map(str, DEFAULT_ARCHITECTURES))} by default.")
    ] = [],  # noqa: B006
    kernel: Annotated[list[str], typer.Option(help="Repeatable, a part of a name; all by default.")] = [],  # noqa: B006
    write: Annotated[bool, typer.Option("--write", help="Record the figures in the table.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail if anything is worse than in the table.")] = False,
    execute: Annotated[bool, typer.Option(help="Count what whole launches execute, in emulation.")] = True,
    path: Annotated[Path, typer.Option("--table", help="The table of --write and --check.")] = gpu_table.PATH,
) -> None:
    """What GPU kernels cost by their machine code; needs nvcc and Triton, and no GPU."""
    wanted = [name for name in KERNELS if not kernel or any(part in name for part in kernel)]
    beside = {KERNELS[name].yardstick for name in wanted}
    chosen = {name: entry for name, entry in KERNELS.items() if name in wanted or name in beside}
    numbers = arch or DEFAULT_ARCHITECTURES
    if write and check:
        raise _fail("--write and --check exclude each other")
    if not chosen:
        raise _fail(f"--kernel: expected a part of one of {', '.join(KERNELS)}, got {', '.join(kernel)}")
    for number in numbers:
        if number not in ARCHITECTURES:
            raise _fail(f"--arch: expected one of {', '.join(map(str, ARCHITECTURES))}, got {number}")
    # what Triton 3.9 does unasked, with a warning
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    results, executed = [], []
    try:
        with tqdm(total=len(chosen) * len(numbers), desc="compiling", leave=False, disable=None) as bar:
            for result in measure(chosen, numbers):
                results.append(result)
                bar.set_postfix_str(f"{result.kernel} {result.architecture}")
                bar.update()
        typer.echo(report(results))
        if execute:
            executed = _execute(wanted)
            typer.echo(f"\n{gpu_executed.report(executed)}")
    except (SassError, MissingTool, EmulationError) as error:
        raise _fail(error) from None
    recorded = gpu_table.read(path)
    entries = [found.entry for found in (*results, *executed)]
    if write:
        gpu_table.write(gpu_table.merged(recorded, entries, KERNELS), path)
        typer.echo(f"\nwritten: {path}")
    if check:
        lines = [line for entry in entries for line in gpu_table.compare(entry, recorded)]
        typer.echo(
            "\n" + "\n".join(f"WORSE: {line}" for line in lines) if lines else "\nnothing is worse than recorded"
        )
        raise typer.Exit(1 if lines else 0)


if __name__ == "__main__":
    app(prog_name="python -m bench.gpu_model")
