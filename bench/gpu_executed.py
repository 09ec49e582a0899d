"""What whole launches of the GPU kernels execute, counted in emulation, for each score that a layout shows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.utils import _pytree

import lcattn
from lcattn.layout import Layout
from tests.gpu_emulation import Memory, emulate
from tests.gpu_emulation.backends import EmulatedCuda, EmulatedTriton
from tests.gpu_emulation.compile import nvcc_ptx, triton_launch
from tests.gpu_emulation.emulate import Counts

from .gpu_kernels import PLAIN_CUDA, PlainCuda, forward_inputs, nvcc_compiler, triton_compiler, yardstick_arguments
from .gpu_table import Entry
from .gpu_yardsticks import causal_attention
from .report import table
from .workloads import visible_pairs

ROWS, HEAD_DIM, DTYPE = 1024, 64, torch.bfloat16
LAYOUTS: dict[str, Layout] = {
    "causal": lcattn.Causal(),
    "window of 128": lcattn.Window(128, 0),
    "chunks of 128, one back": lcattn.Chunked(128) & lcattn.Causal(),
}

# PTX opcodes by their first part
CLASSES = {
    "matrix": "mma wgmma tcgen05",
    "special function": "ex2 lg2 rcp rsqrt sqrt sin cos tanh",
    "arithmetic": (
        "add sub mul fma mad min max neg abs div rem sad and or xor not shl shr shf lop3 bfe bfi prmt popc clz bfind "
        "brev cnot testp copysign cvt selp setp set slct mul24 mad24 dp4a dp2a addc subc madc"
    ),
    "move": "mov cvta isspacep",
    "shared memory": "ldmatrix stmatrix movmatrix cp",
    "memory": "ld st atom red ldu prefetch prefetchu",
    "exchange": "shfl vote match redux activemask elect",
    "barrier": "bar barrier membar fence mbarrier griddepcontrol",
    "control": "bra brx call ret exit trap nanosleep",
}
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}


@dataclass(frozen=True)
class Executed:
    """One launch.

    Attributes:
        instructions: thread instructions of PTX for each visible score; classes: the same, by class.
        tensor: multiply-adds of the tensor cores over those that the visible scores need, 2 head_dim each.
    """

    kernel: str
    layout: str
    compiler: str
    instructions: float
    tensor: float
    classes: Mapping[str, float]

    @property
    def entry(self) -> Entry:
        figures = {"executed instructions": self.instructions, "executed tensor work": self.tensor}
        return Entry(self.compiler, self.kernel, self.layout, figures)


def class_of(opcode: str) -> str:
    name = opcode.split(".")[0]
    if name not in CLASS_OF:
        raise ValueError(f"unknown PTX opcode {opcode!r}: give it a class in CLASSES")
    return CLASS_OF[name]


def multiply_adds(opcode: str) -> int:
    """Of one thread's part of a matrix instruction, 0 for any other."""
    if class_of(opcode) != "matrix":
        return 0
    found = re.match(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)\.", opcode)
    if not found:
        raise ValueError(f"matrix instruction of unknown shape: {opcode}")
    m, n, k = map(int, found.groups())
    return m * n * k // 32


def summed(kernel: str, layout: str, compiler: str, counts: Counts) -> Executed:
    visible = visible_pairs(LAYOUTS[layout], 1, ROWS)
    classes: dict[str, float] = {}
    for opcode, count in counts.opcodes.items():
        name = class_of(opcode)
        classes[name] = classes.get(name, 0) + count / visible
    matrix = sum(count * multiply_adds(opcode) for opcode, count in counts.opcodes.items())
    work = matrix / (2 * HEAD_DIM * visible)
    rounded = {name: round(value, 3) for name, value in sorted(classes.items())}
    return Executed(kernel, layout, compiler, round(counts.total / visible, 3), round(work, 3), rounded)


def _own(backend: EmulatedCuda | EmulatedTriton, layout: Layout, with_bias: bool) -> Counts:
    inputs = forward_inputs(ROWS, HEAD_DIM, DTYPE, layout, with_bias)
    with Memory() as memory:
        inputs = _pytree.tree_map_only(torch.Tensor, memory.copy, inputs)
        shape = inputs.q[0].shape
        launch = backend.describe(inputs, memory.empty(shape, DTYPE), memory.empty(shape[:3], torch.float32))
        return emulate(**launch, check=False)


def _plain(tile: tuple[int, int]) -> Counts:
    arguments = yardstick_arguments(ROWS, HEAD_DIM, tile)
    launch = triton_launch(causal_attention, *arguments, grid=(ROWS // tile[0], 1), num_warps=4, num_stages=2)
    return emulate(**vars(launch), check=False)


@dataclass(frozen=True)
class Executable:
    """A kernel of KERNELS as it is executed: on a layout, or on plain causal attention whatever the layout shows."""

    compiler: Callable[[], str]
    run: Callable[[Layout], Counts]


def _of_triton() -> str:
    return triton_compiler(80)


def plain_cuda(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Counts:
    """A launch of plain_attention.cu on [heads, rows, D] in emulated memory."""
    heads, rows, head_dim = q.shape
    kernel, scale = PlainCuda(head_dim), head_dim**-0.5 / math.log(2)
    return emulate(
        nvcc_ptx(PLAIN_CUDA),
        kernel.name,
        (rows // 64, heads, 1),
        (kernel.threads, 1, 1),
        kernel.shared_bytes,
        [q, k, v, out, lse, rows, scale],
        check=False,
    )


def _plain_cuda() -> Counts:
    with Memory() as memory:
        q, k, v = (memory.copy(torch.zeros(1, ROWS, HEAD_DIM, dtype=DTYPE)) for _ in range(3))
        return plain_cuda(q, k, v, memory.empty(q.shape, DTYPE), memory.empty(q.shape[:2], torch.float32))


YARDSTICK = "plain d64 64x64"
YARDSTICKS = ("plain cuda d64", YARDSTICK)
EXECUTABLES = {
    "cuda bf16 d64": Executable(nvcc_compiler, lambda layout: _own(EmulatedCuda(), layout, False)),
    "triton bf16 d64": Executable(_of_triton, lambda layout: _own(EmulatedTriton(), layout, False)),
    "triton bf16 d64 bias": Executable(_of_triton, lambda layout: _own(EmulatedTriton(), layout, True)),
    "plain cuda d64": Executable(nvcc_compiler, lambda layout: _plain_cuda()),
    YARDSTICK: Executable(_of_triton, lambda layout: _plain((64, 64))),
}


def execute(kernels: Mapping[str, Executable]) -> Iterator[Executed]:
    """Every kernel on every layout."""
    for kernel, executable in kernels.items():
        for name, layout in LAYOUTS.items():
            yield summed(kernel, name, executable.compiler(), executable.run(layout))


def report(found: list[Executed]) -> str:
    """A row for each kernel and layout; the ratio is to its compiler's yardstick, which computes all that is causal."""
    beside_of = {(e.compiler, e.layout): e for e in found if e.kernel in YARDSTICKS}
    rows = []
    for executed in found:
        beside = beside_of.get((executed.compiler, executed.layout))
        ratio = f"{executed.instructions / beside.instructions:.2f}" if beside else ""
        name = f"{executed.kernel}, {executed.layout}"
        classes = [f"{executed.classes.get(kind, 0):.2f}" for kind in CLASSES]
        rows.append((name, f"{executed.instructions:.1f}", ratio, f"{executed.tensor:.2f}", *classes))
    header = ("executed, a visible score", "PTX", "/ plain", "tensor work", *CLASSES)
    return table(header, rows)
