"""What a cubin holds: its instructions, the pipe each is for, its loops, and the resources of a kernel."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.gpu_emulation.tools import find_tool

from .gpu_rates import RESERVED_SHARED

# every opcode by its first part; the rows are those of the throughput table in gpu_rates
CLASSES = {
    "fp32": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I",
    "packed fp32": "FFMA2 FMUL2 FADD2",
    "half": "HFMA2 HADD2 HMUL2",
    "integer mad": "IMAD IMUL IDP",
    "integer add": "IADD VIADD IADD32I",
    "three-way add": "IADD3",
    "logic": "LOP3 LOP LOP32I SHF SHL SHR",
    "select and permute": "SEL FSEL PRMT PLOP3 P2R R2P SGXT BMSK LEA HSET2",
    "float to halves": "F2FP",
    "compare": "ISETP IMNMX VIMNMX VIMNMX3 VIADDMNMX FSETP IABS HSETP2 HMNMX2 FSET FCHK",
    "float min max": "FMNMX FMNMX3",
    "special function": "MUFU",
    "float to integer": "F2I",
    "conversion": "F2F I2F FRND I2I",
    "bit count": "POPC FLO",
    "bit reverse": "BREV",
    "shuffle": "SHFL",
    "vote": "VOTE",
    "warp reduce": "REDUX MATCH CREDUX",
    "tensor": "HMMA HGMMA UTCHMMA",
    "shared": "LDS STS LDSM STSM LDGSTS ATOMS STAS",
    "tensor memory": "LDTM STTM UTCCP UTCSHIFT LDT STT",
    "global": "LDG STG LD ST ATOM ATOMG RED REDG LDGMC CCTL CCTLL",
    "bulk copy": "UTMALDG UTMASTG UTMAREDG UTMAPF UTMACMDFLUSH UTMACCTL UBLKCP UBLKPF UBLKRED",
    "constant": "LDC ULDC LDCU",
    "spill": "LDL STL",
    "move": "MOV MOVM MOV32I CS2R S2R S2UR R2UR I2FP CS2UR MOVSPRL GETLMEMBASE LEPC",
    "uniform": (
        "UMOV UIADD3 ULEA USHF USGXT USEL UIMAD ULOP3 UISETP UPLOP3 UFLO UPOPC UBREV UPRMT UBMSK VOTEU UP2UR UR2UP "
        "UF2FP UFSETP UFFMA UFADD UFMUL UFMNMX UFSEL UI2F UI2FP UVIRTCOUNT UCLEA UIABS UIMNMX USETMAXREG UMEMSETS "
        "UVIMNMX UF2F UF2I UVIADD UFRND UIADD UREDUX USETSHMSZ"
    ),
    "barrier": (
        "BAR LDGDEPBAR DEPBAR SYNCS ARRIVES WARPSYNC WARPGROUP MEMBAR FENCE ERRBAR UTCBAR UTCATOMSWS CGAERRBAR "
        "UCGABAR_ARV UCGABAR_WAIT ACQBULK ACQSHMINIT PREEXIT WARPGROUPSET B2R R2B"
    ),
    "control": (
        "BRA BRX BRXU JMP JMX EXIT BSSY BSYNC CALL RET NOP BREAK BMOV YIELD NANOSLEEP KILL ELECT BPT RPCMOV "
        "ENDCOLLECTIVE BRANCH RTT WARPSYNCALL"
    ),
}
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}


class SassError(RuntimeError):
    """Machine code that is not what the model knows how to read."""


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        name = self.opcode.split(".")[0]
        if name not in CLASS_OF:
            raise SassError(f"unknown SASS opcode {self.opcode!r} at 0x{self.address:x}: give it a class in CLASSES")
        return CLASS_OF[name]

    @property
    def target(self) -> int | None:
        found = re.search(r"\b0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def bytes_per_thread(self) -> int:
        """Of shared memory that one thread reads or writes."""
        parts = self.opcode.split(".")
        if parts[0] in ("LDSM", "STSM"):
            # 8x8 matrices of 16 bits
            return 4 * (int(parts[-1]) if parts[-1].isdigit() else 1)
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[part] for part in parts if part in widths), 4)

    def tensor_fma(self) -> int | None:
        """Multiply-adds of one warp's instruction; None where the shape is not part of the opcode (tcgen05)."""
        if found := re.match(r"HMMA\.(16816|1688|1684)\.", self.opcode):
            return {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}[found[1]]
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.opcode):
            # one instruction of four warps
            return int(found[1]) * int(found[2]) * int(found[3]) // 4
        if self.opcode.startswith("UTCHMMA"):
            return None
        raise SassError(f"tensor-core instruction of unknown shape: {self.opcode} at 0x{self.address:x}")


@dataclass(frozen=True)
class Loop:
    """A loop: the whole of it, and the shortest way around it that leaves out no tensor-core work."""

    whole: tuple[Instruction, ...]
    least: tuple[Instruction, ...]


@dataclass(frozen=True)
class Kernel:
    """The code of one kernel and what it takes of a multiprocessor."""

    name: str
    architecture: int
    instructions: tuple[Instruction, ...]
    registers: int
    stack: int
    static_shared: int

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(instruction.kind == "spill" for instruction in self.instructions)

    @cached_property
    def tensor_loops(self) -> tuple[Loop, ...]:
        """The innermost loops with tensor-core instructions, those with the fewest instructions first."""
        loops = [loop for loop in natural_loops(self.instructions) if any(i.kind == "tensor" for i in loop.whole)]
        addresses = [{i.address for i in loop.whole} for loop in loops]
        inner = [
            loop for loop, own in zip(loops, addresses, strict=True) if not any(other < own for other in addresses)
        ]
        return tuple(sorted(inner, key=lambda loop: (len(loop.least), loop.whole[0].address)))


_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")


def parse(text: str) -> dict[str, tuple[int, tuple[Instruction, ...]]]:
    """The architecture and instructions of each function in what `cuobjdump -sass` printed."""
    found: dict[str, tuple[int, list[Instruction]]] = {}
    architecture, current = 0, None
    for line in text.splitlines():
        if match := re.search(r"code for sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r"\s+Function : (\S+)", line):
            current = found.setdefault(match[1], (architecture, []))[1]
        # @!PT is never executed: ptxas patches such lines in
        elif current is not None and (match := _LINE.match(line)) and match[2] not in ("!PT", "!UPT"):
            current.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return {name: (arch, tuple(instructions)) for name, (arch, instructions) in found.items()}


def run(*command: str | Path) -> str:
    # cuobjdump calls the nvdisasm that it finds on the path
    path = f"{find_tool('nvdisasm').parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        raise SassError(f"{' '.join(map(str, command))} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def read(cubin: Path) -> dict[str, Kernel]:
    """The kernels of a cubin by name."""
    cuobjdump = find_tool("cuobjdump")
    usage = {
        match[1]: tuple(map(int, match.groups()[1:]))
        for match in re.finditer(
            r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", run(cuobjdump, "-res-usage", cubin)
        )
    }
    kernels = {}
    for name, (architecture, instructions) in parse(run(cuobjdump, "-sass", cubin)).items():
        if name not in usage:
            raise SassError(f"{cubin}: no resource usage of {name} in what {cuobjdump} printed")
        registers, stack, shared = usage[name]
        # from 9.0 on, what the system reserves is in the figure of a kernel that has any shared memory
        own = shared - RESERVED_SHARED if architecture >= 90 and shared else shared
        kernels[name] = Kernel(name, architecture, instructions, registers, stack, own)
    return kernels


@dataclass(frozen=True)
class _Block:
    """A basic block: instructions [first, last], and the blocks that may follow."""

    first: int
    last: int
    successors: tuple[int, ...]


def _leaves(instruction: Instruction) -> bool:
    """Whether nothing follows at the next address."""
    ends = ("EXIT", "RET", "BRA", "JMP")
    # BRA.U's predicate, and that of BRA.CONV, are among the operands
    conditional = instruction.predicate or re.match(r"!?U?P\d", instruction.operands)
    return instruction.opcode.split(".")[0] in ends and not conditional and not _diverges(instruction)


def _diverges(instruction: Instruction) -> bool:
    """Leaves for the copy of a warp-wide instruction that runs only where the warp's threads are apart."""
    return instruction.opcode.startswith(("BRA.DIV", "BRA.CONV"))


def _blocks(instructions: tuple[Instruction, ...]) -> list[_Block]:
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    for instruction in instructions:
        if instruction.opcode.split(".")[0] in ("BRX", "BRXU", "JMX"):
            raise SassError(f"{instruction.opcode} at 0x{instruction.address:x}: where a computed jump goes is unknown")
    # a CALL that never returns is how ptxas writes some jumps
    jumps = {
        i: index[instruction.target]
        for i, instruction in enumerate(instructions)
        if instruction.opcode.split(".")[0] in ("BRA", "CALL", "JMP")
        and not _diverges(instruction)
        and instruction.target in index
    }
    ends = set(jumps) | {i for i, instruction in enumerate(instructions) if _leaves(instruction)}
    starts = sorted({0, *jumps.values(), *(i + 1 for i in ends if i + 1 < len(instructions))})
    number = {start: block for block, start in enumerate(starts)}
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(instructions)], strict=True):
        last = stop - 1
        following = [number[jumps[last]]] if last in jumps else []
        if stop in number and not _leaves(instructions[last]):
            following.append(number[stop])
        blocks.append(_Block(start, last, tuple(following)))
    return blocks


def _dominators(blocks: list[_Block]) -> dict[int, set[int]]:
    """For each block that can be reached, the blocks on every way to it."""
    before: dict[int, set[int]] = {}
    pending, reached = [0], {0}
    while pending:
        block = pending.pop()
        for following in blocks[block].successors:
            before.setdefault(following, set()).add(block)
            if following not in reached:
                reached.add(following)
                pending.append(following)
    found = {block: set(reached) for block in reached}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            now = {block} | set.intersection(*(found[p] for p in before[block]))
            if now != found[block]:
                found[block], changed = now, True
    return found


def natural_loops(instructions: tuple[Instruction, ...]) -> Iterator[Loop]:
    """The loops of a function: each head with all from which it is reached again."""
    blocks = _blocks(instructions)
    dominators = _dominators(blocks)
    before: dict[int, list[int]] = {}
    tails: dict[int, list[int]] = {}
    for number in dominators:
        for following in blocks[number].successors:
            before.setdefault(following, []).append(number)
            if following in dominators[number]:
                tails.setdefault(following, []).append(number)
    code = [instructions[block.first : block.last + 1] for block in blocks]
    for head, ends in tails.items():
        members, pending = {head}, list(ends)
        while pending:
            block = pending.pop()
            if block not in members:
                members.add(block)
                pending += before[block]
        way = _least_way(head, set(ends), members, blocks, dominators, code)
        yield Loop(
            tuple(instruction for block in sorted(members) for instruction in code[block]),
            tuple(instruction for block in way for instruction in code[block]),
        )


def _least_way(
    head: int,
    ends: set[int],
    members: set[int],
    blocks: list[_Block],
    dominators: dict[int, set[int]],
    code: list[tuple[Instruction, ...]],
) -> tuple[int, ...]:
    """Of the ways once around a loop that have most tensor-core instructions, the one with the fewest instructions."""
    best: dict[int, tuple[tuple[int, int], tuple[int, ...]]] = {}

    def cost(block: int) -> tuple[int, int]:
        return -sum(i.kind == "tensor" for i in code[block]), len(code[block])

    best[head] = (cost(head), (head,))
    pending = [head]
    while pending:
        block = pending.pop(0)
        for following in blocks[block].successors:
            # once around, and once through each loop inside
            if following not in members or following in dominators[block] or following in best[block][1]:
                continue
            added = cost(following)
            total = (best[block][0][0] + added[0], best[block][0][1] + added[1])
            if following not in best or total < best[following][0]:
                best[following] = (total, (*best[block][1], following))
                pending.append(following)
    return min(best[end] for end in ends if end in best)[1]


def by_class(instructions: Iterable[Instruction]) -> Counter[str]:
    return Counter(instruction.kind for instruction in instructions)
