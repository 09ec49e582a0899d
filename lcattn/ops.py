"""The torch operators `lcattn::attention` and `lcattn::attention_backward`: schemas, fakes, autograd.

An operator takes the layout as its spec string, beside the tensors the layout reads, and lowers it inside its own
implementation, so that a tracer sees one constant and never a table of data-dependent size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, _dispatch_tls_is_dispatch_key_included, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import dispatch
from .cpu import KERNEL_DTYPES, cpu_kernels_exist
from .layout import Layout, from_spec
from .problem import TERMS, Problem

_INPUTS = (
    "Tensor[] q, Tensor[] k, Tensor[] v, Tensor? bias, Tensor? slope, Tensor? rel_key, Tensor? rel_query,"
    " Tensor? qr, Tensor? kr, Tensor? sink, Tensor? key_mask, Tensor? q_pos, Tensor? k_pos, Tensor? offset_q_pos,"
    " Tensor? offset_k_pos, Tensor? turn_table, Tensor? turn_at, Tensor? seed, Tensor[] layout_tensors, str layout,"
    " int[] phase_map, int bias_min,"
    " int rel_key_min, int rel_query_min, float scale, float softcap, float dropout, bool differentiable, str backend"
)
_NAMES = tuple(part.split()[1] for part in _INPUTS.split(", "))
_N_INPUTS = len(_NAMES)
_TERMS_AT = _NAMES.index(TERMS[0])

torch.library.define("lcattn::attention", f"({_INPUTS}) -> (Tensor out, Tensor lse, Tensor lse_rest)")
torch.library.define(
    "lcattn::attention_backward",
    f"({_INPUTS}, Tensor out, Tensor lse, Tensor lse_rest, Tensor dout, Tensor? dlse, bool[] wanted) -> Tensor[]",
)


def attention(problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """out and lse of a problem, differentiable, on the named backend."""
    if _is_plain_inference(problem):
        # in decoding the operator would cost a good part of the kernel's own time
        out, lse, _ = dispatch.select(problem, backend, False).forward(problem, differentiable=False)
    else:
        _check_no_tangents(problem)
        out, lse, _ = torch.ops.lcattn.attention(*arguments(problem, backend))
    return out, lse


def _check_no_tangents(problem: Problem) -> None:
    # the operator would give a tangent of zero
    if is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in problem.differentiables()):
        raise NotImplementedError("lcattn.attention: forward-mode derivatives are not implemented")


def _is_differentiable(problem: Problem) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in problem.differentiables())


def _is_plain_inference(problem: Problem) -> bool:
    return not _is_differentiable(problem) and is_unwatched(problem.differentiables())


def is_unwatched(tensors: Iterable[Tensor]) -> bool:
    """Whether no compiler, tracer, transform or mode sees what is done, and no tensor is of a subclass."""
    return not (
        is_compiling()
        or _get_tracing_state()
        or _len_torch_dispatch_stack()
        or _dispatch_tls_is_dispatch_key_included(DispatchKey.PreDispatch)
        or peek_interpreter_stack()
        or forward_ad._current_level >= 0
        or any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
    )


def arguments(problem: Problem, backend: str) -> tuple[Any, ...]:
    """What the operator takes for a problem, in the order of its schema."""
    parts = (problem.layout, *problem.phases)
    values = {
        **{name: getattr(problem, name, None) for name in _NAMES},
        "q": list(problem.q),
        "k": list(problem.k),
        "v": list(problem.v),
        "layout": ";".join([part.spec for part in parts]),
        "layout_tensors": [t for part in parts for t in part.tensors],
        "phase_map": [at for phase in problem.phase_map for at in phase],
        "differentiable": _is_differentiable(problem),
        "backend": backend,
    }
    return tuple(values.values())


def _layouts(specs: str, tensors: Sequence[Tensor]) -> tuple[Layout, ...]:
    if not tensors:
        return _plain_layouts(specs)
    layouts, at = [], 0
    for spec in specs.split(";"):
        n = spec.count("@")
        layouts.append(from_spec(spec, tensors[at : at + n]))
        at += n
    return tuple(layouts)


@functools.lru_cache(maxsize=1024)
def _plain_layouts(specs: str) -> tuple[Layout, ...]:
    return tuple(from_spec(spec) for spec in specs.split(";"))


def _problem(inputs: Sequence[Any]) -> Problem:
    values = dict(zip(_NAMES, inputs, strict=True))
    layout, *phases = _layouts(values.pop("layout"), values.pop("layout_tensors"))
    flat = values.pop("phase_map")
    del values["differentiable"], values["backend"]
    for name in ("q", "k", "v"):
        values[name] = tuple(values[name])
    phase_map = tuple(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))
    problem = Problem(**values, layout=layout, phases=tuple(phases), phase_map=phase_map)
    if layout.tensors:
        # a tracer saw only some of their sizes
        B, H, _, T, S, _ = problem.sizes
        layout.check(B, H, T, S)
    return problem


@torch.library.impl("lcattn::attention", "default")
def _attention(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(inputs)
    differentiable = inputs[_NAMES.index("differentiable")]
    return dispatch.select(problem, inputs[-1], differentiable).forward(problem, differentiable)


@torch.library.register_fake("lcattn::attention")
def _attention_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q = inputs[0][0]
    lse = q.new_empty(q.shape[:3], dtype=_lse_dtype(q.dtype))
    differentiable = inputs[_NAMES.index("differentiable")]
    return torch.empty_like(q), lse, torch.empty_like(lse) if differentiable else lse.new_empty(0)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.impl("lcattn::attention_backward", "default")
def _backward(*inputs: Any) -> list[Tensor]:
    problem = _problem(inputs[:_N_INPUTS])
    out, lse, lse_rest, dout, dlse, wanted = inputs[_N_INPUTS:]
    names = frozenset(name for name, want in zip(TERMS, wanted, strict=True) if want)
    backend = dispatch.select(problem, inputs[_N_INPUTS - 1], differentiable=True)
    grads = backend.backward(problem, out, lse, lse_rest, dout, dlse, names)
    result = [*grads.q, *grads.k, *grads.v]
    for name in TERMS:
        grad = getattr(grads, name) if name in names else None
        result.append(dout.new_empty(0) if grad is None else grad.to(getattr(problem, name).dtype))
    return result


@torch.library.register_fake("lcattn::attention_backward")
def _backward_fake(*inputs: Any) -> list[Tensor]:
    dout, wanted = inputs[_N_INPUTS + 3], inputs[-1]
    result = [torch.empty_like(t) for tensors in inputs[:3] for t in tensors]
    for name, term, want in zip(TERMS, inputs[_TERMS_AT : _TERMS_AT + len(TERMS)], wanted, strict=True):
        # gradients of tables are contiguous, whatever view the table was
        strides = torch.preserve_format if name in ("qr", "kr") else torch.contiguous_format
        result.append(torch.empty_like(term, memory_format=strides) if want else dout.new_empty(0))
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    q, k, v = inputs[:3]
    tensors_at = _NAMES.index("layout_tensors")
    layout_tensors = inputs[tensors_at]
    ctx.lengths = (len(q), len(k), len(v), len(layout_tensors))
    ctx.save_for_backward(*q, *k, *v, *inputs[3:tensors_at], *layout_tensors, *output)
    ctx.rest = inputs[tensors_at + 1 :]


def _autograd(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:
    n_q, n_k, n_v, n_layout = ctx.lengths
    *saved, out, lse, lse_rest = ctx.saved_tensors
    singles_at = n_q + n_k + n_v
    singles = saved[singles_at : len(saved) - n_layout]
    lists = [saved[:n_q], saved[n_q : n_q + n_k], saved[n_q + n_k : singles_at]]
    wanted = list(ctx.needs_input_grad[_TERMS_AT : _TERMS_AT + len(TERMS)])
    if dout is None and dlse is None:
        return (None,) * _N_INPUTS
    with torch.no_grad():
        grads = torch.ops.lcattn.attention_backward(
            *lists,
            *singles,
            saved[len(saved) - n_layout :],
            *ctx.rest,
            out,
            lse,
            lse_rest,
            torch.zeros_like(out) if dout is None else dout,
            dlse,
            wanted,
        )
    if torch.is_grad_enabled():
        grads = list(_Once.apply(out, *grads))
    terms = [grad if want else None for grad, want in zip(grads[singles_at:], wanted, strict=True)]
    by_list = [grads[:n_q], grads[n_q : n_q + n_k], grads[n_q + n_k : singles_at]]
    between = [None] * (len(singles) - len(terms))
    return (*by_list, *terms, *between, [None] * n_layout, *[None] * len(ctx.rest))


class _Once(torch.autograd.Function):
    """Gradients, for what create_graph=True may still make of them."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("lcattn.attention: second derivatives are not implemented")


torch.library.register_autograd("lcattn::attention", _autograd, setup_context=_setup_context)


def fuses_turns(x: Tensor) -> bool:
    """Whether `fused_turn` takes x: a kernel is there, and nothing but autograd watches."""
    return x.device.type == "cpu" and x.dtype in KERNEL_DTYPES and cpu_kernels_exist() and is_unwatched((x,))


def fused_turn(x: Tensor, table: Tensor, at: Tensor, packed: bool) -> Tensor:
    """x whose first R features turn, in halves, by cosines and sines; differentiable in x.

    Args:
        x: [B, heads, n, D]; table: [rows, R] float32, cos then sin.
        at: [B or 1, n] int32, the row of the table for each row of x, -1 for none.
        packed: whether the result is contiguous; else it lies in memory as x does.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Turn.apply(x, table, at, False, packed)
    return _turn(x, table, at, False, packed)


def _turn(x: Tensor, table: Tensor, at: Tensor, back: bool, packed: bool) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format if packed else torch.preserve_format)
    torch.ops.lcattn.cpu_turn(x, table, at, back, out)
    return out


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, at: Tensor, back: bool, packed: bool) -> Tensor:
        ctx.save_for_backward(table, at)
        ctx.back = back
        return _turn(x, table, at, back, packed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Turn.apply(grads[0], *ctx.saved_tensors, not ctx.back, False), None, None, None, None
