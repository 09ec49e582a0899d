"""Asynchronous copies from global to shared memory."""

from __future__ import annotations

from tests.gpu_emulation.context import Context
from tests.gpu_emulation.instructions.registry import instruction
from tests.gpu_emulation.opcode import Opcode
from tests.gpu_emulation.ptx import PtxError


@instruction("cp")
def copy(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.require("async")
    if op.has("commit_group"):
        return "async_commit(thread);"
    if op.has("wait_all"):
        return f"async_wait_all(thread, {context.site}u);"
    if op.has("wait_group"):
        return f"async_wait(thread, {context.read(operands[0], 'u32')}, {context.site}u);"
    cache = op.require("ca", "cg")
    op.require("shared", "shared::cta")
    op.require("global")
    if "L2::cache_hint" in op.take_prefixed("L2::"):
        operands = operands[:-1]
    destination, source, size, *rest = operands
    count = int(size, 0)
    if count not in (4, 8, 16) or (cache == "cg" and count != 16):
        raise PtxError(f"{op.text} of {count} bytes is not allowed")
    copied = f"{count}u"
    if rest and context.is_register(rest[0]) and context.function.registers[rest[0]] == "pred":
        copied = f"({context.read(rest[0], 'pred')} ? 0u : {count}u)"
    elif rest:
        copied = context.read(rest[0], "u32")
    target, origin = context.address(destination, "shared"), context.address(source, "global")
    return f"async_copy(thread, {target}, {origin}, {count}u, {copied}, {context.site}u);"
