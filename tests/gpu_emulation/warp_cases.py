"""Collectives of a warp and tensor-core products: PTX of kernels, and their definitions lane by lane."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.gpu_emulation.instruction_cases import signed

HEADER = ".version 8.5\n.target sm_80\n.address_size 64\n"
LANES = 32


@dataclass(frozen=True)
class WarpCase:
    """`statement` sets %d from the lane's value %x, or %q; the reference maps all lanes' values to what they get."""

    statement: str
    reference: Callable[[list[int]], list[int]]


def _shuffle(mode: str, offset: int, clamp: int) -> WarpCase:
    """PTX ISA, "shfl.sync": segments by the upper bits of the clamp operand, and a limit within them by the lower."""

    def source(lane: int) -> tuple[int, bool]:
        segment, limit = clamp >> 8 & 31, clamp & 31
        last, first = lane & segment | limit & ~segment, lane & segment
        target = {
            "up": lane - offset,
            "down": lane + offset,
            "bfly": lane ^ offset,
            "idx": first | offset & ~segment,
        }[mode]
        inside = target >= last if mode == "up" else target <= last
        return (target, True) if inside else (lane, False)

    def reference(values: list[int]) -> list[int]:
        # the predicate is added to the value
        return [values[source(lane)[0]] + source(lane)[1] & 0xFFFFFFFF for lane in range(LANES)]

    statement = f"shfl.sync.{mode}.b32 %d|%q, %x, {offset}, {clamp}, -1; selp.b32 %e, 1, 0, %q; add.u32 %d, %d, %e;"
    return WarpCase(statement, reference)


def _vote(mode: str, result: Callable[[list[bool]], int]) -> WarpCase:
    destination = "%d" if mode == "ballot" else "%r"
    after = "" if mode == "ballot" else "selp.b32 %d, 1, 0, %r;"
    type_ = "b32" if mode == "ballot" else "pred"
    return WarpCase(
        f"and.b32 %e, %x, 1; setp.eq.u32 %q, %e, 1; vote.sync.{mode}.{type_} {destination}, %q, -1; {after}",
        lambda values: [result([bool(value & 1) for value in values])] * LANES,
    )


def _reduce(operation: str, type_: str, function: Callable[[list[int]], int]) -> WarpCase:
    def reference(values: list[int]) -> list[int]:
        typed = [signed(value, 32) if type_ == "s32" else value for value in values]
        return [function(typed) & 0xFFFFFFFF] * LANES

    return WarpCase(f"redux.sync.{operation}.{type_} %d, %x, -1;", reference)


def _fold(function: Callable[[int, int], int]) -> Callable[[list[int]], int]:
    def fold(values: list[int]) -> int:
        result = values[0]
        for value in values[1:]:
            result = function(result, value)
        return result

    return fold


def _half_warps(values: list[int]) -> list[int]:
    """Each half adds its own first lane's value."""
    return [value + values[lane // 16 * 16] & 0xFFFFFFFF for lane, value in enumerate(values)]


def warp_cases() -> list[WarpCase]:
    cases = [
        _shuffle(mode, offset, clamp)
        for mode, offset, clamp in [
            *(("up", offset, 0) for offset in (0, 1, 5, 31)),
            ("up", 3, 0x1800),
            *(("down", offset, 31) for offset in (0, 1, 16, 31)),
            ("down", 3, 0x181F),
            *(("bfly", offset, 31) for offset in (1, 2, 16, 31)),
            ("bfly", 4, 0x1C1F),
            *(("idx", offset, 31) for offset in (0, 9, 31)),
            ("idx", 5, 0x181F),
            ("idx", 9, 3),
        ]
    ]
    cases += [
        _vote("ballot", lambda votes: sum(vote << lane for lane, vote in enumerate(votes))),
        _vote("all", lambda votes: int(all(votes))),
        _vote("any", lambda votes: int(any(votes))),
        _vote("uni", lambda votes: int(all(votes) or not any(votes))),
        _reduce("add", "u32", sum),
        _reduce("add", "s32", sum),
        _reduce("min", "u32", min),
        _reduce("max", "u32", max),
        _reduce("min", "s32", min),
        _reduce("max", "s32", max),
        _reduce("and", "b32", _fold(lambda a, b: a & b)),
        _reduce("or", "b32", _fold(lambda a, b: a | b)),
        _reduce("xor", "b32", _fold(lambda a, b: a ^ b)),
        WarpCase(
            "and.b32 %e, %x, 3; match.any.sync.b32 %d, %e, -1;",
            lambda values: [
                sum(1 << other for other in range(LANES) if values[other] & 3 == value & 3) for value in values
            ],
        ),
        WarpCase(
            "match.all.sync.b32 %d|%q, %x, -1;",
            lambda values: [0xFFFFFFFF if len(set(values)) == 1 else 0] * LANES,
        ),
        WarpCase(
            "elect.sync %d|%q, -1; selp.b32 %e, 100, 0, %q; add.u32 %d, %d, %e;",
            lambda values: [100 if lane == 0 else 0 for lane in range(LANES)],
        ),
        WarpCase(
            "shr.u32 %e, %lane, 4; setp.eq.u32 %q, %e, 1; @%q bra {label};"
            "shfl.sync.idx.b32 %d, %x, 0, 31, 0xffff; bra {label}_met; {label}:"
            "shfl.sync.idx.b32 %d, %x, 16, 31, 0xffff0000; {label}_met: add.u32 %d, %d, %x;",
            _half_warps,
        ),
        # lanes may meet at different instructions of the same opcode
        WarpCase(
            "shr.u32 %e, %lane, 4; setp.eq.u32 %q, %e, 1; @%q bra {label};"
            "shfl.sync.bfly.b32 %d, %x, 16, 31, -1; bra {label}_met; {label}:"
            "shfl.sync.bfly.b32 %d, %x, 16, 31, -1; {label}_met:",
            lambda values: [values[lane ^ 16] for lane in range(LANES)],
        ),
    ]
    return cases


def warp_ptx(cases: list[WarpCase], threads: int) -> str:
    """A kernel of `threads` threads that writes what thread t gets of case i to word threads * i + t."""
    lines = [
        f"{HEADER}.visible .entry warp(.param .u64 values, .param .u64 out) {{",
        ".reg .pred %q, %r; .reg .b32 %d, %e, %x, %tid, %lane; .reg .b64 %at, %to, %offset;",
        "mov.u32 %tid, %tid.x; mov.u32 %lane, %laneid; mul.wide.u32 %offset, %tid, 4;",
        "ld.param.u64 %at, [values]; add.u64 %at, %at, %offset; ld.global.b32 %x, [%at];",
        "ld.param.u64 %to, [out]; add.u64 %to, %to, %offset;",
    ]
    for number, case in enumerate(cases):
        lines.append(case.statement.replace("{label}", f"case{number}"))
        lines.append(f"st.global.b32 [%to+{4 * threads * number}], %d;")
    return "\n".join([*lines, "ret; }"])


@dataclass(frozen=True)
class Product:
    """mma.sync.m16n8k<depth> of a type of A and B into f32 or f16."""

    depth: int
    factor: str
    result: str

    @property
    def left_registers(self) -> int:
        return self.depth // 4 if self.factor != "tf32" else self.depth // 2

    @property
    def opcode(self) -> str:
        types = f"{self.result}.{self.factor}.{self.factor}.{self.result}"
        return f"mma.sync.aligned.m16n8k{self.depth}.row.col.{types}"

    @property
    def registers(self) -> tuple[int, int, int]:
        """Of A, B and of the result."""
        return self.left_registers, self.left_registers // 2, 4 if self.result == "f32" else 2


PRODUCTS = tuple(
    Product(depth, factor, result)
    for depth, factor, result in [
        (8, "bf16", "f32"),
        (16, "bf16", "f32"),
        (8, "f16", "f32"),
        (16, "f16", "f32"),
        (8, "f16", "f16"),
        (16, "f16", "f16"),
        (4, "tf32", "f32"),
        (8, "tf32", "f32"),
    ]
)
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "tf32": torch.float32}


def fragments(matrix: Tensor, type_: str, tile_columns: int) -> Tensor:
    """A row-major matrix as registers of 32 lanes: [register, lane]. In each tile of eight rows, lane 4 r + c holds row
    r's c-th register; tiles go down the rows first."""
    words = matrix.to(_DTYPES[type_]).contiguous().view(torch.int32)
    per_tile = tile_columns * _DTYPES[type_].itemsize // 4
    registers = []
    for column in range(0, words.shape[1], per_tile):
        for row in range(0, words.shape[0], 8):
            tile = words[row : row + 8, column : column + per_tile]
            registers += [tile.reshape(8, 4, -1)[:, :, part].reshape(LANES) for part in range(per_tile // 4)]
    return torch.stack(registers)


def result_matrix(registers: Tensor, type_: str) -> Tensor:
    """The 16x8 matrix of which lane 4 r + c holds columns 2 c and 2 c + 1 of rows r and r + 8."""
    per_row = len(registers) // 2
    rows = registers.reshape(2, per_row, 8, 4).permute(0, 2, 3, 1).reshape(16, 4 * per_row)
    return rows.view(_DTYPES[type_])


def result_registers(matrix: Tensor, type_: str) -> Tensor:
    words = matrix.to(_DTYPES[type_]).contiguous().view(torch.int32).reshape(2, 8, 4, -1)
    return words.permute(0, 3, 1, 2).reshape(-1, LANES)


def product_ptx() -> str:
    """A kernel of one warp that reads the registers of each product's operands one after another, and writes the
    results'; then the matrix of `pairs` through stmatrix, movmatrix and ldmatrix in all shapes."""
    lines = [
        f"{HEADER}.visible .entry products(.param .u64 in, .param .u64 out) {{",
        ".reg .b32 %a<4>, %b<2>, %c<4>, %tid, %row, %m<4>, %n; .reg .b64 %at, %to, %offset;",
        ".shared .align 16 .b8 tiles[512];",
        "mov.u32 %tid, %tid.x; mul.wide.u32 %offset, %tid, 4;",
        "ld.param.u64 %at, [in]; add.u64 %at, %at, %offset; ld.param.u64 %to, [out]; add.u64 %to, %to, %offset;",
    ]
    read = written = 0

    def load(names: list[str]) -> None:
        nonlocal read
        for name in names:
            lines.append(f"ld.global.b32 {name}, [%at+{128 * read}];")
            read += 1

    def store(names: list[str]) -> None:
        nonlocal written
        for name in names:
            lines.append(f"st.global.b32 [%to+{128 * written}], {name};")
            written += 1

    for product in PRODUCTS:
        operands = [[f"%{name}{i}" for i in range(n)] for name, n in zip("abc", product.registers, strict=True)]
        for names in operands:
            load(names)
        a, b, c = (f"{{{', '.join(names)}}}" for names in operands)
        lines.append(f"{product.opcode} {c}, {a}, {b}, {c};")
        store(operands[2])
    load([f"%m{i}" for i in range(4)])
    lines.append("mov.u32 %row, tiles; mad.lo.u32 %row, %tid, 16, %row;")
    for count, transposed in [(count, transposed) for count in (1, 2, 4) for transposed in ("", ".trans")]:
        names = [f"%m{i}" for i in range(count)]
        registers = f"{{{', '.join(names)}}}"
        shape = f"m8n8.x{count}{transposed}.shared.b16"
        # what is stored transposed and loaded as it lies comes back transposed
        lines.append(f"stmatrix.sync.aligned.{shape} [%row], {registers}; bar.warp.sync -1;")
        lines.append(f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16 {registers}, [%row]; bar.warp.sync -1;")
        store(names)
        lines.append(f"ldmatrix.sync.aligned.{shape} {registers}, [%row]; bar.warp.sync -1;")
        store(names)
    lines.append("movmatrix.sync.aligned.m8n8.trans.b16 %n, %m0;")
    store(["%n"])
    return "\n".join([*lines, "ret; }"])
