"""The compiled part: build info, the CPU instruction set, planned forwards, test hooks.

Importing it registers the operators. import torch comes first: the extension links against a library that torch loads.
"""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch_target: str  # the oldest torch it runs with
    torch_headers: str  # the torch it was compiled against
    isas: list[str]  # instruction sets compiled in, fastest first
    cuda: str | None  # the CUDA release it was compiled with, None without CUDA kernels
    sanitize: bool  # AddressSanitizer and UBSan compiled in

cuda_plan_bytes: int
"""Size of what lcattn::cuda_forward_plan writes: the launch, and the kernel's parameter."""

cpu_plan_bytes: int
"""Size of what lcattn::cpu_forward_plan writes: the `Problem` of csrc/common/problem.h."""

def run_cpu_plan(plan: int, q: int, k: int, v: int, bias: int, sink: int, out: int, lse: int) -> None:
    """Runs a plan on the tensors at these addresses; bias and sink are 0 where the plan has none. Nothing is checked.

    The plan must have been written by lcattn::cpu_forward_plan, what it points to must still live, and the tensors must
    have the shapes, strides and dtypes of those that it was made of.
    """

def build_info() -> BuildInfo: ...
def cpu_isas() -> list[str]:
    """The instruction sets that this build and this processor support, fastest first."""

def cpu_isa() -> str:
    """The instruction set in use."""

def set_cpu_isa(name: str) -> None:
    """Uses `name`, one of cpu_isas(), from the next call on, in all threads; "auto" is the fastest.

    Raises ValueError for any other name.
    """

def poison_scratch(on: bool) -> None:
    """While on, kernels fill scratch with NaN before they use it: a read of what was never written shows."""
