"""Forwards that are repeated: a step of decoding is checked and lowered once, then costs little but its kernel.

A call of few queries that nothing but values tells from an earlier one (another layer, another token of a cache that
does not grow) runs that one's plan on its own tensors. Without plans, Python took as long as the kernel does to read a
thousand keys in eight heads: what it touches has left the processor's caches, which the keys and values went through.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled

from .cpu import _C, DECODE_QUERIES, KERNEL_DTYPES, MAX_HEAD_DIM, new_lse, outputs
from .inputs import kernel_inputs
from .layout import Layout
from .lowering import cache
from .ops import is_unwatched
from .position import RelativeBias
from .problem import Problem

# of what a key of `_plans` holds, and of shapes and strides for each
_MAX_KEYS, _MAX_PLANS = 64, 32
_plans: dict[Hashable, Any] = {}
# tables that the cache of lowering had dropped when plans were last looked through
_n_dropped = 0


def attention(
    make_problem: Callable[..., Problem], call: tuple[Any, ...], backend: str, with_lse: bool
) -> tuple[Tensor, Tensor] | None:
    """out and lse (of no value unless with_lse) of a call by its plan, which is made if there is none.

    Args:
        make_problem: checks the arguments of the call and lowers them; call: these, in its order, not yet checked.

    Returns:
        None where a call can have no plan.
    """
    q, k, v, layout, position, scale, softcap, sink, key_mask, q_pos, k_pos, dropout = call
    if _C is None or backend not in ("auto", "cpu") or not isinstance(layout, Layout):
        return None
    if key_mask is not None or q_pos is not None or k_pos is not None:
        return None
    # a profile shows operators, of which a plan has none
    if not is_unwatched(()) or torch.is_autocast_enabled("cpu") or _profiler_enabled():
        return None
    bias = first = None
    if isinstance(position, (list, tuple)) and len(position) < 2:
        position = position[0] if position else None
    if position is not None:
        if type(position) is not RelativeBias:
            return None
        bias, first = position.table, position.min_offset
    for number in (scale, softcap):
        if not (number is None or isinstance(number, (int, float))):
            return None
    if not isinstance(dropout, (int, float)) or dropout != 0:
        return None
    key = (layout.spec, first, scale, softcap)
    tensors = (q, k, v, bias, sink)
    grad = torch.is_grad_enabled()
    lse = new_lse if with_lse else None
    if (plans := _plans.pop(key, None)) is None:
        plans = _C.CpuPlans(_MAX_PLANS)
    # the last used one stands last
    _plans[key] = plans
    if (found := plans.run(*tensors, grad, lse)) is not None:
        return found
    _drop_plans()
    # tables of layouts that read indices are made for a length, those of others serve many; and a call is no
    # repetition before it comes again
    if layout.by_index or layout.by_content or not (plans.missed_again and _decodes(*tensors)):
        return None
    plans.add(*_forward(make_problem(*call)), *tensors)
    return plans.run(*tensors, grad, lse)


def _drop_plans() -> None:
    """All but the last used keys; all but the last one where tables that the cache let go of live on in plans."""
    global _n_dropped
    keep = _MAX_KEYS if _n_dropped == cache.n_dropped else 1
    _n_dropped = cache.n_dropped
    for key in list(_plans)[: max(len(_plans) - keep, 0)]:
        # another thread may have done so
        _plans.pop(key, None)


def _decodes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sink: Tensor | None) -> bool:
    """Whether q is of few queries that the CPU backend takes, and the tables are as it takes them."""
    few = q.dim() == 4 and q.shape[2] <= DECODE_QUERIES and q.shape[3] <= MAX_HEAD_DIM and q.dtype in KERNEL_DTYPES
    return few and all(t is None or (t.dtype is torch.float32 and t.is_contiguous()) for t in (bias, sink))


def _forward(problem: Problem) -> tuple[int, Any, Tensor, Tensor]:
    """The address of a forward's `Problem` in C++, what it points to but for the tensors of a call, out and lse."""
    _, inputs = kernel_inputs(problem, transposed=False)
    bytes_ = torch.empty(_C.cpu_plan_bytes, dtype=torch.uint8, device="cpu")
    out, lse = outputs(problem.q[0])
    torch.ops.lcattn.cpu_forward_plan(*inputs, out, lse, bytes_)
    return bytes_.data_ptr(), (bytes_, inputs._replace(q=[], k=[], v=[], bias=None, sink=None)), out, lse
