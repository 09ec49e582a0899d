"""Forwards that are repeated: a step of decoding is checked and lowered once, then costs little but its kernel.

A call of few queries that nothing but values tells from an earlier one (another layer, another token of a cache that
does not grow) runs that one's plan on its own tensors. Without plans, Python took as long as the kernel does to read a
thousand keys in eight heads: what it touches has left the processor's caches, which the keys and values went through.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .cpu import _C, KERNEL_DTYPES, MAX_DECODE_ROWS
from .inputs import kernel_inputs
from .layout import Layout
from .ops import is_unwatched
from .position import Position, RelativeBias
from .problem import Problem

_MAX_PLANS = 256
_plans: OrderedDict[Hashable, Plan] = OrderedDict()


class Plan:
    """A forward on the CPU that runs on any q, k, v of the shapes, strides and dtypes that it was made of."""

    def __init__(self, problem: Problem) -> None:
        _, inputs = kernel_inputs(problem)
        bytes_ = torch.empty(_C.cpu_plan_bytes, dtype=torch.uint8, device="cpu")
        torch.ops.lcattn.cpu_forward_plan(*inputs, *_outputs(problem.q[0]), bytes_)
        # it points into the others, but not for long to these
        self._kept = (bytes_, inputs._replace(q=[], k=[], v=[]))
        self._address = bytes_.data_ptr()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _outputs(q)
        _C.run_cpu_plan(self._address, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr())
        return out, lse


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")


def key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    position: Position | Sequence[Position] | None,
    scale: float | None,
    softcap: float | None,
    sink: Tensor | None,
    key_mask: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    dropout: float,
    backend: str,
) -> Hashable | None:
    """What a call, not yet checked, shares with all that may run its plan; None where it can have none."""
    if _C is None or backend not in ("auto", "cpu") or dropout != 0 or not isinstance(layout, Layout):
        return None
    if key_mask is not None or q_pos is not None or k_pos is not None or layout.tensors or layout.by_content:
        return None
    if position is not None and type(position) is not RelativeBias:
        return None
    # a table is read where it lies, so its values may change
    tables = [] if position is None else [position.table]
    if sink is not None:
        tables.append(sink)
    tensors = (q, k, v, *tables)
    if not is_unwatched(tensors) or q.dim() != 4 or q.shape[2] > MAX_DECODE_ROWS or q.dtype not in KERNEL_DTYPES:
        return None
    if torch.is_autocast_enabled("cpu") or not all(t.is_cpu for t in tensors):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if not all(t.dtype is torch.float32 and t.is_contiguous() for t in tables):
        return None
    if type(scale) not in (type(None), float, int) or type(softcap) not in (type(None), float, int):
        return None
    return (
        layout.spec,
        *((t.shape, t.stride(), t.dtype) for t in (q, k, v)),
        *((t.data_ptr(), t.shape) for t in tables),
        None if position is None else position.min_offset,
        sink is None,
        scale,
        softcap,
    )


def find(key: Hashable) -> Plan | None:
    return _plans.get(key)


def make(key: Hashable, problem: Problem) -> Plan:
    """A plan of a call's problem, which serves all calls of its key."""
    while len(_plans) >= _MAX_PLANS:
        _plans.popitem(last=False)
    plan = _plans[key] = Plan(problem)
    return plan
