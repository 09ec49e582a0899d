"""The checker is checked: kernels without defects pass in any order of their threads, each planted defect is named."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from tests.conftest import SEED
from tests.gpu_emulation import Counts, EmulationError, Memory, build, compile, emulate
from tests.gpu_emulation.compile import Launch, nvcc_ptx, triton_compile, triton_launch
from tests.gpu_emulation.interpret import interpret
from tests.gpu_emulation.planted.launches import ATTENTION_SHARED_BYTES, KERNELS, defects, ptx, run, source
from tests.gpu_emulation.planted.product import double_product, doubled, product, weighted_rows


@dataclass(frozen=True)
class Defect:
    """A defect that the checker stops at: what it says, what stands in the source line that it names, and what it may
    say instead in another order of the threads, where the defect shows otherwise."""

    kernel: str
    name: str
    message: str
    line: str
    elsewhere: str | None = None

    def __str__(self) -> str:
        return f"{self.kernel}-{self.name}"


STOPPED = (
    Defect("reverse_warps", "kMissingSyncwarp", r"race \(write after read\)", "staged[threadIdx.x] = x"),
    Defect("reverse_warps", "kSyncwarpOfHalf", r"race \(read after write\)", "= staged[mirrored]"),
    Defect("reverse_warps", "kShuffleInsteadOfSyncwarp", r"race \(read after write\)", "= staged[mirrored]"),
    Defect("reverse_warps", "kUnwrittenShared", "uninitialised memory", "= staged[mirrored]"),
    Defect("reverse_warps", "kSharedOverrun", "out of bounds: .* shared memory", "= staged[mirrored]"),
    Defect("reverse_warps", "kAllWriteOne", r"race \(write after write\): .* global memory", "to = "),
    Defect("reverse_warps", "kReadsUnwrittenOutput", "uninitialised memory: .* global memory", "to = "),
    Defect("reverse_block", "kExitBeforeBarrier", "deadlock: .* exited", "__syncthreads()"),
    Defect(
        "reverse_block",
        "kBarrierInOneWarp",
        r"race \(write after read\)",
        "staged[threadIdx.x] = x",
        r"race \(read after write\)",
    ),
    Defect("reverse_block", "kDivergentBarriers", "divergent barrier", "__syncthreads()"),
    Defect("reverse_block", "kMissingBarrier", r"race \(write after read\)", "staged[threadIdx.x] = x"),
    Defect("sum_warps", "kDivergentShuffle", "deadlock: .* not reached by all lanes", "__shfl_xor_sync"),
    Defect("sum_warps", "kShuffleFromOutsideMask", "lane 16, which is inactive", "__shfl_xor_sync(0xffff"),
    Defect(
        "hand_over",
        "kBarrierCountTooSmall",
        r"race \(read after write\)",
        "= staged[31 - lane]",
        "uninitialised memory",
    ),
    Defect("hand_over", "kBarrierCountTooLarge", "barrier 1 for 96 threads, but the block has 64", "arrive(kFull"),
    Defect("hand_over", "kLaneArrivesForAnother", "deadlock: .* not reached by all lanes", "arrive(kFull"),
    Defect(
        "hand_over", "kConsumerDoesNotWait", r"race \(read after write\)", "= staged[31 - lane]", "uninitialised memory"
    ),
    Defect(
        "hand_over", "kProducerDoesNotWait", "deadlock: .* exited", "named_barrier(kFull", r"race \(read after write\)"
    ),
    Defect("reverse_copied", "kMissingWait", "copy in flight", "= staged[other"),
    Defect(
        "reverse_copied",
        "kOneThreadDoesNotWait",
        "exits with .* in flight",
        "copy_async(staged + own",
        "copy in flight",
    ),
    Defect("reverse_copied", "kMissingBarrierAfterWait", "copy in flight", "= staged[other"),
    Defect("reverse_copied", "kOverwritesCopyUnderWay", "copy in flight", "staged[own] = 1"),
    Defect("reverse_copied", "kOverwritesSourceOfCopy", "source .* changed .* in flight", "copy_async(staged + own"),
    Defect(
        "reverse_copied", "kExitsWithCopyUnderWay", "exits with .* in flight", "copy_async(staged + own, x + own, 16)"
    ),
    Defect("reverse_copied", "kMisalignedCopy", "misaligned", "copy_async(staged + own"),
    Defect(
        "normalize_rows",
        "kReadsPastRow",
        "gap between the tensor's rows: .* read",
        "sum += from[i]",
        "out of bounds: 8-byte read of global memory",
    ),
    Defect(
        "normalize_rows",
        "kWritesPastRow",
        "gap between the tensor's rows: .* write",
        "to[2 * i] =",
        "out of bounds: 4-byte write of global memory",
    ),
    Defect("normalize_rows", "kTailRowsRead", "out of bounds: 8-byte read of global memory", "sum += from[i]"),
    Defect("normalize_rows", "kTailRowsWritten", "out of bounds: 4-byte write of global memory", "to[2 * i] ="),
    Defect("normalize_rows", "kMisalignedVector", "misaligned: .* 8-byte access", "sum += from[i]"),
    Defect("normalize_rows", "kAddressInInt32", "not allocated", "sum += from[i]"),
    Defect("sum", "kUnorderedSum", "unordered float reduction: .* global memory", "atomicAdd(out"),
    Defect("sum", "kUnorderedSumShared", "unordered float reduction: .* shared memory", "atomicAdd(of_warp"),
    Defect("sum", "kStoresPastArray", "out of bounds: between arrays: 4-byte write of shared memory", "= mine;"),
    Defect("sum", "kMissingBarrier", "uninitialised memory", "of_warp[0] + of_warp[1]", r"race \(read after write\)"),
    Defect("sum", "kMissingBarrierBeforeRead", "uninitialised memory", "if (!last", r"race \(read after write\)"),
    Defect("sum", "kMissingReleaseFence", r"race \(read after write\): .* of another block", "partial[block]"),
    Defect("sum", "kMissingAcquireFence", r"race \(read after write\): .* of another block", "partial[block]"),
    Defect("sum", "kFirstBlockReads", "uninitialised memory", "partial[block]"),
    Defect("sum", "kCounterNotAtomic", r"race \(read after write\): .* of another block", "before = *counter;"),
    Defect("sum", "kCounterReadPlainly", "race .* atomic operation .* of another block", "atomicAdd(counter, 1)"),
    Defect("sum", "kNextBlockAwaited", "deadlock: threads spin", "atomicAdd(counter, 0)"),
    Defect("sum", "kReadOnlyLoad", "read-only load of memory that the launch writes", "__ldg(partial"),
    Defect("histogram", "kSharedCounterNotAtomic", r"race \(read after write\)", "++of_block[x[i]]"),
    Defect("attention", "kMissingWait", "copy in flight", "ldmatrix(query"),
    Defect("attention", "kWaitsForTooFew", "copy in flight", "ldmatrix(query"),
    Defect("attention", "kMissingLastWait", "exits with .* in flight", "copy_tile(queries"),
    Defect(
        "attention",
        "kMissingBarrierAfterWait",
        r"race \(read after write\)|copy in flight",
        "ldmatrix(query",
        "uninitialised memory",
    ),
    Defect("attention", "kMissingBarrierBeforeRefill", r"race \(write after read\)", "copy_tile(keys + next"),
    Defect(
        "attention",
        "kBarrierInTwoWarps",
        r"race \(read after write\)|copy in flight",
        "ldmatrix(query",
        "uninitialised memory",
    ),
    Defect("attention", "kRefillsBufferInUse", "copy in flight", "copy_tile(keys + next"),
    Defect("attention", "kReadsOtherBuffer", "uninitialised memory", "ldmatrix(key", "copy in flight"),
    Defect("attention", "kCopiesPastTile", "out of bounds: .* shared memory", "copy_tile(keys"),
    Defect("attention", "kTailRowsRead", "out of bounds: .* global memory", "copy_tile(queries"),
    Defect(
        "attention",
        "kTailRowsWritten",
        r"race \(write after write\): .* another block",
        "pack(pair[0] * inverse",
        "out of bounds: 4-byte write of global memory",
    ),
    Defect("attention", "kFourLanesWriteLse", r"race \(write after write\)", "problem.lse[head + row] ="),
    Defect("attention", "kDivergentLdmatrix", "deadlock: .* not reached by all lanes", "ldmatrix(key"),
    Defect("attention", "kDivergentMma", "deadlock: .* not reached by all lanes", "mma(score[n]"),
)

# those that leave nothing for the checker to stop at: the numbers are wrong
WRONG_NUMBERS = (
    "kUnswizzledRead",
    "kSwizzleOfNextRow",
    "kFragmentHalvesSwapped",
    "kValuesNotTransposed",
    "kMaximumOverWrongLanes",
    "kSumOverTooFewLanes",
    "kSumNotRescaled",
    "kOutputNotRescaled",
    "kNaturalExponent",
    "kBinaryLogarithm",
    "kEmptyRowsSubtractInfinities",
    "kMaskBeforeChunkEdge",
    "kMaskAfterChunkEdge",
    "kMaskSeesNextKey",
    "kLoopStartsLate",
    "kLoopEndsEarly",
)


@pytest.fixture(scope="module")
def translated() -> None:
    """All kernels' translations, compiled side by side rather than when each first runs."""
    build.runtime()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda item: build.kernel(ptx(item[1][0]), item[0]), KERNELS.items()))


def named_lines(message: str, file: str) -> list[str]:
    """The lines of a source file that an error names."""
    lines = source(file).split("\n")
    return [lines[int(number) - 1] for number in re.findall(rf"{re.escape(file)}:(\d+)", message)]


@pytest.mark.usefixtures("translated")
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_without_defects_pass_in_every_order(kernel: str) -> None:
    first = run(kernel, seed=SEED)
    assert not first.wrong
    for order in ("forward", "reverse", 1, 2, 3):
        for check in (True, False):
            assert first.same_bits(run(kernel, seed=SEED, order=order, check=check)), (order, check)


@pytest.mark.usefixtures("translated")
@pytest.mark.parametrize("defect", STOPPED, ids=str)
def test_a_defect_is_stopped_at_and_named(defect: Defect) -> None:
    with pytest.raises(EmulationError, match=defect.message) as stopped:
        run(defect.kernel, defect.name, seed=SEED)
    message = str(stopped.value)
    assert message.startswith(f"{defect.kernel}: block (")
    file, _ = KERNELS[defect.kernel]
    assert any(defect.line in line for line in named_lines(message, file)), message
    # the first block reads rightly where it runs last
    for order in ("reverse", 1, 2) if defect.name != "kFirstBlockReads" else ():
        with pytest.raises(EmulationError, match="|".join(filter(None, (defect.message, defect.elsewhere)))):
            run(defect.kernel, defect.name, seed=SEED, order=order)


@pytest.mark.usefixtures("translated")
@pytest.mark.parametrize(
    ("kernel", "defect", "message"),
    [
        ("reverse_block", "kExitBeforeBarrier", "deadlock"),
        ("sum_warps", "kDivergentShuffle", "deadlock"),
        ("normalize_rows", "kTailRowsRead", "out of bounds"),
        ("normalize_rows", "kTailRowsWritten", "out of bounds"),
        ("normalize_rows", "kMisalignedVector", "misaligned"),
        ("normalize_rows", "kAddressInInt32", "out of bounds"),
        ("attention", "kCopiesPastTile", "out of bounds"),
        ("attention", "kMissingLastWait", "in flight"),
    ],
)
def test_guard_pages_and_waits_need_no_checker(kernel: str, defect: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        run(kernel, defect, seed=SEED, check=False)


@pytest.mark.usefixtures("translated")
@pytest.mark.parametrize("defect", ["kMissingWait", "kWaitsForTooFew", "kMissingBarrierAfterWait", "kReadsOtherBuffer"])
def test_memory_without_its_data_is_not_a_number(defect: str) -> None:
    assert run("attention", defect, seed=SEED, check=False).outputs["out"].isnan().any()


@pytest.mark.usefixtures("translated")
@pytest.mark.parametrize("defect", WRONG_NUMBERS)
def test_wrong_numbers_exceed_the_budget(defect: str) -> None:
    assert run("attention", defect, seed=SEED).wrong


def test_every_defect_is_planted() -> None:
    files = {kernel: file for kernel, (file, _) in KERNELS.items()}
    planted = {(files[defect.kernel], defect.name) for defect in STOPPED}
    planted |= {("attention.cu", defect) for defect in WRONG_NUMBERS}
    assert planted == {(file, name) for file in files.values() for name in defects(file) if name != "kNone"}


@pytest.mark.usefixtures("translated")
def test_a_kernel_that_could_have_defects_runs_as_one_that_cannot() -> None:
    able, plain = run("attention", seed=SEED), run("attention_plain", seed=SEED)
    for opcode in ("mma.sync", "ldmatrix.sync", "cp.async", "bar.sync", "shfl.sync", "ex2.approx"):
        assert plain.counts.instructions[opcode] == able.counts.instructions[opcode] > 0, opcode


@pytest.mark.usefixtures("translated")
def test_too_little_shared_memory_is_out_of_bounds() -> None:
    with pytest.raises(EmulationError, match=r"out of bounds: .* shared memory"):
        run("attention", seed=SEED, shared_bytes=ATTENTION_SHARED_BYTES - 16)


def replaced(pattern: str, replacement: str) -> Callable[[str], str]:
    def edit(ptx: str) -> str:
        changed, count = re.subn(pattern, replacement, ptx)
        assert count, f"{pattern} is not in the PTX"
        return changed

    return edit


def test_an_edit_of_the_ptx_is_stopped_at() -> None:
    with pytest.raises(EmulationError, match="copy in flight"):
        run("attention_plain", seed=SEED, edit=replaced(r"cp\.async\.wait_group\s+1;", ""))


@dataclass(frozen=True)
class Product:
    """A matrix product as Triton compiles it: its tiles, and how the operands lie."""

    dtype: torch.dtype
    tile: tuple[int, int, int]
    num_warps: int
    precision: str = "tf32"
    transposed: str = ""
    size: tuple[int, int, int] = (70, 50, 90)

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]}-{self.precision}-{self.transposed}-{self.num_warps}-{self.tile}"


PRODUCTS = (
    # rows of 16 bytes and more are copied asynchronously
    Product(torch.bfloat16, (64, 32, 32), 4, size=(80, 64, 96)),
    Product(torch.bfloat16, (64, 64, 64), 8, transposed="b"),
    Product(torch.float16, (32, 64, 32), 2, transposed="ab"),
    Product(torch.float16, (16, 16, 64), 1, transposed="a"),
    Product(torch.float32, (64, 32, 32), 4, transposed="b"),
    Product(torch.float32, (16, 32, 16), 1, transposed="a"),
    Product(torch.float32, (32, 32, 32), 4, precision="tf32x3"),
    Product(torch.float32, (32, 32, 16), 4, precision="ieee"),
)


def emulate_triton(launch: Launch) -> Counts:
    # threads that hold the same value all store it: Triton's compiler does so on purpose
    return emulate(**vars(launch), allow_equal_writes=True)


def integers(*size: int, dtype: torch.dtype) -> Tensor:
    """Integers so small that no sum of their products rounds, in any dtype and order."""
    return torch.randint(-8, 9, size).to(dtype)


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_by_emulation_and_by_interpretation(case: Product) -> None:
    rows, columns, depth = case.size
    a, b = integers(rows, depth, dtype=case.dtype), integers(depth, columns, dtype=case.dtype)
    a = a.T.contiguous().T if "a" in case.transposed else a
    b = b.T.contiguous().T if "b" in case.transposed else b
    tile = dict(zip(("ROWS", "COLUMNS", "DEPTH"), case.tile, strict=True))
    options: dict[str, Any] = {**tile, "PRECISION": case.precision, "num_warps": case.num_warps}
    grid = (triton.cdiv(rows, case.tile[0]), triton.cdiv(columns, case.tile[1]))
    truth = a.float() @ b.float()

    def args(out: Tensor) -> list[Tensor | int]:
        return [a, b, out, rows, columns, depth, *a.stride(), *b.stride()]

    with Memory() as memory:
        out = memory.empty((rows, columns), torch.float32)
        counts = emulate_triton(triton_launch(product, *args(out), grid=grid, **options))
        assert torch.equal(out, truth)
    assert ("mma.sync" in counts.instructions) == (case.precision != "ieee")
    interpreted = torch.full((rows, columns), math.nan)
    interpret(product, *args(interpreted), grid=grid, **options)
    assert torch.equal(interpreted, truth)


# the registers that another layout of the fragments would exchange
EXCHANGED = {
    "rows of the left operand": r"(mma\.sync[^{]*\{[^}]*\}, \{)\s*(%r\d+), (%r\d+)",
    "rows and columns of the left operand": r"(mma\.sync[^{]*\{[^}]*\}, \{ %r\d+,)\s*(%r\d+), (%r\d+)",
    "rows of the right operand": r"(mma\.sync[^{]*\{[^}]*\}, \{[^}]*\}, \{)\s*(%r\d+), (%r\d+)",
    "rows and columns of the result": r"(mma\.sync[^{]*\{\s*%r\d+,)\s*(%r\d+), (%r\d+)",
    "matrices loaded": r"(ldmatrix[^{]*\{)\s*(%r\d+), (%r\d+)",
}


@pytest.mark.parametrize("exchanged", EXCHANGED)
def test_another_layout_of_the_fragments_would_be_noticed(exchanged: str) -> None:
    a, b, c = (integers(16, 16, dtype=torch.bfloat16) for _ in range(3))
    truth = (a.float() @ b.float() + 1).bfloat16().float() @ c.float()
    with Memory() as memory:
        out = memory.empty((16, 16), torch.float32)
        launch = triton_launch(double_product, a, b, c, out, grid=(1,), ROWS=16, INNER=16, num_warps=1)
        emulate_triton(launch)
        assert torch.equal(out, truth)
        out.fill_(math.nan)
        emulate_triton(dataclasses.replace(launch, ptx=replaced(EXCHANGED[exchanged], r"\1 \3, \2")(launch.ptx)))
        assert not torch.equal(out, truth)


@pytest.mark.parametrize("route", ["emulated", "interpreted"])
def test_arguments_of_every_kind(route: str) -> None:
    rows, columns = 5, 50
    wide, narrow = (integers(rows, 64, dtype=dtype)[:, :columns] for dtype in (torch.float32, torch.bfloat16))
    row = integers(columns + 1, dtype=torch.float32)[1:]
    for parts, weights, bias, scale in (((wide, None, narrow), (3, 16, 1), row, 0.5), ((narrow,), (1,), None, 2.0)):
        weighted = [w * part.float() for w, part in zip(weights, parts, strict=True) if part is not None]
        truth = torch.stack(weighted).sum(0) * scale + (0.0 if bias is None else bias)
        out, largest = torch.full((rows, columns), math.nan), torch.full((rows,), math.nan)
        args = (parts, weights, bias, out, largest, rows, columns, 64, scale)
        if route == "emulated":
            emulate_triton(triton_launch(weighted_rows, *args, grid=(rows,), COLUMNS=64))
        else:
            interpret(weighted_rows, *args, grid=lambda meta: (meta["rows"],), COLUMNS=64)
        assert torch.equal(out, truth)
        assert torch.equal(largest, truth.amax(1))


def test_triton_specializes_as_for_a_launch() -> None:
    matrix = torch.zeros(4, 64)
    row = torch.zeros(65)[1:]
    driver = triton.runtime.driver._active

    def compiled(rows: int, row_stride: int) -> CompiledKernel:
        args = ((matrix, None), (1, 2), row, matrix, row, rows, 50, row_stride, 0.5)
        return triton_compile(weighted_rows, *args, grid=(rows,), COLUMNS=64)

    kernel = compiled(4, 64)
    assert kernel.src.signature["parts"] == ("*fp32", "constexpr")
    assert kernel.src.signature["weights"] == ("constexpr", "i32")
    assert compiled(1, 64).src.signature["rows"] == "constexpr"
    divisible = {path for path, attributes in kernel.src.attrs.items() if ["tt.divisibility", 16] in attributes}
    # parts[0], out and row_stride; neither the row, which begins 4 bytes into its memory, nor 4 and 50
    assert divisible == {(0, 0), (3,), (7,)}
    assert triton.runtime.driver._active is driver
    with pytest.raises(TypeError, match=r"expected a triton\.JITFunction"):
        triton_compile(weighted_rows.fn, grid=(1,))


def test_nvcc_compiles_again_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "CACHE", tmp_path / "cache")
    header, file = tmp_path / "a header.cuh", tmp_path / "kernel.cu"
    header.write_text("constexpr float kValue = 1.0f;\n")
    file.write_text('#include "a header.cuh"\nextern "C" __global__ void set(float* x) { *x = kValue; }\n')
    runs = []
    compiler = compile._compile_ptx

    def counted(command: Sequence[object]) -> dict[str, Any]:
        runs.append(command)
        return compiler(command)

    monkeypatch.setattr(compile, "_compile_ptx", counted)
    first = nvcc_ptx(file)
    assert nvcc_ptx(file) == first and len(runs) == 1
    header.write_text("constexpr float kValue = 2.0f;\n")
    assert nvcc_ptx(file) != first and len(runs) == 2
    assert ".target sm_90" in nvcc_ptx(file, arch="sm_90") and len(runs) == 3
    file.write_text("int x = y;\n")
    with pytest.raises(RuntimeError, match='identifier "y" is undefined'):
        nvcc_ptx(file)


def test_what_cannot_be_interpreted_is_refused() -> None:
    x = torch.zeros(16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="bfloat16 arithmetic cannot be interpreted"):
        interpret(doubled, x, grid=(1,), SIZE=16)
