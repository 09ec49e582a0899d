"""What an instruction's translation needs of the function around it: operands as C++ expressions."""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass, field

from tests.gpu_emulation.opcode import bits, is_float, is_half, is_signed
from tests.gpu_emulation.ptx import Function, Module, PtxError, split_operands

_SPECIAL_REGISTERS = {
    **{f"%{name}.{axis}": f"thread.{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"},
    # every block is a cluster of its own
    **{f"%cluster_ctaid.{axis}": "0u" for axis in "xyz"},
    **{f"%cluster_nctaid.{axis}": "1u" for axis in "xyz"},
    **{f"%clusterid.{axis}": f"thread.ctaid.{axis}" for axis in "xyz"},
    **{f"%nclusterid.{axis}": f"thread.nctaid.{axis}" for axis in "xyz"},
    "%cluster_ctarank": "0u",
    "%cluster_nctarank": "1u",
    "%laneid": "thread.lane",
    "%warpid": "(thread.index / 32u)",
    "%nwarpid": "((thread.ntid.x * thread.ntid.y * thread.ntid.z + 31u) / 32u)",
    "%smid": "0u",
    "%nsmid": "1u",
    "%gridid": "0u",
    "%lanemask_eq": "(1u << thread.lane)",
    "%lanemask_lt": "((1u << thread.lane) - 1u)",
    "%lanemask_le": "(((1u << thread.lane) - 1u) | 1u << thread.lane)",
    "%lanemask_gt": "(~0u << thread.lane & ~(1u << thread.lane))",
    "%lanemask_ge": "(~0u << thread.lane)",
    "%clock": "0u",
    "%clock_hi": "0u",
    "%clock64": "0ull",
    "%globaltimer": "0ull",
    "%dynamic_smem_size": "thread.dynamic_shared_bytes",
    "%total_smem_size": "thread.total_shared_bytes",
}


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name.lstrip("%"))


def c_type(type_: str) -> str:
    """The C++ type that an operand of a PTX type is computed in; half types stay bits."""
    if type_ == "pred":
        return "bool"
    if is_float(type_):
        return {"f32": "float", "f64": "double"}[type_]
    if type_ == "b128":
        return "Bits128"
    return f"{'' if is_signed(type_) else 'u'}int{bits(type_)}_t"


def integer_literal(value: int, type_: str) -> str:
    width = bits(type_)
    value &= (1 << width) - 1
    return f"{c_type(type_)}({value:#x}{'ull' if width > 32 else 'u'})"


@dataclass
class Context:
    """`float_registers` are those of untyped bits that are mostly used as floats, hence kept as such."""

    module: Module
    function: Function
    shared_offsets: dict[str, int]
    float_registers: frozenset[str] = frozenset()
    votes: Counter[str] = field(default_factory=Counter)
    site: int = 0

    def __post_init__(self) -> None:
        self.parameter_offsets: dict[str, int] = {}
        offset = 0
        for parameter in self.function.parameters:
            offset = -(-offset // parameter.alignment) * parameter.alignment
            self.parameter_offsets[parameter.name] = offset
            offset += parameter.bytes
        self.parameter_bytes = offset
        self.variables = {variable.name: variable for variable in self.function.variables}

    def storage(self, register: str) -> str:
        """The type that the C++ variable of a register has."""
        declared = self.function.registers[register]
        if declared == "pred" or is_float(declared) or declared == "b128":
            return declared
        if register in self.float_registers:
            return f"f{bits(declared)}"
        return f"b{bits(declared)}"

    def is_register(self, operand: str) -> bool:
        return operand in self.function.registers

    def register(self, name: str, type_: str) -> str:
        if bits(type_) in (32, 64):
            self.votes[name] += 1 if is_float(type_) else -1
        return f"r_{identifier(name)}"

    def read(self, operand: str, type_: str) -> str:
        """An operand as an expression of c_type(type_)."""
        if self.is_register(operand):
            return self._read_register(operand, type_)
        if operand.startswith("!") and type_ == "pred":
            return f"!{self.read(operand[1:], 'pred')}"
        if operand in _SPECIAL_REGISTERS:
            return f"{c_type(type_)}({_SPECIAL_REGISTERS[operand]})"
        if operand == "WARP_SZ":
            return integer_literal(32, type_)
        if (value := self._literal(operand, type_)) is not None:
            return value
        if (symbol := self._symbol(operand)) is not None:
            return f"{c_type(type_)}({symbol})"
        raise PtxError(f"operand not understood: {operand}")

    def _read_register(self, operand: str, type_: str) -> str:
        name, storage = self.register(operand, type_), self.storage(operand)
        if (type_ == "pred") != (storage == "pred"):
            raise PtxError(f"operand {operand} is of type .{storage}, not .{type_}")
        if storage == type_ or type_ in ("pred", "b128"):
            return name
        if is_float(storage):
            name = f"as_bits({name})"
        if is_float(type_):
            return f"as_{c_type(type_)}({name})"
        return name if f"b{bits(type_)}" == f"b{bits(storage)}" and not is_signed(type_) else f"{c_type(type_)}({name})"

    @staticmethod
    def _literal(operand: str, type_: str) -> str | None:
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            if type_ == "f64":
                value = struct.unpack(">f", bytes.fromhex(match[1]))[0]
                return f"as_double(0x{struct.pack('>d', value).hex()}ull)"
            return f"as_float(0x{match[1]}u)" if type_ == "f32" else f"{c_type(type_)}(0x{match[1]}u)"
        if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            if type_ == "f32":
                return f"float(as_double(0x{match[1]}ull))"
            return f"as_double(0x{match[1]}ull)" if type_ == "f64" else f"{c_type(type_)}(0x{match[1]}ull)"
        if match := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", operand):
            text = match[2]
            value = int(text, 8 if re.fullmatch(r"0\d+", text) else 0) * (-1 if match[1] else 1)
            if is_float(type_):
                return f"{c_type(type_)}({value})"
            if type_ == "pred":
                return "true" if value else "false"
            return integer_literal(value, type_)
        if is_float(type_) and re.fullmatch(r"-?\d+\.\d*([eE][-+]?\d+)?", operand):
            return f"{c_type(type_)}({operand})"
        return None

    def _symbol(self, operand: str) -> str | None:
        """The address of a variable, plus an offset, in the variable's state space."""
        match = re.fullmatch(r"([A-Za-z_$][\w$]*)\s*(?:\+\s*(-?\d+))?", operand)
        if match is None:
            return None
        name, offset = match[1], int(match[2] or 0)
        if name in self.shared_offsets:
            return f"{self.shared_offsets[name] + offset}u"
        if name in self.parameter_offsets:
            return f"uint64_t(parameters + {self.parameter_offsets[name] + offset})"
        if name in self.variables and self.variables[name].space in ("local", "param"):
            return f"uint64_t({self.variable(name)} + {offset})"
        if name in self.module.variables or name in self.variables:
            return f"uint64_t(reinterpret_cast<char*>({self.variable(name)}) + ({offset}))"
        return None

    def variable(self, name: str) -> str:
        return f"v_{identifier(name)}"

    def write(self, destination: str, type_: str, expression: str) -> str:
        """A statement that sets a register, extended from `type_` to the register's width."""
        if destination == "_":
            return f"(void)({expression});"
        if not self.is_register(destination):
            raise PtxError(f"destination is not a register: {destination}")
        name, storage = self.register(destination, type_), self.storage(destination)
        if (type_ == "pred") != (storage == "pred"):
            raise PtxError(f"destination {destination} is of type .{storage}, not .{type_}")
        if type_ in ("pred", "b128"):
            return f"{name} = {expression};"
        if is_float(type_):
            return (
                f"{name} = {expression};" if storage == type_ else f"{name} = as_bits({c_type(type_)}({expression}));"
            )
        if is_float(storage):
            return f"{name} = as_{c_type(storage)}({c_type('b' + storage[1:])}({c_type(type_)}({expression})));"
        return f"{name} = {c_type(type_)}({expression});"

    def address(self, operand: str, space: str) -> str:
        """The host address of a memory operand [base+offset] of a state space, or of a generic address."""
        match = re.fullmatch(r"\[\s*(?P<base>[%\w$]+)\s*(?:\+\s*(?P<offset>-?\w+))?\s*\]", operand)
        if match is None:
            raise PtxError(f"address not understood: {operand}")
        base, offset = match["base"], int(match["offset"] or "0", 0)
        if not self.is_register(base):
            if re.fullmatch(r"\d+", base):
                expression = integer_literal(int(base) + offset, "u64")
            elif (symbol := self._symbol(f"{base}+{offset}")) is not None:
                expression = symbol
            else:
                raise PtxError(f"address not understood: {operand}")
        else:
            wide = bits(self.function.registers[base]) == 64
            type_ = "u64" if wide else "u32"
            expression = self.read(base, type_)
            if offset:
                expression = f"({expression} + {integer_literal(offset, type_)})"
        if space == "shared":
            return f"shared_address(thread, {expression}, {self.site}u)"
        return f"uint64_t({expression})"

    @staticmethod
    def vector(operand: str) -> tuple[str, ...]:
        """The elements of {a, b}, or the operand itself."""
        return split_operands(operand.strip()[1:-1]) if operand.startswith("{") else (operand,)

    @staticmethod
    def half_format(type_: str) -> str:
        assert is_half(type_)
        return "Bf16" if type_.startswith("bf16") else "F16"
