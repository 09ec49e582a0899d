"""Integer arithmetic, logic, shifts and bit fields."""

from __future__ import annotations

from tests.gpu_emulation.context import Context, c_type
from tests.gpu_emulation.instructions.registry import instruction
from tests.gpu_emulation.opcode import Opcode, bits, is_signed

_SYMBOLS = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}


def _unsigned(type_: str) -> str:
    return f"u{bits(type_)}"


def _wide(type_: str) -> str:
    return f"{type_[0]}{bits(type_) * 2}"


@instruction("add", "sub", kind="integer")
def add(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    # two's complement wraps, which C++ grants to unsigned types only
    unsigned = _unsigned(type_)
    if op.has("cc"):
        first, second = (context.read(operand, unsigned) for operand in operands[1:])
        return context.write(operands[0], unsigned, f"{op.name}_carry<{c_type(unsigned)}>({first}, {second}, carry)")
    if op.has("sat"):
        first, second = (context.read(operand, type_) for operand in operands[1:])
        return context.write(operands[0], type_, f"{op.name}_saturated({first}, {second})")
    first, second = (context.read(operand, unsigned) for operand in operands[1:])
    return context.write(operands[0], unsigned, f"{first} {_SYMBOLS[op.name]} {second}")


@instruction("addc", "subc", kind="integer")
def add_with_carry(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    unsigned = _unsigned(op.type())
    carry_out = "true" if op.has("cc") else "false"
    first, second = (context.read(operand, unsigned) for operand in operands[1:])
    function = {"addc": "add_with_carry", "subc": "sub_with_borrow"}[op.name]
    return context.write(
        operands[0], unsigned, f"{function}<{c_type(unsigned)}, {carry_out}>({first}, {second}, carry)"
    )


@instruction("mul", "mad", kind="integer")
def multiply(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    half = op.require("lo", "hi", "wide")
    unsigned = _unsigned(type_)
    if op.name == "mad" and op.has("cc"):
        product = _product(context, half, type_, operands)
        addend = context.read(operands[3], unsigned)
        return context.write(
            operands[0], unsigned, f"add_carry<{c_type(unsigned)}>({c_type(unsigned)}({product}), {addend}, carry)"
        )
    product = _product(context, half, type_, operands)
    result = _unsigned(_wide(type_)) if half == "wide" else unsigned
    if op.name == "mad":
        product = f"{c_type(result)}({product}) + {context.read(operands[3], result)}"
    return context.write(operands[0], result, product)


@instruction("madc", kind="integer")
def multiply_add_with_carry(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    half = op.require("lo", "hi")
    unsigned = c_type(_unsigned(type_))
    carry_out = "true" if op.has("cc") else "false"
    product, addend = _product(context, half, type_, operands), context.read(operands[3], _unsigned(type_))
    return context.write(
        operands[0],
        _unsigned(type_),
        f"add_with_carry<{unsigned}, {carry_out}>({unsigned}({product}), {addend}, carry)",
    )


def _product(context: Context, half: str, type_: str, operands: tuple[str, ...]) -> str:
    if half == "lo":
        # 16-bit operands promote to int, whose overflow is undefined
        wrap = "u32" if bits(type_) == 16 else _unsigned(type_)
        first, second = (f"{c_type(wrap)}({context.read(operand, _unsigned(type_))})" for operand in operands[1:3])
        return f"{first} * {second}"
    first, second = (context.read(operand, type_) for operand in operands[1:3])
    if half == "hi":
        return f"multiply_high<{c_type(type_)}>({first}, {second})"
    wide = c_type(_wide(type_))
    return f"{wide}({first}) * {wide}({second})"


@instruction("mul24", "mad24", kind="integer")
def multiply_24(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    half = op.require("lo", "hi")
    first, second = (context.read(operand, type_) for operand in operands[1:3])
    product = f"multiply_24<{c_type(type_)}>({first}, {second}, {'true' if half == 'hi' else 'false'})"
    if op.name == "mad24":
        product = f"uint32_t({product}) + {context.read(operands[3], 'u32')}"
    return context.write(operands[0], "u32", product)


@instruction("div", "rem", kind="integer")
def divide(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    first, second = (context.read(operand, type_) for operand in operands[1:])
    function = {"div": "divide", "rem": "remainder"}[op.name]
    return context.write(operands[0], type_, f"integer_{function}<{c_type(type_)}>({first}, {second})")


@instruction("min", "max", kind="integer")
def minimum(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    relu = op.has("relu")
    first, second = (context.read(operand, type_) for operand in operands[1:])
    comparison = "<" if op.name == "min" else ">"
    result = f"({first} {comparison} {second} ? {first} : {second})"
    if relu:
        result = f"relu({result})"
    return context.write(operands[0], type_, result)


@instruction("neg", "abs", kind="integer")
def negate(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    value = context.read(operands[1], _unsigned(type_))
    if op.name == "abs":
        value = f"({context.read(operands[1], type_)} < 0 ? {c_type(_unsigned(type_))}(0 - {value}) : {value})"
        return context.write(operands[0], _unsigned(type_), value)
    return context.write(operands[0], _unsigned(type_), f"0 - {value}")


@instruction("sad", kind="integer")
def absolute_difference(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    unsigned = _unsigned(type_)
    first, second = (context.read(operand, type_) for operand in operands[1:3])
    left, right = (context.read(operand, unsigned) for operand in operands[1:3])
    addend = context.read(operands[3], unsigned)
    return context.write(
        operands[0], unsigned, f"{addend} + ({first} < {second} ? {right} - {left} : {left} - {right})"
    )


@instruction("and", "or", "xor")
def logic(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    first, second = (context.read(operand, type_) for operand in operands[1:])
    symbol = {"and": "&&", "or": "||", "xor": "!="}[op.name] if type_ == "pred" else _SYMBOLS[op.name]
    return context.write(operands[0], type_, f"({first}) {symbol} ({second})")


@instruction("not", "cnot")
def complement(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    value = context.read(operands[1], type_)
    if op.name == "cnot":
        return context.write(operands[0], type_, f"{value} == 0")
    return context.write(operands[0], type_, f"!{value}" if type_ == "pred" else f"~{value}")


@instruction("shl", "shr")
def shift(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    value, amount = context.read(operands[1], type_), context.read(operands[2], "u32")
    function = {"shl": "shift_left", "shr": "shift_right"}[op.name]
    return context.write(operands[0], type_, f"{function}<{c_type(type_)}>({value}, {amount})")


@instruction("shf")
def funnel_shift(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    direction = {"l": "left", "r": "right"}[op.require("l", "r")]
    clamp = "true" if op.require("wrap", "clamp") == "clamp" else "false"
    low, high, amount = (context.read(operand, "u32") for operand in operands[1:])
    return context.write(operands[0], type_, f"funnel_shift_{direction}<{clamp}>({low}, {high}, {amount})")


@instruction("bfe")
def extract(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    value = context.read(operands[1], type_)
    position, length = (context.read(operand, "u32") for operand in operands[2:])
    return context.write(operands[0], type_, f"bit_field_extract<{c_type(type_)}>({value}, {position}, {length})")


@instruction("bfi")
def insert(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    value, base = (context.read(operand, type_) for operand in operands[1:3])
    position, length = (context.read(operand, "u32") for operand in operands[3:])
    return context.write(
        operands[0], type_, f"bit_field_insert<{c_type(type_)}>({value}, {base}, {position}, {length})"
    )


@instruction("bfind")
def find_leading(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    shift_amount = "true" if op.has("shiftamt") else "false"
    value = context.read(operands[1], type_)
    return context.write(operands[0], "u32", f"find_leading<{c_type(type_)}, {shift_amount}>({value})")


@instruction("brev", "clz", "popc")
def count_bits(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    value = context.read(operands[1], type_)
    if op.name == "brev":
        return context.write(operands[0], type_, f"bit_reverse<{c_type(type_)}>({value})")
    function = {"clz": "std::countl_zero", "popc": "std::popcount"}[op.name]
    return context.write(operands[0], "u32", f"{function}({value})")


@instruction("szext", "bmsk")
def sign_or_mask(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    clamp = "true" if op.require("clamp", "wrap") == "clamp" else "false"
    if op.name == "bmsk":
        first, second = (context.read(operand, "u32") for operand in operands[1:])
        return context.write(operands[0], type_, f"bit_mask<{clamp}>({first}, {second})")
    value, width = context.read(operands[1], type_), context.read(operands[2], "u32")
    return context.write(operands[0], type_, f"extend<{c_type(type_)}, {clamp}>({value}, {width})")


@instruction("lop3")
def logic_of_three(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    values = ", ".join(context.read(operand, "u32") for operand in operands[1:4])
    return context.write(operands[0], type_, f"logic_of_three<{int(operands[4], 0)}>({values})")


@instruction("prmt")
def permute(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.require("b32")
    mode = op.take("f4e", "b4e", "rc8", "ecl", "ecr", "rc16") or "index"
    values = ", ".join(context.read(operand, "u32") for operand in operands[1:])
    return context.write(operands[0], type_, f"permute<Permutation::k{mode.capitalize()}>({values})")


@instruction("dp4a", "dp2a")
def dot_product(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    second_type, first_type = op.type(), op.type()
    result = "s32" if is_signed(first_type) or is_signed(second_type) else "u32"
    byte_types = ", ".join(f"{'' if is_signed(type_) else 'u'}int8_t" for type_ in (first_type, second_type))
    values = ", ".join(context.read(operand, "u32") for operand in operands[1:])
    if op.name == "dp4a":
        return context.write(operands[0], result, f"dot_product_4<{byte_types}>({values})")
    half = "1" if op.require("lo", "hi") == "hi" else "0"
    return context.write(operands[0], result, f"dot_product_2<{byte_types}, {half}>({values})")
