"""The GPU kernels that the model reads: ours and what they are measured against, and how each is compiled."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from lcattn.triton_kernels import forward

import lcattn
from lcattn.api import make_problem
from lcattn.inputs import KernelInputs, kernel_inputs
from lcattn.layout import Layout
from tests.gpu_emulation.backends import SOURCES, EmulatedCuda
from tests.gpu_emulation.compile import NVCC_FLAGS, triton_compile
from tests.gpu_emulation.tools import find_tool, tool_version

from . import gpu_sass
from .gpu_yardsticks import causal_attention


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code and its launch."""

    compiler: str
    code: gpu_sass.Kernel
    threads: int
    dynamic_shared: int


@dataclass(frozen=True)
class Kernel:
    """A kernel as the model sees it.

    Attributes:
        compile: to machine code of an architecture, as 80 for 8.0.
        head_dim: of q, k and v.
        tile: queries and keys of a block of threads, once around its loop.
        yardstick: the kernel that its figures are given beside.
    """

    compile: Callable[[int], Compiled]
    head_dim: int
    tile: tuple[int, int]
    yardstick: str | None = None

    @property
    def multiply_adds(self) -> int:
        """Of a block, once around: q k and p v."""
        return 2 * self.tile[0] * self.tile[1] * self.head_dim

    @property
    def multiply_adds_of_tcgen05(self) -> Fraction:
        """Of one tcgen05 instruction, the mean of the two products: each takes 16 of the summed dimension."""
        return Fraction(self.multiply_adds, (self.head_dim + self.tile[1]) // 16)


@cache
def _nvcc(source: Path, number: int) -> dict[str, gpu_sass.Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        command = [find_tool("nvcc"), "-cubin", f"-arch=sm_{number}", *NVCC_FLAGS, source, "-o", cubin]
        gpu_sass.run(*command)
        return gpu_sass.read(cubin)


def _cuda(dtype: torch.dtype, head_dim: int, number: int) -> Compiled:
    """Our forward as it is launched for a causal call; one kernel serves every layout and position."""
    inputs = forward_inputs(256, head_dim, dtype, lcattn.Causal(), with_bias=False)
    out = torch.empty_like(inputs.q[0])
    launch = EmulatedCuda().describe(inputs, out, torch.empty(out.shape[:3]))
    code = _nvcc(SOURCES / "forward.cu", number)[launch["kernel_name"]]
    return Compiled(nvcc_compiler(), code, launch["block"][0], launch["shared_bytes"])


def nvcc_compiler() -> str:
    return f"nvcc {tool_version(find_tool('nvcc'))}"


PLAIN_CUDA = Path(__file__).with_name("plain_attention.cu")


@dataclass(frozen=True)
class PlainCuda:
    """A launch of plain_attention.cu, beside its grid of (rows / 64, heads)."""

    head_dim: int
    threads: int = 128

    @property
    def name(self) -> str:
        return f"plain_attention_d{self.head_dim}"

    @property
    def shared_bytes(self) -> int:
        # K and V of two blocks
        return 2 * 2 * 64 * self.head_dim * 2

    def compile(self, number: int) -> Compiled:
        return Compiled(nvcc_compiler(), _nvcc(PLAIN_CUDA, number)[self.name], self.threads, self.shared_bytes)


@cache
def triton_compiler(number: int) -> str:
    ptxas = triton.knobs.nvidia.ptxas_blackwell if number >= 100 else triton.knobs.nvidia.ptxas
    return f"triton {triton.__version__} with ptxas {ptxas.version}"


def yardstick_arguments(rows: int, head_dim: int, tile: tuple[int, int]) -> tuple[Any, ...]:
    """Arguments of the yardstick for one head."""
    q, k, v, out = (torch.zeros(1, rows, head_dim, dtype=torch.bfloat16) for _ in range(4))
    strides = (rows * head_dim, head_dim)
    return (q, k, v, out, torch.zeros(1, rows), *strides, *strides, *strides, rows, 0.125, *tile, head_dim)


def _yardstick(head_dim: int, tile: tuple[int, int], num_warps: int, num_stages: int, number: int) -> Compiled:
    rows = 1024
    arguments = yardstick_arguments(rows, head_dim, tile)
    options = {"grid": (rows // tile[0], 1), "num_warps": num_warps, "num_stages": num_stages}
    return of_triton(triton_compile(causal_attention, *arguments, arch=number, **options), number)


def of_triton(compiled: triton.compiler.CompiledKernel, number: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "out.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        code = gpu_sass.read(cubin)[compiled.metadata.name]
    threads = compiled.metadata.num_warps * compiled.metadata.warp_size
    return Compiled(triton_compiler(number), code, threads, compiled.metadata.shared)


def forward_inputs(rows: int, head_dim: int, dtype: torch.dtype, layout: Layout, with_bias: bool) -> KernelInputs:
    """What our kernels are given of a call of one head."""
    q, k, v = (torch.zeros(1, 1, rows, head_dim, dtype=dtype) for _ in range(3))
    position = lcattn.RelativeBias(torch.zeros(1, 2 * rows), 1 - rows) if with_bias else None
    problem = make_problem(q, k, v, layout, position, None, None, None, None, None, None, 0.0)
    return kernel_inputs(problem)[1]


def _triton(dtype: torch.dtype, head_dim: int, with_bias: bool, number: int) -> Compiled:
    """Our forward, compiled for the very arguments of a causal call."""
    inputs = forward_inputs(256, head_dim, dtype, lcattn.Causal(), with_bias)
    out = torch.empty_like(inputs.q[0])
    grid, values = forward.arguments(inputs, out, torch.empty(out.shape[:3]))
    return of_triton(triton_compile(forward._forward, grid=grid, arch=number, **values), number)


_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}

KERNELS = {
    **{
        f"cuda {name} d{head_dim}": Kernel(
            partial(_cuda, dtype, head_dim), head_dim, (64, 64), f"plain cuda d{head_dim}"
        )
        for name, dtype in _DTYPES.items()
        for head_dim in (64, 128)
    },
    **{
        f"triton {name} d{head_dim}{' bias' if with_bias else ''}": Kernel(
            partial(_triton, _DTYPES[name], head_dim, with_bias), head_dim, (64, 64), f"plain d{head_dim} 64x64"
        )
        for head_dim in (64, 128)
        for name, with_bias in (("bf16", False), ("bf16", True), ("f16", False))
    },
    **{f"plain cuda d{d}": Kernel(PlainCuda(d).compile, d, (64, 64)) for d in (64, 128)},
    "plain d64 64x64": Kernel(partial(_yardstick, 64, (64, 64), 4, 2), 64, (64, 64)),
    "plain d64 128x64": Kernel(partial(_yardstick, 64, (128, 64), 4, 3), 64, (128, 64)),
    "plain d128 64x64": Kernel(partial(_yardstick, 128, (64, 64), 4, 2), 128, (64, 64)),
    "plain d128 128x64": Kernel(partial(_yardstick, 128, (128, 64), 8, 2), 128, (128, 64)),
}
