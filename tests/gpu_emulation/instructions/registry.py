"""The table of translations, by opcode name and, where types of operands decide, by kind of type."""

from __future__ import annotations

from collections.abc import Callable

from tests.gpu_emulation.context import Context
from tests.gpu_emulation.opcode import Opcode, is_float, is_half
from tests.gpu_emulation.ptx import TYPE_BYTES, PtxError

Translation = Callable[[Context, Opcode, tuple[str, ...]], str]

_TABLE: dict[tuple[str, str], Translation] = {}


def instruction(*names: str, kind: str = "any") -> Callable[[Translation], Translation]:
    """Registers the translation of opcodes; `kind` is "integer", "float" or "half" where the last type must be one."""

    def register(function: Translation) -> Translation:
        for name in names:
            assert (name, kind) not in _TABLE, f"{name} is translated twice"
            _TABLE[name, kind] = function
        return function

    return register


def _kind(opcode: Opcode) -> str:
    last = opcode.modifiers[-1] if opcode.modifiers else ""
    if last not in TYPE_BYTES:
        return "any"
    return "float" if is_float(last) else "half" if is_half(last) else "integer"


def translation(opcode: Opcode) -> Translation:
    found = _TABLE.get((opcode.name, _kind(opcode))) or _TABLE.get((opcode.name, "any"))
    if found is None:
        raise PtxError(f"opcode {opcode.text} is not supported")
    return found
