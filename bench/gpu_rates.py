"""What a multiprocessor can do in a clock, and how many blocks fit on it, by architecture.

Sources, named in the tables below:

BEST13    CUDA C++ Best Practices Guide 13, section 12.1.1, "Throughput of Native Arithmetic Instructions": operations
          per clock cycle and multiprocessor, a pair of 16-bit ones counting once; columns for 8.0, 8.6 and 8.9, 9.0,
          10.0 and 12.0, note 11 on conversions. It replaces the table of the Programming Guide up to 12.9, whose
          entries for integers and conversions 13.0 corrected.
GUIDE126  CUDA C++ Programming Guide 12.6, table 4, for compare, minimum, maximum, which 13 no longer has.
LIMITS    CUDA Programming Guide 13.4, section 5.1.3, tables 30 to 32. The guide of 12.9 says 32 blocks for 12.0.
RESERVED  CUDA C++ Programming Guide 13.1, sections 20.7.3 to 20.10.3: 1 KB of shared memory a block is the system's.
BANKS     The same, sections 20.4.3, 20.6.4, 20.7.3, 20.10.3: 32 banks of 32 bits per clock.
OCCUPANCY cuda_occupancy.h of nvidia-cuda-runtime 13.5: units of registers and of shared memory, four partitions.
NSIGHT    Nsight Compute Profiling Guide 2026.1, section 2.3.6, "Pipelines": what shares the ALU, FMA and XU pipes; that
          pairs of halves have a pipe of their own on GA100 (8.0) alone and later take the FMA pipe.
A100      NVIDIA A100 and H100 whitepapers, as an NVIDIA moderator quotes them (developer forums, 244727): 1024 and 2048
          dense multiply-adds of float16 per clock and multiprocessor.
GA102     NVIDIA Ampere GA102 whitepaper 2, table 6: 512; A40 data sheet: 149.7 dense TFLOPS with float32 sums = 84
          multiprocessors x 1.74 GHz x 1024.
AD102     L40S data sheet: 362.05 dense TFLOPS = 142 multiprocessors x 2.49 GHz x 1024; L40, GeForce: half.
CUDNN     NVIDIA/cudnn-frontend, benchmark/attention_training/benchmark_single_sdpa.py, _FLOPS_PER_CLOCK_PER_SM: dense
          bfloat16 2048 for A100, 4096 for 9.x, 8192 for 10.x, 1024 for 12.x.
RTX120    NVIDIA RTX Blackwell whitepaper, table 3, RTX 5090: 209.5 dense TFLOPS with float32 sums = 170 multi-
          processors x 2.407 GHz x 512.
HOPPER    Luo et al., arXiv:2501.12084, section 6.2, table 7: mma.sync reaches 62.9% of Hopper's peak on average; only
          wgmma comes near it.

Bounds must stay bounds: a class of instructions without a source (votes below 12.0, compare on 10.0 and 12.0, PRMT and
other odd ones of the ALU, F2FP, warp reductions) has no rate and takes its issue slot alone, and one whose pipe nobody
names has a pipe of its own. BEST13, LIMITS, RESERVED, BANKS, OCCUPANCY, NSIGHT and CUDNN were read, BEST13 in a copy
without merged cells, which were told apart by those who quote them; the others were read as others quote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WARP = 32
# OCCUPANCY, and that registers are given out to a warp in these steps, shared memory to a block
SCHEDULERS = 4
REGISTER_UNIT = 256
SHARED_UNIT = 128
# LIMITS
REGISTERS = 65536
# RESERVED
RESERVED_SHARED = 1024

# BANKS, of every architecture here
SHARED_BYTES_PER_CLOCK = 128


@dataclass(frozen=True)
class Architecture:
    """One compute capability.

    Attributes:
        warps, blocks, shared_kib: most of each on a multiprocessor (LIMITS).
        pipes: for each pipe, the threads' results per clock of each class of instruction that goes through it; a class
            that takes two pipes at once is in both.
        tensor: dense multiply-adds per clock of each tensor-core instruction with 16-bit inputs and float32 sums.
        remarks: what the figures leave out.
    """

    warps: int
    blocks: int
    shared_kib: int
    pipes: Mapping[str, Mapping[str, float]]
    tensor: Mapping[str, float]
    remarks: tuple[str, ...] = field(default=())


# BEST13: the same on 8.0 to 12.0
_COMMON: dict[str, dict[str, float]] = {
    "special function": {"special function": 16},
    "bit count": {"bit count": 16},
    "bit reverse": {"bit reverse": 64},
    "integer add": {"integer add": 128},
    "shuffle": {"shuffle": 32},
}
# BEST13; conversions by its note 11, NSIGHT for the pipe
_UP_TO_100: dict[str, dict[str, float]] = {
    **_COMMON,
    "special function": {"special function": 16, "float to integer": 16},
}
# BEST13 for the rates, NSIGHT for what shares the pipe
_ALU: dict[str, float] = {"three-way add": 64, "logic": 64, "float min max": 64}
# GUIDE126
_COMPARE: dict[str, float] = {"compare": 64}
# BEST13 and NSIGHT: float32 and pairs of halves use FMA-heavy and FMA-lite, integers FMA-heavy only
_FMA: dict[str, dict[str, float]] = {
    "fma": {"fp32": 128, "integer mad": 128, "half": 64},
    "fma heavy": {"integer mad": 64},
}

ARCHITECTURES = {
    80: Architecture(
        warps=64,
        blocks=32,
        shared_kib=164,
        pipes={
            **_UP_TO_100,
            "alu": _ALU | _COMPARE,
            "fma": {"fp32": 64, "integer mad": 64},
            "half": {"half": 128},
        },
        # A100, CUDNN
        tensor={"HMMA": 1024},
    ),
    86: Architecture(
        warps=48,
        blocks=16,
        shared_kib=100,
        pipes={**_UP_TO_100, "alu": _ALU | _COMPARE, **_FMA},
        # GA102
        tensor={"HMMA": 512},
        remarks=("tensor cores at the rate of A40 (GA102)",),
    ),
    89: Architecture(
        warps=48,
        blocks=24,
        shared_kib=100,
        pipes={**_UP_TO_100, "alu": _ALU | _COMPARE, **_FMA},
        # AD102
        tensor={"HMMA": 512},
        remarks=("tensor cores at the rate of L40S; L40 and GeForce do half of it (AD102)",),
    ),
    90: Architecture(
        warps=64,
        blocks=32,
        shared_kib=228,
        pipes={**_UP_TO_100, "alu": _ALU | _COMPARE, **_FMA, "fma": {"fp32": 128, "integer mad": 128, "half": 128}},
        # A100, CUDNN
        tensor={"HGMMA": 2048, "HMMA": 2048},
        remarks=(
            "mma.sync (HMMA) is costed at wgmma's rate, of which it reaches 62.9% on average (arXiv:2501.12084)",
            "the shared memory that wgmma reads is not costed",
        ),
    ),
    100: Architecture(
        warps=64,
        blocks=32,
        shared_kib=228,
        pipes={**_UP_TO_100, "alu": _ALU | {"float min max": 128}, **_FMA},
        # CUDNN, of tcgen05; none is published for mma.sync
        tensor={"UTCHMMA": 4096},
        remarks=("the shared and tensor memory that tcgen05 reads is not costed",),
    ),
    120: Architecture(
        warps=48,
        blocks=24,
        shared_kib=100,
        pipes={**_COMMON, "float to integer": {"float to integer": 2}, "vote": {"vote": 128}, "alu": _ALU, **_FMA},
        # CUDNN
        tensor={"HMMA": 512},
        remarks=("tensor cores at the rate of RTX PRO; GeForce does half of it (RTX120)",),
    ),
}


def architecture(number: int) -> Architecture:
    if number not in ARCHITECTURES:
        raise ValueError(f"no rates for sm_{number}, only for {', '.join(f'sm_{known}' for known in ARCHITECTURES)}")
    return ARCHITECTURES[number]


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    warps: int
    limit: str


def occupancy(number: int, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Blocks that fit on a multiprocessor at once, by the rules of the CUDA occupancy calculator.

    Args:
        threads: of a block.
        registers: of a thread.
        shared_bytes: of a block, static and dynamic.
    """
    limits = architecture(number)
    warps = -(-threads // WARP)
    a_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    a_block = -(-(shared_bytes + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    fit = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        # each scheduler has a quarter of the registers
        "registers": REGISTERS // SCHEDULERS // a_warp * SCHEDULERS // warps if registers else limits.blocks,
        "shared memory": limits.shared_kib * 1024 // a_block,
    }
    limit = min(fit, key=lambda name: fit[name])
    return Occupancy(fit[limit], fit[limit] * warps, limit)
