"""Compiles the runtime and translated kernels into shared libraries, kept by content under build/emulation."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from tests.gpu_emulation.ptx import PtxError, parse
from tests.gpu_emulation.tools import find_tool
from tests.gpu_emulation.translate import KernelParameter, translate

_HERE = Path(__file__).parent
_RUNTIME = _HERE / "runtime"
_CACHE = _HERE.parents[1] / "build" / "emulation"
# products and sums must not be contracted to fused ones, of which the kernel asks for its own
_FLAGS = ("-std=c++20", "-fPIC", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-psabi")
_KERNEL_FLAGS = ("-O1", "-fvisibility=hidden", "-w")
# by its soname the kernels' libraries find it once it is loaded, wherever it lies
_LINK_RUNTIME = ("-shared", "-fno-semantic-interposition", "-Wl,-soname,libgpu_emulation.so,-Bsymbolic")
_RUNTIME_FLAGS = ("-O2", "-frounding-math", "-Wall", "-Wextra", *_LINK_RUNTIME)


class EmulationError(Exception):
    """A kernel that cannot be translated, or that did what is wrong on a GPU."""


@dataclass(frozen=True)
class Kernel:
    """A kernel's library, and what Python must know of it."""

    path: Path
    module: int
    parameters: tuple[KernelParameter, ...]
    parameter_bytes: int
    blocks: tuple[tuple[str, ...], ...]
    sites: tuple[str, ...]

    def block_counts(self) -> list[int]:
        counts = (ctypes.c_uint64 * max(len(self.blocks), 1)).in_dll(_load(self.path), "emulated_block_counts")
        return list(counts)[: len(self.blocks)]


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode() + part.encode())
    return digest.hexdigest()[:24]


@cache
def _machine() -> str:
    """The compiler and the processor, whose instructions -march=native uses."""
    version = subprocess.run([find_tool("c++"), "--version"], capture_output=True, text=True, check=True).stdout
    try:
        flags = {
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
        }
    except OSError:
        flags = set()
    return version + platform.machine() + "".join(sorted(flags))


@cache
def _sources() -> str:
    """Of all that a translation depends on."""
    translator = [_HERE / f"{name}.py" for name in ("build", "context", "opcode", "ptx", "translate")]
    files = [*_RUNTIME.glob("*.h"), *_RUNTIME.glob("*.cpp"), *translator, *(_HERE / "instructions").glob("*.py")]
    return "".join(f"{path.name}\n{path.read_text()}" for path in sorted(files))


def _variant() -> tuple[str, ...]:
    """GPU_EMULATION_FLAGS are further flags of the compiler, as -DGPU_EMULATION_UCONTEXT."""
    return tuple(os.environ.get("GPU_EMULATION_FLAGS", "").split())


def _compile(arguments: list[str | Path], output: Path) -> None:
    done = subprocess.run([find_tool("c++"), *arguments, "-o", output], capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(f"the translation of a kernel does not compile:\n{done.stderr[:4000]}")


@cache
def runtime() -> Path:
    """The runtime's library."""
    sources = "".join(path.read_text() for path in sorted([*_RUNTIME.glob("*.h"), *_RUNTIME.glob("*.cpp")]))
    flags = [*_FLAGS, *_RUNTIME_FLAGS, *_variant()]
    folder = _CACHE / f"runtime-{_digest(sources, _machine(), *flags)}"
    library = folder / "libgpu_emulation.so"
    if not library.exists():
        with _publish(folder) as temporary:
            objects: list[str | Path] = []
            running = []
            for source in sorted(_RUNTIME.glob("*.cpp")):
                objects.append(temporary.folder / f"{source.stem}.o")
                command = [find_tool("c++"), *flags, "-c", source, "-o", objects[-1]]
                running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            errors = [process.communicate()[1] for process in running]
            if any(process.returncode for process in running):
                raise EmulationError(f"the runtime does not compile:\n{''.join(errors)[:4000]}")
            _compile([*flags, *objects], temporary.folder / library.name)
    return library


class _publish:
    """A folder that takes its name when it is complete; another process may have been faster."""

    def __init__(self, folder: Path) -> None:
        self.target = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))

    def __enter__(self) -> _publish:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            try:
                self.folder.rename(self.target)
                return
            except OSError:
                if not self.target.exists():
                    raise
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


@cache
def _load(path: Path) -> ctypes.CDLL:
    # the kernels' libraries find the runtime's symbols in it
    return ctypes.CDLL(str(path), mode=os.RTLD_GLOBAL if path == runtime() else os.RTLD_LOCAL)


def runtime_library() -> ctypes.CDLL:
    return _load(runtime())


@cache
def kernel(ptx: str, name: str) -> Kernel:
    """A kernel of a PTX text, translated and compiled unless it already was."""
    flags = [*_FLAGS, *_KERNEL_FLAGS, *_variant()]
    folder = _CACHE / f"kernel-{_digest(ptx, name, _sources(), _machine(), *flags)}"
    description = folder / "kernel.json"
    if not description.exists():
        try:
            translated = translate(parse(ptx), name)
        except PtxError as error:
            raise EmulationError(f"{name}: {error}") from error
        with _publish(folder) as temporary:
            source = temporary.folder / "kernel.cpp"
            source.write_text(translated.source)
            library = runtime()
            link = ["-shared", f"-I{_RUNTIME}", f"-L{library.parent}", "-lgpu_emulation"]
            _compile([*flags, source, *link], temporary.folder / "kernel.so")
            described = asdict(translated)
            del described["source"]
            (temporary.folder / description.name).write_text(json.dumps(described))
    described = json.loads(description.read_text())
    runtime_library()
    path = folder / "kernel.so"
    module = ctypes.addressof(ctypes.c_char.in_dll(_load(path), "emulated_module"))
    parameters = tuple(KernelParameter(**parameter) for parameter in described["parameters"])
    blocks = tuple(tuple(block) for block in described["blocks"])
    return Kernel(path, module, parameters, described["parameter_bytes"], blocks, tuple(described["sites"]))
