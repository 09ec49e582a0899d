"""The model of the GPU kernels' cost: what it reads from machine code, and that no kernel got worse than recorded."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lcattn.bench import gpu_executed, gpu_model, gpu_rates, gpu_sass, gpu_table
from lcattn.bench.gpu_kernels import KERNELS
from lcattn.bench.gpu_model import Figures, LoopFigures, Result
from lcattn.bench.gpu_sass import Instruction, SassError
from lcattn.bench.gpu_table import Entry
from lcattn.bench.gpu_yardsticks import causal_attention
from typer.testing import CliRunner

from lcattn import tolerance
from tests.gpu_emulation import Counts, Memory, emulate
from tests.gpu_emulation.compile import triton_launch
from tests.gpu_emulation.tools import MissingTool, find_tool

# a loop over 0x10..0xb0: a branch around two instructions, one over three; a copy for a warp whose threads are apart,
# outside of the loop, that comes back to it; a jump written as a call
SASS = """
	code for sm_80
		Function : small
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                    /* 0x00000a0000017a02 */
                                                                             /* 0x000fe40000000f00 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;     /* 0x0000000c0804723c */
        /*0020*/               @P0 BRA 0x60 ;                                /* 0x0000000000000947 */
        /*0030*/                   FFMA R2, R2, R3, R4 ;                     /* 0x0 */
        /*0040*/                   MUFU.EX2 R2, R2 ;                         /* 0x0 */
        /*0050*/                   BRA 0x90 ;                                /* 0x0 */
        /*0060*/                   FADD R2, R2, R3 ;                         /* 0x0 */
        /*0070*/                   FMUL R2, R2, R3 ;                         /* 0x0 */
        /*0080*/              @!P1 IADD3 R2, R2, R3, RZ ;                    /* 0x0 */
        /*0090*/                   BRA.DIV ~URZ, 0xe0 ;                      /* 0x0 */
        /*00a0*/              @!PT LDS RZ, [RZ] ;                            /* 0x0 */
        /*00b0*/                   LDSM.16.M88.4 R8, [R20+0x400] ;           /* 0x0 */
        /*00c0*/               @P2 CALL.REL.NOINC 0x100 ;                    /* 0x0 */
        /*00d0*/                   BRA 0x10 ;                                /* 0x0 */
        /*00e0*/                   WARPSYNC.COLLECTIVE R4, 0xf0 ;            /* 0x0 */
        /*00f0*/                   BRA 0xa0 ;                                /* 0x0 */
        /*0100*/                   STL.64 [R1], R2 ;                         /* 0x0 */
        /*0110*/                   EXIT ;                                    /* 0x0 */
        /*0120*/                   BRA 0x120;                                /* 0x0 */
"""


def _small() -> gpu_sass.Kernel:
    number, instructions = gpu_sass.parse(SASS)["small"]
    return gpu_sass.Kernel("small", number, instructions, registers=24, stack=8, static_shared=0)


def test_sass_is_parsed() -> None:
    kernel = _small()
    assert kernel.architecture == 80
    # all but the line that is never executed
    assert len(kernel.instructions) == 18
    assert kernel.instructions[2] == Instruction(0x20, "P0", "BRA", "0x60")
    assert kernel.instructions[8] == Instruction(0x80, "!P1", "IADD3", "R2, R2, R3, RZ")
    assert kernel.instructions[-1].target == 0x120
    assert kernel.spills == 1


def test_a_loop_is_found_with_its_shortest_way_around() -> None:
    (loop,) = _small().tensor_loops
    addresses = [instruction.address for instruction in loop.whole]
    assert addresses == [*range(0x10, 0xA0, 0x10), 0xB0, 0xC0, 0xD0]
    # by 0x30 to 0x50 and by 0x60 to 0x80 are equally long: the jump at 0x50 counts
    assert len(loop.least) == 9
    assert {0x10, 0x20, 0x90, 0xB0, 0xC0, 0xD0} < {instruction.address for instruction in loop.least}
    assert gpu_sass.by_class(loop.least)["tensor"] == 1


def _line(address: int, opcode: str, operands: str = "", predicate: str = "") -> Instruction:
    return Instruction(address, predicate, opcode, operands)


def test_the_innermost_loops_count_and_tensor_work_is_not_skipped() -> None:
    code = (
        _line(0x00, "MOV"),
        # around the tensor-core instruction is shorter, and not wanted
        _line(0x10, "BRA", "0x40", "P0"),
        _line(0x20, "HMMA.16816.F32"),
        _line(0x30, "FADD"),
        _line(0x40, "BRA", "0x10", "P1"),
        _line(0x50, "FMUL"),
        _line(0x60, "BRA", "0x0", "P2"),
        _line(0x70, "EXIT"),
    )
    (loop,) = gpu_sass.Kernel("nested", 80, code, 32, 0, 0).tensor_loops
    assert [i.address for i in loop.whole] == [0x10, 0x20, 0x30, 0x40]
    assert loop.least == loop.whole
    assert sorted(len(found.whole) for found in gpu_sass.natural_loops(code)) == [4, 7]


def test_an_unknown_opcode_is_an_error_that_names_it() -> None:
    with pytest.raises(SassError, match=r"unknown SASS opcode 'FROB\.X2' at 0x40"):
        _ = _line(0x40, "FROB.X2").kind
    with pytest.raises(SassError, match=r"unknown shape: HMMA\.323\.F32"):
        _line(0x40, "HMMA.323.F32").tensor_fma()
    with pytest.raises(SassError, match=r"BRX at 0x10: where a computed jump goes"):
        list(gpu_sass.natural_loops((_line(0x00, "MOV"), _line(0x10, "BRX"))))


def test_no_opcode_has_two_classes() -> None:
    opcodes = [opcode for listed in gpu_sass.CLASSES.values() for opcode in listed.split()]
    assert len(opcodes) == len(set(opcodes))
    rated = {name for entry in gpu_rates.ARCHITECTURES.values() for rates in entry.pipes.values() for name in rates}
    assert rated <= set(gpu_sass.CLASSES)


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDS", 4),
        ("LDS.128", 16),
        ("LDS.U.64", 8),
        ("STS.U16", 2),
        ("LDSM.16.MT88.4", 16),
        ("LDSM.16.M88", 4),
        ("STSM.16.M88.2", 8),
        ("LDGSTS.E", 4),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
    ],
)
def test_bytes_of_shared_memory(opcode: str, size: int) -> None:
    assert _line(0, opcode).bytes_per_thread == size


def test_cycles_of_the_pipes() -> None:
    code = [_line(0, "MUFU.EX2")] * 4 + [_line(0, "FFMA")] * 8 + [_line(0, "LDSM.16.M88.4")] * 2 + [_line(0, "BRA")]
    # four warps, one on each scheduler: 32 lanes by 16, 64 and 128 results, 2 x 4 x 512 bytes by 128
    assert gpu_model.pipe_cycles(80, code, warps=4) == {
        "issue": 15,
        "special function": 4 * 4 * 32 / 16,
        "fma": 8 * 4 * 32 / 64,
        "shared memory": 32,
    }
    assert gpu_model.pipe_cycles(90, code, warps=4)["fma"] == 8 * 4 * 32 / 128
    kernel = KERNELS["plain d64 64x64"]
    # 16 x 8 x 16 a warp; 64 x 64 x 16 four warps; a tile takes (64 + 64) / 16 instructions of tcgen05
    for opcode, times in (("HMMA.16816.F32.BF16", 128), ("HGMMA.64x64x16.F32.BF16", 8), ("UTCHMMA", 8)):
        count = 64 if opcode.startswith("HMMA") else 8
        (work,) = gpu_model.multiply_adds(kernel, [_line(0, opcode)] * count, warps=4).values()
        assert work == kernel.multiply_adds == 2 * 64 * 64 * 64, (opcode, times)


# from the CUDA occupancy calculator's rules; blocks on a multiprocessor
@pytest.mark.parametrize(
    ("number", "threads", "registers", "shared", "blocks", "limit"),
    [
        (80, 256, 32, 0, 8, "warps"),
        (80, 32, 16, 0, 32, "blocks"),
        (80, 128, 128, 0, 4, "registers"),
        # 172 registers take 5632 of a warp: two warps on each scheduler's quarter, though eleven in all would fit
        (80, 128, 172, 0, 2, "registers"),
        (80, 96, 168, 0, 4, "registers"),
        (80, 1024, 64, 0, 1, "registers"),
        (80, 128, 32, 81 * 1024, 2, "shared memory"),
        (80, 128, 32, 81 * 1024 + 1, 1, "shared memory"),
        (80, 128, 32, 163 * 1024, 1, "shared memory"),
        (80, 128, 32, 164 * 1024, 0, "shared memory"),
        (86, 128, 40, 0, 12, "warps"),
        (86, 32, 32, 0, 16, "blocks"),
        (89, 32, 32, 0, 24, "blocks"),
        (90, 384, 168, 0, 1, "registers"),
        (90, 128, 32, 113 * 1024, 2, "shared memory"),
        (120, 128, 32, 49 * 1024, 2, "shared memory"),
        (120, 1024, 32, 0, 1, "warps"),
    ],
)
def test_occupancy(number: int, threads: int, registers: int, shared: int, blocks: int, limit: str) -> None:
    found = gpu_rates.occupancy(number, threads, registers, shared)
    assert (found.blocks, found.warps, found.limit) == (blocks, blocks * -(-threads // 32), limit)


BEFORE = Entry(
    "nvcc 13.0.88",
    "cuda bf16 d64",
    "sm_80",
    {"registers": 150, "spills": 0, "blocks per multiprocessor": 3, "loop 0 least": 400, "loop 0 bound": 130},
)
RECORDED = gpu_table.merged({}, [BEFORE], KERNELS)


def _with(entry: Entry, **changes: float) -> Entry:
    figures = {**entry.figures, **{name.replace("_", " "): value for name, value in changes.items()}}
    return dataclasses.replace(entry, figures=figures)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, None),
        ({"registers": 168, "loop_0_least": 404, "loop_0_bound": 132}, None),
        ({"loop_0_least": 300, "loop_0_bound": 100, "blocks_per_multiprocessor": 4}, None),
        ({"spills": 1}, "spills: 0 before, 1 now"),
        ({"loop_0_least": 412}, "loop 0 least: 400 before, 412 now"),
        ({"loop_0_bound": 133.9}, "loop 0 bound: 130 before, 133.9 now"),
        ({"blocks_per_multiprocessor": 2}, "blocks per multiprocessor: 3 before, 2 now"),
        ({"loop_1_least": 1}, "loop 1 least: not in the table; add it with --write"),
    ],
)
def test_what_is_worse_is_named(changes: dict[str, float], line: str | None) -> None:
    assert gpu_table.compare(_with(BEFORE, **changes), RECORDED) == ([f"cuda bf16 d64, sm_80: {line}"] if line else [])


def test_a_kernel_that_does_not_fit_is_worse_whatever_was_recorded() -> None:
    none = _with(BEFORE, blocks_per_multiprocessor=0)
    assert gpu_table.compare(none, gpu_table.merged({}, [none], KERNELS)) == [
        "cuda bf16 d64, sm_80: blocks per multiprocessor: 0 before, 0 now"
    ]


def test_a_figure_that_is_no_more_is_named() -> None:
    fewer = dataclasses.replace(BEFORE, figures={k: v for k, v in BEFORE.figures.items() if k != "loop 0 bound"})
    assert gpu_table.compare(fewer, RECORDED) == [
        "cuda bf16 d64, sm_80: loop 0 bound: in the table, not found now; --write"
    ]


def test_figures_are_of_one_compiler() -> None:
    other = dataclasses.replace(BEFORE, compiler="nvcc 13.1.80")
    (line,) = gpu_table.compare(other, RECORDED)
    assert "not comparable: compiled by nvcc 13.1.80, the table is of nvcc 13.0.88" in line
    assert "--write" in line
    both = gpu_table.merged(RECORDED, [_with(other, loop_0_least=300)], KERNELS)
    assert gpu_table.compare(BEFORE, both) == []
    assert gpu_table.compare(other, both) != []
    (line,) = gpu_table.compare(dataclasses.replace(BEFORE, place="sm_90"), both)
    assert line == "cuda bf16 d64, sm_90: absent from the table of nvcc 13.0.88; add it with --write"


def test_the_table_is_read_as_written_and_forgets_kernels_that_are_no_more(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert gpu_table.read(path) == {}
    more = [dataclasses.replace(BEFORE, kernel="no more"), dataclasses.replace(BEFORE, place="sm_100")]
    table = gpu_table.merged(RECORDED, more, [*KERNELS, "no more"])
    gpu_table.write(table, path)
    assert gpu_table.read(path) == table
    assert list(gpu_table.merged(table, [], KERNELS)["nvcc 13.0.88"]) == ["cuda bf16 d64"]


LOOP = LoopFigures(400, 420, 130, "tensor", {"tensor": 130}, {"fp32": 300, "tensor": 100})
RESULT = Result(
    "cuda bf16 d64",
    80,
    "nvcc 13.0.88",
    Figures(150, 0, 24, 32768, 3, 12, "registers", (LOOP,)),
    {},
)


def test_the_report_has_the_stack_and_the_instructions_of_each_class() -> None:
    header, _, row, _, title, classes, *_ = gpu_model.report([RESULT]).split("\n")
    cells = dict(zip(re.split(r"  +", header), re.split(r"  +", row), strict=False))
    assert (cells["spills"], cells["stack"], cells["bound"]) == ("0", "24", "130 (tensor)")
    assert "1,024 scores, by class" in title and classes == "cuda bf16 d64, sm_80: fp32 300, tensor 100"


def test_check_fails_and_write_mends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [RESULT]
    monkeypatch.setattr(gpu_model, "measure", lambda *_: iter(found))
    path = tmp_path / "table.json"

    def run(*options: str) -> Any:
        return CliRunner().invoke(gpu_model.app, ["--table", str(path), "--arch", "80", "--no-execute", *options])

    absent = run("--check")
    assert absent.exit_code == 1 and "the table is of nothing" in absent.output
    assert run("--write").exit_code == 0
    good = run("--check")
    assert good.exit_code == 0 and "nothing is worse" in good.output
    found[0] = dataclasses.replace(RESULT, figures=dataclasses.replace(RESULT.figures, spills=4))
    bad = run("--check")
    assert bad.exit_code == 1 and "WORSE: cuda bf16 d64, sm_80: spills: 0 before, 4 now" in bad.output
    assert run("--arch", "70").exit_code == 2
    assert run("--kernel", "nothing like it").exit_code == 2
    assert run("--check", "--write").exit_code == 2


@pytest.mark.parametrize("number", gpu_model.DEFAULT_ARCHITECTURES)
def test_no_kernel_is_worse_than_recorded(number: int) -> None:
    recorded = gpu_table.read()
    # the yardsticks take their time to compile: on one architecture only
    kernels = {name: kernel for name, kernel in KERNELS.items() if number == 80 or kernel.yardstick}
    results = gpu_model.measure(kernels, [number])
    lines = [line for result in results for line in gpu_table.compare(result.entry, recorded)]
    assert not lines, "\n".join(lines)


def test_no_launch_executes_more_than_recorded() -> None:
    recorded = gpu_table.read()
    kernels = {n: e for n, e in gpu_executed.EXECUTABLES.items() if n not in gpu_executed.YARDSTICKS}
    lines = [line for found in gpu_executed.execute(kernels) for line in gpu_table.compare(found.entry, recorded)]
    assert not lines, "\n".join(lines)


def test_executed_work_is_summed_by_class_for_each_visible_score() -> None:
    visible = gpu_executed.ROWS * (gpu_executed.ROWS + 1) // 2
    opcodes = {
        # 64 a thread
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 4 * visible,
        "ex2.approx.ftz.f32": visible,
        "add.f32": visible,
        "fma.rn.f32": 2 * visible,
    }
    counts = Counts({}, opcodes, total=8 * visible, seconds=1.0, blocks=1)
    found = gpu_executed.summed("cuda bf16 d64", "causal", "nvcc 13.0.88", counts)
    assert found.instructions == 8
    assert found.tensor == 4 * 64 / (2 * gpu_executed.HEAD_DIM)
    assert found.classes == {"matrix": 4, "special function": 1, "arithmetic": 3}
    assert found.entry.figures == {"executed instructions": 8, "executed tensor work": found.tensor}
    with pytest.raises(ValueError, match="unknown PTX opcode 'frob"):
        gpu_executed.class_of("frob.f32")
    with pytest.raises(ValueError, match=r"unknown shape: wgmma\.mma_async"):
        gpu_executed.multiply_adds("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16")


def check_causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Of [heads, rows, D], scores scaled by 1 / sqrt(D)."""
    scale, hidden = q.shape[2] ** -0.5, torch.ones(q.shape[1], k.shape[1]).triu(1).bool()
    scores = (q.double() @ k.double().mT * scale).masked_fill(hidden, -math.inf)
    eager = (q @ k.mT * scale).masked_fill(hidden, -math.inf).softmax(-1) @ v
    compared = tolerance.compare("out", out, scores.softmax(-1) @ v.double(), eager)
    assert compared.ok, str(compared)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_the_yardstick_is_attention_and_does_the_work_it_is_said_to(seed: int) -> None:
    heads, rows, head_dim, tile = 2, 130, 64, (64, 64)
    q, k, v = (torch.randn(heads, rows, head_dim, dtype=torch.bfloat16) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(heads, rows)
    strides = (rows * head_dim, head_dim)
    scale = head_dim**-0.5
    scalars = (*strides, *strides, *strides, rows, scale / math.log(2), *tile, head_dim)
    with Memory() as memory:
        given = [memory.copy(t) for t in (q, k, v)]
        made = [memory.empty(t.shape, t.dtype) for t in (out, lse)]
        launch = triton_launch(causal_attention, *given, *made, *scalars, grid=(3, heads), num_warps=4, num_stages=2)
        counts = emulate(**vars(launch), check=False)
        out, lse = (t.clone() for t in made)
    check_causal_attention(q, k, v, out, lse)
    work = sum(count * gpu_executed.multiply_adds(opcode) for opcode, count in counts.opcodes.items())
    # one, two and three tiles of keys
    assert work == heads * (1 + 2 + 3) * 2 * 64 * 64 * head_dim


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_yardstick_in_cuda_is_attention_too(head_dim: int, seed: int) -> None:
    heads, rows = 2, 192
    q, k, v = (torch.randn(heads, rows, head_dim, dtype=torch.bfloat16) for _ in range(3))
    with Memory() as memory:
        given = [memory.copy(t) for t in (q, k, v)]
        made = memory.empty(q.shape, q.dtype), memory.empty((heads, rows), torch.float32)
        counts = gpu_executed.plain_cuda(*given, *made)
        out, lse = (t.clone() for t in made)
    check_causal_attention(q, k, v, out, lse)
    work = sum(count * gpu_executed.multiply_adds(opcode) for opcode, count in counts.opcodes.items())
    assert work == heads * (1 + 2 + 3) * 2 * 64 * 64 * head_dim


def test_a_tool_is_found_by_its_variable_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "my-nvcc"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(own))
    assert find_tool("nvcc") == own
    monkeypatch.setenv("NVCC", str(tmp_path / "absent"))
    with pytest.raises(MissingTool, match=r"NVCC is .*absent', which is no executable; expected nvcc"):
        find_tool("nvcc")
    with pytest.raises(ValueError, match="unknown tool 'nvlink'"):
        find_tool("nvlink")


def test_a_missing_tool_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.gpu_emulation import tools

    for name in ("NVCC", "CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tools, "_candidates", lambda tool: iter([tmp_path / "nvcc"]))
    with pytest.raises(MissingTool, match=r"nvcc was not found: set NVCC or CUDACXX, or `pip install nvidia-cuda-nvcc"):
        find_tool("nvcc")
