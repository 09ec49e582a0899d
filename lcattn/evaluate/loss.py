"""Next-token loss by position, past the length that a model was trained on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# logits of this many tokens at a time: of a whole text they would take gigabytes
_HEAD_TOKENS = 512
# a mean loss is kept for this many tokens, for the plot
CURVE_STEP = 64


def layers(model: nn.Module) -> nn.ModuleList:
    """The model's stack of layers: its outermost list of modules, experts being further in."""
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList)), nn.ModuleList())


@torch.inference_mode()
def read(model: Any, tokens: Tensor, on_layer: Callable[[], None] = lambda: None) -> Tensor:
    """Next-token losses of one pass, in nats: element t is -log p(token t + 1 | tokens up to t).

    Hidden states are computed once, logits in slices by the model's own head, so memory is O(T).

    Args:
        model: a transformers causal language model; tokens [1, T] int64, T >= 2.
        on_layer: called after each of its layers.

    Returns:
        [T - 1] float32.
    """
    base = model.base_model
    hooks = [layer.register_forward_hook(lambda *_: on_layer()) for layer in layers(base)]
    try:
        output = base(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    hidden = output.last_hidden_state
    found = []
    with _standing_in(base, output):
        for first in range(0, tokens.shape[1] - 1, _HEAD_TOKENS):
            targets = tokens[0, first + 1 : first + 1 + _HEAD_TOKENS]
            output.last_hidden_state = hidden[:, first : first + len(targets)]
            logits = model(input_ids=targets[None], use_cache=False).logits
            found.append(F.cross_entropy(logits[0].float(), targets, reduction="none"))
    return torch.cat(found)


@contextmanager
def _standing_in(base: Any, output: Any) -> Iterator[None]:
    """The base gives this output, so that what a model does after it (head, caps, scales) can be had by itself."""
    before = base.__dict__.get("forward")
    base.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del base.forward
        if before is not None:
            base.forward = before


def mean(losses: Tensor, first: int, end: int, origin: int = 0) -> float:
    """Mean loss of predicting tokens [first, end) of the text, by a pass that began at token `origin`."""
    return float(losses[max(first - origin, 1) - 1 : end - origin - 1].mean())


def own_start(length: int, trained: int) -> int:
    """Where the document of its own begins: at the trained length, later if more than `trained` tokens follow."""
    return max(trained, length - trained)


def measure(
    model: Any, tokens: Tensor, trained: int, span: int, origin: int = 0, on_layer: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Reads the text from token `origin` on as a document of its own.

    Args:
        tokens: [1, T] int64, the whole text, T > trained; span: mean losses are given for this many tokens each.

    Returns:
        first_token, tokens (read), seconds, attention (what the model ran on);
        loss_by_span [{start, end, loss}];
        within_trained, past_trained: means over tokens [1, trained) and [trained, T), None unless origin is 0;
        compared: mean over the tokens that the document of its own predicts, those after `own_start`;
        curve {step, loss}: means of `step` tokens each from the first on. Positions count in the whole text.
    """
    length = tokens.shape[1]
    start = time.perf_counter()
    losses = read(model, tokens[:, origin:], on_layer)
    seconds = time.perf_counter() - start

    def spans(width: int) -> list[dict[str, Any]]:
        edges = [origin, *range((origin // width + 1) * width, length, width), length]
        # a pass does not predict its first token
        pairs = [(a, b) for a, b in itertools.pairwise(edges) if b > max(a, origin + 1)]
        return [{"start": a, "end": b, "loss": mean(losses, a, b, origin)} for a, b in pairs]

    return {
        "first_token": origin,
        "tokens": length - origin,
        "seconds": seconds,
        "attention": model.config._attn_implementation,
        "loss_by_span": spans(span),
        "within_trained": mean(losses, 1, trained) if origin == 0 else None,
        "past_trained": mean(losses, trained, length) if origin == 0 else None,
        "compared": mean(losses, own_start(length, trained) + 1, length, origin),
        "curve": {"step": CURVE_STEP, "loss": [part["loss"] for part in spans(CURVE_STEP)]},
    }


def curve(record: dict[str, Any], smooth: int = 8) -> list[tuple[float, float]]:
    """(position, running mean of `smooth` means) of a record, for the plot."""
    values, step = record["curve"]["loss"], record["curve"]["step"]
    smooth = max(1, min(smooth, len(values) // 2))
    first = record["first_token"]
    return [
        (first + (i + smooth / 2) * step, sum(values[i : i + smooth]) / smooth) for i in range(len(values) - smooth + 1)
    ]
