"""Multi-query associative recall: what a layout can carry from a key-value pair to a query a gap away.

A sequence is n_pairs key-value pairs, filler, and each key again, every one `gap` tokens after its first
appearance; there the model must say the key's value. Source: Arora et al. 2023 (Zoology), section 3.1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import Causal, Layout
from ..modules import EncoderLayer

# what the loss and the accuracy leave out
NOT_ASKED = -100
# sequences that an accuracy is of
ASKED = 128


@dataclass(frozen=True)
class Recall:
    """The task: n_pairs pairs out of n_symbols keys and n_symbols values; keys differ within a sequence."""

    n_pairs: int = 8
    n_symbols: int = 32

    def __post_init__(self) -> None:
        if self.n_pairs < 1:
            raise ValueError(f"pairs: expected 1 or more, got {self.n_pairs}")
        if self.n_symbols < max(2, self.n_pairs):
            raise ValueError(f"symbols: expected at least as many as pairs, {self.n_pairs}, got {self.n_symbols}")

    @property
    def vocabulary(self) -> int:
        """Keys, then values, then the filler."""
        return 2 * self.n_symbols + 1

    @property
    def shortest_gap(self) -> int:
        """The pairs come before the first query."""
        return 2 * self.n_pairs

    def draw(self, gap: int, batch: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences of one gap.

        Returns:
            tokens [batch, gap + 2 n_pairs] int64; answers, likewise, the value where a key is asked for and
            NOT_ASKED elsewhere.
        """
        if gap < self.shortest_gap:
            raise ValueError(f"gaps: {self.n_pairs} pairs need a gap of {self.shortest_gap} or more, got {gap}")
        keys = torch.rand(batch, self.n_symbols, generator=draw).argsort(1)[:, : self.n_pairs]
        values = torch.randint(self.n_symbols, (batch, self.n_pairs), generator=draw) + self.n_symbols
        tokens = torch.full((batch, gap + 2 * self.n_pairs), self.vocabulary - 1)
        answers = torch.full_like(tokens, NOT_ASKED)
        tokens[:, : 2 * self.n_pairs : 2], tokens[:, 1 : 2 * self.n_pairs : 2] = keys, values
        tokens[:, gap::2], answers[:, gap::2] = keys, values
        return tokens, answers


class RecallModel(nn.Module):
    """Two `EncoderLayer`s between an embedding and a head, with a learned bias by offset and the given layout.

    Args:
        vocabulary, dim, heads: sizes; layout: who sees whom, joined to causality unless two_sided.
        reach: offsets that the bias tells apart; what is further takes its last entry.
    """

    def __init__(
        self, vocabulary: int, layout: Layout, two_sided: bool, dim: int = 64, heads: int = 2, reach: int = 64
    ) -> None:
        super().__init__()
        self.embed, self.embed_before = nn.Embedding(vocabulary, dim), nn.Embedding(vocabulary, dim)
        layers = [EncoderLayer(dim, heads, reach, lookback=0, causal=not two_sided) for _ in range(2)]
        for layer in layers:
            layer.attention.layout = layout if two_sided else layout & Causal()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] int64 to logits [B, T, vocabulary]."""
        # a value knows the key before it, so that what remains to learn is to find it across the gap
        x = self.embed(tokens) + F.pad(self.embed_before(tokens[:, :-1]), (0, 0, 1, 0))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Training:
    """How the model learns: AdamW over `steps` batches, the gap of each drawn log-uniformly up to the longest."""

    steps: int = 300
    batch: int = 32
    learning_rate: float = 6e-3

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch: expected 1 or more, got {self.steps} and {self.batch}")

    def rate(self, step: int) -> float:
        """A tenth of the steps rising, then half a cosine to zero, as a share of the learning rate."""
        return min(1.0, (step + 1) / max(1, self.steps // 10)) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def losses(self, model: nn.Module, task: Recall, longest_gap: int, draw: torch.Generator) -> Iterator[float]:
        """Trains the model in place; yields each step's loss."""
        optimiser = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self.rate)
        model.train()
        for _ in range(self.steps):
            share = float(torch.rand((), generator=draw))
            gap = round(task.shortest_gap * (longest_gap / task.shortest_gap) ** share)
            tokens, answers = task.draw(gap, self.batch, draw)
            asked = answers != NOT_ASKED
            loss = F.cross_entropy(model(tokens)[asked], answers[asked])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            yield float(loss.detach())


@torch.inference_mode()
def accuracy(model: nn.Module, task: Recall, gap: int, sequences: int, draw: torch.Generator) -> float:
    """Share of queries whose likeliest token is their value, over fresh sequences of one gap."""
    model.eval()
    tokens, answers = task.draw(gap, sequences, draw)
    asked = answers != NOT_ASKED
    return float((model(tokens)[asked].argmax(-1) == answers[asked]).float().mean())


def measure(
    layout: Layout,
    task: Recall,
    training: Training,
    gaps: Sequence[int],
    two_sided: bool,
    seed: int,
    on_step: Callable[[float], None] = lambda loss: None,
) -> dict[str, Any]:
    """Trains a model of this layout and asks it at every gap; the same seed gives every layout the same sequences.

    Returns:
        layout, final_loss (the last step's), seconds (of the training) and accuracy [{gap, accuracy}].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RecallModel(task.vocabulary, layout, two_sided)
    start = time.perf_counter()
    loss = math.nan
    for loss in training.losses(model, task, max(gaps), torch.Generator().manual_seed(seed + 1)):
        on_step(loss)
    seconds = time.perf_counter() - start
    found = [
        {"gap": gap, "accuracy": accuracy(model, task, gap, ASKED, torch.Generator().manual_seed(seed + 2))}
        for gap in gaps
    ]
    return {"layout": layout.spec, "final_loss": loss, "seconds": seconds, "accuracy": found}
