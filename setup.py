"""Builds lcattn._C: CPU kernels once per instruction set, CUDA kernels if there is an nvcc, and the bindings.

Only headers and one library of torch are needed, so torch is found without being imported: an isolated build
uses the torch of the environment it installs into and downloads none. Read at build time:

    CXX               compiler (g++)
    MAX_JOBS          parallel compilations (number of processors)
    LCATTN_CUDA       1: fail unless the CUDA kernels can be built; 0: leave them out
    LCATTN_SANITIZE   1: AddressSanitizer and UBSan, used by `make sanitize`
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# the oldest torch whose stable ABI has all we call: major in the top byte, minor in the next
TORCH_TARGET = (2, 10)
# only for an environment without any torch
TORCH_PIN = "torch==2.13.0"
SANITIZE = os.environ.get("LCATTN_SANITIZE") == "1"

ISA_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mavx2 -mbmi2",
    "avx2": "-mavx2 -mfma -mf16c -mbmi2",
    "portable": "",
}
# compiled once, for any processor; the other files of csrc/cpu are compiled once per instruction set
SHARED_SOURCES = ("kernels.cpp", "scratch.cpp")
CUDA_ARCHS = (80, 90, 100, 120)


class Torch(NamedTuple):
    root: Path
    version: str


def find_torch() -> Torch | None:
    """The torch that can be imported, or else the one of the environment an isolated build installs into."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    for place in places:
        if (place / "include/torch/csrc/stable/library.h").is_file():
            found = re.search(r"__version__ = ['\"]([^'\"]+)", (place / "version.py").read_text())
            version = found.group(1) if found else "0.0"
            if tuple(map(int, version.split(".")[:2])) >= TORCH_TARGET:
                return Torch(place, version)
    return None


def find_nvcc() -> Path | None:
    """nvcc from CUDACXX, CUDA_HOME, the path, NVIDIA's packages on PyPI, or the usual folder."""
    site = Path(sysconfig.get_path("purelib"))
    home = os.environ.get("CUDA_HOME")
    candidates = [
        os.environ.get("CUDACXX"),
        home and f"{home}/bin/nvcc",
        shutil.which("nvcc"),
        *sorted(site.glob("nvidia/*/bin/nvcc"), reverse=True),
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((Path(c) for c in candidates if c and os.access(c, os.X_OK)), None)


def cuda_build() -> tuple[Path, list[Path]] | None:
    """The nvcc and the sources to give it, or None. Raises if LCATTN_CUDA=1 and there is no way."""
    wanted = os.environ.get("LCATTN_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"LCATTN_CUDA must be 0 or 1 or unset, not {wanted!r}")
    nvcc, sources = find_nvcc(), sorted(ROOT.glob("csrc/cuda/*.cu"))
    if wanted == "1" and not sources:
        raise SystemExit("LCATTN_CUDA=1, but there are no CUDA sources in csrc/cuda")
    if wanted == "1" and nvcc is None:
        raise SystemExit(
            "LCATTN_CUDA=1, but no nvcc was found: set CUDACXX or CUDA_HOME, or install one, "
            "for example with `pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime "
            "nvidia-cuda-cccl`"
        )
    return (nvcc, sources) if nvcc and sources and wanted != "0" else None


def cuda_arch_flags(nvcc: Path) -> str:
    """Machine code for each architecture that this nvcc knows, and PTX of the newest for what comes later."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed.split()]
    if not archs:
        raise SystemExit(f"{nvcc} compiles for none of the architectures {CUDA_ARCHS}")
    flags = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def cuda_link_flags(nvcc: Path) -> str:
    """nvcc may be a script or a link: only it knows where its toolkit lies."""
    plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    libs = [Path(top.group(1)).resolve() / name for name in ("lib64", "lib")] if top else []
    return " ".join([*(f"-L{lib}" for lib in libs if lib.is_dir()), "-lcudart_static -ldl -lrt -lpthread"])


def write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def ninja_file(folder: Path, torch: Torch, version: str) -> str:
    """The build of folder/_C.so; ninja itself tracks headers, flags and compilers' command lines."""
    cxx = os.environ.get("CXX", "g++")
    x86 = platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux"
    isas = list(ISA_FLAGS) if x86 else ["portable"]
    sanitize = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g"
    include = torch.root / "include"
    common = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra"
    if SANITIZE:
        common = f"{common} {sanitize} -O1"
    python = [f"-isystem {include}", f"-I{sysconfig.get_path('include')}"]
    bindings = [
        *python,
        f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000",
        f'-DLCATTN_VERSION=\\"{version}\\"',
        f'-DLCATTN_TORCH_TARGET=\\"{TORCH_TARGET[0]}.{TORCH_TARGET[1]}\\"',
        f'-DLCATTN_TORCH_HEADERS=\\"{torch.version}\\"',
        f"-DLCATTN_SANITIZE={int(SANITIZE)}",
    ]
    link = f"-shared -L{torch.root / 'lib'} -ltorch_cpu" + (f" {sanitize}" if SANITIZE else "")
    sources = sorted(set(ROOT.glob("csrc/cpu/*.cpp")))
    shared = [source for source in sources if source.name in SHARED_SOURCES]
    per_isa = [source for source in sources if source.name not in SHARED_SOURCES]

    lines = [
        "ninja_required_version = 1.8",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {common} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        # an inline function of std compiled for AVX-512 must never stand in for the portable copy of it, so
        # the objects of one instruction set become one object that shows nothing but its own namespace
        "rule isolate",
        f"  command = {cxx} -r -nostdlib -Wl,--force-group-allocation -o $out.all $in && "
        "objcopy --wildcard --keep-global-symbol='_ZN6lcattn3cpu$isa*' $out.all $out && rm $out.all",
        "rule link",
        f"  command = {cxx} -o $out $in $flags",
    ]
    objects = []

    def compile_cxx(source: Path, to: str, flags: str) -> str:
        lines.extend([f"build {to}: cxx {source}", f"  flags = {flags}"])
        return to

    for isa in isas:
        flags = f"-DLCATTN_ISA={isa} {ISA_FLAGS[isa]}"
        parts = [compile_cxx(source, f"{isa}/{source.stem}.o", flags) for source in per_isa]
        lines.extend([f"build {isa}.o: isolate {' '.join(parts)}", f"  isa = {len(isa)}{isa}"])
        objects.append(f"{isa}.o")
    objects += [compile_cxx(source, f"{source.stem}.o", "") for source in shared]

    cuda = cuda_build()
    if cuda:
        nvcc, cuda_sources = cuda
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        cuda_version = re.search(r"release ([0-9.]+)", release)
        bindings.append(f'-DLCATTN_CUDA_VERSION=\\"{cuda_version.group(1) if cuda_version else "unknown"}\\"')
        lines += [
            "rule nvcc",
            f"  command = {nvcc} -ccbin {cxx} -MD -MF $out.d -std=c++20 -O3 --expt-relaxed-constexpr "
            f"-Xcompiler -fPIC,-fvisibility=hidden {cuda_arch_flags(nvcc)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        for source in cuda_sources:
            lines.append(f"build cuda/{source.stem}.o: nvcc {source}")
            objects.append(f"cuda/{source.stem}.o")
        link += f" {cuda_link_flags(nvcc)}"

    objects.append(compile_cxx(ROOT / "csrc/bindings.cpp", "bindings.o", " ".join(bindings)))
    objects.append(compile_cxx(ROOT / "csrc/plans.cpp", "plans.o", " ".join(python)))
    lines += [f"build _C.so: link {' '.join(objects)}", f"  flags = {link}", "default _C.so", ""]
    assert not any(" " in str(path) for path in (ROOT, torch.root, folder)), "no spaces in paths, please"
    return "\n".join(lines)


class NinjaBuild(build_ext):
    """Writes build.ninja into a folder that stays, so that an edit recompiles only what it touches."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                f"building lcattn needs torch {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or newer: pip install {TORCH_PIN}"
            )
        # one folder per Python and kind of build; relative to the sources, also when pip builds in isolation
        kind = f"{sysconfig.get_config_var('SOABI')}{'-sanitize' if SANITIZE else ''}"
        folder = ROOT / "build" / "native" / kind
        write_if_changed(folder / "build.ninja", ninja_file(folder, torch, self.distribution.get_version()))
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if subprocess.run([*ninja, "-C", folder, "-j", jobs]).returncode:
                raise SystemExit("lcattn did not compile; the compiler's messages are above")
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # a running Python keeps the old file mapped, so replace it rather than write into it
            shutil.copy2(folder / "_C.so", f"{target}.new")
            os.replace(f"{target}.new", target)


class InstalledModules(build_py):
    """Leaves out what runs in the source tree only: it imports the tests."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [m for m in found if (package, m[1][:4]) != ("lcattn.bench", "gpu_")]


setup(
    packages=[
        *find_packages(include=["lcattn", "lcattn.*"]),
        "lcattn.bench",
        "lcattn.triton_kernels",
        *(f"lcattn.triton_kernels.{name}" for name in find_packages("triton_kernels")),
    ],
    package_dir={"lcattn.bench": "bench", "lcattn.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("lcattn._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild, "build_py": InstalledModules},
    setup_requires=[] if find_torch() else [TORCH_PIN],
)
