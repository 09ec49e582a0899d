"""Readings: a model's own attention or a context extender, each in a layout or not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..layout import Layout, from_spec
from .sources import Source

# how a model may read: as it is, by rescaled rotary frequencies, by remapped positions (as in lcattn.hf.extend, which
# imports transformers)
RESCALED = ("linear", "dynamic", "yarn")
METHODS = ("plain", *RESCALED, "dual_chunk", "self_extend", "rerope")


@dataclass(frozen=True)
class Reading:
    """A way for a model to read.

    Attributes:
        method: one of METHODS; options: the method's own, by name.
        layout: who sees whom, besides the model's causality; None, what the method does by itself: the model's own
            attention (torch's sdpa) for plain, linear, dynamic and yarn, lcattn for the others.
    """

    method: str
    options: tuple[tuple[str, Any], ...] = ()
    layout: Layout | None = None

    @classmethod
    def parse(cls, text: str, layout: str | None = None) -> Reading:
        """A reading from METHOD or METHOD:key=value,key=value; a layout named there goes before `layout`.

        `layout=EXPRESSION` is read by `lcattn.layout.from_spec`. `attention=lcattn` is short for `layout=Full()`,
        `attention=sdpa` for no layout. Other keys go to the method, as numbers where they look like such.

        Raises:
            ValueError: an unknown method, a key without a value or given twice, a layout that is none.
        """
        method, _, rest = text.strip().partition(":")
        if method not in METHODS:
            raise ValueError(f"reading: expected one of {', '.join(METHODS)}, got {method!r}")
        options: dict[str, Any] = {}
        for item in _split(rest):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not (key.isidentifier() and equals and value):
                raise ValueError(f"reading: expected {method}:key=value,key=value, got {text!r}")
            if key in options:
                raise ValueError(f"reading: {text!r} gives {key} twice")
            options[key] = value
        spec = options.pop("layout", layout)
        attention = options.pop("attention", None)
        if attention is not None:
            if attention not in ("sdpa", "lcattn"):
                raise ValueError(f"reading: {text!r}: attention is sdpa or lcattn, got {attention!r}")
            if method not in ("plain", *RESCALED):
                raise ValueError(f"reading: {text!r}: {method} runs on lcattn, its attention can't be chosen")
            spec = None if attention == "sdpa" else spec or "Full()"
        if method == "plain" and options:
            raise ValueError(f"reading: plain takes no {', '.join(options)}")
        found = None
        if spec is not None:
            try:
                found = from_spec(spec)
            except TypeError as error:
                raise ValueError(f"layout: {spec!r}: {error}") from None
        return cls(method, tuple((key, _value(value)) for key, value in options.items()), found)

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        layout = () if self.layout is None else (("layout", self.layout.spec),)
        return ":".join([self.method, ",".join(f"{k}={v}" for k, v in (*self.options, *layout))]).rstrip(":")

    def describe(self) -> dict[str, Any]:
        """For the results: reading, method, options, layout."""
        layout = None if self.layout is None else self.layout.spec
        return {"reading": self.name, "method": self.method, "options": dict(self.options), "layout": layout}

    @contextmanager
    def put_on(self, source: Source, to: int) -> Iterator[None]:
        """The model reads this way, up to `to` tokens, until the block is left; then as it was.

        Raises:
            ValueError: this model can't read so; the message says why.
        """
        from .. import hf

        options = dict(self.options)
        if self.method in RESCALED and to <= source.trained and "factor" not in options:
            raise ValueError(
                f"reading: {self.name} stretches the {source.trained:,} tokens that {source.name} was trained on;"
                f" expected a longer text (or factor=...), got {to:,}"
            )
        model = source.model
        own = model.config._attn_implementation
        try:
            if self.method != "plain":
                hf.extend(model, to=to, method=self.method, layout=self.layout, **options)
            elif self.layout is not None:
                hf.use(model, self.layout)
            if self.method in RESCALED and self.layout is None:
                model.set_attn_implementation(own)
        except (TypeError, ValueError) as error:
            hf.use(model, None)
            raise ValueError(f"reading: {self.name}: {error}") from error
        try:
            yield
        except IndexError as error:
            # what torch says of an embedding of positions
            if "index out of range in self" not in str(error):
                raise
            raise ValueError(f"reading: {self.name}: {source.name} has no positions for so many tokens") from error
        finally:
            hf.use(model, None)


def parse_all(texts: list[str], layout: str | None) -> list[Reading]:
    """Every reading once. ValueError if two are the same."""
    readings = [Reading.parse(text, layout) for text in texts]
    names = [reading.name for reading in readings]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"reading: {name} is given twice")
    return readings


def _split(text: str) -> list[str]:
    """Cut at commas outside parentheses."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return items if text else []


def _value(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (int, float)) else text
