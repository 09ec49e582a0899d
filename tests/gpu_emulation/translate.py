"""A kernel's PTX as C++ that runs on the runtime beside this file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tests.gpu_emulation.context import Context, c_type, identifier, integer_literal
from tests.gpu_emulation.instructions import translation
from tests.gpu_emulation.opcode import Opcode, bits
from tests.gpu_emulation.ptx import Function, Instruction, Label, Module, Parameter, PtxError, Variable

_DYNAMIC_ALIGNMENT = 1024
# between static arrays of shared memory; they stay aligned as they would be without
_RED_ZONE = _DYNAMIC_ALIGNMENT
# that a block may have at most, by architecture: CUDA C++ Programming Guide, technical specifications per compute
# capability
_SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
_SHARED_KIB_ELSEWHERE = 227
_EXPORT = '__attribute__((visibility("default")))'
_JUMPS = ("bra", "brx", "ret", "exit")


@dataclass(frozen=True)
class KernelParameter:
    name: str
    type: str
    offset: int
    bytes: int


@dataclass(frozen=True)
class Translated:
    """`blocks` are the opcodes of each basic block, in the order of the counters; `sites` are the instructions."""

    source: str
    parameters: tuple[KernelParameter, ...]
    parameter_bytes: int
    blocks: tuple[tuple[str, ...], ...]
    sites: tuple[str, ...]


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _reachable(module: Module, kernel: Function) -> list[Function]:
    """The kernel's device functions, each before its callers."""
    ordered: list[Function] = []

    def visit(function: Function, callers: tuple[str, ...]) -> None:
        if function.name in callers:
            raise PtxError(f"function {function.name} calls itself, which is not supported")
        for statement in function.statements:
            if isinstance(statement, Instruction) and statement.opcode.split(".")[0] == "call":
                for operand in statement.operands:
                    if operand in module.functions:
                        visit(module.functions[operand], (*callers, function.name))
        if function not in ordered:
            ordered.append(function)

    visit(kernel, ())
    return ordered


def _symbols(function: Function) -> set[str]:
    return {
        name
        for statement in function.statements
        if isinstance(statement, Instruction)
        for operand in statement.operands
        for name in re.findall(r"[A-Za-z_$][\w$]*", operand)
    }


class _Translator:
    def __init__(self, module: Module, kernel: Function) -> None:
        self.module = module
        self.kernel = kernel
        self.functions = _reachable(module, kernel)
        self.used = set().union(*(_symbols(function) for function in self.functions))
        self.shared_offsets, self.static_shared_bytes, self.red_zones = self._lay_out_shared()
        self.sites: list[tuple[str, str]] = []
        self.blocks: list[list[str]] = []

    def _lay_out_shared(self) -> tuple[dict[str, int], int, list[tuple[int, int]]]:
        """Static variables in order, then the extern ones, which all begin where the dynamic memory does.

        The bytes are those that a GPU would need, without the red zones, which are given by their offsets and ends.
        """
        variables = [variable for function in self.functions for variable in function.variables]
        variables += [variable for variable in self.module.variables.values() if variable.name in self.used]
        shared = [variable for variable in variables if variable.space == "shared"]
        offsets: dict[str, int] = {}
        zones: list[tuple[int, int]] = []
        offset = 0

        def begin(alignment: int) -> int:
            nonlocal offset
            end = offset + len(zones) * _RED_ZONE
            offset = _align(offset, alignment)
            if offsets:
                zones.append((end, offset + (len(zones) + 1) * _RED_ZONE))
            return offset + len(zones) * _RED_ZONE

        for variable in shared:
            if not variable.is_extern:
                offsets[variable.name] = begin(variable.alignment)
                offset += variable.bytes
        dynamic = [variable for variable in shared if variable.is_extern]
        if dynamic:
            alignment = max(variable.alignment for variable in dynamic)
            if alignment > _DYNAMIC_ALIGNMENT:
                raise PtxError(f"{dynamic[0].name}: alignment {alignment} exceeds {_DYNAMIC_ALIGNMENT}")
            offsets |= dict.fromkeys([variable.name for variable in dynamic], begin(max(alignment, 16)))
        return offsets, offset, zones

    def translate(self) -> Translated:
        bodies = [self._function(function) for function in self.functions]
        context = Context(self.module, self.kernel, self.shared_offsets)
        parameters = tuple(
            KernelParameter(parameter.name, parameter.type, context.parameter_offsets[parameter.name], parameter.bytes)
            for parameter in self.kernel.parameters
        )
        globals_ = [
            variable
            for variable in self.module.variables.values()
            if variable.name in self.used and variable.space in ("global", "const")
        ]
        for function in self.functions:
            globals_ += [variable for variable in function.variables if variable.space in ("global", "const")]
        source = "\n".join(
            [
                '#include "device.h"',
                "using namespace emulation;",
                f'extern "C" {{ {_EXPORT} uint64_t emulated_block_counts[{len(self.blocks)}]; }}',
                *(self._global(variable) for variable in globals_),
                *bodies,
                f"static const Site sites[] = {{{', '.join(map(_site, self.sites)) or '{}'}}};",
                f"static const Variable variables[] = {{{self._variable_table(globals_)}}};",
                f"static const RedZone red_zones[] = {{{self._red_zone_table()}}};",
                f'extern "C" {_EXPORT} const Module emulated_module;',
                f"const Module emulated_module = {{{', '.join(self._exported(len(globals_)))}}};",
            ]
        )
        blocks = tuple(tuple(block) for block in self.blocks)
        sites = tuple(where for where, _ in self.sites)
        return Translated(source, parameters, context.parameter_bytes, blocks, sites)

    def _exported(self, variables: int) -> list[str]:
        """The members of thread.h's Module."""
        return [
            f'"{self.kernel.name}"',
            f'"{self.module.target}"',
            f"function_{identifier(self.kernel.name)}",
            "sites",
            f"{len(self.sites)}u",
            "emulated_block_counts",
            f"{len(self.blocks)}u",
            "variables",
            f"{variables}u",
            f"{self.static_shared_bytes}u",
            f"{self._most_shared_bytes()}u",
            "red_zones",
            f"{len(self.red_zones)}u",
            f"{len(self.red_zones) * _RED_ZONE}u",
            f"{self._stack_bytes()}u",
        ]

    def _variable_table(self, variables: list[Variable]) -> str:
        entries = [
            f'{{"{variable.name}", reinterpret_cast<char*>(v_{identifier(variable.name)}), {variable.bytes}u,'
            f" {'true' if variable.space == 'const' else 'false'}}}"
            for variable in variables
        ]
        return ", ".join(entries) or "{}"

    def _red_zone_table(self) -> str:
        return ", ".join(f"{{{begin}u, {end}u}}" for begin, end in self.red_zones) or "{}"

    def _most_shared_bytes(self) -> int:
        # sm_90a has what sm_90 has
        return _SHARED_KIB.get(self.module.target.rstrip("af"), _SHARED_KIB_ELSEWHERE) << 10

    def _stack_bytes(self) -> int:
        """Local memory and a word for each register, of all functions, as they may be nested."""
        registers = sum(len(function.registers) for function in self.functions)
        local = sum(variable.bytes for function in self.functions for variable in function.variables)
        return 8 * registers + local

    def _global(self, variable: Variable) -> str:
        type_ = f"b{bits(variable.type)}"
        values = []
        for value in variable.initial:
            if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", value):
                values.append(f"{c_type(type_)}(0x{value[2:]}u{'ll' if bits(type_) == 64 else ''})")
            elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", value):
                values.append(integer_literal(int(value.rstrip("U"), 0), type_))
            else:
                raise PtxError(f"variable {variable.name}: initial value {value} is not supported")
        count = max(variable.bytes // (bits(type_) // 8), 1)
        return (
            f"alignas({max(variable.alignment, 16)}) static {c_type(type_)} v_{identifier(variable.name)}[{count}]"
            f" = {{{', '.join(values)}}};"
        )

    def _signature(self, function: Function) -> str:
        name = f"function_{identifier(function.name)}"
        if function.is_entry:
            return f"static void {name}(Thread& thread, const char* parameters)"
        arguments = [f"char* v_{identifier(p.name)}" for p in (*function.results, *function.parameters)]
        return f"static void {name}({', '.join(['Thread& thread', *arguments])})"

    def _function(self, function: Function) -> str:
        """Translated twice: the first pass shows which untyped registers hold floats."""
        sites, blocks = len(self.sites), len(self.blocks)
        context = self._context(function)
        self._body(context, function)
        del self.sites[sites:], self.blocks[blocks:]
        floats = frozenset(name for name, votes in context.votes.items() if votes > 0)
        context = self._context(function, floats)
        body = self._body(context, function)
        lines = [f"{self._signature(function)} {{", *self._declarations(context, function), *body, "return;", "}"]
        return "\n".join(lines)

    def _context(self, function: Function, float_registers: frozenset[str] = frozenset()) -> Context:
        context = Context(self.module, function, self.shared_offsets, float_registers)
        if not function.is_entry:
            # a device function's parameters are arrays of its caller
            context.parameter_offsets = {}
            for parameter in (*function.results, *function.parameters):
                context.variables[parameter.name] = _as_variable(parameter)
        return context

    def _declarations(self, context: Context, function: Function) -> list[str]:
        lines = ["[[maybe_unused]] bool carry = false;"]
        by_type: dict[str, list[str]] = {}
        for register in function.registers:
            by_type.setdefault(c_type(context.storage(register)), []).append(register)
        for type_, registers in by_type.items():
            # what PTX leaves undefined is a NaN, or true
            ones = {"bool": "true", "float": "as_float(~0u)", "double": "as_double(~0ull)"}.get(
                type_, f"{type_}(~0ull)"
            )
            for begin in range(0, len(registers), 16):
                names = ", ".join(f"r_{identifier(name)} = {ones}" for name in registers[begin : begin + 16])
                lines.append(f"[[maybe_unused]] {type_} {names};")
        for variable in function.variables:
            if variable.space in ("local", "param"):
                name = context.variable(variable.name)
                lines.append(f"alignas(16) char {name}[{max(variable.bytes, 1)}];")
                if variable.space == "local":
                    lines.append(f"LocalVariable scope_{name}(thread, {name}, {variable.bytes}u);")
        return lines

    def _body(self, context: Context, function: Function) -> list[str]:
        lines = [self._begin_block()]
        for statement in function.statements:
            if isinstance(statement, Label):
                count = self._begin_block().removesuffix(";")
                stop = f'fail(thread, {len(self.sites)}u, "endless: executed %llu times", kEndless);'
                lines += [f"label_{identifier(statement.name)}:", f"if ({count} == kEndless) {stop}"]
                continue
            lines.append(self._instruction(context, statement))
            name = statement.opcode.split(".")[0]
            self.blocks[-1].append(statement.opcode)
            if name in _JUMPS and statement.predicate:
                lines.append(self._begin_block())
        return lines

    def _begin_block(self) -> str:
        self.blocks.append([])
        return f"++emulated_block_counts[{len(self.blocks) - 1}];"

    def _instruction(self, context: Context, instruction: Instruction) -> str:
        context.site = len(self.sites)
        where = f"{instruction.location}: " if instruction.location else ""
        self.sites.append((f"{where}{instruction.opcode}", f"PTX line {instruction.line}: {instruction}"))
        opcode = Opcode(instruction.opcode)
        try:
            translated = translation(opcode)(context, opcode, instruction.operands)
            opcode.finish()
        except (PtxError, ValueError, KeyError, IndexError) as error:
            raise PtxError(f"PTX line {instruction.line}: {instruction}: {error}") from error
        if instruction.predicate:
            predicate = context.read(instruction.predicate, "pred")
            return f"if ({'!' * instruction.negated}{predicate}) {{ {translated} }}"
        return translated


def _site(site: tuple[str, str]) -> str:
    return f"{{{', '.join(json.dumps(text) for text in site)}}}"


def _as_variable(parameter: Parameter) -> Variable:
    return Variable(parameter.name, "param", parameter.type, parameter.alignment, parameter.bytes, False)


def translate(module: Module, kernel_name: str) -> Translated:
    """The C++ of one kernel of a module, with the device functions and variables that it uses."""
    kernel = module.functions.get(kernel_name)
    if kernel is None or not kernel.is_entry:
        kernels = [function.name for function in module.functions.values() if function.is_entry]
        raise PtxError(f"no kernel {kernel_name}; the module has {', '.join(kernels) or 'none'}")
    return _Translator(module, kernel).translate()


def short_opcode(opcode: str) -> str:
    """The opcode's first two parts, by which counts are summed: mma.sync, ex2.approx, ld.global."""
    return ".".join(opcode.split(".")[:2])
