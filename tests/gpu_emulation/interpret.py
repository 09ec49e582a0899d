"""Triton kernels by Triton's own interpreter, which shares nothing with its compiler's back end nor with the emulator.

Whether Triton compiles or interprets is settled when it is imported, so the interpreter is a process of its own.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from tests.gpu_emulation.compile import Grid, grid_sizes


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _pack(message: Any) -> bytes:
    # unlike plain pickling, this keeps strides, and views of one storage together
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


@functools.cache
def _interpreter() -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), *(path for path in sys.path if path)])
    # it ends when its standard input does, which is when this process ends
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"},
    )


def interpret(kernel: triton.JITFunction, *args: Any, grid: Grid, **options: Any) -> None:
    """`kernel[grid](*args, **options)` interpreted; what it writes is in the argument tensors afterwards.

    The kernel must be found by its name in its module. Blocks run one after another, and whatever lies outside the
    tensors is not guarded.
    """
    module, name = kernel.fn.__module__, kernel.fn.__qualname__
    if "<locals>" in name:
        raise ValueError(f"{module}.{name}: expected a kernel of a module, got one inside a function")
    interpreter = _interpreter()
    assert interpreter.stdin and interpreter.stdout
    request = module, name, grid_sizes(kernel, args, options, grid), args, options
    try:
        pickle.dump(_pack(request), interpreter.stdin)
        interpreter.stdin.flush()
        results = _unpack(pickle.load(interpreter.stdout))
    except (BrokenPipeError, EOFError):
        status = interpreter.wait()
        _interpreter.cache_clear()
        raise RuntimeError(f"{module}.{name}: Triton's interpreter ended with status {status}") from None
    if isinstance(results, str):
        raise RuntimeError(f"{module}.{name}: Triton's interpreter failed\n{results}")
    for tensor, result in zip(_tensors([args, options]), results, strict=True):
        # whole storages, since elements of an expanded tensor cannot be written one by one
        tensor.untyped_storage().copy_(result.untyped_storage())


def _answer(request: bytes) -> list[Tensor] | str:
    module, name, grid, args, options = _unpack(request)
    try:
        getattr(importlib.import_module(module), name)[grid](*args, **options)
    except Exception:
        return traceback.format_exc()
    return list(_tensors([args, options]))


def _mend_bfloat16() -> None:
    """Triton 3.9 holds bfloat16 as its bits, and computes with those as integers: products widen, the rest refuses."""
    dot = InterpreterBuilder.create_dot

    def widened(builder: InterpreterBuilder, operand: Any) -> Any:
        return builder.cast_impl(operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand

    def create_dot(self: InterpreterBuilder, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(self, a), widened(self, b), *rest)

    def refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(self: InterpreterBuilder, *operands: Any) -> Any:
            if any(getattr(x, "dtype", None) == tl.bfloat16 for x in operands):
                raise TypeError("bfloat16 arithmetic cannot be interpreted: expected a cast to float32 before it")
            return operation(self, *operands)

        return refuse

    InterpreterBuilder.create_dot = create_dot
    for name in ("unary_op", "binary_op", "create_fma"):
        setattr(InterpreterBuilder, name, refusing(getattr(InterpreterBuilder, name)))


def _serve() -> None:
    """Answers requests until there are no more."""
    _mend_bfloat16()
    answers = os.fdopen(os.dup(1), "wb")
    # what a kernel prints must not come between the answers
    os.dup2(2, 1)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_pack(_answer(request)), answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
