"""What these modules are given as dense [T, S] tensors, read once for all layers, and the call they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...api import attention
from ...layout import Blocks, Causal, Documents, Full, Layout, Window
from ...position import Position
from ..masks import Mask
from .base import conversion_of, positions_of

Result = TypeVar("Result")


def once(read: Callable[..., Result]) -> Callable[..., Result]:
    """`read(values, *rest)`, remembered while the tensor `values` lives unchanged. Results must hold no view of it."""
    known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    # what a tracer would put in it are not tensors
    @torch.compiler.disable
    def remembered(values: Tensor, *rest: Any) -> Result:
        if values.is_inference():
            # tensors of inference mode don't count their changes
            return read(values, *rest)
        version, results = known.get(values, (None, {}))
        if version != values._version:
            known[values] = (values._version, results := {})
        # what is made in inference mode serves no training
        key = (torch.is_inference_mode_enabled(), *rest)
        if key not in results:
            results[key] = read(values, *rest)
        return results[key]

    return remembered


def unmasked(T: int, S: int, device: torch.device) -> Mask:
    """Every query sees every key; queries stand at the end."""
    return Mask((1, T, S), Full(), Full(), q_offset=S - T, device=device)


def padded(keys: Tensor, T: int) -> Mask:
    """Every query sees the keys [B, S] bool that are True."""
    B, S = keys.shape
    return Mask((B, T, S), Full(), Full(), key_mask=keys, q_offset=S - T, padding=keys, device=keys.device)


def read_mask(seen: Tensor, T: int) -> Mask:
    """The `Mask` of seen [B or 1, T or 1, S] bool, True where a query sees a key; queries stand at the end.

    Padding is found where that is exact, with or without causality and with or without hidden tokens seeing themselves;
    anything else becomes an explicit mask. O(B T S).
    """
    B, rows, S = seen.shape
    if rows == 1:
        return unmasked(T, S, seen.device) if bool(seen.all()) else padded(seen[:, 0].clone(), T)
    q_idx, k_idx = torch.arange(S - T, S, device=seen.device)[:, None], torch.arange(S, device=seen.device)
    itself, before = k_idx == q_idx, k_idx <= q_idx
    # a row shows every key that it may see but itself, which another row shows
    keys = seen[:, 0].clone()
    keys[:, S - T] = seen[:, -1, S - T]
    last = seen[:, -1].clone()
    for causal, real in ((False, keys), (True, last)):
        for selves in (False, True):
            expected = real[:, None] | itself if selves else real[:, None].expand_as(seen)
            if torch.equal(seen, expected & before if causal else expected):
                return _patterned(real, causal, selves, T)
    if T == S:
        real = seen.diagonal(dim1=1, dim2=2).clone()
        if torch.equal(seen, real[:, None] & real[:, :, None]):
            # rows of hidden tokens, which nothing sees, see what the others see
            return padded(real, T)
    layout = Blocks(seen[:, None], 1)
    return Mask((B, T, S), layout, layout, q_offset=S - T, device=seen.device)


def _patterned(real: Tensor, causal: bool, selves: bool, T: int) -> Mask:
    B, S = real.shape
    everything = bool(real.all())
    layout: Layout = Full()
    if selves and not everything:
        q_ids = torch.zeros(1, T, dtype=torch.long, device=real.device)
        layout = Documents(ids=real.long() - 1, q_ids=q_ids) | Window(0, 0)
    if causal:
        layout = Causal() if isinstance(layout, Full) else layout & Causal()
    padding = None if everything else real
    key_mask = None if selves else padding
    return Mask((B, T, S), layout, layout, key_mask, q_offset=S - T, padding=padding, device=real.device)


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    position: Sequence[Position],
    scale: float,
    dropout: nn.Dropout,
) -> Tensor:
    """`attention` under what was put on the module; out [B, H, T, D]."""
    view = mask.view(conversion_of(module), relative=True)
    return attention(
        q,
        k,
        v,
        layout=view.layout,
        position=positions_of(module, *position),
        scale=scale,
        key_mask=mask.key_mask,
        q_pos=view.q_pos,
        k_pos=view.k_pos,
        dropout=dropout.p if dropout.training else 0.0,
    )
