"""The GPU backends: CUDA C++ kernels in csrc/cuda, Triton kernels in triton_kernels.

Both have a forward and no backward yet. They are verified by PTX-level emulation, as compiled for compute capability
8.0, not on hardware. For 9.0 and later Triton takes other instructions (wgmma, tcgen05, pairs of float32), which the
emulator does not know.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from .cpu import _C, _MISSING
from .inputs import MAX_PHASES, KernelInputs, kernel_inputs, strided_like
from .problem import Gradients, Problem

_DTYPES = (torch.bfloat16, torch.float16)
# rows of both kinds of kernel start at multiples of so many bytes, which is what one thread copies
_ALIGNMENT = 16
# blocks in the second and third dimension of a grid
_MAX_GRID = 65535
# the first with the matrix instructions and asynchronous copies that the kernels use
_CAPABILITY = (8, 0)


class _GpuBackend:
    """What both backends share; each says where it runs, which head dims it takes, and how it launches."""

    name: str

    def _unavailable(self, device: torch.device) -> str | None:
        """Why the backend cannot run on a device, or None."""
        raise NotImplementedError

    def _takes_head_dim(self, D: int) -> str | None:
        raise NotImplementedError

    def _launch(self, inputs: KernelInputs, out: Tensor, lse: Tensor) -> None:
        raise NotImplementedError

    def reject_reason(self, problem: Problem, differentiable: bool) -> str | None:
        q = problem.q[0]
        if (reason := self._unavailable(q.device)) is not None:
            return reason
        if differentiable:
            return "it has no backward yet, and gradients are wanted (torch.no_grad() if they are not)"
        if q.dtype not in _DTYPES:
            return f"dtype is {q.dtype}, expected bfloat16 or float16"
        if (reason := self._takes_head_dim(q.shape[3])) is not None:
            return reason
        for what, there in (
            ("relative keys", problem.rel_key is not None),
            ("relative queries", problem.rel_query is not None),
            ("dropout", problem.dropout > 0),
        ):
            if there:
                return f"it has no {what} yet"
        if len(problem.phase_map) > MAX_PHASES:
            return f"the position has {len(problem.phase_map)} phases, at most {MAX_PHASES}"
        if max(q.shape[:2]) > _MAX_GRID:
            return f"batch size and heads are {q.shape[0]} and {q.shape[1]}, at most {_MAX_GRID}"
        return None

    def forward(self, problem: Problem, differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
        q = problem.q[0]
        _, inputs = kernel_inputs(problem.turned(), transposed=False)
        q_list, k_list, v_list = ([_aligned(t) for t in tensors] for tensors in inputs[:3])
        inputs = inputs._replace(q=q_list, k=k_list, v=v_list)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        self._launch(inputs, out, lse)
        return strided_like(q, out), lse, lse.new_empty(0)

    def backward(self, *_: Any) -> Gradients:
        raise NotImplementedError(f"{self.name}: no backward yet")


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy of it whose rows are adjacent elements and start at multiples of 16 bytes."""
    unit = _ALIGNMENT // t.element_size()
    fits = t.stride(3) == 1 and t.data_ptr() % _ALIGNMENT == 0
    if fits and all(stride % unit == 0 for stride in t.stride()[:3]):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _elsewhere(device: torch.device) -> str:
    """Why tensors of another device are not on a GPU."""
    if torch.cuda.is_available():
        return f"tensors are on {device.type}"
    return "no CUDA device" if torch.backends.cuda.is_built() else "no CUDA device, and torch is built without CUDA"


def _capability(device: torch.device) -> str | None:
    found = torch.cuda.get_device_capability(device)
    return None if found >= _CAPABILITY else f"compute capability is {found[0]}.{found[1]}, at least 8.0"


class CudaBackend(_GpuBackend):
    """CUDA C++ kernels for compute capability 8.0 and later."""

    name = "cuda"

    def _unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return _elsewhere(device)
        if _C is None:
            return _MISSING
        if _C.build_info()["cuda"] is None:
            return "lcattn was built without an nvcc"
        return _capability(device)

    def _takes_head_dim(self, D: int) -> str | None:
        return None if D in (64, 128) else f"head dim is {D}, expected 64 or 128"

    def _launch(self, inputs: KernelInputs, out: Tensor, lse: Tensor) -> None:
        torch.ops.lcattn.cuda_forward(*inputs, out, lse)


class TritonBackend(_GpuBackend):
    """Triton kernels; on CPU tensors too where Triton interprets (TRITON_INTERPRET=1), for debugging."""

    name = "triton"

    def _unavailable(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device.type == "cuda":
            return _capability(device)
        import triton

        return None if triton.knobs.runtime.interpret else _elsewhere(device)

    def _takes_head_dim(self, D: int) -> str | None:
        return None if D <= 128 else f"head dim is {D}, at most 128"

    def _launch(self, inputs: KernelInputs, out: Tensor, lse: Tensor) -> None:
        from .triton_kernels import forward

        forward.launch(inputs, out, lse)
