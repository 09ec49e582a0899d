"""Existing rotary models read past the length they were trained on."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Layout
from ..layout.base import check_int
from ..position import DualChunk, ReRoPE, Rotary, SelfExtend, Terms
from ..position.base import check_positive
from ..position.rotary import Turning, turn
from .masks import Conversion, PositionIds
from .models import convert, pretrained, self_attentions, tuned_prefix, use

# what remaps positions in the operator, and what only changes the model's frequencies
_REMAPS = ("dual_chunk", "self_extend", "rerope")
_SCALINGS = ("linear", "dynamic", "yarn")
METHODS = (*_REMAPS, *_SCALINGS)


def extend(model: Any, to: int, method: str = "dual_chunk", layout: Layout | None = None, **options: Any) -> Any:
    """Makes a rotary model read texts of `to` tokens, without training, and returns the model.

    With `trained` its config's max_position_embeddings (the last three scale the length before any scaling, its
    original_max_position_embeddings if there is one), the methods and their options (defaults):

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
    text tells how each layer turns its features: in halves, in interleaved pairs (which are put in halves before they
    are cached), or not at all. The operator counts tokens itself, from each row's or document's first; position_ids
    that say otherwise, as those of images do, are refused in the forward pass.

    Args:
        model: a transformers or PEFT model with rotary positions.
        to: tokens the model is to read.
        method: one of the above; options: as above.
        layout: who sees whom, beside the model's causality and padding; None for what the model sees by itself.

    Raises:
        ValueError: no rotary positions or turned in another way, an unknown method or option, distances beyond the
            trained length, frequencies to be scaled that are scaled already; the model stays as it was.
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
    if method in _REMAPS and tuned_prefix(model):
        raise ValueError(
            f"model: PEFT's prefix tuning gives keys that are not to be turned, which {method} would turn;"
            f" {', '.join(_SCALINGS)} leave them as they are"
        )
    # whoever scales frequencies starts from the length before any scaling
    length_of = trained_length if method in _REMAPS else _original_length
    trained = min(length_of(rotary.config) for rotary in rotaries.values())
    options = dict(options)
    sharper = _attention_factor(options) if method in _REMAPS else 1.0
    make = _remap(method, to, trained, options) if method in _REMAPS else None
    factor = _factor(method, to, trained, options) if make is None else 1.0
    convert(model)
    undo: list[Any] = model.__dict__["_lcattn_before"][1]
    position_ids = PositionIds()
    try:
        if make is None:
            for name, rotary in rotaries.items():
                undo.append(_replace(model, name, _scaled(rotary, method, factor, trained)))
            turned: dict[nn.Module, Rotary] = {}
        else:
            turned = _leave_turning(model, rotaries, undo, position_ids)
        for module in self_attentions(model):
            position: tuple[Turning, ...] = ()
            if make is not None and module in turned:
                own: Turning = turned[module]
                if not _slides(module):
                    own = make(
                        replace(turned[module], attention_factor=sharper), not getattr(module, "is_causal", True)
                    )
                position = (own,)
            module.__dict__["_lcattn"] = Conversion(
                layout, position, tuned_prefix(model), position_ids if position else None
            )
    except BaseException:
        use(model, None)
        raise
    return model


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
    """The modules that make cos and sin for text, by name."""
    pretrained(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding") and _counts_tokens(module)
    }
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no rotary positions that could be remapped: none of its modules makes"
            " cos and sin by rope_parameters and max_position_embeddings of a config (some models turn inside their"
            " attention)"
        )
    return found


def _counts_tokens(module: Any) -> bool:
    """Whether a module's config is one of rotary positions in a text; those of images have no length."""
    config = getattr(module, "config", None)
    return all(getattr(config, name, None) is not None for name in ("rope_parameters", "max_position_embeddings"))


def _slides(module: Any) -> bool:
    """Whether an attention module sees a window of its own."""
    config, layer = module.config, getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and layer is not None:
        return kinds[layer] in ("sliding_attention", "chunked_attention")
    if hasattr(module, "sliding_window"):
        return bool(module.sliding_window)
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def trained_length(config: Any) -> int:
    """Tokens that a model reads as it stands, its max_position_embeddings; 0 where its config doesn't say."""
    return int(getattr(config, "max_position_embeddings", None) or 0)


def _original_length(config: Any) -> int:
    """Tokens that a model was trained on before any scaling of its frequencies."""
    parameters = config.rope_parameters
    kinds = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    known = [p["original_max_position_embeddings"] for p in kinds if p.get("original_max_position_embeddings")]
    return int(min(known, default=trained_length(config)))


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


def _hand_on(position_ids: PositionIds, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A rotary's cos and sin, made to turn nothing, its position_ids left for attention to compare."""
    if not isinstance(output, tuple) or len(output) != 2:
        raise ValueError(f"model: {type(module).__name__} makes no cos and sin; its convention is not supported")
    position_ids.put(kwargs.get("position_ids", args[1] if len(args) > 1 else None))
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


def _leave_turning(
    model: Any, rotaries: dict[str, Any], undo: list[Any], position_ids: PositionIds
) -> dict[nn.Module, Rotary]:
    """Makes the model's own rotaries turn nothing; the modules left to be turned in halves, and by what."""
    modules = self_attentions(model)
    turned = {
        module: Rotary(rope_parameters=_parameters(module))
        for module in modules
        if _counts_tokens(module) and getattr(module, "use_rope", True)
    }
    # no longer than the model knows: frequencies that depend on the length stay as they are
    text = _ShortText(model, modules, min(64, *(trained_length(rotary.config) for rotary in rotaries.values())))
    before = text.read()
    for rotary in rotaries.values():
        undo.append(rotary.register_forward_hook(functools.partial(_hand_on, position_ids), with_kwargs=True))
    after = text.read()
    other = [m for m in before if m not in turned or _error(before[m], after[m], turned[m]) > _TURNED_ALIKE]
    for module in other:
        if torch.equal(before[module].q, after[module].q):
            turned.pop(module, None)
        elif module not in turned:
            raise ValueError(f"model: {type(module).__name__} is turned, but no config of its own says by what")
        else:
            undo.extend(_pairs_to_halves(module, after[module].q.shape[3], turned[module]))
    again = text.read() if other else {}
    for module in other:
        if module in turned and (error := _error(before[module], again[module], turned[module])) > _TURNED_ALIKE:
            raise ValueError(
                f"model: {type(module).__name__} turns its queries and keys in a way that is not supported, neither in"
                f" halves nor in interleaved pairs: scores of a short text are off by {error:.0%} of what turning does"
            )
    return turned


# of what turning does to scores: rounding to bfloat16 is below a hundredth, another convention about everything
_TURNED_ALIKE = 0.05


class _Heard:
    """A position that changes nothing and keeps what it was given."""

    q: Tensor
    k: Tensor

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        self.q, self.k = q.float(), k.float()
        return Terms()

    def scores(self, rotary: Rotary | None) -> Tensor:
        """q . k [B, H, T, S], both turned by the rotary."""
        q, k = self.q, self.k
        if rotary is not None:
            T, S = q.shape[2], k.shape[2]
            frequency, factor = rotary.frequencies(q.shape[3], T, q.device)
            at = torch.arange(S, device=q.device)[None]
            q, k = turn(q, at[:, S - T :], frequency, factor), turn(k, at, frequency, factor)
        return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT


def _error(own: _Heard, unturned: _Heard, rotary: Rotary) -> float:
    """How far turning by `rotary` is from what the model does by itself, as a part of what that does."""
    want = own.scores(None)
    error = float((unturned.scores(rotary) - want).norm())
    return error and error / max(float((unturned.scores(None) - want).norm()), 1e-30)


class _ShortText:
    """A text read again and again, in which each attention gives what it gave first.

    So what reaches one of them differs by how it is turned there and by nothing before it.
    """

    def __init__(self, model: Any, modules: list[nn.Module], n: int) -> None:
        self.model, self.modules, self.n = model, modules, n
        self.given: dict[nn.Module, Any] = {}

    def read(self) -> dict[nn.Module, _Heard]:
        """What each attention that took part was given; nothing where the model reads something else than tokens."""
        model = self.model
        if getattr(model, "main_input_name", "input_ids") != "input_ids" or model.device.type == "meta":
            return {}
        vocabulary = model.get_input_embeddings().num_embeddings
        ids = (torch.arange(self.n, device=model.device) * 7919 % vocabulary)[None]
        known = inspect.signature(model.forward).parameters
        given: dict[str, Any] = {"input_ids": ids}
        if "use_cache" in known:
            given["use_cache"] = False
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = ids
        heard = {module: _Heard() for module in self.modules}
        hooks = []
        training = model.training
        model.eval()
        try:
            for module, listener in heard.items():
                module.__dict__["_lcattn"] = Conversion(None, (listener,))
                hooks.append(module.register_forward_hook(self._as_first))
            with torch.no_grad():
                model(**given)
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
        return {module: listener for module, listener in heard.items() if hasattr(listener, "q")}

    def _as_first(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.given.setdefault(module, output)


def _pairs_to_halves(module: nn.Module, D: int, rotary: Rotary) -> list[Any]:
    """Hooks that put the features 2 i of queries and keys into one half of what is turned, 2 i + 1 into the other.

    A score is the same in any order of features.
    """
    R = 2 * len(rotary.frequencies(D, 0, torch.device("cpu"))[0])

    def reorder(part: nn.Module, args: Any, output: Tensor) -> Tensor:
        x = output.unflatten(-1, (-1, D))
        return torch.cat([x[..., 0:R:2], x[..., 1:R:2], x[..., R:]], -1).flatten(-2)

    hooks = []
    for side in ("q", "k"):
        # a norm weighs features by their place
        parts = (getattr(module, f"{side}_{kind}", None) for kind in ("norm", "proj"))
        part = next((part for part in parts if part is not None), None)
        if part is not None:
            hooks.append(part.register_forward_hook(reorder))
    return hooks
