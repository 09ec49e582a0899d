"""The CPU backend: lowers a problem to the arguments of the C++ kernels in csrc/cpu."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .inputs import MAX_PHASES, kernel_inputs
from .problem import TERMS, Gradients, Problem

try:
    _C: Any = importlib.import_module("lcattn._C")
    _MISSING = None
except ImportError as error:  # a source tree whose extension was not built
    _C = None
    _MISSING = f"the C++ extension is not built ({error}); run `pip install .`"

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
# kDecodeQueries and kDecodeRows of csrc/cpu/kernels.h
DECODE_QUERIES, _DECODE_ROWS = 8, 16


def cpu_kernels_exist() -> bool:
    return _C is not None


def decodes(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel for few queries takes these, which turns keys as it reads them."""
    return q.shape[2] <= DECODE_QUERIES or q.shape[2] * (q.shape[1] // k.shape[1]) <= _DECODE_ROWS


def outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out and lse."""
    return torch.empty_like(q), new_lse(q)


def new_lse(q: Tensor) -> Tensor:
    """Room for lse, whatever the default device is."""
    return torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")


class CpuBackend:
    """Fused C++ kernels for AVX-512, AVX2 and everything else, chosen at run time."""

    name = "cpu"

    def __init__(self, isa: str | None) -> None:
        if _C is not None and isa:
            _C.set_cpu_isa(isa)

    def reject_reason(self, problem: Problem, differentiable: bool) -> str | None:
        q = problem.q[0]
        if _C is None:
            return _MISSING
        if q.device.type != "cpu":
            return f"tensors are on {q.device.type}"
        if q.dtype not in KERNEL_DTYPES:
            return f"dtype is {q.dtype}, expected float32, bfloat16 or float16"
        if q.shape[3] > MAX_HEAD_DIM:
            return f"head dim is {q.shape[3]}, at most {MAX_HEAD_DIM}"
        if len(problem.phase_map) > MAX_PHASES:
            return f"the position has {len(problem.phase_map)} phases, at most {MAX_PHASES}"
        return None

    def forward(self, problem: Problem, differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
        q = problem.q[0]
        if differentiable or not decodes(q, problem.k[0]):
            problem = problem.turned()
        _, inputs = kernel_inputs(problem, transposed=False)
        out, lse = outputs(q)
        rest = torch.empty_like(lse) if differentiable else None
        torch.ops.lcattn.cpu_forward(*inputs, out, lse, rest)
        return out, lse, lse.new_empty(0) if rest is None else rest

    def backward(
        self,
        problem: Problem,
        out: Tensor,
        lse: Tensor,
        lse_rest: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        wanted: frozenset[str],
    ) -> Gradients:
        table, inputs = kernel_inputs(problem.turned())
        grads: dict[str, Any] = {n: [torch.empty_like(t) for t in getattr(problem, n)] for n in ("q", "k", "v")}
        terms: dict[str, Any] = dict.fromkeys(TERMS)
        for name in wanted:
            dtype = None if name in ("qr", "kr") else torch.float32
            terms[name] = torch.empty_like(getattr(problem, name), dtype=dtype, memory_format=_format(name))
        torch.ops.lcattn.cpu_backward(
            *inputs,
            table.seg_ptr_t,
            table.entries_t,
            out,
            lse,
            lse_rest,
            dout,
            None if dlse is None else dlse.float().contiguous(),
            *grads.values(),
            *terms.values(),
        )
        if problem.turn_table is not None:
            grads["k"] = problem.turn_keys(tuple(grads["k"]), -1)
        return Gradients(**terms | {n: tuple(g) for n, g in grads.items()})


def _format(name: str) -> torch.memory_format:
    return torch.preserve_format if name in ("qr", "kr") else torch.contiguous_format
