"""The compiled part: build info, the CPU instruction set, planned forwards, test hooks.

Importing it registers the operators. import torch comes first: the extension links against a library that torch loads.
"""

from collections.abc import Callable
from typing import TypedDict

from torch import Tensor

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

class CpuPlans:
    """Repeated forwards of one layout, scale, softcap and first offset of the bias, the last used one first."""

    def __init__(self, most: int) -> None:
        """Holds so many plans."""

    def __len__(self) -> int: ...
    def add(
        self,
        problem: int,
        kept: object,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sink: Tensor | None,
    ) -> None:
        """Adds the plan at this address, written by lcattn::cpu_forward_plan for these tensors, all plain.

        kept holds the memory that the plan points to, but for these tensors. Plain is a Tensor or a Parameter on the
        CPU that is no lazy view.
        """

    @property
    def missed_again(self) -> bool:
        """Whether the last run found no plan, as one before it of plain tensors that lie alike."""

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sink: Tensor | None,
        grad: bool,
        new_lse: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """out, and lse if new_lse makes room for it from q, by the plan whose tensors lie as these do.

        None if there is no such plan, or they are not plain, or if grad and one requires a gradient.
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
