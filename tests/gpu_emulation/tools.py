"""Finds the compilers and disassemblers: those that the project pins before any that the machine has."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


class MissingTool(RuntimeError):
    """A tool that is needed is not on this machine; says how to get it."""


@dataclass(frozen=True)
class Tool:
    variables: tuple[str, ...]
    executables: tuple[str, ...]
    remedy: str


TOOLS = {
    # CUDACXX is the name that setup.py and CMake read
    "nvcc": Tool(
        ("NVCC", "CUDACXX"),
        ("nvcc",),
        "pip install nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 "
        "nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85",
    ),
    "ptxas": Tool(("PTXAS",), ("ptxas",), "pip install nvidia-cuda-nvcc==13.0.88"),
    "cuobjdump": Tool(("CUOBJDUMP",), ("cuobjdump",), "pip install nvidia-cuda-cuobjdump"),
    "nvdisasm": Tool(("NVDISASM",), ("nvdisasm",), "pip install nvidia-cuda-nvdisasm"),
    "c++": Tool(("CXX",), ("g++", "c++"), "install a C++20 compiler, for example with `apt-get install g++`"),
}


def find_tool(name: str) -> Path:
    """A tool from its environment variable, NVIDIA's packages on PyPI, Triton, CUDA_HOME, the path, /usr/local/cuda."""
    if name not in TOOLS:
        raise ValueError(f"unknown tool {name!r}, expected one of {', '.join(TOOLS)}")
    tool = TOOLS[name]
    for variable in tool.variables:
        if value := os.environ.get(variable):
            found = shutil.which(value)
            if found is None:
                raise MissingTool(f"{variable} is {value!r}, which is no executable; expected {name}")
            return Path(found)
    for candidate in _candidates(tool):
        if os.access(candidate, os.X_OK):
            return candidate
    remedy = tool.remedy if name == "c++" else f"`{tool.remedy}`"
    raise MissingTool(f"{name} was not found: set {' or '.join(tool.variables)}, or {remedy}")


@cache
def tool_version(path: Path) -> str:
    """The release that a CUDA tool names, such as 13.0.88; the last line of --version of another tool."""
    lines = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.strip().splitlines()
    for line in lines:
        _, found, version = line.partition(", V")
        if found and "release" in line:
            return version.strip()
    return lines[0] if lines else "unknown"


def _candidates(tool: Tool) -> Iterator[Path]:
    site = Path(sysconfig.get_path("purelib"))
    for executable in tool.executables:
        # versions that the project pins, so that figures and reports are comparable between machines
        yield from sorted(site.glob(f"nvidia/*/bin/{executable}"), reverse=True)
        triton = importlib.util.find_spec("triton")
        if triton and triton.origin:
            yield Path(triton.origin).parent / "backends/nvidia/bin" / executable
        if home := os.environ.get("CUDA_HOME"):
            yield Path(home) / "bin" / executable
        if on_path := shutil.which(executable):
            yield Path(on_path)
        yield Path("/usr/local/cuda/bin") / executable
