"""The emulator's instructions against their definitions, and its approximations against their documented bounds."""

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
from tests.gpu_emulation.instruction_cases import WIDTHS, Case, float_cases, half_cases, integer_cases, signed
from tests.gpu_emulation.warp_cases import (
    HEADER,
    LANES,
    PRODUCTS,
    fragments,
    product_ptx,
    result_matrix,
    result_registers,
    warp_cases,
    warp_ptx,
)

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
    return torch.tensor([signed(value, 64) for value in values])


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


def test_warp_collectives() -> None:
    """Shuffles, votes, matches and reductions, of two warps whose values differ."""
    cases, threads = warp_cases(), 2 * LANES
    values = [random.Random(SEED).getrandbits(32) for _ in range(LANES)] + [5] * LANES
    with Memory() as memory:
        out = memory.empty((len(cases), threads), torch.int32)
        emulate(warp_ptx(cases, threads), "warp", (1, 1, 1), (threads, 1, 1), args=[_as_words(values), out])
        for case, row in zip(cases, out.tolist(), strict=True):
            expected = case.reference(values[:LANES]) + case.reference(values[LANES:])
            assert [value & 0xFFFFFFFF for value in row] == expected, case.statement


def _as_words(values: list[int]) -> torch.Tensor:
    return _as_tensor(values).to(torch.int32)


def _run_products(mma: str) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Of each product the result and the exact one; the pairs that went through the matrix moves, and what came out."""
    torch.manual_seed(SEED)
    factors, registers = [], []
    for product in PRODUCTS:
        a, b, c = torch.randn(16, product.depth), torch.randn(product.depth, 8), torch.randn(16, 8)
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b))
        columns = 4 if product.factor == "tf32" else 8
        # what is below the bits of tf32 must not count
        noise = torch.randint(0x2000, (1,)).item() if product.factor == "tf32" else 0
        parts = [fragments(a, product.factor, columns) | noise, fragments(b.T, product.factor, columns) | noise]
        registers += [*parts, result_registers(c, product.result)]
        types = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f32": torch.float32}
        a, b, c = a.to(types[product.factor]), b.to(types[product.factor]), c.to(types[product.result])
        factors.append(c.double() + a.double() @ b.double())
    pairs = torch.randint(1 << 31, (4, LANES), dtype=torch.int32)
    source = torch.cat([*registers, pairs])
    results = sum(product.registers[2] for product in PRODUCTS)
    with Memory() as memory:
        out = memory.empty((results + 2 * 2 * 7 + 1, LANES), torch.int32)
        counts = emulate(product_ptx(), "products", (1, 1, 1), (LANES, 1, 1), args=[source, out], mma=mma)
        assert counts.instructions["mma.sync"] == LANES * len(PRODUCTS)
        moved = out[results:].clone()
        rows = list(out[:results].clone().split([product.registers[2] for product in PRODUCTS]))
    got = [result_matrix(row, product.result) for row, product in zip(rows, PRODUCTS, strict=True)]
    return list(zip(got, factors, strict=True)), pairs, moved


def test_products() -> None:
    """Every shape of mma gives the matrix product, summed exactly and rounded once."""
    for product, (got, exact) in zip(PRODUCTS, _run_products("exact")[0], strict=True):
        assert torch.equal(got, exact.to(got.dtype)), product.opcode


def test_truncating_products() -> None:
    """The pessimistic sums differ from the exact ones, by no more than their 24 bits allow."""
    for product, (got, exact) in zip(PRODUCTS, _run_products("truncating")[0], strict=True):
        bound = 2.0**-9 if product.result == "f16" else 2.0**-19
        assert ((got.double() - exact).abs() <= bound * 16).all(), product.opcode
        if product.result == "f32" and product.depth == 16:
            assert not torch.equal(got, exact.to(got.dtype)), product.opcode


def _transposed(pairs: torch.Tensor) -> torch.Tensor:
    """Of 8x8 matrices of 16-bit elements, one to a register."""
    matrices = pairs.contiguous().view(torch.int16).reshape(-1, 8, 8)
    return matrices.transpose(1, 2).contiguous().view(torch.int32).reshape(-1, LANES)


def test_matrix_moves() -> None:
    """stmatrix, ldmatrix and movmatrix transpose what they say they do, and nothing else."""
    _, pairs, moved = _run_products("exact")
    at = 0
    for count, transposed in [(count, transposed) for count in (1, 2, 4) for transposed in (False, True)]:
        stored = _transposed(pairs[:count]) if transposed else pairs[:count]
        loaded = _transposed(stored) if transposed else stored
        assert torch.equal(moved[at : at + count], stored), (count, transposed)
        assert torch.equal(moved[at + count : at + 2 * count], loaded), (count, transposed)
        pairs = torch.cat([loaded, pairs[count:]])
        at += 2 * count
    assert torch.equal(moved[at], _transposed(pairs[:1])[0])


APPROXIMATIONS = {
    # opcode -> definition, and the bound as units in the last place, relative or absolute error
    "ex2.approx.f32": (torch.exp2, "ulp", 2.0),
    "ex2.approx.ftz.f32": (torch.exp2, "ulp", 2.0),
    "lg2.approx.f32": (torch.log2, "lg2", 2.0**-22),
    "rcp.approx.f32": (torch.reciprocal, "ulp", 1.0),
    "sqrt.approx.f32": (torch.sqrt, "relative", 2.0**-23),
    "rsqrt.approx.f32": (torch.rsqrt, "relative", 2.0**-22.9),
    "tanh.approx.f32": (torch.tanh, "relative", 2.0**-11),
    "sin.approx.f32": (torch.sin, "absolute", 2.0**-20.5),
    "cos.approx.f32": (torch.cos, "absolute", 2.0**-20.5),
}
HALF_APPROXIMATIONS = {
    "ex2.approx.f16": (torch.exp2, "relative", 2.0**-9.9),
    "ex2.approx.ftz.bf16": (torch.exp2, "relative", 2.0**-7),
    "tanh.approx.f16": (torch.tanh, "absolute", 2.0**-10.987),
    "tanh.approx.bf16": (torch.tanh, "absolute", 2.0**-8),
}
QUOTIENTS = {
    "div.full.f32": (torch.div, "ulp", 2.0),
    "div.approx.f32": (torch.div, "ulp", 2.0),
}
ROWS = len(APPROXIMATIONS) + len(HALF_APPROXIMATIONS) + len(QUOTIENTS)


def _approximation_ptx() -> str:
    lines = [
        f"{HEADER}.visible .entry approximations(.param .u64 x, .param .u64 y, .param .u64 out, .param .u32 n) {{",
        ".reg .b32 %tid, %block, %n; .reg .f32 %x, %y, %d; .reg .b16 %h; .reg .b64 %at, %to, %offset, %step;",
        "mov.u32 %tid, %tid.x; mov.u32 %block, %ctaid.x; mad.lo.u32 %tid, %block, 256, %tid; ld.param.u32 %n, [n];",
        "mul.wide.u32 %offset, %tid, 4; mul.wide.u32 %step, %n, 4; ld.param.u64 %to, [out]; add.u64 %to, %to, %offset;",
        "ld.param.u64 %at, [x]; add.u64 %at, %at, %offset; ld.global.f32 %x, [%at];",
        "ld.param.u64 %at, [y]; add.u64 %at, %at, %offset; ld.global.f32 %y, [%at];",
    ]
    computed = [f"{opcode} %d, %x;" for opcode in APPROXIMATIONS]
    for opcode in HALF_APPROXIMATIONS:
        type_ = opcode.split(".")[-1]
        computed.append(f"cvt.rn.{type_}.f32 %h, %x; {opcode} %h, %h; cvt.f32.{type_} %d, %h;")
    computed += [f"{opcode} %d, %x, %y;" for opcode in QUOTIENTS]
    lines += [f"{statement} st.global.f32 [%to], %d; add.u64 %to, %to, %step;" for statement in computed]
    return "\n".join([*lines, "ret; }"])


def _error(kind: str, x: torch.Tensor, got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    error = (got.double() - exact).abs()
    if kind == "ulp":
        unit = torch.exp2(torch.floor(torch.log2(exact.abs())).clamp(min=-126) - 23)
        return error / unit
    if kind == "absolute":
        return error
    relative = error / exact.abs()
    return torch.where((x > 0.5) & (x < 2), error, relative) if kind == "lg2" else relative


def test_approximations() -> None:
    """Within the documented bound, and often enough near it that a kernel which needs more is found out."""
    torch.manual_seed(SEED)
    n = 256 * 16
    x = torch.cat([torch.rand(n // 2) * 6, torch.exp2(torch.rand(n // 2) * 40 - 20)])
    y = torch.exp2(torch.rand(n) * 40 - 20)
    out = torch.zeros(ROWS, n)
    emulate(_approximation_ptx(), "approximations", (n // 256, 1, 1), (256, 1, 1), args=[x, y, out, n], check=False)
    bounds = {**APPROXIMATIONS, **HALF_APPROXIMATIONS, **QUOTIENTS}
    for row, (opcode, (function, kind, bound)) in zip(out, bounds.items(), strict=True):
        argument = x.to({"bf16": torch.bfloat16, "f16": torch.float16}.get(opcode.split(".")[-1], torch.float32))
        exact = function(argument.double(), y.double()) if opcode in QUOTIENTS else function(argument.double())
        valid = exact.abs() < (6e4 if argument.dtype == torch.float16 else 1e38)
        if opcode[:3] in ("sin", "cos"):
            valid &= x.abs() < 2 * math.pi
        error = _error(kind, x, row, exact)[valid]
        assert error.max() <= bound, (opcode, error.max())
        assert error.max() > bound / 2, (opcode, error.max())


def test_approximations_of_edges() -> None:
    """What the PTX ISA tabulates exactly."""
    infinity, nan = math.inf, math.nan
    x = torch.tensor([0.0, -0.0, infinity, -infinity, nan, 2.0**-140, 1.0, -1.0]).repeat(32)
    out = torch.zeros(ROWS, 256)
    emulate(_approximation_ptx(), "approximations", (1, 1, 1), (256, 1, 1), args=[x, x, out, 256], check=False)
    rows = dict(zip(APPROXIMATIONS, out[:, :8], strict=False))
    expected = {
        "ex2.approx.f32": [1, 1, infinity, 0, nan],
        "lg2.approx.f32": [-infinity, -infinity, infinity, nan, nan],
        "rcp.approx.f32": [infinity, -infinity, 0, -0.0, nan],
        "sqrt.approx.f32": [0, -0.0, infinity, nan, nan],
        "rsqrt.approx.f32": [infinity, -infinity, 0, nan, nan],
        "tanh.approx.f32": [0, -0.0, 1, -1, nan],
        "sin.approx.f32": [0, -0.0, nan, nan, nan],
    }
    for opcode, values in expected.items():
        assert str(rows[opcode][: len(values)].tolist()) == str([float(value) for value in values]), opcode
    # a subnormal is flushed where .ftz says so
    assert rows["ex2.approx.ftz.f32"][5] == 1
