"""What replaced modules share: refusals, heads, key padding, and layouts that `use` put in place of their windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...layout import Full, Layout
from ...position import Position, T5Bias, Terms
from ..masks import Conversion, Mask, View


def refuse_weights(module: nn.Module, output_attentions: bool | None) -> None:
    """NotImplementedError where attention weights are asked for, which a fused kernel never holds."""
    if output_attentions:
        raise NotImplementedError(
            f"{type(module).__name__}: output_attentions: expected False, got {output_attentions};"
            " output_attentions=True is not supported, since no attention weights are stored;"
            " lcattn.hf.use(model, None) gives the model back its own attention"
        )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., T, H * D] as [..., H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] as [B, T, H * D]."""
    return x.transpose(1, 2).flatten(2)


def real_keys(seen: Tensor) -> Tensor | None:
    """A key mask [B, S] bool, or None where it hides nothing."""
    return None if bool(seen.all()) else seen


def conversion_of(module: nn.Module) -> Conversion | None:
    """What `use` put on a module."""
    found: Conversion | None = module.__dict__.get("_lcattn")
    return found


def positions_of(module: nn.Module, *own: Position) -> list[Position] | None:
    """The module's own positions and those that `use` gave it, None for none."""
    conversion = conversion_of(module)
    found = [*own, *(() if conversion is None else conversion.position)]
    return found or None


def view_of(module: nn.Module, hidden_states: Tensor, window: Layout, real: Tensor | None, relative: bool) -> View:
    """Layout and coordinates of an encoder's self-attention: its window, or what `use` put in its place.

    Args:
        hidden_states: [B, T, C]; window: the module's own layout; real: [B, T] bool, None if no token is padding.
        relative: whether the call has a position.
    """
    B, T, _ = hidden_states.shape
    mask = Mask((B, T, T), window, Full(), real, padding=real, device=hidden_states.device)
    return mask.view(conversion_of(module), relative)


def coordinates(pos: Tensor | None, n: int, device: torch.device) -> Tensor:
    """Coordinates [B or 1, n] of a view."""
    return torch.arange(n, device=device)[None] if pos is None else pos


def dropout_of(module: nn.Module, probability: float) -> float:
    return probability if module.training else 0.0


@dataclass(frozen=True, eq=False)
class BucketTable:
    """T5Bias of a table that is asked for anew by each layer, as the model asks it.

    An adapter may stand around the table; and what a reentrant checkpoint computes again must not share a graph with
    what it does not.
    """

    embedding: nn.Module
    bidirectional: bool
    max_distance: int

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        table: Tensor = self.embedding.weight  # type: ignore[assignment]
        weight = self.embedding(torch.arange(table.shape[0], device=table.device))
        return T5Bias(weight, self.bidirectional, self.max_distance).lower(q, k, v, q_pos, k_pos)
