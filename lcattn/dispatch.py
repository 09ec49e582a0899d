"""Backends in order of preference, and why each rejects a problem.

The environment variables of the project are read here and nowhere else, when lcattn is imported:

    LCATTN_BACKEND   the backend that "auto" means, instead of the first that accepts
    LCATTN_CPU_ISA   the instruction set of the CPU kernels: avx512, avx2 or portable, instead of the best supported
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from . import cpu, gpu, reference
from .inputs import strided_like
from .problem import TERMS, Gradients, Problem


class Backend(Protocol):
    """What computes a problem."""

    name: str

    def reject_reason(self, problem: Problem, differentiable: bool) -> str | None:
        """Why this backend cannot compute the problem here, or None if it can; gradients too if differentiable."""
        ...

    def forward(self, problem: Problem, differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
        """out [B, H, T, D], lse [B, H, T], and for the backward what rounding took from lse (else empty).

        Where no backward may follow, a kernel may sum scores in another order.
        """
        ...

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
        """Gradients of q, k, v and of the terms named in `wanted`."""
        ...


class _Reference:
    name = "reference"

    def reject_reason(self, problem: Problem, differentiable: bool) -> str | None:
        return None

    def forward(self, problem: Problem, differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = reference.attention(problem)
        lse = lse.contiguous()
        rest = torch.zeros_like(lse) if differentiable else lse.new_empty(0)
        return strided_like(problem.q[0], out), lse, rest

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
        grads = reference.gradients(problem, dout, dlse)
        lists: dict[str, Any] = {
            n: tuple(map(strided_like, getattr(problem, n), getattr(grads, n))) for n in ("q", "k", "v")
        }
        terms: dict[str, Any] = {}
        for name in TERMS:
            if (grad := getattr(grads, name)) is not None:
                whole = name in ("qr", "kr")
                terms[name] = strided_like(getattr(problem, name), grad) if whole else grad.contiguous()
        return Gradients(**lists, **terms)


# what "auto" tries, in this order; the dense reference is only ever used by name
AUTOMATIC: tuple[Backend, ...] = (
    cpu.CpuBackend(os.environ.get("LCATTN_CPU_ISA")),
    gpu.CudaBackend(),
    gpu.TritonBackend(),
)
BACKENDS: dict[str, Backend] = {b.name: b for b in (*AUTOMATIC, _Reference())}


# what "auto" means
preferred = os.environ.get("LCATTN_BACKEND", "auto")


def check_name(name: str) -> str:
    """The backend asked for, "auto" resolved by the environment; ValueError if there is none of that name."""
    if name == "auto":
        name = preferred
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(['auto', *BACKENDS])}, got {name!r}")
    return name


def select(problem: Problem, name: str, differentiable: bool) -> Backend:
    """The backend of a checked name for a problem; RuntimeError with every reason if none can, never a fallback."""
    candidates = AUTOMATIC if name == "auto" else (BACKENDS[name],)
    reasons = []
    for backend in candidates:
        reason = backend.reject_reason(problem, differentiable)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    hint = '; backend="reference" computes anything, densely' if name == "auto" else ""
    raise RuntimeError("no backend can compute this call: " + "; ".join(reasons) + hint)
