"""Arithmetic of .f16, .bf16 and their pairs."""

from __future__ import annotations

from tests.gpu_emulation.context import Context
from tests.gpu_emulation.instructions.registry import instruction
from tests.gpu_emulation.opcode import Opcode, bits

_OPERATIONS = {
    "add": "Add",
    "sub": "Subtract",
    "mul": "Multiply",
    "fma": "FusedMultiplyAdd",
    "ex2": "Exp2Approx",
    "tanh": "TanhApprox",
}


def _apply(context: Context, operation: str, flags: list[str], type_: str, operands: tuple[str, ...]) -> str:
    function = "half_pair" if type_.endswith("x2") else "half"
    values = ", ".join(context.read(operand, f"b{bits(type_)}") for operand in operands[1:])
    options = " | ".join(flags) or "0"
    form = context.half_format(type_)
    return context.write(operands[0], f"b{bits(type_)}", f"{function}<{form}, {operation}, {options}>({values})")


def _flags(op: Opcode) -> list[str]:
    return [f"k{name.capitalize()}" for name in ("ftz", "sat", "relu") if op.has(name)]


@instruction("add", "sub", "mul", "fma", kind="half")
def arithmetic(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    op.take("rn")
    return _apply(context, _OPERATIONS[op.name], _flags(op), type_, operands)


@instruction("ex2", "tanh", kind="half")
def approximation(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    op.require("approx")
    return _apply(context, f"{_OPERATIONS[op.name]}<{context.half_format(type_)}>", _flags(op), type_, operands)


@instruction("min", "max", kind="half")
def minimum(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    flags = _flags(op)
    nan = "true" if op.has("NaN") else "false"
    name = {"min": "Minimum", "max": "Maximum"}[op.name]
    if op.has("xorsign"):
        op.require("abs")
        name = f"XorSign{name}"
    return _apply(context, f"{name}<{nan}>", flags, type_, operands)


@instruction("neg", "abs", kind="half")
def negate(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    flush = op.has("ftz")
    width = f"b{bits(type_)}"
    value = context.read(operands[1], width)
    if flush:
        value = f"flush_halves<{context.half_format(type_)}>({value})"
    sign = "0x80008000u" if type_.endswith("x2") else "0x8000u"
    return context.write(operands[0], width, f"{value} ^ {sign}" if op.name == "neg" else f"{value} & ~{sign}")
