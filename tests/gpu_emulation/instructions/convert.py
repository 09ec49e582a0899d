"""Moves, conversions between types, and conversions of addresses between state spaces."""

from __future__ import annotations

from tests.gpu_emulation.context import Context, c_type
from tests.gpu_emulation.instructions.registry import instruction
from tests.gpu_emulation.opcode import Opcode, bare, bits, is_float, is_half
from tests.gpu_emulation.ptx import PtxError

_DIRECTED = {"rz": "kTowardZero", "rm": "kDown", "rp": "kUp"}
_TO_INTEGER = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}


@instruction("mov")
def move(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    destination, source = operands
    if source.startswith("{"):
        return _pack(context, type_, destination, source)
    if destination.startswith("{"):
        return _unpack(context, type_, destination, source)
    return context.write(destination, type_, context.read(source, type_))


def _pack(context: Context, type_: str, destination: str, source: str) -> str:
    elements = context.vector(source)
    width = bits(type_) // len(elements)
    wide = c_type(bare(type_))
    parts = [
        f"{wide}({context.read(element, f'b{width}')}) << {index * width}" for index, element in enumerate(elements)
    ]
    return context.write(destination, bare(type_), " | ".join(parts))


def _unpack(context: Context, type_: str, destination: str, source: str) -> str:
    elements = context.vector(destination)
    width = bits(type_) // len(elements)
    stores = [
        context.write(element, f"b{width}", f"{c_type(f'b{width}')}(whole >> {index * width})")
        for index, element in enumerate(elements)
        if element != "_"
    ]
    return f"{{ const {c_type(bare(type_))} whole = {context.read(source, bare(type_))}; {' '.join(stores)} }}"


@instruction("cvt")
def convert(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    source = op.type()
    if op.modifiers and op.modifiers[-1] == "tf32":
        return _to_tf32(context, op, operands)
    destination = op.type()
    if destination in ("f16x2", "bf16x2"):
        return _to_half_pair(context, op, destination, source, operands)
    if is_half(destination):
        return _to_half(context, op, destination, source, operands)
    if is_float(destination):
        return _to_float(context, op, destination, source, operands)
    if is_float(source) or is_half(source):
        return _float_to_integer(context, op, destination, source, operands)
    value = context.read(operands[1], source)
    if op.has("sat"):
        value = f"saturate_integer<{c_type(destination)}>({value})"
    return context.write(operands[0], destination, value)


def _widened(context: Context, type_: str, operand: str) -> str:
    """A floating-point operand as float or double, exactly."""
    if is_half(type_):
        return f"{context.half_format(type_)}::value({context.read(operand, 'b16')})"
    return context.read(operand, type_)


def _half_options(op: Opcode) -> str:
    rounding = op.require("rn", "rz")
    # a .f32 that is subnormal rounds to a zero of .f16 anyway
    if "f16" in op.text.split("."):
        op.take("ftz")
    flags = [f"k{name.capitalize()}" for name in ("relu", "satfinite", "sat") if op.has(name)]
    return f"Rounding::{_DIRECTED.get(rounding, 'kNearest')}, {' | '.join(flags) or '0'}"


def _to_half_pair(context: Context, op: Opcode, destination: str, source: str, operands: tuple[str, ...]) -> str:
    if source != "f32":
        raise PtxError(f"{op.text}: only .f32 converts to pairs")
    convert_one = f"to_half<{context.half_format(destination)}, {_half_options(op)}>"
    high, low = (context.read(operand, "f32") for operand in operands[1:])
    return context.write(operands[0], "b32", f"uint32_t({convert_one}({high})) << 16 | {convert_one}({low})")


def _to_half(context: Context, op: Opcode, destination: str, source: str, operands: tuple[str, ...]) -> str:
    form = context.half_format(destination)
    if not is_float(source) and not is_half(source):
        rounding = op.require("rn", "rz", "rm", "rp")
        value = context.read(operands[1], source)
        return context.write(
            operands[0], "b16", f"integer_to_half<{form}, Rounding::{_DIRECTED.get(rounding, 'kNearest')}>({value})"
        )
    if source == destination:
        return _round_half(context, op, form, operands)
    value = _widened(context, source, operands[1])
    return context.write(operands[0], "b16", f"to_half<{form}, {_half_options(op)}>({value})")


def _round_half(context: Context, op: Opcode, form: str, operands: tuple[str, ...]) -> str:
    rounding = op.require(*_TO_INTEGER)
    value = f"{_TO_INTEGER[rounding]}({form}::value({context.read(operands[1], 'b16')}))"
    return context.write(operands[0], "b16", f"to_half<{form}, Rounding::kNearest, 0>({value})")


def _to_tf32(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.modifiers.pop()
    rounding = op.require("rna", "rn", "rz")
    flags = [f"k{name.capitalize()}" for name in ("relu", "satfinite") if op.has(name)]
    value = context.read(operands[1], "f32")
    options = f"Tf32Rounding::k{rounding.capitalize()}, {' | '.join(flags) or '0'}"
    return context.write(operands[0], "b32", f"to_tf32<{options}>({value})")


def _to_float(context: Context, op: Opcode, destination: str, source: str, operands: tuple[str, ...]) -> str:
    flush, saturate = op.has("ftz"), op.has("sat")
    c_destination = c_type(destination)
    if is_float(source) or is_half(source):
        value = _widened(context, source, operands[1])
        if flush and source == "f32":
            value = f"flush({value})"
        if rounding := op.take(*_TO_INTEGER):
            if source != destination:
                raise PtxError(f"{op.text}: rounding to an integer needs equal types")
            value = f"{_TO_INTEGER[rounding]}({value})"
        elif bits(source) > bits(destination):
            rounding = op.require("rn", "rz", "rm", "rp")
            value = _narrowed(value, rounding)
    else:
        rounding = op.require("rn", "rz", "rm", "rp")
        value = context.read(operands[1], source)
        if rounding == "rn":
            value = f"{c_destination}({value})"
        else:
            value = f"integer_to_float<{c_destination}, Rounding::{_DIRECTED[rounding]}>({value})"
    if flush and destination == "f32":
        value = f"flush({c_destination}({value}))"
    value = f"{c_destination}({value})"
    return context.write(operands[0], destination, f"saturate({value})" if saturate else value)


def _narrowed(value: str, rounding: str) -> str:
    return f"float({value})" if rounding == "rn" else f"narrow_rounded<Rounding::{_DIRECTED[rounding]}>({value})"


def _float_to_integer(context: Context, op: Opcode, destination: str, source: str, operands: tuple[str, ...]) -> str:
    rounding = op.require(*_TO_INTEGER)
    # saturation is implied, as the result is clamped to the destination's range
    op.take("sat")
    value = _widened(context, source, operands[1])
    if op.has("ftz"):
        value = f"flush({value})"
    from_double = "true" if source == "f64" else "false"
    expression = f"float_to_integer<{c_type(destination)}, {from_double}>({_TO_INTEGER[rounding]}({value}))"
    return context.write(operands[0], destination, expression)


@instruction("cvta")
def convert_address(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    to_space = op.has("to")
    space = op.require("global", "shared", "shared::cta", "local", "const", "param")
    value = context.read(operands[1], "u64")
    if space.startswith("shared"):
        base = "uint64_t(thread.shared)"
        value = f"{value} - {base}" if to_space else f"{base} + {value}"
    return context.write(operands[0], type_, value)


@instruction("isspacep")
def is_in_space(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    space = op.require("global", "shared", "shared::cta", "local", "const")
    value = context.read(operands[1], "u64")
    name = space.removesuffix("::cta").capitalize()
    return context.write(operands[0], "pred", f"is_in_space(thread, {value}, Space::k{name})")
