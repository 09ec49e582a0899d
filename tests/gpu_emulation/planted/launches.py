"""Launches of the kernels beside this file: their inputs, and what they should give."""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from lcattn.tolerance import Comparison, compare
from tests.gpu_emulation import Counts, Memory, emulate
from tests.gpu_emulation.compile import nvcc_ptx
from tests.gpu_emulation.emulate import Order

FOLDER = Path(__file__).parent
# from q, k and v of [heads, length, features]: out and lse
HEADS, LENGTH, FEATURES, CHUNK, FIRST_KEY = 2, 250, 64, 40, 70
# of the queries, and two stages of keys and values
ATTENTION_SHARED_BYTES = 5 * 64 * FEATURES * 2


@dataclass(frozen=True)
class Outcome:
    """What a kernel gave: its outputs, how they compare with the truth, and what was executed."""

    outputs: dict[str, Tensor]
    comparisons: list[Comparison]
    counts: Counts

    @property
    def wrong(self) -> list[str]:
        return [str(comparison) for comparison in self.comparisons if not comparison.ok]

    def same_bits(self, other: Outcome) -> bool:
        return all(
            torch.equal(t.view(torch.uint8), other.outputs[name].view(torch.uint8)) for name, t in self.outputs.items()
        )


@dataclass(frozen=True)
class Prepared:
    """A launch: everything but the number of the defect, which is a kernel's last argument."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: list[Any]
    outputs: dict[str, Tensor]
    judge: Callable[[dict[str, Tensor]], list[Comparison]]
    shared_bytes: int = 0


def source(file: str) -> str:
    return (FOLDER / file).read_text()


@functools.cache
def defects(file: str) -> list[str]:
    """The defects of a .cu file, each at its number."""
    enumerators = re.search(r"enum Defect : int \{(.*?)\};", source(file), re.DOTALL)
    assert enumerators, f"{file} has no enum Defect"
    return re.findall(r"k\w+", enumerators[1])


@functools.cache
def ptx(file: str) -> str:
    return nvcc_ptx(FOLDER / file)


def _exactly(**truths: Tensor) -> Callable[[dict[str, Tensor]], list[Comparison]]:
    def judge(outputs: dict[str, Tensor]) -> list[Comparison]:
        return [
            Comparison(name, float((outputs[name].double() - truth.double()).abs().max()), 0.0)
            for name, truth in truths.items()
        ]

    return judge


def _reverse_warps(memory: Memory, draw: Generator) -> Prepared:
    x, y = torch.randn(64, generator=draw), memory.empty((64,), torch.float32)
    judge = _exactly(y=x.view(2, 32).flip(1).flatten())
    return Prepared((1, 1, 1), (64, 1, 1), [memory.copy(x), y], {"y": y}, judge, shared_bytes=64 * 4)


def _reverse_block(memory: Memory, draw: Generator) -> Prepared:
    x, y = torch.randn(64, generator=draw), memory.empty((64,), torch.float32)
    return Prepared((1, 1, 1), (64, 1, 1), [memory.copy(x), y], {"y": y}, _exactly(y=x.flip(0)))


def _sum_warps(memory: Memory, draw: Generator) -> Prepared:
    # sums of small integers are exact
    x = torch.randint(-99, 99, (64,), generator=draw).float()
    y = memory.empty((64,), torch.float32)
    judge = _exactly(y=x.view(2, 32).sum(1).repeat_interleave(32))
    return Prepared((1, 1, 1), (64, 1, 1), [memory.copy(x), y], {"y": y}, judge)


def _hand_over(memory: Memory, draw: Generator) -> Prepared:
    x, y = torch.randn(96, generator=draw), memory.empty((96,), torch.float32)
    judge = _exactly(y=x.view(3, 32).flip(1).flatten())
    return Prepared((1, 1, 1), (64, 1, 1), [memory.copy(x), y, 3], {"y": y}, judge)


def _reverse_copied(memory: Memory, draw: Generator) -> Prepared:
    x, y = torch.randn(256, generator=draw), memory.empty((256,), torch.float32)
    return Prepared((1, 1, 1), (64, 1, 1), [memory.copy(x), y], {"y": y}, _exactly(y=x.flip(0)))


def _normalize_rows(memory: Memory, draw: Generator) -> Prepared:
    rows, columns, stride = 10, 40, 48
    x = (torch.rand(rows, stride, generator=draw) + 1)[:, :columns]
    y = memory.copy(torch.full((rows, stride), math.nan)[:, :columns])
    # far into a matrix of more than 2^32 elements, of which these rows are in memory
    args = [memory.copy(x), y, rows, columns, stride, stride, 100_000_000]

    def judge(outputs: dict[str, Tensor]) -> list[Comparison]:
        wide = x.double()
        return [compare("y", outputs["y"], wide / wide.sum(1, keepdim=True), x / x.sum(1, keepdim=True))]

    return Prepared((3, 1, 1), (32, 4, 1), args, {"y": y}, judge)


def _sum(memory: Memory, draw: Generator) -> Prepared:
    blocks, x = 5, torch.randint(-99, 99, (1000,), generator=draw).float()
    partial, out = memory.empty((blocks,), torch.float32), memory.copy(torch.zeros(1))
    args = [memory.copy(x), partial, memory.copy(torch.zeros(1, dtype=torch.int32)), out, len(x)]
    return Prepared((blocks, 1, 1), (64, 1, 1), args, {"out": out}, _exactly(out=x.sum()[None]))


def _histogram(memory: Memory, draw: Generator) -> Prepared:
    x = torch.randint(16, (1000,), generator=draw, dtype=torch.int32)
    counts = memory.copy(torch.zeros(16, dtype=torch.int32))
    args = [memory.copy(x), counts, len(x)]
    return Prepared((5, 1, 1), (64, 1, 1), args, {"counts": counts}, _exactly(counts=x.bincount(minlength=16)))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> dict[str, Tensor]:
    """Attention over chunks as it is defined, in the dtype of its inputs."""
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    visible = (key <= query) & (key >= FIRST_KEY) & (key // CHUNK >= query // CHUNK - 1)
    scores = (q @ k.mT * scale).masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(2)
    # a row that sees nothing gives zeros
    weights = (scores - lse[..., None].nan_to_num(neginf=0.0)).exp()
    return {"out": weights @ v, "lse": lse}


def _attention(memory: Memory, draw: Generator) -> Prepared:
    scale = FEATURES**-0.5
    q, k, v = (
        memory.copy((torch.randn(HEADS, LENGTH, FEATURES, generator=draw) * spread).bfloat16()) for spread in (2, 1, 1)
    )
    out = memory.empty((HEADS, LENGTH, FEATURES), torch.bfloat16)
    lse = memory.empty((HEADS, LENGTH), torch.float32)
    addresses = [t.data_ptr() for t in (q, k, v, out, lse)]
    problem = struct.pack("5Q3if", *addresses, LENGTH, CHUNK, FIRST_KEY, scale * math.log2(math.e))

    def judge(outputs: dict[str, Tensor]) -> list[Comparison]:
        truth = _attend(q.double(), k.double(), v.double(), scale)
        eager = _attend(q, k, v, scale)
        return [compare(name, outputs[name], truth[name], eager[name]) for name in truth]

    grid = (math.ceil(LENGTH / 64), HEADS, 1)
    return Prepared(grid, (128, 1, 1), [problem], {"out": out, "lse": lse}, judge, ATTENTION_SHARED_BYTES)


# the file of each kernel, and what to launch it on
KERNELS: dict[str, tuple[str, Callable[[Memory, Generator], Prepared]]] = {
    "reverse_warps": ("small.cu", _reverse_warps),
    "reverse_block": ("small.cu", _reverse_block),
    "sum_warps": ("small.cu", _sum_warps),
    "hand_over": ("small.cu", _hand_over),
    "reverse_copied": ("small.cu", _reverse_copied),
    "normalize_rows": ("rows.cu", _normalize_rows),
    "sum": ("reduce.cu", _sum),
    "histogram": ("reduce.cu", _histogram),
    "attention": ("attention.cu", _attention),
    "attention_plain": ("attention.cu", _attention),
}


def run(
    kernel: str,
    defect: str = "kNone",
    *,
    seed: int,
    order: Order = "forward",
    check: bool = True,
    shared_bytes: int | None = None,
    edit: Callable[[str], str] = str,
) -> Outcome:
    """Runs one kernel with one defect of its file planted.

    Args:
        seed: of the inputs.
        order, check: as in `emulate`.
        shared_bytes: dynamic shared memory, where that is not what the kernel needs.
        edit: changes the PTX before it runs.
    """
    file, prepare = KERNELS[kernel]
    with Memory() as memory:
        prepared = prepare(memory, torch.Generator().manual_seed(seed))
        number = [] if kernel == "attention_plain" else [defects(file).index(defect)]
        counts = emulate(
            edit(ptx(file)),
            kernel,
            grid=prepared.grid,
            block=prepared.block,
            shared_bytes=prepared.shared_bytes if shared_bytes is None else shared_bytes,
            args=[*prepared.args, *number],
            order=order,
            check=check,
        )
        outputs = {name: t.clone() for name, t in prepared.outputs.items()}
    return Outcome(outputs, prepared.judge(outputs), counts)
