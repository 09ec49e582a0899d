"""Arithmetic of .f32 and .f64, and the approximations of transcendental functions."""

from __future__ import annotations

from tests.gpu_emulation.context import Context, c_type
from tests.gpu_emulation.instructions.registry import instruction
from tests.gpu_emulation.opcode import Opcode

_ROUNDINGS = {"rz": "kTowardZero", "rm": "kDown", "rp": "kUp"}


def _operands(context: Context, flush: bool, type_: str, operands: tuple[str, ...]) -> list[str]:
    values = [context.read(operand, type_) for operand in operands]
    return [f"flush({value})" for value in values] if flush else values


def _result(expression: str, flush: bool, saturate: bool) -> str:
    if flush:
        expression = f"flush({expression})"
    return f"saturate({expression})" if saturate else expression


@instruction("add", "sub", "mul", "fma", "mad", kind="float")
def arithmetic(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    rounding = op.take("rn", "rz", "rm", "rp") or "rn"
    flush, saturate = op.has("ftz"), op.has("sat")
    values = _operands(context, flush, type_, operands[1:])
    name = "fma" if op.name == "mad" else op.name
    if rounding != "rn":
        expression = f"{name}_rounded<Rounding::{_ROUNDINGS[rounding]}>({', '.join(values)})"
    elif name == "fma":
        expression = f"std::fma({', '.join(values)})"
    else:
        expression = f"{values[0]} {({'add': '+', 'sub': '-', 'mul': '*'})[name]} {values[1]}"
    return context.write(operands[0], type_, _result(expression, flush, saturate))


@instruction("div", kind="float")
def divide(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    rounding = op.require("approx", "full", "rn", "rz", "rm", "rp")
    flush = op.has("ftz")
    values = _operands(context, flush, type_, operands[1:])
    if rounding in ("approx", "full"):
        if type_ != "f32":
            op.modifiers.append(rounding)
        expression = f"div_{rounding}({', '.join(values)})"
    elif rounding == "rn":
        expression = f"{values[0]} / {values[1]}"
    else:
        expression = f"div_rounded<Rounding::{_ROUNDINGS[rounding]}>({', '.join(values)})"
    return context.write(operands[0], type_, _result(expression, flush, False))


@instruction("rcp", "sqrt", kind="float")
def root_or_reciprocal(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    rounding = op.require("approx", "rn", "rz", "rm", "rp")
    flush = op.has("ftz")
    if rounding == "approx" and type_ == "f64":
        op.modifiers.append(rounding)
    (value,) = _operands(context, flush, type_, operands[1:])
    if rounding == "approx":
        expression = f"{op.name}_approx({value})"
    elif rounding == "rn":
        expression = f"{c_type(type_)}(1) / {value}" if op.name == "rcp" else f"std::sqrt({value})"
    elif op.name == "rcp":
        expression = f"div_rounded<Rounding::{_ROUNDINGS[rounding]}>({c_type(type_)}(1), {value})"
    else:
        expression = f"sqrt_rounded<Rounding::{_ROUNDINGS[rounding]}>({value})"
    return context.write(operands[0], type_, _result(expression, flush, False))


@instruction("rsqrt", "ex2", "lg2", "sin", "cos", "tanh", kind="float")
def approximation(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    op.require("approx")
    flush = op.has("ftz")
    if type_ == "f64":
        op.modifiers.append("f64")
    (value,) = _operands(context, flush, type_, operands[1:])
    return context.write(operands[0], type_, _result(f"{op.name}_approx({value})", flush, False))


@instruction("min", "max", kind="float")
def minimum(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    flush, absolute = op.has("ftz"), op.has("abs")
    nan = "true" if op.has("NaN") else "false"
    if absolute:
        op.require("xorsign")
    first, *rest = _operands(context, flush, type_, operands[1:])
    function = {"min": "minimum", "max": "maximum"}[op.name]
    expression = first
    if absolute:
        expression = f"xor_sign_{function}<{nan}>({first}, {rest[0]})"
    else:
        for value in rest:
            expression = f"{function}<{nan}>({expression}, {value})"
    return context.write(operands[0], type_, expression)


@instruction("neg", "abs", kind="float")
def negate(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    flush = op.has("ftz")
    (value,) = _operands(context, flush, type_, operands[1:])
    return context.write(operands[0], type_, f"-{value}" if op.name == "neg" else f"std::fabs({value})")


@instruction("copysign", kind="float")
def copy_sign(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    sign, magnitude = (context.read(operand, type_) for operand in operands[1:])
    return context.write(operands[0], type_, f"std::copysign({magnitude}, {sign})")


@instruction("testp", kind="float")
def test_property(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    value = context.read(operands[1], type_)
    tests = {
        "finite": "std::isfinite({})",
        "infinite": "std::isinf({})",
        "number": "!std::isnan({})",
        "notanumber": "std::isnan({})",
        "normal": "std::isnormal({})",
        "subnormal": "std::fpclassify({}) == FP_SUBNORMAL",
    }
    return context.write(operands[0], "pred", tests[op.require(*tests)].format(value))
