"""Existing rotary models read past the length they were trained on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layout import Layout
from ..layout.base import check_int
from ..position import DualChunk, ReRoPE, Rotary, SelfExtend
from ..position.base import check_positive
from ..position.rotary import Turning
from .masks import Conversion
from .models import convert, self_attentions, tuned_prefix, use

# what remaps positions in the operator, and what only changes the model's frequencies
_REMAPS = ("dual_chunk", "self_extend", "rerope")
_SCALINGS = ("linear", "dynamic", "yarn")
METHODS = (*_REMAPS, *_SCALINGS)


def extend(model: Any, to: int, method: str = "dual_chunk", layout: Layout | None = None, **options: Any) -> Any:
    """Makes a rotary model read texts of `to` tokens, without training, and returns the model.

    With `trained` its config's max_position_embeddings, the methods and their options (defaults):

        dual_chunk    chunk (trained - local), local (trained / 4)      lcattn.DualChunk
        self_extend   window (trained / 4), group (the least that fits `to`)   lcattn.SelfExtend
        rerope        window (trained / 2)                               lcattn.ReRoPE
        linear, dynamic, yarn     factor (to / trained)                  transformers' rope_parameters

    The first three also take attention_factor (1): scores are multiplied by its square, so that attention over many
    more keys than in training stays as sharp. YaRN's is 0.1 ln(to / trained) + 1.

    For the first three the model's own rotary becomes the identity, caches hold keys as they are, and the operator
    turns queries and keys; layers with a sliding window of their own keep their positions. Attention runs on lcattn as
    after `convert`, or, if a layout is given, as after `use`. `use(model, None)` restores the model. The config stays
    as it is, and so does what `save_pretrained` writes; `generate()` may remind of its length, to no effect. A short
    text is read before and after; should the model's rotary follow a convention that is not served, that tells.

    Args:
        model: a transformers or PEFT model with rotary positions.
        to: tokens the model is to read.
        method: one of the above; options: as above.
        layout: who sees whom, beside the model's causality and padding; None for what the model sees by itself.

    Raises:
        ValueError: no rotary positions, an unknown method or option, distances beyond the trained length, frequencies
            to be scaled that are scaled already; the model stays as it was.
    """
    check_int("extend", "to", to, 1)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"layout: expected a layout such as Chunked(1024), got {type(layout).__name__}")
    use(model, None)
    rotaries = _rotaries(model)
    trained = trained_length(next(iter(rotaries.values())).config)
    options = dict(options)
    sharper = _attention_factor(options) if method in _REMAPS else 1.0
    make = _remap(method, to, trained, options) if method in _REMAPS else None
    factor = _factor(method, to, trained, options) if make is None else 1.0
    # so short that every method reads it as the model itself does
    n_probe = min(64, trained)
    if make is not None:
        remap: Any = make(Rotary(), False)
        n_probe = min(n_probe, remap.chunk if method == "dual_chunk" else remap.window)
    before = _probe(model, n_probe)
    convert(model)
    undo: list[Any] = model.__dict__["_lcattn_before"][1]
    try:
        for name, rotary in rotaries.items():
            if make is None:
                undo.append(_replace(model, name, _scaled(rotary, method, factor, trained)))
            else:
                undo.append(rotary.register_forward_hook(_identity))
        _put_on(model, make, layout, 1.0)
        if make is not None and before is not None:
            _compare(before, _probe(model, n_probe), model)
        if sharper != 1:
            _put_on(model, make, layout, sharper)
    except BaseException:
        use(model, None)
        raise
    return model


def _put_on(
    model: Any, make: Callable[[Rotary, bool], Turning] | None, layout: Layout | None, attention_factor: float
) -> None:
    """Every attention of the model reads by `make`, or, if that is None, as it is."""
    for module in self_attentions(model):
        position: tuple[Turning, ...] = ()
        if make is not None and getattr(module, "use_rope", True):
            parameters, local = _parameters(module), _slides(module)
            own = Rotary(rope_parameters=parameters, attention_factor=1.0 if local else attention_factor)
            position = (own if local else make(own, not getattr(module, "is_causal", True)),)
        module.__dict__["_lcattn"] = Conversion(layout, position, tuned_prefix(model))


def _attention_factor(options: dict[str, Any]) -> float:
    """Taken out of the options."""
    given = options.pop("attention_factor", 1.0)
    check_positive("extend", "attention_factor", given)
    return float(given)


def _remap(method: str, to: int, trained: int, options: dict[str, Any]) -> Callable[[Rotary, bool], Turning]:
    """Makes the position from a model's frequencies and two-sidedness; everything else is checked here."""
    given = dict(options)
    kind: Callable[..., Turning]
    for name, value in given.items():
        check_int(method, name, value, 1)
    if method == "dual_chunk":
        local = given.pop("local", max(1, trained // 4))
        if local >= trained:
            raise ValueError(f"dual_chunk: local must be less than the trained length, {trained}, got {local}")
        values = {"chunk": given.pop("chunk", trained - local), "local": local}
        reach, kind = values["chunk"] + local, DualChunk
    elif method == "self_extend":
        window = given.pop("window", max(1, trained // 4))

        def farthest(group: int) -> int:
            return (to - 1) // group + window - window // group

        least = next((g for g in range(1, to) if farthest(g) < trained), to)
        values = {"group": given.pop("group", least), "window": window}
        made = SelfExtend(**values)
        reach, kind = min(to, farthest(made.group) + 1), SelfExtend
    else:
        values = {"window": given.pop("window", max(1, trained // 2))}
        reach, kind = values["window"] + 1, ReRoPE
    _check_none_left(method, given, tuple(values))
    kind(**values)
    if reach > trained:
        what = ", ".join(f"{name}={value}" for name, value in values.items())
        raise ValueError(f"{method}: {what} spans {reach} tokens for texts of {to}, more than the trained {trained}")
    return lambda rotary, two_sided: kind(**values, rotary=rotary, two_sided=two_sided)


def _factor(method: str, to: int, trained: int, options: dict[str, Any]) -> float:
    given = dict(options)
    factor = given.pop("factor", max(1.0, to / trained))
    _check_none_left(method, given, ("factor",))
    check_positive(method, "factor", factor)
    if factor < 1:
        raise ValueError(f"{method}: factor must be at least 1, got {factor}")
    return float(factor)


def _check_none_left(method: str, left: dict[str, Any], known: tuple[str, ...]) -> None:
    if left:
        raise ValueError(f"options: {method} takes {', '.join(known)}, got {', '.join(sorted(left))}")


def _rotaries(model: nn.Module) -> dict[str, Any]:
    """The modules that make cos and sin, by name."""
    if not any(isinstance(m, PreTrainedModel) for m in model.modules()):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding") and hasattr(module, "config")
    }
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no rotary positions that could be remapped")
    for module in found.values():
        if getattr(module.config, "rope_parameters", None) is None:
            raise ValueError(
                f"model: {type(model).__name__} keeps no rope_parameters in its config; it is not supported"
            )
    return found


def _slides(module: Any) -> bool:
    """Whether an attention module sees a window of its own."""
    config, layer = module.config, getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and layer is not None:
        return kinds[layer] in ("sliding_attention", "chunked_attention")
    if hasattr(module, "sliding_window"):
        return module.sliding_window is not None
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def trained_length(config: Any) -> int:
    """Tokens that a model was trained on, before any scaling of its positions; 0 where its config doesn't say."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    known = [p["original_max_position_embeddings"] for p in kinds if p and p.get("original_max_position_embeddings")]
    return int(min(known, default=getattr(config, "max_position_embeddings", 0)))


def _parameters(module: nn.Module) -> dict[str, Any]:
    """transformers' rope_parameters of an attention module's layer."""
    config: Any = module.config
    parameters = config.rope_parameters
    if any(isinstance(value, dict) for value in parameters.values()):
        kind = getattr(module, "layer_type", None) or config.layer_types[module.layer_idx]
        parameters = parameters[kind]
    return {"max_position_embeddings": config.max_position_embeddings} | dict(parameters)


def _scaled(rotary: Any, method: str, factor: float, trained: int) -> nn.Module:
    """The same rotary with frequencies scaled by one of transformers' methods."""
    config = copy.deepcopy(rotary.config)
    parameters: Any = config.rope_parameters

    def scale(old: Any) -> Any:
        if old is None:
            return old
        if (kind := old.get("rope_type", "default")) not in ("default", method):
            others = ", ".join(_REMAPS)
            raise ValueError(
                f"method: {method} can't scale positions of rope_type {kind!r} again; {others} can read on"
            )
        return old | {"rope_type": method, "factor": factor, "original_max_position_embeddings": trained}

    if any(isinstance(value, dict) for value in parameters.values()):
        # layers that slide stay within what they were trained on
        config.rope_parameters = {k: v if "sliding" in k else scale(v) for k, v in parameters.items()}
    else:
        config.rope_parameters = scale(parameters)
    made = type(rotary)(config)
    device = next(iter(rotary.buffers())).device
    return made.to(device)


def _identity(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(output, tuple) or len(output) != 2:
        raise ValueError(f"model: {type(module).__name__} makes no cos and sin; its convention is not supported")
    return torch.ones_like(output[0]), torch.zeros_like(output[1])


class _Set:
    """An attribute set, and on `remove` set back."""

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.before = owner, name, getattr(owner, name)
        setattr(owner, name, value)

    def remove(self) -> None:
        setattr(self.owner, self.name, self.before)


def _replace(model: nn.Module, name: str, module: nn.Module) -> _Set:
    parent, _, leaf = name.rpartition(".")
    return _Set(model.get_submodule(parent), leaf, module)


def _probe(model: Any, n: int) -> Tensor | None:
    """What the model says to a short text; None where it reads something else than tokens."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or model.device.type == "meta":
        return None
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(n, device=model.device) * 7919 % vocabulary)[None]
    given: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(**given)[0].float()
    finally:
        model.train(training)


def _compare(before: Tensor, after: Tensor | None, model: Any) -> None:
    assert after is not None
    error = float((after - before).abs().max() / before.std())
    if not error < (1e-2 if model.dtype == torch.float32 else 0.5):
        raise ValueError(
            f"model: {type(model).__name__} turns its queries and keys in a way that is not supported: a short text"
            f" reads otherwise when the operator does it (by {error:.2g} standard deviations of the output)"
        )
