"""Forwards that are repeated: a step of decoding is checked and lowered once, then costs little but its kernel.

A call of few queries that nothing but values tells from an earlier one (another layer, another token of a cache that
does not grow) runs that one's plan on its own tensors. Without plans, Python took as long as the kernel does to read a
thousand keys in eight heads: what it touches has left the processor's caches, which the keys and values went through.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cpu import _C, DECODE_QUERIES, KERNEL_DTYPES, MAX_HEAD_DIM, outputs
from .inputs import kernel_inputs
from .layout import Layout
from .ops import is_unwatched
from .position import RelativeBias
from .problem import Problem

_MAX_PLANS = 256
_plans: OrderedDict[Hashable, Plan] = OrderedDict()


class Plan:
    """A forward on the CPU that runs on any tensors of the shapes, strides and dtypes that it was made of."""

    def __init__(self, problem: Problem) -> None:
        _, inputs = kernel_inputs(problem, transposed=False)
        out, lse = outputs(problem.q[0])
        bytes_ = torch.empty(_C.cpu_plan_bytes, dtype=torch.uint8, device="cpu")
        torch.ops.lcattn.cpu_forward_plan(*inputs, out, lse, bytes_)
        # it points into the table and coordinates; the rest is given anew
        self._kept = (bytes_, inputs._replace(q=[], k=[], v=[], bias=None, sink=None))
        self._address = bytes_.data_ptr()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sink: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = outputs(q)
        _C.run_cpu_plan(
            self._address,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if sink is None else sink.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
        )
        return out, lse


def attention(
    make_problem: Callable[..., Problem], call: tuple[Any, ...], backend: str
) -> tuple[Tensor, Tensor] | None:
    """out and lse of a call by its plan, which is made if there is none; None where a call can have no plan.

    Args:
        make_problem: checks the arguments of the call and lowers them; call: these, in its order, not yet checked.
    """
    q, k, v, layout, position, scale, softcap, sink, key_mask, q_pos, k_pos, dropout = call
    if _C is None or backend not in ("auto", "cpu") or dropout != 0 or not isinstance(layout, Layout):
        return None
    # tables of layouts that read indices are made for a length, those of others serve many
    if layout.by_index or layout.by_content or key_mask is not None or q_pos is not None or k_pos is not None:
        return None
    if isinstance(position, (list, tuple)) and len(position) < 2:
        position = position[0] if position else None
    if not (position is None or type(position) is RelativeBias):
        return None
    bias = None if position is None else position.table
    tables = [t for t in (bias, sink) if t is not None]
    if not _are_plain((q, k, v), tables) or not all(x is None or isinstance(x, (int, float)) for x in (scale, softcap)):
        return None
    key = (
        layout.spec,
        *((t.shape, t.stride(), t.dtype) for t in (q, k, v)),
        None if position is None else (position.table.shape, position.min_offset),
        None if sink is None else sink.shape,
        scale,
        softcap,
    )
    plan = _plans.get(key)
    if plan is None:
        plan = Plan(make_problem(*call))
        while len(_plans) >= _MAX_PLANS:
            _plans.popitem(last=False)
        _plans[key] = plan
    _plans.move_to_end(key)
    return plan(q, k, v, bias, sink)


def _are_plain(qkv: tuple[Tensor, ...], tables: Sequence[Tensor]) -> bool:
    """Whether decoding on these takes no more than their addresses: the CPU backend takes them, and none is lazy."""
    tensors = (*qkv, *tables)
    if not is_unwatched(tensors) or torch.is_autocast_enabled("cpu"):
        return False
    q = qkv[0]
    # nested tensors have no sizes to look a plan up by
    if (
        any(t.is_nested for t in qkv)
        or q.dim() != 4
        or q.dtype not in KERNEL_DTYPES
        or q.shape[2] > DECODE_QUERIES
        or q.shape[3] > MAX_HEAD_DIM
    ):
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if not t.is_cpu or t.layout is not torch.strided or (grad and t.requires_grad):
            return False
        # views whose values are not those in memory
        if t.is_neg() or t._is_zerotensor():
            return False
    return all(t.dtype is torch.float32 and t.is_contiguous() for t in tables)
