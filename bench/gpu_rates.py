"""What a multiprocessor can do in a clock, and how many blocks fit on it, by architecture.

Sources, named in the tables below:

GUIDE     CUDA C++ Programming Guide 12.6, table "Throughput of Native Arithmetic Instructions": results per clock cycle
          per multiprocessor. From CUDA 13 on it is in the CUDA C++ Best Practices Guide.
BEST13    CUDA C++ Best Practices Guide 13.4, section 12.1.1, the same table with a column for 12.0.
LIMITS    CUDA C++ Programming Guide, appendix "Compute Capabilities", table of technical specifications; the guides of
          12.9 and 13.4 disagree on the blocks of 12.0 (32 and 24): the newer counts here.
BANKS     CUDA C++ Programming Guide, appendix "Compute Capabilities", "Shared Memory": 32 banks of 32 bits per clock.
NSIGHT    Nsight Compute Profiling Guide, "Pipelines": which instructions share the ALU, FMA and FMA-heavy pipes.
A100      NVIDIA A100 Tensor Core GPU Architecture whitepaper: 1024 dense FP16/BF16 FMA per clock and multiprocessor.
GA102     NVIDIA Ampere GA102 GPU Architecture whitepaper, RTX A6000: 154.8 dense TFLOPS with float32 sums = 84 multi-
          processors x 1.8 GHz x 1024. GeForce products of the same chip do half.
AD102     NVIDIA Ada GPU Architecture whitepapers, L40 and RTX 6000 Ada: 512 as GA102; GeForce products do half.
H100      NVIDIA H100 Tensor Core GPU Architecture whitepaper, H100 SXM: 989.4 dense TFLOPS = 132 multiprocessors x
          1.83 GHz x 4096.
CUDNN     NVIDIA/cudnn-frontend, benchmarks, _FLOPS_PER_CLOCK_PER_SM: dense BF16 4096 for 9.x, 8192 for 10.x, 1024 for
          12.x.
RTX120    NVIDIA RTX Blackwell GPU Architecture whitepaper, RTX 5090: 209.5 dense TFLOPS with float32 sums = 170
          multiprocessors x 2.407 GHz x 512.
HOPPER    Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv:2402.13499: mma.sync
          reaches 62.9% of Hopper's peak on average; only wgmma comes near it.

A class of instructions that is in no row has no rate here: it takes its issue slot and nothing else. NVIDIA's tables
were read as others quote them, and special functions, NSIGHT's pipes and the whitepapers are from memory: compare a row
before citing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WARP = 32
SCHEDULERS = 4
REGISTERS = 65536
# LIMITS: registers are given out to a warp in these steps, shared memory to a block
REGISTER_UNIT = 256
SHARED_UNIT = 128
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


# GUIDE: the same on 8.0 to 12.0
_COMMON: dict[str, dict[str, float]] = {
    # NSIGHT: the XU pipe has both
    "special function": {"special function": 16, "conversion": 16},
    "bit count": {"bit count": 16},
    "warp reduce": {"warp reduce": 16},
    "shuffle": {"shuffle": 32},
    "vote": {"vote": 64},
}
# GUIDE for the rates, NSIGHT for what shares the pipe
_ALU: dict[str, dict[str, float]] = {
    "alu": {"integer add": 64, "logic": 64, "compare": 64, "float min max": 64},
}
# GUIDE and NSIGHT: float32 uses FMA-heavy and FMA-lite, integers FMA-heavy only
_FMA128: dict[str, dict[str, float]] = {
    "fma": {"fp32": 128, "integer mad": 128},
    "fma heavy": {"integer mad": 64},
}

ARCHITECTURES = {
    80: Architecture(
        warps=64,
        blocks=32,
        shared_kib=164,
        pipes={**_COMMON, **_ALU, "fma": {"fp32": 64, "integer mad": 64}, "half": {"half": 128}},
        # A100
        tensor={"HMMA": 1024},
    ),
    86: Architecture(
        warps=48,
        blocks=16,
        shared_kib=100,
        pipes={**_COMMON, **_ALU, **_FMA128, "half": {"half": 64}},
        # GA102
        tensor={"HMMA": 512},
        remarks=("tensor cores at the rate of A40 and RTX A6000; GeForce does half of it (GA102)",),
    ),
    89: Architecture(
        warps=48,
        blocks=24,
        shared_kib=100,
        pipes={**_COMMON, **_ALU, **_FMA128, "half": {"half": 64}},
        # AD102
        tensor={"HMMA": 512},
        remarks=("tensor cores at the rate of L40 and RTX 6000 Ada; GeForce does half of it (AD102)",),
    ),
    90: Architecture(
        warps=64,
        blocks=32,
        shared_kib=228,
        pipes={**_COMMON, **_ALU, **_FMA128, "half": {"half": 128}},
        # H100, CUDNN
        tensor={"HGMMA": 2048, "HMMA": 2048},
        remarks=(
            "mma.sync (HMMA) is costed at wgmma's rate, of which it reaches 62.9% on average (arXiv:2402.13499)",
            "the shared memory that wgmma reads is not costed",
        ),
    ),
    100: Architecture(
        warps=64,
        blocks=32,
        shared_kib=228,
        # no table with 10.0 was at hand: nothing but what all architectures share
        pipes=_COMMON,
        # CUDNN, of tcgen05; none is published for mma.sync
        tensor={"UTCHMMA": 4096},
        remarks=("the shared and tensor memory that tcgen05 reads is not costed",),
    ),
    120: Architecture(
        warps=48,
        blocks=24,
        shared_kib=100,
        # BEST13
        pipes={
            **_COMMON,
            "vote": {"vote": 128},
            "alu": {"logic": 64, "float min max": 64},
            "integer": {"integer add": 128, "compare": 128},
            "fma": {"fp32": 128},
            "fma heavy": {"integer mad": 64},
            "half": {"half": 64},
        },
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
