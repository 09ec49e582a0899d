"""The project's GPU backends with emulated launches: what a real launch would be given, and the kernels' own PTX."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lcattn import _C, gpu
from lcattn.inputs import KernelInputs

from .compile import nvcc_ptx, triton_launch
from .emulate import Counts, Memory, emulate

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
# struct Launch of csrc/cuda/launch.h, after which the kernel's parameter follows
_LAUNCH = struct.Struct("64s3III")


def _to(memory: Memory, value: Any) -> Any:
    """A kernel's inputs with every tensor on the emulated device."""
    if isinstance(value, Tensor):
        return memory.copy(value)
    if isinstance(value, list):
        return [_to(memory, part) for part in value]
    return value


class _Emulated:
    """Replaces where a backend runs and how it launches.

    Attributes:
        order, check, mma: as in `emulate`; counts: of the latest launch.
    """

    order: str | int = "forward"
    check = True
    mma: Literal["exact", "truncating"] = "exact"
    counts: Counts | None = None

    def _unavailable(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else f"tensors are on {device}"

    def _launch(self, inputs: KernelInputs, out: Tensor, lse: Tensor) -> None:
        with Memory() as memory:
            inputs = KernelInputs(*(_to(memory, value) for value in inputs))
            results = memory.empty(out.shape, out.dtype), memory.empty(lse.shape, lse.dtype)
            launch = self.describe(inputs, *results)
            self.counts = emulate(**launch, order=self.order, check=self.check, mma=self.mma)
            out.copy_(results[0])
            lse.copy_(results[1])

    def describe(self, inputs: KernelInputs, out: Tensor, lse: Tensor) -> dict[str, Any]:
        """What `emulate` takes."""
        raise NotImplementedError


class EmulatedCuda(_Emulated, gpu.CudaBackend):
    """The CUDA C++ kernels, launched as the operator would."""

    name = "cuda-emulated"

    def describe(self, inputs: KernelInputs, out: Tensor, lse: Tensor) -> dict[str, Any]:
        planned = torch.empty(_C.cuda_plan_bytes, dtype=torch.uint8)
        torch.ops.lcattn.cuda_forward_plan(*inputs, out, lse, planned)
        data = planned.numpy().tobytes()
        kernel, x, y, z, threads, shared_bytes = _LAUNCH.unpack_from(data)
        return {
            "ptx": nvcc_ptx(SOURCES / "forward.cu"),
            "kernel_name": kernel.rstrip(b"\0").decode(),
            "grid": (x, y, z),
            "block": (threads, 1, 1),
            "shared_bytes": shared_bytes,
            "args": [data[_LAUNCH.size :]],
        }


class EmulatedTriton(_Emulated, gpu.TritonBackend):
    """The Triton kernels, compiled for the very arguments of each call."""

    name = "triton-emulated"

    def describe(self, inputs: KernelInputs, out: Tensor, lse: Tensor) -> dict[str, Any]:
        from lcattn.triton_kernels import forward

        grid, values = forward.arguments(inputs, out, lse)
        # threads that hold the same value all store it: Triton's compiler does so on purpose
        return vars(triton_launch(forward._forward, grid=grid, **values)) | {"allow_equal_writes": True}
