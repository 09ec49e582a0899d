"""Parser of PTX text: modules, kernels and functions, variables, and statements with their source locations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

TYPE_BYTES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8, "pred": 1, "b128": 16},
}


class PtxError(Exception):
    """PTX that is not understood; the message names the line."""


@dataclass(frozen=True)
class Location:
    """A line of the source that the PTX was compiled from, with the lines of the inlined calls that led into it."""

    file: str
    line: int
    inlined: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        inlined = f" (inlined {', '.join(f'{file}:{line}' for file, line in self.inlined)})" if self.inlined else ""
        return f"{self.file}:{self.line}{inlined}"


@dataclass(frozen=True)
class Instruction:
    line: int
    location: Location | None
    predicate: str | None
    negated: bool
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Variable:
    """A variable of a state space; `initial` holds integers, floats' bits and symbols as written."""

    name: str
    space: str
    type: str
    alignment: int
    bytes: int
    is_extern: bool
    initial: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    alignment: int
    bytes: int


@dataclass
class Function:
    """A kernel (`is_entry`) or a device function."""

    name: str
    is_entry: bool
    parameters: tuple[Parameter, ...]
    results: tuple[Parameter, ...]
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    statements: list[Instruction | Label] = field(default_factory=list)
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class Module:
    """`target` is the architecture, as sm_80."""

    target: str
    variables: dict[str, Variable]
    functions: dict[str, Function]


def split_operands(text: str) -> tuple[str, ...]:
    """Splits at the commas outside brackets, braces and parentheses."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return tuple(part for part in parts if part)


_STATEMENT = re.compile(
    r"""\s*(?:
      (?P<loc>\.loc\b[^\n]*)
    | (?P<file>\.file\b[^\n]*)
    | (?P<section>\.section\b[^{]*\{[^}]*\})
    | (?P<line_directive>\.(?:version|target|address_size|maxntid|reqntid|minnctapersm|maxnreg|maxnctapersm|noreturn
        |explicitcluster|reqnctapercluster|maxclusterrank|blocksareclusters)\b[^\n{]*)
    | (?P<open>\{)
    | (?P<close>\})
    | (?P<label>[\w$%]+)\s*:(?!:)
    | (?P<function>(?:\.(?:visible|extern|weak|common)\s+)*\.(?:entry|func)\b[^{;]*)
    | (?P<statement>[^;{}]*(?:\{[^{}]*\}[^;{}]*)*);
    )""",
    re.X,
)


def _tokens(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, kind and text of each statement; comments must already be blank."""
    text = text.rstrip()
    position, line = 0, 1
    while position < len(text):
        match = _STATEMENT.match(text, position)
        if match is None:
            excerpt = text[position : position + 80].strip().split("\n")[0]
            raise PtxError(
                f"PTX line {line + _leading_lines(text[position:])}: expected a statement, found {excerpt!r}"
            )
        kind = str(match.lastgroup)
        begin = match.start(kind)
        line += text.count("\n", position, begin)
        yield line, kind, match[kind].strip()
        line += text.count("\n", begin, match.end())
        position = match.end()


def _leading_lines(text: str) -> int:
    return text[: len(text) - len(text.lstrip())].count("\n")


def _without_comments(text: str) -> str:
    def blank(match: re.Match[str]) -> str:
        # a path in quotes may hold what begins a comment
        return match[0] if match[0].startswith('"') else "\n" * match[0].count("\n")

    return re.sub(r'"[^"\n]*"|/\*.*?\*/|//[^\n]*', blank, text, flags=re.S)


def _variable(line: int, statement: str, space: str) -> Variable:
    match = re.match(
        r"(?P<linkage>(?:\.(?:visible|extern|weak|common)\s+)*)\.\w+\s+(?:\.attribute\s*\([^)]*\)\s*)?"
        r"(?:\.align\s+(?P<alignment>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)\s*(?P<sizes>(?:\[\d*\])*)"
        r"\s*(?:=\s*(?P<initial>.*))?$",
        statement,
        re.S,
    )
    if match is None or match["type"] not in TYPE_BYTES:
        raise PtxError(f"PTX line {line}: variable not understood: {statement}")
    element = TYPE_BYTES[match["type"]]
    count, unsized = 1, False
    for size in re.findall(r"\[(\d*)\]", match["sizes"]):
        count, unsized = count * int(size or 1), unsized or not size
    initial = split_operands(re.sub(r"[{}\s]", "", match["initial"] or ""))
    is_extern = ".extern" in match["linkage"] or unsized
    alignment = int(match["alignment"] or element)
    return Variable(
        match["name"], space, match["type"], alignment, 0 if is_extern else count * element, is_extern, initial
    )


def _parameters(text: str) -> tuple[Parameter, ...]:
    found = []
    for declaration in split_operands(text):
        match = re.match(
            r"\.(?:param|reg)\s+(?:\.align\s+(?P<alignment>\d+)\s+)?\.(?P<type>\w+)"
            r"(?:\s+\.ptr(?:\s+\.\w+(?:\s+\d+)?)*)?\s+(?P<name>[\w$%]+)(?:\[(?P<count>\d+)\])?$",
            declaration.strip(),
        )
        if match is None or match["type"] not in TYPE_BYTES:
            raise PtxError(f"parameter not understood: {declaration}")
        element = TYPE_BYTES[match["type"]]
        alignment = int(match["alignment"] or element)
        found.append(Parameter(match["name"], match["type"], alignment, element * int(match["count"] or 1)))
    return tuple(found)


def _function(line: int, header: str) -> Function:
    match = re.search(r"\.(entry|func)\s*(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[\w$]+)\s*(?P<rest>.*)", header, re.S)
    if match is None:
        raise PtxError(f"PTX line {line}: function not understood: {header}")
    parameters = re.match(r"\((?P<parameters>.*?)\)", match["rest"], re.S)
    try:
        return Function(
            match["name"],
            match[1] == "entry",
            _parameters(parameters["parameters"] if parameters else ""),
            _parameters(match["results"] or ""),
        )
    except PtxError as error:
        raise PtxError(f"PTX line {line}: {match['name']}: {error}") from None


class _Body:
    """Collects a function's statements; names that a nested block declares become unique."""

    def __init__(self, function: Function, files: dict[str, str]) -> None:
        self.function = function
        self.files = files
        self.location: Location | None = None
        self.callers: dict[tuple[str, int], tuple[str, int]] = {}
        self.scopes: list[dict[str, str]] = [{}]
        self.blocks = 0
        # label references resolve when the block ends, as a branch may precede its label
        self.pending: list[list[int]] = [[]]

    def open(self) -> None:
        self.blocks += 1
        self.scopes.append({})
        self.pending.append([])

    def close(self) -> bool:
        """True at the function's own closing brace."""
        scope, pending = self.scopes.pop(), self.pending.pop()
        for index in pending:
            statement = self.function.statements[index]
            assert isinstance(statement, Instruction)
            renamed = tuple(scope.get(operand, operand) for operand in statement.operands)
            self.function.statements[index] = Instruction(**{**vars(statement), "operands": renamed})
        if self.scopes:
            self.pending[-1] += pending
        return not self.scopes

    def declare(self, name: str) -> str:
        unique = name if len(self.scopes) == 1 else f"{name}__{self.blocks}"
        self.scopes[-1][name] = unique
        return unique

    def resolve(self, operand: str) -> str:
        def rename(match: re.Match[str]) -> str:
            for scope in reversed(self.scopes):
                if match[0] in scope:
                    return scope[match[0]]
            return match[0]

        return re.sub(r"[%A-Za-z_$][\w$]*", rename, operand)

    def loc(self, text: str) -> None:
        match = re.match(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?", text)
        if match is None:
            return
        # line 0 is code that the compiler made up
        if match[2] == "0":
            return
        line = self.line(match[1], match[2])
        if match[3]:
            self.callers[line] = self.line(match[3], match[4])
        else:
            self.callers.pop(line, None)
        # each .loc names one caller, whose own caller an earlier .loc named
        chain = [line]
        while (caller := self.callers.get(chain[-1])) and caller not in chain:
            chain.append(caller)
        outermost, *inlined = reversed(chain)
        self.location = Location(*outermost, tuple(inlined))

    def line(self, file: str, line: str) -> tuple[str, int]:
        return self.files.get(file, f"file {file}"), int(line)

    def label(self, name: str) -> None:
        self.function.statements.append(Label(self.declare(name)))

    def statement(self, line: int, text: str) -> None:
        if text.startswith(".reg"):
            self.registers(line, text)
        elif text.startswith((".shared", ".local", ".param", ".global", ".const")):
            space = re.match(r"\.(\w+)", text)[1]  # type: ignore[index]
            variable = _variable(line, text, space)
            name = self.declare(variable.name)
            self.function.variables.append(Variable(**{**vars(variable), "name": name}))
        elif text.startswith(".branchtargets"):
            label = self.function.statements.pop()
            assert isinstance(label, Label)
            self.function.branch_targets[label.name] = split_operands(text.removeprefix(".branchtargets"))
        elif text.startswith(".pragma") or not text:
            return
        elif text.startswith("."):
            raise PtxError(f"PTX line {line}: directive not supported: {text}")
        else:
            self.instruction(line, text)

    def registers(self, line: int, text: str) -> None:
        match = re.match(r"\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*)", text, re.S)
        if match is None or match[1] not in TYPE_BYTES or ".v" in text.split()[1]:
            raise PtxError(f"PTX line {line}: registers not understood: {text}")
        for name in split_operands(match[2]):
            if numbered := re.match(r"([%\w$]+)<(\d+)>$", name):
                for number in range(int(numbered[2])):
                    self.function.registers[self.declare(f"{numbered[1]}{number}")] = match[1]
            elif re.fullmatch(r"[%\w$]+", name):
                self.function.registers[self.declare(name)] = match[1]
            else:
                raise PtxError(f"PTX line {line}: registers not understood: {text}")

    def instruction(self, line: int, text: str) -> None:
        match = re.match(r"(?:@(!?)\s*([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if match is None:
            raise PtxError(f"PTX line {line}: instruction not understood: {text}")
        operands = tuple(self.resolve(operand) for operand in split_operands(re.sub(r"\s+", " ", match[4])))
        predicate = self.resolve(match[2]) if match[2] else None
        instruction = Instruction(line, self.location, predicate, match[1] == "!", match[3], operands)
        if match[3].startswith(("bra", "brx")):
            self.pending[-1].append(len(self.function.statements))
        self.function.statements.append(instruction)


def parse(text: str) -> Module:
    """The module of a PTX text."""
    text = _without_comments(text)
    files: dict[str, str] = {}
    for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M):
        files[number] = path.rsplit("/", 1)[-1]
    target = re.search(r"^\s*\.target\s+(\w+)", text, re.M)
    module = Module(target[1] if target else "", {}, {})
    body: _Body | None = None
    function: Function | None = None
    for line, kind, statement in _tokens(text):
        if kind == "function":
            function = _function(line, statement)
        elif kind == "open":
            if body is not None:
                body.open()
            elif function is not None:
                body = _Body(function, files)
            else:
                raise PtxError(f"PTX line {line}: block outside a function")
        elif kind == "close":
            if body is None:
                raise PtxError(f"PTX line {line}: unmatched closing brace")
            if body.close():
                module.functions[body.function.name] = body.function
                body, function = None, None
        elif body is not None:
            if kind == "loc":
                body.loc(statement)
            elif kind == "label":
                body.label(statement)
            elif kind == "statement":
                body.statement(line, statement)
        elif kind == "statement":
            # a bare semicolon ends the declaration of a function that is defined elsewhere
            if space := re.search(r"\.(global|const|shared)\b", statement):
                variable = _variable(line, statement, space[1])
                module.variables[variable.name] = variable
            elif statement and not statement.startswith((".alias", ".pragma", ".extern", ".noreturn")):
                raise PtxError(f"PTX line {line}: directive not supported: {statement}")
    return module
