"""Tensor-core products and the movement of their fragments."""

from __future__ import annotations

from tests.gpu_emulation.context import Context
from tests.gpu_emulation.instructions.registry import instruction
from tests.gpu_emulation.opcode import Opcode
from tests.gpu_emulation.ptx import PtxError

# shape and type of A and B -> 32-bit registers of A and of B
_FRAGMENTS = {
    ("m16n8k8", "bf16"): (2, 1),
    ("m16n8k16", "bf16"): (4, 2),
    ("m16n8k8", "f16"): (2, 1),
    ("m16n8k16", "f16"): (4, 2),
    ("m16n8k4", "tf32"): (2, 1),
    ("m16n8k8", "tf32"): (4, 2),
}


@instruction("mma")
def multiply_accumulate(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.require("sync")
    op.require("aligned")
    op.require("row")
    op.require("col")
    shape = op.modifiers.pop(0)
    types, op.modifiers = op.modifiers, []
    if len(types) != 4:
        raise PtxError(f"{op.text}: modifiers .{'.'.join(types)} are not supported")
    result, left, right, addend = types
    if left != right or (shape, left) not in _FRAGMENTS or result != addend or result not in ("f32", "f16"):
        raise PtxError(f"{op.text}: shape {shape} of .{left} and .{right} into .{result} is not supported")
    if result == "f16" and left != "f16":
        raise PtxError(f"{op.text}: a .f16 accumulator needs .f16 factors")
    sizes = (*_FRAGMENTS[shape, left], 4 if result == "f32" else 2)
    names = ("a", "b", "c")
    arrays = ""
    for name, size, operand in zip(names, sizes, operands[1:], strict=True):
        elements = context.vector(operand)
        if len(elements) != size:
            raise PtxError(f"{op.text}: operand {name} needs {size} registers, not {len(elements)}")
        values = ", ".join(context.read(element, "b32") for element in elements)
        arrays += f"const uint32_t {name}[] = {{{values}}}; "
    factor = {"bf16": "kBf16", "f16": "kF16", "tf32": "kTf32"}[left]
    call = f"mma<Factor::{factor}, {shape.split('k')[1]}, {'true' if result == 'f32' else 'false'}>"
    stores = " ".join(
        context.write(register, "b32", f"d[{index}]") for index, register in enumerate(context.vector(operands[0]))
    )
    return f"{{ {arrays}uint32_t d[{sizes[2]}]; {call}(thread, a, b, c, d, {context.site}u); {stores} }}"


@instruction("ldmatrix", "stmatrix")
def load_matrix(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    for modifier in ("sync", "aligned", "m8n8"):
        op.require(modifier)
    count = int(op.require("x1", "x2", "x4")[1])
    transposed = "true" if op.has("trans") else "false"
    # generic addresses of shared memory are allowed too
    space = "shared" if op.take("shared", "shared::cta") else "generic"
    op.require("b16")
    loads = op.name == "ldmatrix"
    registers = context.vector(operands[0 if loads else 1])
    if len(registers) != count:
        raise PtxError(f"{op.text} needs {count} registers, not {len(registers)}")
    address = context.address(operands[1 if loads else 0], space)
    if loads:
        stores = " ".join(context.write(register, "b32", f"rows[{i}]") for i, register in enumerate(registers))
        call = f"ldmatrix<{count}, {transposed}>(thread, {address}, rows, {context.site}u);"
        return f"{{ uint32_t rows[{count}]; {call} {stores} }}"
    values = ", ".join(context.read(register, "b32") for register in registers)
    call = f"stmatrix<{count}, {transposed}>(thread, {address}, rows, {context.site}u);"
    return f"{{ const uint32_t rows[] = {{{values}}}; {call} }}"


@instruction("movmatrix")
def transpose_matrix(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    for modifier in ("sync", "aligned", "m8n8", "trans", "b16"):
        op.require(modifier)
    return context.write(operands[0], "b32", f"movmatrix(thread, {context.read(operands[1], 'b32')}, {context.site}u)")
