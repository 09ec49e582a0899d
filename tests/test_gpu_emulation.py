"""The emulator against definitions of its instructions, and what it promises of errors, orders and caching."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest
import torch

from tests.conftest import SEED
from tests.gpu_emulation import Memory, emulate
from tests.gpu_emulation.conversion_cases import comparison_cases, conversion_cases
from tests.gpu_emulation.formats import FORMATS
from tests.gpu_emulation.instruction_cases import WIDTHS, Case, float_cases, half_cases, integer_cases

HEADER = ".version 8.5\n.target sm_80\n.address_size 64\n"
THREADS = 256

GROUPS = {
    "integer": integer_cases,
    "float": float_cases,
    "half": half_cases,
    "comparison": comparison_cases,
    "conversion": conversion_cases,
}


def _edge_values(type_: str) -> list[int]:
    width, form = WIDTHS[type_], FORMATS[type_]
    zero, infinity = 0, ((1 << form.exponent_bits) - 1) << form.fraction_bits
    one, least_normal = form.bias << form.fraction_bits, 1 << form.fraction_bits
    positive = [zero, 1, least_normal - 1, least_normal, one - 1, one, one + 1, infinity - 1, infinity, infinity | 1]
    # around the limits of integers, and halves between integers
    powers = [(form.bias + power) << form.fraction_bits for power in (-1, 1, 7, 8, 15) if power <= form.bias]
    powers += [(form.bias + power) << form.fraction_bits for power in (31, 32, 63, 64) if power <= form.bias]
    positive += powers + [power - 1 for power in powers] + [power | 1 << (form.fraction_bits - 1) for power in powers]
    return positive + [value | 1 << (width - 1) for value in positive]


def _operand(kind: int, generator: random.Random) -> int:
    """64 bits, of which narrower operands are the lower ones."""
    bits = generator.getrandbits(64)
    if kind < 4:
        type_ = ("f16", "bf16", "f32", "f64")[kind]
        edge = generator.choice(_edge_values(type_))
        width = WIDTHS[type_]
        return (edge | edge << 16) if width == 16 else bits >> width << width | edge
    if kind == 4:
        return generator.randrange(80) * generator.choice((1, -1)) % (1 << 64)
    if kind == 5:
        # floats of like magnitudes, whose sums cancel
        return bits & ~0x7F807C00 | 0x3F803C00 | (generator.randrange(4) << 23)
    return bits


@cache
def _operands() -> list[tuple[int, int, int]]:
    generator = random.Random(SEED)
    kinds = [(kind, kind, kind) for kind in range(7)] + [(2, 4, 2), (6, 4, 4), (5, 2, 5)]
    return [tuple(_operand(kind, generator) for kind in kinds[i % len(kinds)]) for i in range(THREADS)]


def _register(name: str, type_: str) -> str:
    return f"%{name}{max(WIDTHS[type_], 16)}"


def _ptx(cases: list[Case]) -> str:
    """One kernel that writes the result of case i and thread t to the 64 bits at 8 * (THREADS * i + t)."""
    lines = [
        f"{HEADER}.visible .entry cases(.param .u64 x, .param .u64 y, .param .u64 z, .param .u64 out) {{",
        ".reg .pred %d1; .reg .b32 %tid, %flag;",
        ".reg .b64 %at, %offset, %to;",
        "mov.u32 %tid, %tid.x; mul.wide.u32 %offset, %tid, 8; ld.param.u64 %to, [out]; add.u64 %to, %to, %offset;",
    ]
    for name in "xyzd":
        lines.append(f".reg .b16 %{name}16; .reg .b32 %{name}32; .reg .b64 %{name}64;")
    for name in "xyz":
        lines.append(f"ld.param.u64 %at, [{name}]; add.u64 %at, %at, %offset; ld.global.b64 %{name}64, [%at];")
        lines.append(f"cvt.u32.u64 %{name}32, %{name}64; cvt.u16.u64 %{name}16, %{name}64;")
    for number, case in enumerate(cases):
        names = iter("xyz")
        operands = [o[1:] if o.startswith("=") else _register(next(names), o) for o in case.operands]
        destination = "%d1" if case.result == "pred" else _register("d", case.result)
        lines.append(f"{case.opcode} {destination}, {', '.join(operands)};")
        address = f"[%to+{8 * THREADS * number}]"
        if case.result == "pred":
            lines.append(f"selp.b32 %flag, 1, 0, %d1; st.global.b32 {address}, %flag;")
        else:
            lines.append(f"st.global.b{max(WIDTHS[case.result], 16)} {address}, {destination};")
    return "\n".join([*lines, "ret; }"])


def _as_tensor(values: list[int]) -> torch.Tensor:
    return torch.tensor([value - (1 << 64) if value >> 63 else value for value in values])


def _run(cases: list[Case]) -> list[list[int]]:
    with Memory() as memory:
        inputs = [memory.copy(_as_tensor(list(values))) for values in zip(*_operands(), strict=True)]
        out = memory.empty((len(cases), THREADS), torch.int64)
        emulate(_ptx(cases), "cases", (1, 1, 1), (THREADS, 1, 1), args=[*inputs, out], check=False)
        masks = [(1 << max(WIDTHS[case.result], 16 if case.result != "pred" else 32)) - 1 for case in cases]
        return [[value & mask for value in row] for row, mask in zip(out.tolist(), masks, strict=True)]


def _is_nan(type_: str, bits: int) -> bool:
    return type_ in FORMATS and math.isnan(FORMATS[type_].decode(bits))


def _agree(case: Case, got: int, expected: int) -> bool:
    """Equal bits, but for a NaN's."""
    expected &= (1 << (16 if WIDTHS[case.result] == 8 else WIDTHS[case.result])) - 1
    if case.result.endswith("x2"):
        half = case.result.removesuffix("x2")
        parts = [(got >> shift & 0xFFFF, expected >> shift & 0xFFFF) for shift in (0, 16)]
        return all(a == b or (_is_nan(half, a) and _is_nan(half, b)) for a, b in parts)
    return got == expected or (_is_nan(case.result, got) and _is_nan(case.result, expected))


@pytest.mark.parametrize("group", GROUPS)
def test_instructions(group: str) -> None:
    """Over random bits and edge cases, each instruction gives what its definition does."""
    cases = GROUPS[group]()
    wrong = []
    for case, row in zip(cases, _run(cases), strict=True):
        for values, got in zip(_operands(), row, strict=True):
            bits = [value & ((1 << WIDTHS[type_]) - 1) for value, type_ in zip(values, case.types, strict=False)]
            expected = case.reference(*bits)
            if not _agree(case, got, expected):
                wrong.append(f"{case.opcode} {[hex(value) for value in bits]}: {got:#x}, expected {expected:#x}")
                break
    assert not wrong, "\n".join(wrong)
