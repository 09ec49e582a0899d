"""Comparisons and selections."""

from __future__ import annotations

from tests.gpu_emulation.context import Context
from tests.gpu_emulation.instructions.registry import instruction
from tests.gpu_emulation.opcode import Opcode, bare, is_float, is_half
from tests.gpu_emulation.ptx import PtxError

_SYMBOLS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}
_BOOLEAN = {"and": "&&", "or": "||", "xor": "!="}


def _comparison(op: Opcode, type_: str) -> str:
    """An expression of `left` and `right`, formatted in."""
    floating = is_float(type_) or is_half(type_)
    names = (*_SYMBOLS, *_UNORDERED, "num", "nan") if floating else (*_SYMBOLS, *_UNSIGNED)
    # the comparison comes first; .lo and .hi mean others elsewhere
    if not op.modifiers or op.modifiers[0] not in names:
        raise PtxError(f"{op.text} has no comparison supported for .{type_}")
    name = op.modifiers.pop(0)
    if not floating:
        return f"({{left}} {(_SYMBOLS | _UNSIGNED)[name]} {{right}})"
    if name == "num":
        return "!is_unordered({left}, {right})"
    if name == "nan":
        return "is_unordered({left}, {right})"
    if name in _UNORDERED:
        return f"(is_unordered({{left}}, {{right}}) || {{left}} {_UNORDERED[name]} {{right}})"
    # every ordered comparison with NaN is false, and C++'s != is the exception
    ordered = "!is_unordered({left}, {right}) && " if name == "ne" else ""
    return f"({ordered}{{left}} {_SYMBOLS[name]} {{right}})"


def _compared(context: Context, type_: str, operand: str, flush: bool, upper: bool = False) -> str:
    if not is_half(type_):
        value = context.read(operand, type_)
        return f"flush({value})" if flush else value
    form = context.half_format(type_)
    value = context.read(operand, bare(type_))
    value = f"uint16_t({value} >> {16 if upper else 0})"
    if flush:
        value = f"uint16_t(flush_halves<{form}>({value}))"
    return f"{form}::value({value})"


def _comparisons(context: Context, op: Opcode, type_: str, operands: tuple[str, ...]) -> list[str]:
    """The comparison, of each half where the type is a pair."""
    flush = op.has("ftz")
    comparison = _comparison(op, type_)
    compared = []
    for upper in (False, True) if type_.endswith("x2") else (False,):
        left, right = (_compared(context, type_, operand, flush, upper) for operand in operands[1:3])
        compared.append(comparison.format(left=left, right=right))
    return compared


def _combined(context: Context, op: Opcode, compared: list[str], operands: tuple[str, ...]) -> list[str]:
    combination = op.take(*_BOOLEAN)
    if combination is None:
        return compared
    predicate = context.read(operands[3], "pred")
    return [f"({comparison} {_BOOLEAN[combination]} {predicate})" for comparison in compared]


@instruction("setp")
def set_predicate(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    compared = _comparisons(context, op, type_, operands)
    destinations = operands[0].split("|")
    if len(compared) == 1 and len(destinations) == 2:
        compared.append(f"!{compared[0]}")
    results = _combined(context, op, compared, operands)
    names = [f"result{index}" for index in range(len(destinations))]
    computed = " ".join(f"const bool {name} = {result};" for name, result in zip(names, results, strict=True))
    stores = " ".join(context.write(to.strip(), "pred", name) for to, name in zip(destinations, names, strict=True))
    return f"{{ {computed} {stores} }}"


@instruction("set")
def set_value(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    source, destination = op.type(), op.type()
    results = _combined(context, op, _comparisons(context, op, source, operands), operands)
    if len(results) == 2:
        one = {"f16x2": "0x3c00u", "bf16x2": "0x3f80u"}.get(destination, "0xffffu")
        value = f"({results[0]} ? {one} : 0u) | ({results[1]} ? {one} : 0u) << 16"
        return context.write(operands[0], "b32", value)
    one = {"f32": "0x3f800000u", "f16": "0x3c00u", "bf16": "0x3f80u"}.get(destination, "~0u")
    return context.write(operands[0], bare(destination), f"{results[0]} ? {one} : 0u")


@instruction("selp")
def select(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    value = bare(type_) if is_half(type_) else type_
    first, second = (context.read(operand, value) for operand in operands[1:3])
    return context.write(operands[0], value, f"{context.read(operands[3], 'pred')} ? {first} : {second}")


@instruction("slct")
def select_by_sign(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    sign, type_ = op.type(), op.type()
    flush = op.has("ftz")
    first, second = (context.read(operand, type_) for operand in operands[1:3])
    value = context.read(operands[3], sign)
    if flush:
        value = f"flush({value})"
    return context.write(operands[0], type_, f"{value} >= 0 ? {first} : {second}")
