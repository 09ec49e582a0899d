"""Device code as nvcc and Triton hand it to ptxas, on a machine without a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from tests.gpu_emulation.tools import find_tool, tool_version

CACHE = Path(__file__).parents[2] / "build" / "emulation" / "nvcc"
# what setup.py compiles the project's own kernels with, and line numbers for the checker's messages
NVCC_FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo")

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the arguments of `emulate` of the same names."""

    ptx: str
    kernel_name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    args: list[Any]


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def _digest_file(path: str) -> str | None:
    try:
        return _digest(Path(path).read_bytes())
    except OSError:
        return None


def _compile_ptx(command: Sequence[object]) -> dict[str, Any]:
    """PTX, and the files that it was made of with their contents' digests."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, rule = Path(folder, "out.ptx"), Path(folder, "out.d")
        done = subprocess.run([*map(str, command), "-MD", "-MF", rule, "-o", ptx], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed: {' '.join(map(str, command))}\n{done.stderr or done.stdout}")
        # a make rule: target, colon, files with spaces and line ends escaped
        _, files = rule.read_text().replace("\\\n", " ").split(" : ", 1)
        names = [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", files.strip())]
        return {"ptx": ptx.read_text(), "files": {name: _digest_file(name) for name in names}}


def nvcc_ptx(source: Path, arch: str = "sm_80", flags: Sequence[str] = ()) -> str:
    """PTX of a .cu file; compiled only when the file, one that it includes, the flags or the compiler changed."""
    nvcc, source = find_tool("nvcc"), Path(source).resolve()
    command = [nvcc, "-ccbin", find_tool("c++"), "-ptx", f"-arch={arch}", *NVCC_FLAGS, *flags, source]
    entry = CACHE / f"{source.stem}-{_digest(*map(str, command), tool_version(nvcc))[:16]}.json"
    if entry.exists():
        found = json.loads(entry.read_text())
        if all(_digest_file(name) == digest for name, digest in found["files"].items()):
            return found["ptx"]
    found = _compile_ptx(command)
    CACHE.mkdir(parents=True, exist_ok=True)
    # other processes see the old entry or the new one, never half of one
    with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
        json.dump(found, file)
    os.replace(file.name, entry)
    return found["ptx"]


class _AbsentGPU:
    """What Triton asks of a driver in order to compile for a GPU; it can launch nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        # a key of the kernel's cache of compiled code: apart from that of any real device
        return f"emulated sm_{self.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"compiling for sm_{self.arch} without a GPU, Triton asked its driver for {name!r}")


@contextmanager
def _compiling_for(arch: int) -> Iterator[None]:
    config = triton.runtime.driver
    # the property would look for a real GPU, and fail where there is none
    active = config._active
    config.set_active(_AbsentGPU(arch))
    try:
        yield
    finally:
        config.set_active(active)


def triton_compile(
    kernel: triton.JITFunction, *args: Any, grid: Grid, arch: int = 80, **options: Any
) -> CompiledKernel:
    """The very kernel that a launch with these arguments would compile: alignments, ones and None specialised alike.

    Args:
        kernel, args, grid: as in `kernel[grid](*args)`; tensors may live on any device.
        arch: compute capability, as 80 for 8.0.
        options: keyword arguments of the kernel and Triton's options (num_warps, num_stages, ...).
    """
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"kernel: expected a triton.JITFunction, got {type(kernel).__name__}")
    with _compiling_for(arch):
        return kernel.warmup(*args, grid=grid, **options)


def _bind(kernel: triton.JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """Every argument of a kernel by name."""
    bound = kernel.signature.bind(*args, **{name: x for name, x in options.items() if name in kernel.arg_names})
    bound.apply_defaults()
    return dict(bound.arguments)


def grid_sizes(
    kernel: triton.JITFunction, args: tuple[Any, ...], options: dict[str, Any], grid: Grid
) -> tuple[int, int, int]:
    """The three sizes of a grid that may be a function of the kernel's arguments."""
    x, y, z = (*(grid(_bind(kernel, args, options)) if callable(grid) else grid), 1, 1)[:3]
    return x, y, z


def _flat(signature: Any, argument: Any) -> Iterator[Any]:
    """The arguments that are left of one in compiled code: those of a tuple, none of what was specialised away."""
    if isinstance(signature, tuple):
        for part, value in zip(signature, argument, strict=True):
            yield from _flat(part, value)
    elif signature.startswith("tensordesc"):
        raise NotImplementedError("tensor descriptors are made by the driver: pass pointers and strides")
    elif signature != "constexpr":
        yield argument


def triton_launch(kernel: triton.JITFunction, *args: Any, grid: Grid, arch: int = 80, **options: Any) -> Launch:
    """`kernel[grid](*args, **options)` as a launch of the PTX that Triton compiles for it; see `triton_compile`."""
    compiled = triton_compile(kernel, *args, grid=grid, arch=arch, **options)
    metadata = compiled.metadata
    unmodelled = {
        "num_ctas": metadata.num_ctas - 1,
        "global_scratch_size": metadata.global_scratch_size,
        "profile_scratch_size": metadata.profile_scratch_size,
    }
    if any(unmodelled.values()):
        names = ", ".join(name for name, value in unmodelled.items() if value)
        raise NotImplementedError(f"{compiled.name}: expected a plain launch, got one with {names}")
    bound = _bind(kernel, args, options)
    flat = [x for name, kind in compiled.src.signature.items() for x in _flat(kind, bound[name])]
    # Triton's own last two parameters: scratch memory, of which there is none
    flat += [0, 0]
    ptx = compiled.asm["ptx"]
    header = re.search(r"\.entry[^(]*\(([^)]*)\)", ptx)
    declared = len(re.findall(r"\.param\b", header[1])) if header else 0
    if len(flat) != declared:
        raise AssertionError(f"{compiled.name}: expected {len(flat)} parameters in its PTX, got {declared}")
    block = (metadata.num_warps * metadata.warp_size, 1, 1)
    return Launch(ptx, compiled.name, grid_sizes(kernel, args, options, grid), block, metadata.shared, flat)
