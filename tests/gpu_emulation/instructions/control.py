"""Branches, calls, barriers, and instructions that only steer the machine."""

from __future__ import annotations

from tests.gpu_emulation.context import Context, identifier
from tests.gpu_emulation.instructions.registry import instruction
from tests.gpu_emulation.opcode import Opcode
from tests.gpu_emulation.ptx import PtxError


@instruction("bra")
def branch(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.take("uni")
    return f"goto label_{identifier(operands[0])};"


@instruction("brx")
def indexed_branch(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.require("idx")
    op.take("uni")
    index, table = operands
    if table not in context.function.branch_targets:
        raise PtxError(f"{op.text}: no branch targets named {table}")
    cases = " ".join(
        f"case {number}: goto label_{identifier(label)};"
        for number, label in enumerate(context.function.branch_targets[table])
    )
    return (
        f'switch ({context.read(index, "u32")}) {{ {cases} default: fail(thread, {context.site}u, "no such target"); }}'
    )


@instruction("ret", "exit")
def leave(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.take("uni")
    if op.name == "exit" and not context.function.is_entry:
        raise PtxError("exit inside a device function is not supported")
    return "return;"


@instruction("call")
def call(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.take("uni")
    groups = [operand[1:-1] for operand in operands if operand.startswith("(")]
    names = [operand for operand in operands if not operand.startswith("(")]
    if len(names) != 1:
        raise PtxError(f"{op.text}: indirect calls are not supported")
    name = names[0]
    results = groups.pop(0) if operands[0].startswith("(") else ""
    arguments = groups[0] if groups else ""
    if name == "__assertfail":
        return f'fail(thread, {context.site}u, "an assertion of the kernel failed");'
    if name not in context.module.functions:
        raise PtxError(f"{op.text}: function {name} is not defined in this module")
    passed = [
        f"{context.variable(argument.strip())}"
        for group in (results, arguments)
        if group
        for argument in group.split(",")
    ]
    return f"function_{identifier(name)}({', '.join(['thread', *passed])});"


@instruction("bar", "barrier")
def barrier(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    if op.has("warp"):
        op.require("sync")
        return f"sync_warp(thread, {context.read(operands[0], 'u32')}, {context.site}u);"
    op.take("cta")
    action = op.require("sync", "arrive", "red")
    aligned = op.has("aligned") or op.name == "bar"
    options = f"{'true' if aligned else 'false'}, {context.site}u"
    if action == "red":
        return _reduction(context, op, operands, options)
    number, *rest = operands
    count = context.read(rest[0], "u32") if rest else "0u"
    return f"barrier_{action}(thread, {context.read(number, 'u32')}, {count}, {options});"


def _reduction(context: Context, op: Opcode, operands: tuple[str, ...], options: str) -> str:
    reduction = op.require("popc", "and", "or")
    type_ = "pred" if reduction != "popc" else "u32"
    op.require(type_)
    destination, number, *rest, predicate = operands
    count = context.read(rest[0], "u32") if rest else "0u"
    value = (
        f"barrier_count(thread, {context.read(number, 'u32')}, {count}, {context.read(predicate, 'pred')}, {options})"
    )
    expression = {"popc": "set", "and": "set == waiting", "or": "set != 0"}[reduction]
    return f"{{ const auto [set, waiting] = {value}; {context.write(destination, type_, expression)} }}"


@instruction("trap")
def trap(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    return f'fail(thread, {context.site}u, "the kernel trapped");'


@instruction("nanosleep")
def sleep(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.type()
    return f"yield(thread, {context.site}u);"


@instruction("griddepcontrol", "setmaxnreg", "pmevent")
def hint(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.take("launch_dependents", "wait", "inc", "dec")
    op.take("sync")
    op.take("aligned")
    op.take("u32")
    op.take("mask")
    return ";"
