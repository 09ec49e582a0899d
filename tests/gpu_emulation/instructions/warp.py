"""Collectives of a warp: shuffles, votes, matches and reductions."""

from __future__ import annotations

from tests.gpu_emulation.context import Context, c_type
from tests.gpu_emulation.instructions.registry import instruction
from tests.gpu_emulation.opcode import Opcode, bits


@instruction("shfl")
def shuffle(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.require("sync")
    mode = op.require("up", "down", "bfly", "idx")
    op.require("b32")
    destination, *predicate = operands[0].split("|")
    value, position, clamp, mask = (context.read(operand, "u32") for operand in operands[1:])
    call = f"shuffle(thread, Shuffle::k{mode.capitalize()}, {value}, {position}, {clamp}, {mask}, {context.site}u)"
    stores = context.write(destination.strip(), "b32", "result.value")
    if predicate:
        stores += " " + context.write(predicate[0].strip(), "pred", "result.in_range")
    return f"{{ const ShuffleResult result = {call}; {stores} }}"


@instruction("vote")
def vote(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.require("sync")
    mode = op.require("all", "any", "uni", "ballot")
    type_ = op.require("b32" if mode == "ballot" else "pred")
    predicate, mask = context.read(operands[1], "pred"), context.read(operands[2], "u32")
    results = {
        "ballot": "result.set",
        "all": "result.set == result.lanes",
        "any": "result.set != 0",
        "uni": "(result.set == result.lanes || result.set == 0)",
    }
    call = f"ballot(thread, {predicate}, {mask}, {context.site}u)"
    return f"{{ const Ballot result = {call}; {context.write(operands[0], type_, results[mode])} }}"


@instruction("match")
def match(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    mode = op.require("any", "all")
    op.require("sync")
    value, mask = context.read(operands[1], type_), context.read(operands[2], "u32")
    destination, *predicate = operands[0].split("|")
    call = f"match_{mode}(thread, {value}, {mask}, {context.site}u)"
    stores = context.write(destination.strip(), "b32", "result")
    if predicate:
        stores += " " + context.write(predicate[0].strip(), "pred", "result != 0")
    return f"{{ const uint32_t result = {call}; {stores} }}"


@instruction("redux")
def reduce(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    type_ = op.type()
    op.require("sync")
    operation = op.require("add", "min", "max", "and", "or", "xor")
    if bits(type_) != 32 or type_ == "f32":
        op.modifiers.append(type_)
    value, mask = context.read(operands[1], type_), context.read(operands[2], "u32")
    functor = f"Atomic{operation.capitalize()}<{c_type(type_)}>"
    return context.write(operands[0], type_, f"reduce<{functor}>(thread, {value}, {mask}, {context.site}u)")


@instruction("elect")
def elect(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    op.require("sync")
    destination, predicate = operands[0].split("|")
    mask = context.read(operands[1], "u32")
    stores = context.write(destination.strip(), "b32", "result")
    stores += " " + context.write(predicate.strip(), "pred", "result == thread.lane")
    return f"{{ const uint32_t result = elect(thread, {mask}, {context.site}u); {stores} }}"


@instruction("activemask")
def active_mask(context: Context, op: Opcode, operands: tuple[str, ...]) -> str:
    # nothing promises that lanes run together, and here each runs by itself
    op.require("b32")
    return context.write(operands[0], "b32", "1u << thread.lane")
