"""The attention function of transformers' interface, and layouts put on existing models."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..api import attention
from ..layout import Layout
from ..position import Position, Terms, lower
from ..position.rotary import Turning
from . import swap
from .masks import Conversion, Mask, make_mask, mask_of
from .swap.base import BucketTable

NAME = "lcattn"


def register() -> None:
    """Makes `attn_implementation="lcattn"` and `model.set_attn_implementation("lcattn")` known, once for all.

    Attention is then what sdpa computes, case by case, with padding, sliding windows, packing, caches,
    softcap and sinks, at the cost of the visible blocks. A row that sees nothing gives zeros. A model that
    computes attention by itself ignores the name in silence: `check(model)` tells, `convert(model)` mends.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


# what models tell their attention besides the mask: MiniMax-M3's blocks, DeepSeek's indexer, Inkling's sinks of a query
_SELECTIONS = ("block_indices", "indices", "sinks")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | BlockMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Position | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface; what sdpa computes, softcap and sinks besides.

    Args:
        query: [B, H, T, D]; key, value: [B, G, S, D], heads not repeated; value's head dim may be less.
        attention_mask: a `Mask`; None, causal if T > 1 and is_causal (or module.is_causal) says so; a
            FlexAttention BlockMask; or a mask by its values, [B or 1, H or 1, T, S] bool or of 0 and -inf.
        position_bias: a position (T5's buckets, which `use` provides); a dense [1, H, T, S] bias is refused.
        s_aux: [H] sink logits, module.sinks by default.

    Returns:
        (out [B, T, H, D], None), D value's.

    Raises:
        ValueError, NotImplementedError: what the operator cannot honour is never ignored.
    """
    if isinstance(position_bias, Tensor):
        hint = "; lcattn.hf.use(model, layout) passes the bucket table of T5 and MT5 instead"
        raise NotImplementedError(
            f"{type(module).__name__}: a dense position bias is not supported"
            + (hint if hasattr(module, "has_relative_attention_bias") else "")
        )
    if kwargs.get("cache") is not None:
        raise NotImplementedError(
            "continuous batching's paged cache is not supported; use generate() or another backend"
        )
    for name in _SELECTIONS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{type(module).__name__}: its {name} choose what is seen, which is not supported"
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask = mask_of(attention_mask, query, key.shape[2], is_causal)
    conversion: Conversion | None = module.__dict__.get("_lcattn")
    # empty terms stand for the zeros of T5's cross-attention
    position = [] if position_bias is None or isinstance(position_bias, Terms) else [position_bias]
    if conversion is not None:
        position += conversion.position
    view = mask.view(conversion, relative=bool(position))
    if conversion is not None and conversion.position_ids is not None:
        conversion.position_ids.compare(mask, conversion.prefix)
    D_v = value.shape[3]
    if D_v < query.shape[3]:
        # latent attention's values
        value = nn.functional.pad(value, (0, query.shape[3] - D_v))
    out = attention(
        query,
        key,
        value,
        layout=view.layout,
        position=position or None,
        scale=scaling,
        softcap=softcap,
        sink=getattr(module, "sinks", None) if s_aux is None else s_aux,
        key_mask=mask.key_mask,
        q_pos=view.q_pos,
        k_pos=view.k_pos,
        dropout=dropout,
    )
    return out[..., :D_v].transpose(1, 2).contiguous(), None


_SERVES = "what serves: {} with lcattn.hf.use(model, {}), or lcattn.modules in a model of your own"
# why some architectures are refused, unless modules of theirs are replaced
_REFUSED = {
    "umt5": ("each of its layers builds a dense bias of its own", "T5 or MT5", "Chunked(512)"),
}


@functools.lru_cache(maxsize=1024)
def _routes(kind: type[nn.Module]) -> bool | None:
    """Whether a class computes attention through transformers' interface; None: it computes none."""
    source = ""
    # the base of all models names the interface without going through it
    own = itertools.takewhile(lambda base: base not in (PreTrainedModel, nn.Module), kind.__mro__)
    for base in own:
        try:
            source += inspect.getsource(base)
        except (OSError, TypeError):
            continue
    if ".get_interface(" in source:
        return True
    computes = "Attention" in kind.__name__ and re.search(r"softmax\(|scaled_dot_product_attention\(", source)
    return False if computes else None


@dataclass(frozen=True)
class _Served:
    """Modules of a model by how they come to lcattn: through the interface, or replaced by one of ours."""

    routed: dict[str, nn.Module]
    replaced: dict[str, nn.Module]


def pretrained(model: Any) -> list[PreTrainedModel]:
    """transformers' models within a model, itself first; TypeError if there are none."""
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)] if isinstance(model, nn.Module) else []
    if not parts:
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    return parts


def _served(model: nn.Module) -> _Served:
    """How the model's attention comes to lcattn; ValueError if some of it does not."""
    parts = pretrained(model)
    served = _Served({}, {})
    past: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        kind = module.__class__
        if swap.original(kind) is not None or swap.find(kind) is not None:
            served.replaced[name] = module
        elif (routes := _routes(kind)) is not None:
            (served.routed if routes else past)[name] = module
    replaced = {id(module) for module in served.replaced.values()}
    for part in parts:
        refusal = _REFUSED.get(part.config.model_type)
        if refusal is not None and not any(id(module) in replaced for module in part.modules()):
            reason, *serves = refusal
            raise ValueError(f"model: {part.config.model_type} is not supported: {reason}; {_SERVES.format(*serves)}")
    if past:
        name, module = next(iter(past.items()))
        raise ValueError(f"model: {type(module).__name__} ({name}) computes attention past transformers' interface")
    for part in parts:
        if served.replaced and getattr(part.config, "output_attentions", False):
            raise ValueError(f"model: {type(part).__name__} has config.output_attentions set; no weights are stored")
    if not served.routed and not served.replaced:
        raise ValueError(f"model: {type(model).__name__} has no attention that goes through transformers' interface")
    return served


def check(model: nn.Module) -> None:
    """Raises ValueError, with the reason, unless all of the model's attention runs on lcattn."""
    served = _served(model)
    for name, module in served.replaced.items():
        if swap.original(module.__class__) is None:
            raise ValueError(
                f"model: {type(module).__name__} ({name}) computes attention past transformers' interface;"
                " lcattn.hf.convert(model) replaces it"
            )
    for name, module in served.routed.items():
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if chosen != NAME:
            raise ValueError(f"model: {type(module).__name__} ({name}) runs on {chosen!r}, not {NAME!r}")


def convert(model: Any) -> Any:
    """Puts all of a model's attention on lcattn, in place, and returns the model; its results stay the same.

    Attention that goes through transformers' interface is set to "lcattn", T5's with its bucket table for a bias.
    Attention modules that bypass the interface (Longformer's, LED's, BigBird's, LongT5's: `lcattn.hf.swap` has the
    table) are given another class, derived from their own, so that parameters, state_dict, hooks and saved files stay
    as they are. `use(model, None)` takes all of it back.

    Args:
        model: a transformers or PEFT model; a layout that `use` put on it is taken off.

    Raises:
        ValueError: some attention can be served in neither way; the model stays as it was.
        TypeError: not a transformers model.
    """
    served = _served(model)
    register()
    _restore(model)
    held = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in held.values()]
    hooks: list[RemovableHandle] = []
    model.__dict__["_lcattn_before"] = (before, hooks)
    try:
        for module in served.replaced.values():
            module.__class__ = swap.SWAPS[module.__class__]
        if served.routed:
            model.set_attn_implementation(NAME)
        if served.replaced:
            # masks come to replaced modules as layouts too; transformers sets the name only where it is asked for
            for config in held.values():
                config._attn_implementation_internal = NAME
        check(model)
        for name, module in served.routed.items():
            if "position_bias" in inspect.signature(type(module).forward).parameters:
                if not hasattr(module, "has_relative_attention_bias"):
                    raise ValueError(f"model: {type(module).__name__} ({name}) is given a dense position bias")
                hooks.append(module.register_forward_pre_hook(_give_buckets, with_kwargs=True))
    except BaseException:
        _restore(model)
        raise
    return model


def use(model: Any, layout: Layout | None, position: Position | Sequence[Position] | None = None) -> Any:
    """Puts a layout on an existing model, and returns the model.

    The model is converted (`convert`), and in every self-attention visibility becomes layout & the model's causality &
    padding & documents: only its own sliding windows, chunks and blocks are replaced. Global tokens that the caller
    names (Longformer's and LED's global_attention_mask) and LongT5's side keys stay. Cross-attention keeps seeing
    everything. Coordinates count from each row's first real token, and from each packed document's, so that padding
    and packing change no result; a prefix that PEFT tuned stays visible to all. T5 and MT5 get their bias by the bucket
    table. A second call replaces the first.

    Args:
        model: a transformers or PEFT model.
        layout: who sees whom; None restores the model as it was before the first call, or before `convert`.
        position: one additive position or several, beside the model's own; the caller trains its tensors.

    Raises:
        ValueError: the model's attention would not run on lcattn, or a position is for other heads; it stays as it was.
        TypeError: not a transformers model.
    """
    if layout is None:
        if position is not None:
            raise ValueError("position: give a layout with it, Full() for none")
        pretrained(model)
        return _restore(model)
    if not isinstance(layout, Layout):
        raise TypeError(f"layout: expected a layout such as Causal(), got {type(layout).__name__}")
    if position is None:
        position = ()
    positions = tuple(position) if isinstance(position, (list, tuple)) else (position,)
    for part in positions:
        if isinstance(part, Turning) or not hasattr(part, "lower"):
            raise ValueError(
                f"position: expected an additive position such as Alibi(slopes), got {type(part).__name__};"
                " lcattn.hf.extend remaps rotary positions"
            )
    convert(model)
    conversion = Conversion(layout, positions, tuned_prefix(model))
    modules = self_attentions(model)
    try:
        _check_fits(positions, modules)
    except BaseException:
        _restore(model)
        raise
    for module in modules:
        module.__dict__["_lcattn"] = conversion
    return model


def _check_fits(positions: tuple[Position, ...], modules: list[nn.Module]) -> None:
    """ValueError if a position is for other heads or head dims than an attention module has, as far as it tells."""
    sizes = {
        (_first(module, _HEADS) or _first(getattr(module, "config", None), _HEADS), _first(module, _HEAD_DIM))
        for module in modules
    }
    with torch.no_grad():
        for H, D in sizes:
            if H and D:
                q = next(modules[0].parameters()).new_zeros(1, H, 1, D)
                lower(positions, q, q, q, None, None)


_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")


def _first(owner: Any, names: Sequence[str]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int)), None)


def tuned_prefix(model: Any) -> int:
    """How many leading keys PEFT's prefix tuning put before every text."""
    peft = getattr(model, "active_peft_config", None)
    return getattr(peft, "num_virtual_tokens", 0) if getattr(peft, "peft_type", "") == "PREFIX_TUNING" else 0


def self_attentions(model: nn.Module) -> list[nn.Module]:
    """The modules of a converted model in which a text attends to itself."""
    served = _served(model)
    return [
        module
        for name, module in (served.routed | served.replaced).items()
        if not re.search("cross|encoder_attn|encdecattention", f"{name}.{type(module).__name__}".lower())
    ]


def _restore(model: Any) -> Any:
    for module in model.modules():
        before, hooks = module.__dict__.pop("_lcattn_before", ((), ()))
        for config, chosen in before:
            config._attn_implementation_internal = chosen
        for hook in hooks:
            hook.remove()
        module.__dict__.pop("_lcattn", None)
        replaced = swap.original(module.__class__)
        if replaced is not None:
            module.__class__ = replaced
    return model


def _give_buckets(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hands T5's first layers their bucket table, which they pass on, before they make a dense bias."""
    if kwargs.get("position_bias") is None:
        bias: Position = Terms()
        if module.has_relative_attention_bias:
            bias = BucketTable(
                module.relative_attention_bias,
                not module.is_decoder,
                module.relative_attention_max_distance,
            )
        kwargs["position_bias"] = bias
    return args, kwargs
