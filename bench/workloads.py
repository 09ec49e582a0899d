"""What is timed: one table of workloads, and the inputs they are drawn with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

import lcattn
from lcattn.layout import Layout
from lcattn.plot import picture

# queries and keys of this standard deviation give content scores of its square
_QK_STD = 3**0.5

EXACT = ("lcattn", "sdpa-folded", "sdpa-folded-fixed", "sdpa-padded", "flex-bias")


@dataclass(frozen=True)
class Workload:
    """Causal attention over chunks and the chunks before them, with a learned bias by offset.

    Attributes:
        name, about: what it is called and what it is for.
        N: tokens; H: heads; D: head dim; chunk: chunk length, one back; dtype: of q, k, v; B is 1.
        providers: who is timed on it; passes: "forward", "forward+backward", or both.
    """

    name: str
    about: str
    N: int = 8192
    D: int = 64
    H: int = 8
    chunk: int = 512
    dtype: torch.dtype = torch.float32
    providers: tuple[str, ...] = EXACT
    passes: tuple[str, ...] = ("forward", "forward+backward")

    @property
    def layout(self) -> Layout:
        return lcattn.Chunked(self.chunk) & lcattn.Causal()

    @property
    def min_offset(self) -> int:
        return 1 - 2 * self.chunk

    def position(self, table: Tensor) -> lcattn.RelativeBias:
        return lcattn.RelativeBias(table, self.min_offset)

    def small(self) -> Workload:
        """The same question with fewer tokens and heads, for the dense float64 reference."""
        return dataclasses.replace(self, N=3 * self.chunk, H=2)

    def draw(self, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(shape, generator=generator) * std

        shape = (1, self.H, self.N, self.D)
        q, k = (normal(*shape, std=_QK_STD).to(self.dtype) for _ in range(2))
        v, dout = (normal(*shape, std=1).to(self.dtype) for _ in range(2))
        return Inputs(q, k, v, dout, normal(self.H, 2 * self.chunk, std=1))


@dataclass(frozen=True)
class Inputs:
    """q, k, v, dout [1, H, N, D] in the workload's dtype; table [H, 2 chunk] float32, the bias by offset."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    table: Tensor


PEERS = (
    *EXACT,
    "lcattn-plain",
    "lcattn-shaw",
    "sdpa-causal",
    "flex",
    "local-attention",
    "longformer",
    "bigbird",
    "longt5",
)

WORKLOADS = {
    w.name: w
    for w in (
        Workload("main", "8,192 tokens, head dim 64, float32, against every peer", providers=PEERS),
        Workload("d128", "head dim 128", D=128),
        Workload("bf16", "bfloat16", dtype=torch.bfloat16),
        Workload("avx2", "main, held to AVX2 in a child process", providers=("lcattn", "sdpa-folded-fixed")),
        Workload("short", "2,048 tokens", N=2048, providers=("lcattn", "sdpa-folded-fixed", "sdpa-causal")),
        Workload("long", "65,536 tokens", N=65536, providers=("lcattn", "lcattn-shaw", "sdpa-folded-fixed")),
    )
}

# decoding: one query against this many cached keys
DECODE = Workload("decode", "one token against 65,536 cached keys", N=65536, providers=("lcattn", "sdpa-folded"))
LOWER_LAYOUT = "(Chunked(512) | Global(16)) & Causal()"
LOWER_TOKENS = 1 << 20


def visible_pairs(layout: Layout, H: int, N: int) -> int:
    """Visible (query, key) pairs of N tokens, summed over H heads."""
    heads = range(H) if layout.per_head else (0,)
    return sum(picture(layout, N, N, head=h, block=64).visible for h in heads) * (H // len(heads))
