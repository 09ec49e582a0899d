"""Rotary positions: frequencies, and queries and keys turned by any coordinates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..cpu import decodes
from ..ops import fused_turn, fuses_turns, is_unwatched
from ..problem import turn_by
from .base import Terms, check_positive, remembered

# a table of so many coordinates is made for any number of rows
_LONG_TABLE = 1 << 17


class Turning(ABC):
    """A position that turns queries and keys, in one way or several, and says which pairs meet in which."""

    # whether it reads coordinates themselves, not only their differences
    absolute = True

    @property
    @abstractmethod
    def frequencies_of(self) -> Rotary:
        """The frequencies to turn by."""

    @abstractmethod
    def queries(self, i: Tensor) -> list[Tensor]:
        """The coordinates that queries at i [B or 1, T] are turned to, one for each way."""

    @abstractmethod
    def keys(self, j: Tensor) -> list[Tensor | None]:
        """The same for keys at j [B or 1, S]; None leaves them as they are."""

    def reach(self, length: Callable[[], int]) -> int:
        """The length that frequencies which depend on it are for; length() is the text's."""
        return length()

    def phases(self) -> dict[str, Any]:
        """The terms that say who meets whom in which way; none for one way."""
        return {}

    def lower(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> Terms:
        T, D = q.shape[2:]
        S = k.shape[2]
        rotary = self.frequencies_of
        # a cache may have room for more than the text
        length = rotary.that_matters(lambda: self.reach(lambda: S if q_pos is None else int(q_pos.max()) + 1))
        frequency, _ = rotary.frequencies(D, length, q.device)
        if D % 2 or 2 * len(frequency) > D:
            raise ValueError(f"Rotary: the head dim must be even and at least {2 * len(frequency)}, got {D}")
        if rotary.attention_factor != 1:
            q = q * rotary.attention_factor**2
        terms = self.phases() | {"q": self._turned(q, "queries", q_pos, S - T, length)}
        # for few queries, turning a whole cache would cost more than reading it; compiled graphs serve all lengths, so
        # they don't ask for this one
        few = is_unwatched((q, k)) and decodes(q, k)
        if few and (places := _places_of(self, "keys", k, k_pos, 0)) is not None:
            table = _table(rotary, D, length, places.span, k.device)
            return Terms(**terms, k=(k,) * len(places.rows), turn_table=table, turn_at=places.rows)
        return Terms(**terms, k=self._turned(k, "keys", k_pos, 0, length))

    def _turned(self, x: Tensor, side: Side, at: Tensor | None, first: int, length: int) -> tuple[Tensor, ...]:
        """x [B, heads, n, D] in each way, for coordinates at [B or 1, n], None for those from `first` on."""
        rotary, D = self.frequencies_of, x.shape[3]
        places = _places_of(self, side, x, at, first) if fuses_turns(x) else None
        if places is not None:
            table = _table(rotary, D, length, places.span, x.device)
            # rows of keys close together: query blocks in turn read them where they lie
            packed = side == "keys"
            ways = zip(places.rows, places.kept, strict=True)
            return tuple(x if kept else fused_turn(x, table, rows, packed) for rows, kept in ways)
        frequency, factor = rotary.frequencies(D, length, x.device)
        if at is None:
            at = torch.arange(first, first + x.shape[2], device=x.device)[None]
        return tuple(x if to is None else turn(x, to, frequency, factor) for to in getattr(self, side)(at))


Side = Literal["queries", "keys"]


class _Places(NamedTuple):
    """Rows of a table that queries or keys are turned by.

    rows: [ways, B or 1, n] int32, -1 for none; kept: the ways that turn nothing; span: coordinates of the table, from
    one to before the other.
    """

    rows: Tensor
    kept: tuple[bool, ...]
    span: tuple[int, int]


def _places_of(position: Turning, side: Side, x: Tensor, at: Tensor | None, first: int) -> _Places | None:
    """For x [B, heads, n, D] at coordinates `at`, or from `first` on; None where a table would be too long."""
    end = first + x.shape[2]
    if at is None and first < 0:
        at = torch.arange(first, end, device=x.device)[None]
    if at is not None:
        places = _places(position, side, at)
        # coordinates far apart, or far from the first
        return places if places.span[1] - places.span[0] <= max(_LONG_TABLE, 4 * x.shape[2]) else None
    places = _default_places(position, side, _power_of_two(end), x.device)
    return places._replace(rows=places.rows[..., first:end])


def _places(position: Turning, side: Side, at: Tensor) -> _Places:
    ways = getattr(position, side)(at)
    given = torch.stack(torch.broadcast_tensors(*(to for to in ways if to is not None)))
    low, high = int(given.min()), int(given.max())
    # a padded row's keys may stand before its first
    first = -_power_of_two(-low) if low < 0 else 0
    rows = [torch.full_like(at, -1) if to is None else to - first for to in ways]
    stacked = torch.stack(torch.broadcast_tensors(*rows)).int().contiguous()
    return _Places(stacked, tuple(to is None for to in ways), (first, first + _power_of_two(high - first + 1)))


@remembered(64)
def _default_places(position: Turning, side: Side, end: int, device: torch.device) -> _Places:
    return _places(position, side, torch.arange(end, device=device)[None])


def _power_of_two(n: int) -> int:
    """At or above n, so that a cache serves all lengths up to it."""
    return 1 << max(n - 1, 1).bit_length()


@dataclass(frozen=True)
class Rotary(Turning):
    """Rotary embedding: q and k are turned by their coordinates, so that q . k depends on k_pos - q_pos.

    Pair (d, d + R/2) turns by angle pos * base^(-2 d / R) (the half-split convention of GPT-NeoX and Llama); R is the
    head dim, or the part of it that partial_rotary_factor names, and features from R on stay as they are.

    Args:
        base: of the frequencies.
        rope_parameters: transformers' dictionary (rope_type default, linear, dynamic, yarn, longrope, llama3, and what
            the type needs: factor, original_max_position_embeddings, ...; dynamic and longrope also take the config's
            max_position_embeddings). Its rope_theta goes before base. The length that dynamic and longrope look at is
            the largest of q_pos plus one, and S without q_pos.
        attention_factor: scores are multiplied by its square (queries are), besides what rope_parameters ask for: above
            1 it makes attention sharper, which many more keys than in training blur.

    Source: Su et al. 2021 (RoFormer), equation 34; attention_factor: Peng et al. 2023 (YaRN), section 3.4.
    """

    base: float = 10000.0
    rope_parameters: Mapping[str, Any] | None = field(default=None, hash=False)
    attention_factor: float = 1.0
    absolute = False

    def __post_init__(self) -> None:
        check_positive("Rotary", "base", self.base)
        check_positive("Rotary", "attention_factor", self.attention_factor)
        if self.rope_parameters is not None:
            object.__setattr__(self, "rope_parameters", _checked(self.rope_parameters, self.base))

    @property
    def frequencies_of(self) -> Rotary:
        return self

    def frequencies(self, D: int, length: int, device: torch.device) -> tuple[Tensor, float]:
        """Angles per unit of coordinate, [R / 2] float32, and the factor on cos and sin."""
        return _frequencies(self, D, self.that_matters(lambda: length), device)

    def that_matters(self, length: Callable[[], int]) -> int:
        """length() as far as frequencies depend on it, so that caches serve all others."""
        return length() if (self.rope_parameters or {}).get("rope_type") in _BY_LENGTH else 0

    def queries(self, i: Tensor) -> list[Tensor]:
        return [i]

    def keys(self, j: Tensor) -> list[Tensor | None]:
        return [j]


def turn(x: Tensor, position: Tensor, frequency: Tensor, factor: float) -> Tensor:
    """x [B, heads, n, D] turned to coordinates [B or 1, n]: its first 2 len(frequency) features, in halves."""
    # angles of long documents need float64: float32 is off by 0.03 at a million
    angle = position[:, None, :, None].double() * frequency.double()
    cos, sin = ((f * factor).to(torch.promote_types(x.dtype, torch.float32)) for f in (angle.cos(), angle.sin()))
    return turn_by(x, cos, sin)


@remembered(16)
def _table(rotary: Rotary, D: int, length: int, span: tuple[int, int], device: torch.device) -> Tensor:
    """cos then sin of the coordinates from one to before the other, [n, R] float32."""
    frequency, factor = rotary.frequencies(D, length, device)
    angle = torch.arange(*span, device=device)[:, None] * frequency.double()
    return (torch.cat([angle.cos(), angle.sin()], 1) * factor).float()


# types whose frequencies depend on the length of the text
_BY_LENGTH = ("dynamic", "longrope")
# what each type must be given beside rope_theta; others that transformers knows are checked by it
_ORIGINAL = "original_max_position_embeddings"
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "yarn": ("factor", _ORIGINAL),
    "longrope": ("short_factor", "long_factor", _ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}


def _checked(given: Mapping[str, Any], base: float) -> dict[str, Any]:
    """rope_parameters with every number in order and rope_theta filled in."""
    if not isinstance(given, Mapping):
        raise ValueError(f"Rotary: rope_parameters must be a dictionary, got {given!r}")
    parameters = {"rope_theta": base, **given}
    by_layer = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if by_layer:
        raise ValueError(f"Rotary: rope_parameters must be those of one kind of layer, got one each of {by_layer}")
    # "type" is how older configs call it
    kind = parameters["rope_type"] = parameters.get("rope_type", parameters.pop("type", "default"))
    if not isinstance(kind, str):
        raise ValueError(f"Rotary: rope_type must be one of {', '.join(_NEEDED)}, got {kind!r}")
    if kind in ("yarn", "longrope", "llama3") and "max_position_embeddings" in parameters:
        parameters.setdefault(_ORIGINAL, parameters["max_position_embeddings"])
    if kind == "dynamic" and _ORIGINAL in parameters:
        parameters.setdefault("max_position_embeddings", parameters[_ORIGINAL])
    if kind == "longrope" and not {"factor", "attention_factor", "max_position_embeddings"} & set(parameters):
        raise ValueError("Rotary: longrope needs factor, attention_factor or max_position_embeddings, got none")
    for name in _NEEDED.get(kind, ()):
        if parameters.get(name) is None:
            raise ValueError(f"Rotary: rope_type {kind!r} needs {', '.join(_NEEDED[kind])}, got no {name}")
    for name, value in parameters.items():
        if name.endswith("_factor") and name.split("_")[0] in ("short", "long"):
            for one in value:
                check_positive("Rotary", f"rope_parameters[{name!r}]", one)
        elif value is not None and ("factor" in name or name in ("rope_theta", "max_position_embeddings", _ORIGINAL)):
            check_positive("Rotary", f"rope_parameters[{name!r}]", value)
    return parameters


@remembered(64)
def _frequencies(rotary: Rotary, D: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    if rotary.rope_parameters is None:
        return _default_frequencies(rotary.base, D, device), 1.0
    return _rope_frequencies(rotary.rope_parameters, D, length, device)


def _default_frequencies(base: float, R: int, device: torch.device) -> Tensor:
    return 1.0 / base ** (torch.arange(0, R, 2, device=device, dtype=torch.float32) / R)


def _rope_frequencies(parameters: Mapping[str, Any], D: int, length: int, device: torch.device) -> tuple[Tensor, float]:
    from transformers import PreTrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    if kind == "default":
        R = int(D * parameters.get("partial_rotary_factor", 1.0))
        return _default_frequencies(parameters.get("rope_theta", 10000.0), R, device), 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        expected = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
        raise ValueError(f"Rotary: rope_type must be one of {expected}, got {kind!r}")
    known = parameters.get("max_position_embeddings", parameters.get(_ORIGINAL, length))
    config = PreTrainedConfig()
    needed = {"head_dim": D, "hidden_size": D, "num_attention_heads": 1, "max_position_embeddings": known}
    for name, value in {**needed, "rope_parameters": dict(parameters)}.items():
        setattr(config, name, value)
    R = int(D * parameters.get("partial_rotary_factor", 1.0))
    for name in ("short_factor", "long_factor"):
        if name in parameters and len(parameters[name]) != R // 2:
            what = f"{R // 2} factors for head dim {D}, got {len(parameters[name])}"
            raise ValueError(f"Rotary: rope_parameters[{name!r}] must have {what}")
    frequency, factor = ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=length)
    return frequency.to(device), factor
