"""What the emulator promises: state spaces and barriers, errors, orders of threads, arguments, and caching."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.conftest import SEED
from tests.gpu_emulation import EmulationError, Memory, build, emulate
from tests.gpu_emulation.emulate import Order
from tests.gpu_emulation.instruction_cases import signed
from tests.gpu_emulation.warp_cases import HEADER


def _kernel(name: str) -> str:
    return (Path(__file__).parent / "gpu_emulation" / "kernels" / f"{name}.ptx").read_text()


def _memory_expected(thread: int, data: list[int], added: int) -> list[int]:
    """The words that a thread of the kernel `memory` writes."""
    raw = b"".join(word.to_bytes(4, "little") for word in data)
    byte, half = raw[3], int.from_bytes(raw[6:8], "little")
    other = thread ^ 1
    pair = thread & ~1
    words = [
        signed(byte, 8),
        byte,
        signed(half, 16),
        half,
        data[4] + other,
        *data[5:8],
        data[5],
        3,
        pair | (pair + 1) << 16,
        0,
    ]
    words += [thread, (3, 5, 7, -9)[thread % 4], -5, struct.unpack("<i", struct.pack("<f", 0.25))[0]]
    words += [11, 22, 33, struct.unpack("<i", struct.pack("<f", 2.5))[0], min(thread, 40), 100 * (1 + thread % 3), 5, 1]
    words += [added, 0, data[0], 0, data[2], data[3], 0, thread]
    return [word & 0xFFFFFFFF for word in words]


def test_memory() -> None:
    """State spaces, generic addresses, widths, calls, structs, barriers and asynchronous copies, in any order."""
    data = [random.Random(SEED).getrandbits(32) for _ in range(8)]
    words = torch.tensor([signed(word, 32) for word in data], dtype=torch.int32)
    sums = []
    for order, check in [(order, check) for order in ("forward", "reverse", 7) for check in (True, False)]:
        with Memory() as memory:
            pointed, out = memory.copy(torch.tensor([33], dtype=torch.int32)), memory.empty((64, 32), torch.int32)
            record = struct.pack("<Qiid", pointed.data_ptr(), 11, 22, 2.5)
            arguments = [words, out, record, -5, 0.25]
            counts = emulate(
                _kernel("memory"), "memory", (1, 1, 1), (64, 1, 1), 4096, arguments, order=order, check=check
            )
            # the module's variable lives on from launch to launch
            sums.append(int(out[0, 24]))
            for thread, row in enumerate(out.tolist()):
                assert [word & 0xFFFFFFFF for word in row] == _memory_expected(thread, data, sums[-1])
        assert counts.blocks == 1 and counts.instructions["cp.async"] == 64 * 7
        assert bool(counts.traffic) == check
    assert sums[0] % 128 == 1 and sums == list(range(sums[0], sums[0] + 128 * len(sums), 128))


def test_atomics() -> None:
    """Every atomic operation, by all threads of a block; their sums of floats are exact, so any order does."""
    cells = torch.zeros(16, dtype=torch.int64)
    cells[5], cells[14] = 0xFF, 5
    cells[4], cells[9] = 100, 3
    tickets = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(EmulationError, match="unordered float reduction: 4-byte atomic operation"):
        emulate(_kernel("atomics"), "atomics", (1, 1, 1), (64, 1, 1), args=[cells.clone(), tickets])
    emulate(_kernel("atomics"), "atomics", (1, 1, 1), (64, 1, 1), args=[cells, tickets], order=3, allow_unordered=True)
    total = 63 * 32
    float_total = struct.unpack("<I", struct.pack("<f", total))[0]
    assert cells[:8].tolist() == [total, total, float_total, 63, 0, 0, 63, 0]
    # wraps to zero after 40, and from zero to 40
    assert cells[8:10].tolist() == [64 % 41, (3 - 64) % 41]
    assert cells[10:12].tolist() == [0x54005400, 0x42804280]
    assert cells[12:14].tolist() == [7, 9] and 0 <= cells[14] < 64 and cells[15] == 64
    assert sorted(tickets.tolist()) == list(range(64))


def _fault(number: int, order: Order = "forward", check: bool = True) -> torch.Tensor:
    with Memory() as memory:
        data, flag = memory.empty((128,), torch.int32), memory.copy(torch.zeros(1, dtype=torch.int32))
        emulate(_kernel("faults"), "faults", (2, 1, 1), (64, 1, 1), 16, [number, data, flag], order=order, check=check)
        return data.clone()


FAULTS = {
    1: "deadlock: threads spin on memory that none changes .*threads 0..63: spins at ld.volatile.global.u32",
    2: r"race \(read after write\): 4-byte read of global memory \(argument 1\) .* which thread \d+ of another block",
    4: r"unordered float reduction: .* \(argument 2\) at byte 0, which thread \d+ added to at red.global.add.f32",
    5: r"out of bounds: 4-byte write of global memory \(argument 1\) at byte 512 of 512",
    6: "out of bounds: 4-byte write of global memory that is not allocated, address 0x",
    7: "misaligned: address 0x.* of a 8-byte access",
    8: "lane 0 is not in its own mask fffffff0",
    9: "deadlock: a warp's collective .*threads 0..15: waits for lanes ffffffff .*threads 16..31: waits for lanes",
    11: "out of bounds: 4-byte read of global memory that is not allocated, address 0x8",
    12: r"out of bounds: 4-byte write of global memory \(argument 1\) at byte -4 of 512",
    13: "endless: executed 1000000000 times",
    14: "uninitialised memory: 8-byte read of local memory at byte 12",
    15: r"race \(read after write\): 4-byte read of global memory \(argument 1\) .* which thread \d+ of another block",
    16: r"race \(write after write\): 4-byte atomic operation of global memory \(argument 2\) at byte 0, which thread",
}


@pytest.mark.parametrize("number", FAULTS)
def test_faults(number: int) -> None:
    """Each error names the kernel, the block, and the thread, or all threads where they wait for each other."""
    with pytest.raises(EmulationError, match=FAULTS[number]) as caught:
        _fault(number)
    assert re.match(r"faults: block \(\d,0,0\)", str(caught.value)) and "PTX line" in str(caught.value)


@pytest.mark.parametrize("number", [0, 3, 10])
@pytest.mark.parametrize("order", ["forward", "reverse", 1, 2])
def test_faultless(number: int, order: Order) -> None:
    """Among them the last of two blocks reading what the other wrote, ordered by fences, or by the atomic operation."""
    data = _fault(number, order)
    assert (data % 1000 < 128).all() and (data >= 0).all()
    if number:
        # the last block's words are what the other wrote, and a thousand
        assert (data >= 1000).sum() == 64


@pytest.mark.parametrize("number", [6, 11])
def test_invalid_addresses_unchecked(number: int) -> None:
    """Without the checker, addresses that are not mapped still end in an error that names the instruction."""
    with pytest.raises(EmulationError, match=r"out of bounds: invalid address.*\[PTX line \d+: (ld|st).global"):
        _fault(number, check=False)


def _one(statement: str) -> str:
    return (
        f"{HEADER}.visible .entry one(.param .u64 p, .param .s32 n) {{\n.reg .b32 %a, %b; .reg .f32 %f, %g;"
        f".reg .b64 %w; .reg .pred %q;\n{statement}\nret; }}"
    )


def _write_after_volatile_reads(between: str, store: str = "st.global.u32") -> None:
    """Thread 64 of 96 writes what the others read."""
    statement = f"""mov.u32 %a, %tid.x; setp.eq.u32 %q, %a, 64; ld.param.u64 %w, [p];
        @!%q ld.volatile.global.u32 %b, [%w]; {between} @%q {store} [%w], %a;"""
    emulate(_one(statement), "one", (1, 1, 1), (96, 1, 1), args=[torch.zeros(1), 0])


def test_a_plain_write_after_volatile_reads() -> None:
    _write_after_volatile_reads("bar.sync 0;")
    _write_after_volatile_reads("", "st.volatile.global.u32")
    race = r"race \(write after read\): 4-byte write of .* which thread"
    with pytest.raises(EmulationError, match=f"{race} 0 read"):
        _write_after_volatile_reads("")
    with pytest.raises(EmulationError, match=f"{race} 0 read"):
        _write_after_volatile_reads("@%q st.volatile.global.u32 [%w], %a;")
    # the first warp, which read first, is waited for, but not the second
    with pytest.raises(EmulationError, match=f"{race} 32 read"):
        _write_after_volatile_reads(
            "div.u32 %b, %a, 32; setp.eq.u32 %q, %b, 1; @!%q bar.sync 1, 64; setp.eq.u32 %q, %a, 64;"
        )


# blocks 0 to 2 read the first word, and then release to block 3 by the second one
READ = "ld.global.u32 %b, [%w];"
RELEASE = "membar.gl; atom.global.add.u32 %b, [%w+4], 1;"


def _write_after_other_blocks(first: str, second: str, third: str, write: str = "st.global.u32 [%w], %a;") -> None:
    statement = f"""mov.u32 %a, %ctaid.x; ld.param.u64 %w, [p];
        setp.eq.u32 %q, %a, 0; @%q bra first; setp.eq.u32 %q, %a, 1; @%q bra second; setp.eq.u32 %q, %a, 2;
        @%q bra third; atom.global.add.u32 %b, [%w+4], 1; membar.gl; {write} ret;
        first: {first} ret; second: {second} ret; third: {third}"""
    emulate(_one(statement), "one", (4, 1, 1), (1, 1, 1), args=[torch.zeros(2), 0])


def test_a_write_after_reads_of_other_blocks() -> None:
    released = [READ + RELEASE] * 3
    _write_after_other_blocks(*released)
    race = r"race \(write after read\): 4-byte write of .* which thread 0 of another block read"
    for block in range(3):
        for unreleased in (READ, RELEASE + READ):
            with pytest.raises(EmulationError, match=race):
                _write_after_other_blocks(*released[:block], unreleased, *released[block + 1 :])


@pytest.mark.parametrize("block", range(3))
def test_strong_accesses_of_a_block_meet_no_other_block(block: int) -> None:
    def reads(scope: str) -> list[str]:
        return [f"ld.relaxed.{scope if i == block else 'gpu'}.global.u32 %b, [%w];" for i in range(3)]

    write = "st.relaxed.gpu.global.u32 [%w], %a;"
    _write_after_other_blocks(*reads("gpu"), write=write)
    for scope, store in (("cta", write), ("gpu", "st.relaxed.cta.global.u32 [%w], %a;")):
        with pytest.raises(EmulationError, match=r"race \(write after read\)"):
            _write_after_other_blocks(*reads(scope), write=store)


# adds to the first word, and counts by the second one
ADD, COUNT = "red.global.add.u32 [%w], 1;", "atom.global.add.u32 %b, [%w+4], 1;"


def test_a_write_after_atomic_operations_of_other_blocks() -> None:
    """Not only after the last of them."""
    _write_after_other_blocks(*[ADD + RELEASE] * 3)
    for block in range(3):
        operations = [ADD + (COUNT if i == block else RELEASE) for i in range(3)]
        with pytest.raises(EmulationError, match=r"race \(write after write\): .* thread 0 of another block wrote"):
            _write_after_other_blocks(*operations)


@pytest.mark.parametrize("order", ["forward", "reverse", 1])
def test_an_atomic_operation_hides_no_other(order: Order) -> None:
    def last_of_four(fence: str, last: str) -> None:
        """`last` is done by the block that counts last."""
        count = f"ld.param.u64 %w, [p]; {ADD} {fence} {COUNT} setp.ne.u32 %q, %b, 3; @%q ret; {fence} {last}"
        emulate(_one(count), "one", (4, 1, 1), (1, 1, 1), args=[torch.zeros(2, dtype=torch.int32), 0], order=order)

    last_of_four("membar.gl;", "ld.global.u32 %b, [%w];")
    # resets the counter for the next launch
    last_of_four("", "st.global.u32 [%w+4], 0;")
    with pytest.raises(EmulationError, match=r"race \(read after write\): .* which thread 0 of another block wrote"):
        last_of_four("", "ld.global.u32 %b, [%w];")


@pytest.mark.parametrize("order", ["forward", "reverse", 1, 2])
@pytest.mark.parametrize("written", [0, 4])
def test_a_wide_strong_store_keeps_the_readers_of_bytes(order: Order, written: int) -> None:
    # thread 40 reads byte 1 and thread 0 writes
    statement = f""".shared .align 16 .b8 words[16]; .reg .b32 %c;
        mov.u32 %a, %tid.x; mov.u32 %b, words; shl.b32 %a, %a, 2;
        add.u32 %b, %b, %a; setp.lt.u32 %q, %a, 16; @%q st.shared.u32 [%b], %a; bar.sync 0; mov.u32 %b, words;
        setp.eq.u32 %q, %a, 160; @%q ld.volatile.shared.u8 %c, [%b+1]; setp.ne.u32 %q, %a, 0; @%q ret;
        st.volatile.shared.v4.u32 [%b], {{%a, %a, %a, %a}}; st.shared.u32 [%b+{written}], %a;"""
    race = pytest.raises(EmulationError, match=r"race .*: [14]-byte (read|write) of shared memory")
    with race if written == 0 else nullcontext():
        emulate(_one(statement), "one", (1, 1, 1), (64, 1, 1), args=[torch.zeros(1), 0], order=order)


def test_a_write_after_a_read_only_load() -> None:
    message = r"write of memory that the launch has read by a read-only load: 4-byte write .* which thread 0 read"
    with pytest.raises(EmulationError, match=message):
        statement = "ld.param.u64 %w, [p]; ld.global.nc.u32 %b, [%w]; bar.sync 0; st.global.u32 [%w], %b;"
        emulate(_one(statement), "one", (1, 1, 1), (1, 1, 1), args=[torch.zeros(1), 0])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("order", ["forward", "reverse", 1])
def test_a_spin_over_two_addresses(order: Order, check: bool) -> None:
    def wait_for(sum_: int) -> None:
        """Thread 0 waits for what threads 32 and 64 write, each to a word of its own."""
        statement = f""".reg .b32 %c; mov.u32 %a, %tid.x; ld.param.u64 %w, [p]; mov.u32 %b, 1;
            setp.eq.u32 %q, %a, 32; @%q st.volatile.global.u32 [%w], %b; setp.eq.u32 %q, %a, 64;
            @%q st.volatile.global.u32 [%w+4], %b; setp.ne.u32 %q, %a, 0; @%q ret; again:
            ld.volatile.global.u32 %a, [%w]; ld.volatile.global.u32 %c, [%w+4]; add.u32 %a, %a, %c;
            setp.lt.u32 %q, %a, {sum_}; @%q bra again;"""
        arguments = [torch.zeros(2, dtype=torch.int32), 0]
        emulate(_one(statement), "one", (1, 1, 1), (96, 1, 1), args=arguments, order=order, check=check)

    wait_for(2)
    with pytest.raises(EmulationError, match=r"deadlock: threads spin on memory that none changes .* 0..0: spins"):
        wait_for(3)


@pytest.mark.parametrize("order", ["forward", "reverse", 1])
def test_requests_of_a_long_loop_stay_those_of_warps(order: Order) -> None:
    loop = """ld.param.u64 %w, [p]; ld.param.s32 %a, [n]; again: ld.global.u32 %b, [%w];
        sub.u32 %a, %a, 1; setp.ne.u32 %q, %a, 0; @%q bra again;"""
    counts = emulate(_one(loop), "one", (1, 1, 1), (64, 1, 1), args=[torch.zeros(1), 5000], order=order)
    assert [(entry.requests, entry.passes) for entry in counts.traffic] == [(10000, 10000)]


@pytest.mark.parametrize("threads", [40, 64])
@pytest.mark.parametrize("order", ["forward", "reverse", 1])
def test_barriers_count_warps(order: Order, threads: int) -> None:
    """The lanes that a block's last warp lacks have arrived with it."""
    statement = """.shared .align 4 .b8 word[4];
        mov.u32 %a, %tid.x; setp.eq.u32 %q, %a, 0; @%q st.shared.u32 [word], %a;
        bar.sync 1, 64; setp.lt.u32 %q, %a, 32; bar.red.popc.u32 %b, 2, 64, %q; bar.red.and.pred %q, 3, 64, %q;
        @%q mov.u32 %b, 0; setp.eq.u32 %q, %a, 32; @%q st.shared.u32 [word], %b; setp.ge.u32 %q, %a, 32; @%q bra second;
        bar.sync 4, 64; ld.shared.u32 %b, [word]; ld.param.u64 %w, [p]; setp.eq.u32 %q, %a, 0;
        @%q st.global.u32 [%w], %b; ret;
        second: bar.arrive 4, 64;"""
    out = torch.zeros(1, dtype=torch.int32)
    emulate(_one(statement), "one", (1, 1, 1), (threads, 1, 1), args=[out, 0], order=order)
    assert out.item() == 32


@pytest.mark.parametrize("order", ["forward", "reverse", 1])
def test_lanes_may_wait_apart_unless_aligned(order: Order) -> None:
    def halves(sync: str, arrive: str) -> None:
        """Odd and even lanes of the first warp wait at two instructions for the second warp, which arrives."""
        statement = f"""mov.u32 %a, %tid.x; setp.ge.u32 %q, %a, 32; @%q bra second; and.b32 %a, %a, 1;
            setp.eq.u32 %q, %a, 1; @%q bra odd; {sync} 1, 64; ret; odd: {sync} 1, 64; ret; second: {arrive} 1, 64;"""
        emulate(_one(statement), "one", (1, 1, 1), (64, 1, 1), args=[0, 0], order=order)

    for arrive in ("bar.arrive", "barrier.arrive"):
        halves("barrier.sync", arrive)
        with pytest.raises(EmulationError, match="divergent barrier: lanes of the warp wait at different instructions"):
            halves("bar.sync", arrive)


def test_time_grows_as_the_work_does() -> None:
    """Where every read of a loop is in an epoch of its own, and unordered with the other lanes'."""
    loop = """.shared .align 4 .b8 word[4]; ld.param.s32 %a, [n]; mov.u32 %b, %tid.x; setp.eq.u32 %q, %b, 0;
        @%q st.shared.u32 [word], %a; bar.warp.sync -1; again: ld.volatile.shared.u32 %b, [word]; membar.cta;
        shfl.sync.bfly.b32 %b, %b, 1, 31, -1; sub.u32 %a, %a, 1; setp.ne.u32 %q, %a, 0; @%q bra again;"""
    counts = [emulate(_one(loop), "one", (1, 1, 1), (32, 1, 1), args=[0, n]) for n in (500, 16000)]
    assert counts[1].seconds < 200 * counts[0].seconds


def _shared_arrays(offset: int) -> torch.Tensor:
    """Stores into the first of two arrays of 12 and 16 bytes and at an offset from it; returns where the second is."""
    statement = f""".shared .align 4 .b8 first[12]; .shared .align 16 .b8 second[16];
        mov.u32 %a, first; st.shared.u32 [%a+8], %b; st.shared.u32 [%a+{offset}], %b;
        mov.u32 %b, second; mov.u32 %a, %total_smem_size; ld.param.u64 %w, [p]; st.global.v2.u32 [%w], {{%a, %b}};"""
    with Memory() as memory:
        out = memory.empty((2,), torch.int32)
        emulate(_one(statement), "one", (1, 1, 1), (1, 1, 1), 64, args=[out, 0])
        return out.clone()


def test_shared_arrays_lie_apart() -> None:
    """But a kernel's bytes are those that hardware would give it."""
    total, second = _shared_arrays(0).tolist()
    assert total == 32 + 64 and second % 16 == 0
    for offset in (12, 16, 36, second - 4):
        with pytest.raises(EmulationError, match="out of bounds: between arrays: 4-byte write of shared memory"):
            _shared_arrays(offset)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("tcgen05.alloc.sync %a;", r"PTX line 6: tcgen05.alloc.sync %a: opcode tcgen05.alloc.sync is not supported"),
        ("add.oob.f32 %f, %f, %g;", r"PTX line 6: add.oob.f32 %f, %f, %g: add.oob.f32: modifier .oob is not supported"),
        ("ex2.f32 %f, %g;", "ex2.f32 has none of the modifiers supported here: approx"),
        ("ld.global.f32 %f, [%z];", r"address not understood: \[%z\]"),
        ("mov.b32 %a, nowhere;", "operand not understood: nowhere"),
        ("selp.b32 %a, %b, %b, %w;", "operand %w is of type .b64, not .pred"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%w}, {%w}, {%w}, {%w};", "shape m8n8k4 of .f64"),
        ("cp.async.cg.shared.global [%a], [%w], 8;", "of 8 bytes is not allowed"),
        ("call.uni far_away, (%a);", "function far_away is not defined in this module"),
        (".reg .b32 %c<", "PTX line 6"),
    ],
)
def test_untranslatable(statement: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        emulate(_one(statement), "one", (1, 1, 1), (32, 1, 1), args=[0, 0])


def test_arguments() -> None:
    ptx = _one("")
    with pytest.raises(EmulationError, match=r"^one: expected 2 arguments \(p, n\), got 1"):
        emulate(ptx, "one", (1, 1, 1), (32, 1, 1), args=[0])
    with pytest.raises(EmulationError, match=r"^one: parameter n \(.s32, 4 bytes\) cannot take int 4294967296"):
        emulate(ptx, "one", (1, 1, 1), (32, 1, 1), args=[0, 1 << 32])
    with pytest.raises(EmulationError, match="no kernel two; the module has one"):
        emulate(ptx, "two", (1, 1, 1), (32, 1, 1))
    with pytest.raises(EmulationError, match=r"^one: a block of 2048 threads; 1 to 1024 are possible"):
        emulate(ptx, "one", (1, 1, 1), (2048, 1, 1), args=[0, 0])


@pytest.mark.parametrize(
    ("target", "kib"),
    [("sm_80", 163), ("sm_86", 99), ("sm_90a", 227), ("sm_100a", 227), ("sm_120", 99), ("sm_52", 227)],
)
def test_shared_memory_that_a_block_may_have(target: str, kib: int) -> None:
    ptx = re.sub(r"\.target \w+", f".target {target}", _one(""))
    emulate(ptx, "one", (1, 1, 1), (32, 1, 1), kib << 10, args=[0, 0])
    needs = f"^one: the launch needs {(kib << 10) + 16} bytes of shared memory, more than the {kib << 10} of {target}$"
    with pytest.raises(EmulationError, match=needs):
        emulate(ptx, "one", (1, 1, 1), (32, 1, 1), (kib << 10) + 16, args=[0, 0])


def test_names_of_source_files_survive() -> None:
    """As those of nvcc's headers, which have what begins a comment elsewhere."""
    statement = ".loc 2 7 1, function_name $L__info, inlined_at 1 3 5\nst.global.u32 [%w], %a;"
    files = '\n.file 1 "/home/a/*b//kernel.cu" // */\n.file 2 "/usr/bin/..//include/header.hpp"\n'
    with pytest.raises(EmulationError, match=r"kernel\.cu:3 \(inlined header\.hpp:7\): st\.global"):
        emulate(_one(statement) + files, "one", (1, 1, 1), (1, 1, 1), args=[0, 0])


def test_tensors() -> None:
    """Copies keep sizes, strides and alignment; what lies between rows is not the tensor's."""
    base = torch.randn(10, 48)
    for tensor in (base[:, :40], base[1:, 3:].t(), base[:, :1].expand(10, 5), base[:0], torch.tensor(3.0)):
        with Memory() as memory:
            copy = memory.copy(tensor)
            assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
            assert copy.data_ptr() % 16 == tensor.data_ptr() % 16
            assert memory.written(copy).all() and not memory.written(memory.empty((3,))).any()
    # the host may use them longer
    assert torch.equal(copy, tensor)


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled once, by one of several processes that need it, and again when its PTX changes."""
    monkeypatch.setattr(build, "_CACHE", tmp_path)
    compiled: list[Path] = []
    compile_ = build._compile
    monkeypatch.setattr(
        build, "_compile", lambda arguments, output: (compiled.append(output), compile_(arguments, output))
    )
    library = build.runtime()
    monkeypatch.setattr(build, "runtime", lambda: library)
    with ThreadPoolExecutor(2) as pool:
        # past the cache in memory, as other processes are
        kernels = list(pool.map(lambda _: build.kernel.__wrapped__(_one(""), "one"), range(2)))
    assert kernels[0] == kernels[1] and 1 <= len(compiled) <= 2
    assert len(list(tmp_path.iterdir())) == 1
    before = len(compiled)
    build.kernel.__wrapped__(_one(""), "one")
    assert len(compiled) == before
    build.kernel.__wrapped__(_one("mov.b32 %a, %b;"), "one")
    assert len(compiled) == before + 1


def test_ucontext() -> None:
    """The portable switch of fibers runs what the hand-written one does."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_fault"]
    # compiled quickly, as it is for this test alone
    flags = "-DGPU_EMULATION_UCONTEXT -O0"
    environment = {**os.environ, "GPU_EMULATION_FLAGS": flags, "LCATTN_TEST_SEED": str(SEED)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
