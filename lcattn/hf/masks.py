"""Masks of transformers models as layouts, key padding and coordinates, never as [T, S] tensors."""

from __future__ import annotations

import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils

from ..layout import (
    Blocks,
    Causal,
    Chunked,
    Context,
    Dilated,
    Documents,
    FromBlockMask,
    Full,
    Global,
    Layout,
    Not,
    Window,
)
from ..layout.base import register, set_fields
from ..layout.data import HIDDEN, reads_batch_and_head
from ..lowering import Region, lower
from ..position import Position


@dataclass(eq=False)
class PositionIds:
    """The position_ids that a model's rotary was given, until a mask has been compared with them."""

    pending: Tensor | None = None

    def put(self, ids: Tensor | None) -> None:
        # a graph being traced knows no values
        self.pending = None if torch.compiler.is_compiling() else ids

    def compare(self, mask: Mask, prefix: int) -> None:
        if not torch.compiler.is_compiling() and self.pending is not None:
            ids, self.pending = self.pending, None
            mask.check_position_ids(ids, prefix)


@dataclass(frozen=True, eq=False)
class Conversion:
    """What `use` put on a model: layout (None: its own), position, and how many leading keys are a tuned prefix.

    position_ids: what its rotary is given, where the operator turns in its stead.
    """

    layout: Layout | None
    position: tuple[Position, ...] = ()
    prefix: int = 0
    position_ids: PositionIds | None = None


@dataclass(frozen=True)
class View:
    """A mask as one attention call sees it: layout and coordinates, as `lcattn.attention` takes them."""

    layout: Layout
    q_pos: Tensor | None
    k_pos: Tensor | None


# layouts that read k_pos - q_pos alone, so that coordinates may start anywhere
_BY_OFFSET = (Full, Causal, Window, Dilated)


_NO_TENSOR = (
    "attention mask: lcattn's tells who sees whom and is no tensor; a model that computes with the values of its mask "
    'needs attn_implementation="eager" or "sdpa"'
)


@dataclass(frozen=True, eq=False)
class Mask:
    """Who sees whom in one forward pass, shared by its layers.

    Attributes:
        sizes: B, T and S.
        layout: what transformers asked for; unwindowed: the same without its sliding windows and chunks.
        key_mask: [B or 1, S] bool, False hides a key; None when nothing is hidden.
        q_offset, kv_offset: index of the first query and of the first key in the whole sequence; q_offset is
            None where it is unknown (a mask given by its values, T != S).
        padding: [B, n] bool, the 2-D attention mask of the whole sequence, None when nothing is hidden.
        position_ids: [B, T] int, of packed documents.
        device: of the queries; views: what was worked out for the layers, by conversion.
    """

    sizes: tuple[int, int, int]
    layout: Layout
    unwindowed: Layout
    key_mask: Tensor | None = None
    q_offset: int | None = 0
    kv_offset: int = 0
    padding: Tensor | None = None
    position_ids: Tensor | None = None
    device: torch.device | None = None
    views: dict[tuple[Conversion | None, bool], View] = field(default_factory=dict, repr=False)

    # generate() may make masks ahead of the forward pass, and both ask them for what 4-D tensors have
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        B, T, S = self.sizes
        return B, 1, T, S

    def contiguous(self) -> Mask:
        return self

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{_NO_TENSOR}; asked for its {name!r}")

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        # no TypeError, which operators take for a reason to ask the other operand
        raise NotImplementedError(f"{_NO_TENSOR}; met in {getattr(function, '__name__', function)}")

    def __getitem__(self, at: Any) -> Tensor:
        """What an additive mask adds to each key, [B, S] float64: Longformer reads its padding as mask[:, 0, 0, :]."""
        if at != (slice(None), 0, 0, slice(None)):
            raise TypeError(f"{_NO_TENSOR}; asked for [{at}]")
        B, _, S = self.sizes
        row = torch.zeros(B, S, dtype=torch.float64, device=self.device)
        return row if self.key_mask is None else row.masked_fill(~self.key_mask, -math.inf)

    def view(self, conversion: Conversion | None, relative: bool) -> View:
        """Layout and coordinates, under what `use` put on the model; `relative`: the call has a position."""
        view = self.views.get((conversion, relative))
        if view is None:
            view = self.views[conversion, relative] = self._view(conversion, relative)
        return view

    def _view(self, conversion: Conversion | None, relative: bool) -> View:
        _, T, S = self.sizes
        layout, prefix, by_offset = self.layout, 0, True
        if conversion is not None:
            prefix = conversion.prefix
            if conversion.layout is not None:
                layout = _all_of([self.unwindowed, self._placed(conversion.layout, prefix)])
            by_offset = not any(getattr(position, "absolute", False) for position in conversion.position)
        readers = [leaf for leaf in _leaves(layout) if not leaf.by_index and not isinstance(leaf, Full)]
        if not readers and not relative:
            return View(layout, None, None)
        if self.q_offset is None:
            raise ValueError(
                f"attention_mask: a mask given by its values, {T} queries by {S} keys, does not say where the"
                " queries stand; give a 2-D attention mask instead"
            )
        start = self.q_offset - self.kv_offset
        if (by_offset and all(isinstance(leaf, _BY_OFFSET) for leaf in readers)) or (
            self.position_ids is None and self.kv_offset == prefix == 0 and not self._left_padding(0).any()
        ):
            q_pos = None if start == S - T else torch.arange(start, start + T, device=self.device)[None]
            return View(layout, q_pos, None)
        return View(layout, *self._absolute(prefix))

    def check_position_ids(self, ids: Tensor, prefix: int) -> None:
        """ValueError unless ids [B or 1, T] or [axes, B or 1, T] are this mask's coordinates but for where they start.

        In a cached step even that is known: at the first slot, or at each row's first real token.
        """
        if self.q_offset is None:
            # the view says what to give instead
            return
        _, T, _ = self.sizes
        ids = ids.reshape(-1, *ids.shape[-2:])
        device, end = ids.device, self.q_offset + T
        slots = torch.arange(self.q_offset, end)[None] if self.position_ids is None else self.position_ids
        shift = ids - slots.to(device)
        real = torch.ones(1, T, dtype=torch.bool, device=device)
        if self.padding is not None:
            seen = self.padding[:, self.q_offset : end].to(device)
            real = torch.nn.functional.pad(seen, (0, T - seen.shape[1]))
        shift, real = torch.broadcast_tensors(shift, real)
        if self.q_offset > prefix:
            left = self._left_padding(prefix)[:, None].to(device)
            follows = (shift == 0) | (shift == -left) | (shift == -left - prefix)
        else:
            # one axis of positions says where a row starts for all
            start = shift.gather(-1, real.long().argmax(-1, keepdim=True))[:1]
            follows = shift == start
        if bool((follows | ~real).all()):
            return
        _, row, token = (~follows & real).nonzero()[0].tolist()
        got = ids.expand_as(shift)[:, row, token].tolist()
        cached = f", on from the {self.q_offset} cached" if self.q_offset > prefix else ""
        raise ValueError(
            "position_ids: a model that lcattn.hf.extend remapped counts tokens by itself; expected positions that"
            f" count each row's one by one, alike on all axes{cached}, got {got} for token {token} of row {row}"
        )

    def _placed(self, layout: Layout, prefix: int) -> Layout:
        """The converted model's layout, checked against what this pass can offer it."""
        _, T, S = self.sizes
        causal = any(isinstance(leaf, Causal) for leaf in _leaves(self.unwindowed))
        if self.q_offset == 0 and T < S != T + prefix and not causal:
            raise ValueError(
                f"lcattn.hf.use: {S - T} keys precede the {T} queries; if they are a tuned prefix, call use"
                " on the PEFT model"
            )
        whole = T == S and self.q_offset == 0 and self.padding is None and self.position_ids is None
        if layout.by_index and not whole:
            raise ValueError(
                f"lcattn.hf.use: {layout} counts plain indices from 0, which serves no cache, padding or"
                " packing; documents are better told by position_ids, a mask by attention_mask"
            )
        if prefix and not isinstance(layout, Full):
            layout = layout | Global(indices=tuple(range(-prefix, 0)))
        if self.kv_offset and self.q_offset is not None:
            for first in set((self.q_offset - self._left_padding(prefix) - prefix).tolist()):
                if layout.by_content or _reaches(layout, first, T, first - self.q_offset, self.kv_offset):
                    raise ValueError(
                        f"lcattn.hf.use: {layout} sees keys that the model's sliding-window cache dropped;"
                        " pass past_key_values=transformers.DynamicCache(), which keeps them all"
                    )
        return layout

    def _left_padding(self, prefix: int) -> Tensor:
        """Hidden tokens before the first real one, [B or 1]; a tuned prefix stands before them all."""
        if self.padding is None:
            return torch.zeros(1, dtype=torch.long, device=self.device)
        return (self.padding[:, prefix:].cumsum(1) == 0).sum(1)

    def _absolute(self, prefix: int) -> tuple[Tensor, Tensor]:
        """Coordinates from each row's or document's first real token, [B or 1, T] and [B or 1, S]."""
        if self.position_ids is not None:
            return self.position_ids, self.position_ids
        assert self.q_offset is not None
        _, T, S = self.sizes
        origin = self._left_padding(prefix)[:, None] + prefix
        # an encoder's queries are not told of the prefix before their keys
        q_offset = max(self.q_offset, prefix)
        q_pos = torch.arange(q_offset, q_offset + T, device=self.device) - origin
        k_pos = torch.arange(self.kv_offset, self.kv_offset + S, device=self.device) - origin
        k_pos[:, :prefix] = torch.arange(-prefix, 0, device=self.device)
        return q_pos, k_pos


@functools.lru_cache(maxsize=256)
def _reaches(layout: Layout, first_query: int, T: int, first_key: int, S: int) -> bool:
    """Whether T queries from one coordinate see any of S keys from another, causally."""
    q_pos = torch.arange(first_query, first_query + T)[None]
    k_pos = torch.arange(first_key, first_key + S)[None]
    return lower(layout & Causal(), T=T, S=S, q_pos=q_pos, k_pos=k_pos).n_pairs() > 0


def _leaves(layout: Layout) -> Iterator[Layout]:
    parts = getattr(layout, "parts", None) or ((layout.part,) if hasattr(layout, "part") else ())
    for part in parts:
        yield from _leaves(part)
    if not parts:
        yield layout


def _all_of(layouts: Sequence[Layout]) -> Layout:
    narrowing = [layout for layout in layouts if not isinstance(layout, Full)]
    return functools.reduce(Layout.__and__, narrowing) if narrowing else Full()


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Mask:
    """The mask function of transformers' interface: who sees whom, from what its masking_utils composed.

    Args:
        batch_size, q_length, kv_length: B, T, S; q_offset, kv_offset: indices of the first query and key.
        mask_function: f(b, h, q_idx, kv_idx) -> bool; a part that transformers did not make is evaluated,
            under vmap, where the rest leaves it to decide, in O(T S) time at most and bounded memory.
        attention_mask: [B, n] bool, False hides a token, n up to kv_offset + S.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    q_offset = int(q_offset)
    padding = key_mask = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask: expected 2 or 4 dimensions, got {list(attention_mask.shape)}")
        end = kv_offset + kv_length
        # as transformers does: what the mask does not reach is hidden
        seen = torch.nn.functional.pad(attention_mask.bool(), (0, max(0, end - attention_mask.shape[1])))
        if not bool(seen.all()):
            padding, key_mask = attention_mask.bool(), seen[:, kv_offset:end]
    reader = _Reader(q_length, kv_length, q_offset, kv_offset, padding)
    layout = reader.read(mask_function, windows=True)
    return Mask(
        sizes=(batch_size, q_length, kv_length),
        layout=layout,
        unwindowed=reader.read(mask_function, windows=False) if reader.windowed else layout,
        key_mask=key_mask,
        q_offset=q_offset,
        kv_offset=kv_offset,
        padding=padding,
        position_ids=reader.position_ids,
        device=device,
    )


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _maker(function: Callable[..., Any]) -> str | None:
    """The function of masking_utils that `function` is, or that made it."""
    # a name alone may be borrowed, by functools.wraps
    code = getattr(function, "__code__", None)
    if getattr(function, "__module__", None) != masking_utils.__name__ or code is None:
        return None
    return function.__qualname__.partition(".")[0] if code.co_filename == masking_utils.__file__ else None


def _later_than(offset: int) -> Layout:
    """Keys whose offset is greater; configs without a window (Qwen2-MoE) say 0, and ask for its mask all the same."""
    return Window(-offset - 1, None) if offset < 0 else Not(Window(None, offset))


@dataclass
class _Reader:
    """Reads layouts off transformers' mask functions; notes packed documents and windows on the way."""

    T: int
    S: int
    q_offset: int
    kv_offset: int
    padding: Tensor | None
    windowed: bool = False
    position_ids: Tensor | None = None

    def read(self, function: Callable[..., Any], windows: bool) -> Layout:
        maker = _maker(function)
        held = _closure(function) if maker else {}
        match maker:
            case "causal_mask_function":
                return Causal()
            case "bidirectional_mask_function":
                return Full()
            case "and_masks":
                return self._both(held["mask_functions"], windows)
            case "or_masks":
                parts = [self.read(part, windows) for part in held["mask_functions"]]
                return functools.reduce(Layout.__or__, parts)
            case "sliding_window_overlay":
                return self._window(_later_than(-held["sliding_window"]), windows)
            case "sliding_window_bidirectional_overlay":
                return self._window(Window(held["sliding_window"], held["sliding_window"]), windows)
            case "chunked_overlay" if self._counts_from_first_token(held["left_padding"]):
                return self._window(Chunked(held["chunk_size"], lookback=0), windows)
            case "packed_sequence_mask_function":
                return self._documents(held["packed_sequence_mask"])
            case "blockwise_overlay":
                return self._documents(held["block_sequence_ids"])
            case "padding_mask_function":
                hidden = held["padding_mask"].long() - 1
                q_ids = torch.zeros(1, self.T, dtype=torch.long, device=hidden.device)
                return Documents(ids=self._keys(hidden), q_ids=q_ids)
        return MaskFunction.of(function, self.q_offset, self.kv_offset)

    def _both(self, functions: Sequence[Callable[..., Any]], windows: bool) -> Layout:
        documents = [
            _closure(f)["packed_sequence_mask"] for f in functions if _maker(f) == "packed_sequence_mask_function"
        ]
        parts = []
        for function in functions:
            if _maker(function) == "remap_positions_for_packed_sequence" and documents:
                held = _closure(function)
                positions = held["position_ids"]
                # within a document positions step by one, so offsets are those of plain indices
                steps = (positions.diff(dim=1) == 1) | (documents[0].diff(dim=1) != 0)
                if bool(steps.all()):
                    self.position_ids = positions
                    function = held["mask_function"]
            parts.append(self.read(function, windows))
        return _all_of(parts)

    def _window(self, layout: Layout, windows: bool) -> Layout:
        self.windowed = True
        return layout if windows else Full()

    def _counts_from_first_token(self, left_padding: Tensor) -> bool:
        mine = 0 if self.padding is None else (self.padding.cumsum(1) == 0).sum(1)
        return bool((left_padding == mine).all())

    def _documents(self, ids: Tensor) -> Layout:
        q_ids = ids[:, self.q_offset : self.q_offset + self.T]
        keys = self._keys(ids)
        same = self.T == self.S and self.q_offset == self.kv_offset
        return Documents(ids=keys) if same else Documents(ids=keys, q_ids=q_ids)

    def _keys(self, values: Tensor) -> Tensor:
        return values[:, self.kv_offset : self.kv_offset + self.S]


# The functions of the latest forward passes, which layouts name by number. A function has a new number in every pass:
# what it closes over may have changed, and tables are remembered by number.
_functions: OrderedDict[int, tuple[Callable[..., Any], bool]] = OrderedDict()
_numbers = itertools.count()
_N_FUNCTIONS = 1024


@register
@dataclass(frozen=True, repr=False, eq=False)
class MaskFunction(Layout):
    """A transformers mask function that nothing is known of, by indices of the whole sequence."""

    number: int
    q_offset: int
    kv_offset: int

    def __post_init__(self) -> None:
        if self.number not in _functions:
            raise ValueError(f"MaskFunction: function {self.number} is no longer held")
        spec = f"MaskFunction({self.number}, {self.q_offset}, {self.kv_offset})"
        set_fields(self, spec=spec, by_index=True, per_batch=_functions[self.number][1])

    @classmethod
    def of(cls, function: Callable[..., Any], q_offset: int, kv_offset: int) -> MaskFunction:
        number = next(_numbers)
        _functions[number] = (function, reads_batch_and_head(function)[0])
        while len(_functions) > _N_FUNCTIONS:
            _functions.popitem(last=False)
        return cls(number, q_offset, kv_offset)

    def visible(self, q_pos: Tensor, k_pos: Tensor, ctx: Context) -> Tensor:
        function, _ = _functions[self.number]
        b = torch.as_tensor(ctx.b, device=q_pos.device)
        q_idx = ctx.q_idx.clamp(0, ctx.T - 1) + self.q_offset
        k_idx = ctx.k_idx.clamp(0, ctx.S - 1) + self.kv_offset
        b, q_idx, k_idx = torch.broadcast_tensors(b, q_idx, k_idx)
        # as transformers does: such functions need only make sense for one element, and see head 0
        with TransformGetItemToIndex():
            seen = torch.vmap(function)(*(x.reshape(-1) for x in (b, torch.zeros_like(b), q_idx, k_idx)))
        return seen.reshape(q_idx.shape).to(q_pos.device)

    def bounds(self, region: Region) -> tuple[Tensor, Tensor]:
        some = torch.ones_like(region.q_lo, dtype=torch.bool)
        return some, ~some


# masks given by their values, with the version of the tensor that was read
_by_value: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _from_values(values: Tensor, T: int, S: int) -> Mask:
    """The mask that a [B or 1, H or 1, T or 1, S] tensor gives: True or 0 sees, False or -inf does not."""
    # tensors of inference mode don't count their changes
    version = None if values.is_inference() else values._version
    known = _by_value.get(values)
    if known is not None and known[0] == version is not None and known[1].sizes[1:] == (T, S):
        return known[1]
    if values.dim() != 4 or values.shape[2] not in (1, T) or values.shape[3] not in (1, S):
        raise ValueError(f"attention_mask: expected [B or 1, H or 1, {T}, {S}], got {list(values.shape)}")
    # not a view of the key of the memo, which would live as long as its value
    seen = values.data
    if values.dtype != torch.bool:
        seen = values == 0
        if values.requires_grad or not bool((seen | (values <= HIDDEN)).all()):
            raise ValueError(
                "attention_mask: a float mask must hold 0 where a key is seen and -inf (or at most -1e4)"
                " where not; for a bias on scores: lcattn.hf.use(model, layout, lcattn.RelativeBias(...))"
            )
    q_offset = 0 if T == S else None
    if values.shape[1] == values.shape[2] == 1:
        layout: Layout = Full()
        key_mask = seen[:, 0, 0].expand(-1, S)
    else:
        layout, key_mask = Blocks(seen.expand(-1, -1, T, S), block=1), None
    mask = Mask((values.shape[0], T, S), layout, layout, key_mask, q_offset, device=values.device)
    _by_value[values] = (version, mask)
    return mask


def mask_of(attention_mask: Mask | BlockMask | Tensor | None, query: Tensor, S: int, causal: bool) -> Mask:
    """Whatever reaches an attention function, as a `Mask` of the right sizes."""
    B, _, T, _ = query.shape
    if attention_mask is None:
        # as sdpa: a single query sees every key, others stand at the start of the keys
        causal = causal and T > 1
        layout: Layout = Causal() if causal else Full()
        return Mask((B, T, S), layout, layout, q_offset=0 if causal else S - T, device=query.device)
    if isinstance(attention_mask, BlockMask):
        layout = FromBlockMask(attention_mask)
        return Mask((B, T, S), layout, layout, q_offset=0 if T == S else None, device=query.device)
    if isinstance(attention_mask, Tensor):
        return _from_values(attention_mask, T, S)
    if not isinstance(attention_mask, Mask):
        raise TypeError(f"attention_mask: expected a tensor or lcattn's Mask, got {type(attention_mask).__name__}")
    b, t, s = attention_mask.sizes
    if b not in (1, B) or (t, s) != (T, S):
        if attention_mask.layout == Full() and attention_mask.key_mask is None:
            # keys that a prefix added unannounced are seen as well: sdpa comes to it by making no mask at all
            return replace(attention_mask, sizes=(B, T, S), views={})
        raise ValueError(f"attention_mask: made for {b} x {t} queries by {s} keys, got {B} x {T} queries by {S} keys")
    return attention_mask
