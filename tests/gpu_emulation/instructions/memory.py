"""Loads, stores, atomic operations and fences."""

from __future__ import annotations

from tests.gpu_emulation.context import Context, c_type
from tests.gpu_emulation.instructions.registry import instruction
from tests.gpu_emulation.opcode import Opcode, bare, is_float, is_half
from tests.gpu_emulation.ptx import PtxError

_SPACES = ("global", "shared", "shared::cta", "local", "const", "param", "param::entry", "param::func")
# these change performance, not values
_CACHE = ("ca", "cg", "cs", "lu", "wb", "wt")
_SCOPES = ("cta", "cluster", "gpu", "gl", "sys")


def _space(op: Opcode) -> str:
    return (op.take(*_SPACES) or "generic").split("::")[0]


def _cache_hints(op: Opcode, operands: tuple[str, ...]) -> tuple[str, ...]:
    """Takes the hints off the opcode, and the operand that one of them brings off the operands."""
    hints = op.take_prefixed("L1::", "L2::")
    return operands[:-1] if "L2::cache_hint" in hints else operands


def _scope(op: Opcode) -> str:
    scope = op.take(*_SCOPES) or "gpu"
    return "Scope::kBlock" if scope == "cta" else "Scope::kDevice"


def _access(op: Opcode, plain: str) -> str:
    """The memory order of a load or store, as C++."""
    order = op.take("weak", "volatile", "relaxed", "acquire", "release", "mmio", "cv", "wt")
    scope = _scope(op) if order in ("relaxed", "acquire", "release", "mmio") else "Scope::kDevice"
    if order in (None, "weak", "wt"):
        return f"Access::{plain}, Order::kWeak, Scope::kDevice"
    kind = {"acquire": "kAcquire", "release": "kRelease"}.get(str(order), "kRelaxed")
    return f"Access::{plain}, Order::{kind}, {scope}"


def _register_type(type_: str) -> str:
    """Memory holds bits; only .s types extend by sign."""
    return type_ if type_.startswith("s") else bare(type_)


@instruction("ld", "ldu")
def load(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    space = _space(op)
    operands = _cache_hints(op, operands)
    op.take(*_CACHE)
    read_only = op.has("nc") or op.name == "ldu"
    access = _access(op, "kReadOnly" if read_only else "kRead")
    op.take("v2", "v4", "v8")
    registers = context.vector(operands[0])
    element = _register_type(type_)
    template = f"{c_type(element)}, {len(registers)}"
    if space in ("param", "const"):
        values = f"load_plain<{template}>({context.address(operands[1], space)})"
    else:
        address = context.address(operands[1], space)
        values = f"load<{template}, {_space_of(space)}, {access}>(thread, {address}, {context.site}u)"
    stores = " ".join(context.write(register, element, f"values[{i}]") for i, register in enumerate(registers))
    return f"{{ const auto values = {values}; {stores} }}"


def _space_of(space: str) -> str:
    return f"Space::k{space.capitalize()}"


@instruction("st")
def store(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    space = _space(op)
    operands = _cache_hints(op, operands)
    op.take("wb", "cg", "cs")
    access = _access(op, "kWrite")
    op.take("v2", "v4", "v8")
    registers = context.vector(operands[1])
    element = bare(type_)
    values = ", ".join(context.read(register, element) for register in registers)
    vector = f"Vector<{c_type(element)}, {len(registers)}>{{{values}}}"
    address = context.address(operands[0], space)
    if space == "param":
        return f"store_plain({address}, {vector});"
    return (
        f"store<{c_type(element)}, {len(registers)}, {_space_of(space)}, {access}>"
        f"(thread, {address}, {vector}, {context.site}u);"
    )


_ATOMICS = ("add", "min", "max", "inc", "dec", "exch", "cas", "and", "or", "xor")


@instruction("atom", "red")
def atomic(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    order = op.take("relaxed", "acquire", "release", "acq_rel") or "relaxed"
    operands = _cache_hints(op, operands)
    scope = _scope(op)
    space = _space(op)
    operation = op.require(*_ATOMICS)
    op.take("noftz")
    returns = op.name == "atom"
    address, *values = operands[1:] if returns else operands
    if len(values) != (2 if operation == "cas" else 1) or address.startswith("{"):
        raise PtxError(f"{op.text} with operands {', '.join(operands)} is not supported")
    element = bare(type_) if is_half(type_) else type_
    arguments = "".join(f", {context.read(value, element)}" for value in values)
    if is_half(type_):
        pair = "Pair" if type_.endswith("x2") else ""
        if operation != "add":
            raise PtxError(f"{op.text}: only .add is supported of .{type_}")
        functor = f"AtomicHalf{pair}Add<{context.half_format(type_)}>"
    else:
        functor = f"Atomic{operation.capitalize()}<{c_type(element)}>"
    unordered = operation == "add" and (is_float(type_) or is_half(type_))
    orders = {"relaxed": "kRelaxed", "acquire": "kAcquire", "release": "kRelease", "acq_rel": "kAcquireRelease"}
    call = (
        f"atomic<{functor}, {_space_of(space)}, Order::{orders[order]}, {scope}, {'true' if unordered else 'false'}>"
        f"(thread, {context.address(address, space)}, {context.site}u{arguments})"
    )
    return context.write(operands[0], element, call) if returns else f"(void){call};"


@instruction("membar", "fence")
def fence(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    # orders the generic and the asynchronous proxy, which the emulator does not tell apart
    if op.has("proxy"):
        op.require("async", "alias")
        op.take_prefixed("shared", "global")
        return ";"
    op.take("sc", "acq_rel", "acquire", "release")
    return f"fence(thread, {_scope(op)});"


@instruction("prefetch", "prefetchu", "discard", "applypriority")
def prefetch(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    if op.name == "discard":
        raise PtxError(f"{op.text} is not supported: it leaves memory undefined")
    _space(op)
    op.take_prefixed("L1", "L2")
    return ";"


@instruction("createpolicy")
def create_policy(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.require("fractional", "range")
    op.take_prefixed("L2::")
    _space(op)
    type_ = op.type()
    return context.write(operands[0], type_, "0")
