"""An opcode's modifiers, each of which an instruction's translation must take: one left over is an error."""

from __future__ import annotations

from tests.gpu_emulation.ptx import TYPE_BYTES, PtxError


class Opcode:
    """`name` and the modifiers in order, as `fma` and `rn`, `ftz`, `f32` of fma.rn.ftz.f32."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.name, *self.modifiers = text.split(".")

    def take(self, *names: str) -> str | None:
        """Removes and returns the first modifier that is one of `names`, or None."""
        for index, modifier in enumerate(self.modifiers):
            if modifier in names:
                return self.modifiers.pop(index)
        return None

    def has(self, name: str) -> bool:
        return self.take(name) is not None

    def require(self, *names: str) -> str:
        found = self.take(*names)
        if found is None:
            raise PtxError(f"{self.text} has none of the modifiers supported here: {', '.join(names)}")
        return found

    def take_prefixed(self, *prefixes: str) -> list[str]:
        """Removes and returns all modifiers that begin with one of `prefixes`."""
        found = [modifier for modifier in self.modifiers if modifier.startswith(prefixes)]
        self.modifiers = [modifier for modifier in self.modifiers if not modifier.startswith(prefixes)]
        return found

    def type(self) -> str:
        """Removes and returns the last modifier, which must be a type."""
        if not self.modifiers or self.modifiers[-1] not in TYPE_BYTES:
            raise PtxError(f"{self.text} does not end with a supported type")
        return self.modifiers.pop()

    def finish(self) -> None:
        if self.modifiers:
            raise PtxError(f"{self.text}: modifier .{self.modifiers[0]} is not supported")


def is_float(type_: str) -> bool:
    return type_ in ("f32", "f64")


def is_half(type_: str) -> bool:
    return type_ in ("f16", "bf16", "f16x2", "bf16x2")


def is_signed(type_: str) -> bool:
    return type_.startswith("s")


def bits(type_: str) -> int:
    return TYPE_BYTES[type_] * 8


def bare(type_: str) -> str:
    """The untyped-bits type of the same width."""
    return f"b{bits(type_)}"
