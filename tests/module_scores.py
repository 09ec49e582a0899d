"""Sizes of the modules under test, and what makes their scores: sharp projections, masks, biases."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcattn.modules import ChunkedSelfAttention

E, H, B, T = 32, 4, 2, 37


def sharpen(module: nn.Module, x: Tensor) -> None:
    """Scales the query and key projections of a module until its scores have a standard deviation of 3.2."""
    D = E // H
    with torch.no_grad():
        if isinstance(module, ChunkedSelfAttention):
            weights = [module.qkv.weight[: (module.num_heads + module.num_kv_heads) * D]]
            q = F.linear(x, module.qkv.weight[:E])
            k = F.linear(x, module.qkv.weight[E : E + module.num_kv_heads * D])
        elif module.in_proj_weight is not None:
            weights = [module.in_proj_weight[: 2 * E]]
            q, k = F.linear(x, module.in_proj_weight[: 2 * E]).chunk(2, -1)
        else:
            weights = [module.q_proj_weight, module.k_proj_weight]
            q = F.linear(x, module.q_proj_weight)
            k = F.linear(torch.randn(*x.shape[:-1], module.kdim).to(x), module.k_proj_weight)
        # std of a sum of D products of independent features
        std = float(q.float().std() * k.float().std() * math.sqrt(D) / math.sqrt(D))
        for weight in weights:
            weight *= math.sqrt(3.2 / std)


TRIANGLE = torch.ones(T, T, dtype=torch.bool).triu(1)


def dense_bias(table: Tensor, first: int, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    return table[:, (k_pos[None, :] - q_pos[:, None] - first).clamp(0, table.shape[1] - 1)]
