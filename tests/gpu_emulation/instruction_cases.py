"""Instructions of one result, each with its definition in exact arithmetic over the operands' bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from tests.gpu_emulation import formats
from tests.gpu_emulation.formats import FORMATS, Format, Real

WIDTHS = {
    "pred": 1,
    "f16x2": 32,
    "bf16x2": 32,
    **{
        kind: int(kind.lstrip("bfsu"))
        for kind in ("b8 u8 s8 b16 u16 s16 f16 bf16 b32 u32 s32 f32 b64 u64 s64 f64".split())
    },
}

Reference = Callable[..., int]


@dataclass(frozen=True)
class Case:
    """`operands` are types, or literals that begin with "="; the reference gets the bits of the former."""

    opcode: str
    result: str
    operands: tuple[str, ...]
    reference: Reference

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(operand for operand in self.operands if not operand.startswith("="))


def signed(value: int, width: int) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


def _integer(type_: str, value: int) -> int:
    return signed(value, WIDTHS[type_]) if type_[0] == "s" else value & ((1 << WIDTHS[type_]) - 1)


def _values(type_: str, function: Callable[..., int]) -> Reference:
    """A reference of integers with their sign."""
    return lambda *bits: function(*(_integer(type_, value) for value in bits))


def integer_cases() -> list[Case]:
    cases = []
    for type_ in ("u16", "s16", "u32", "s32", "u64", "s64"):
        width = WIDTHS[type_]
        two, three = (type_,) * 2, (type_,) * 3

        def case(opcode: str, operands: tuple[str, ...], function: Callable[..., int], type_: str = type_) -> None:
            cases.append(Case(f"{opcode}.{type_}", type_, operands, _values(type_, function)))

        case("add", two, lambda a, b: a + b)
        case("sub", two, lambda a, b: a - b)
        case("mul.lo", two, lambda a, b: a * b)
        case("mul.hi", two, lambda a, b, width=width: (a * b) >> width)
        case("mad.lo", three, lambda a, b, c: a * b + c)
        case("mad.hi", three, lambda a, b, c, width=width: ((a * b) >> width) + c)
        case("min", two, min)
        case("max", two, max)
        case("sad", three, lambda a, b, c: abs(a - b) + c)
        case("div", two, lambda a, b: _divide(a, b)[0])
        case("rem", two, lambda a, b: _divide(a, b)[1])
        cases.append(Case(f"shr.{type_}", type_, (type_, "u32"), lambda a, n, t=type_: _integer(t, a) >> n))
        if width < 64:
            wide = f"{type_[0]}{2 * width}"
            cases.append(Case(f"mul.wide.{type_}", wide, two, _values(type_, lambda a, b: a * b)))
            cases.append(
                Case(
                    f"mad.wide.{type_}",
                    wide,
                    (*two, wide),
                    lambda a, b, c, t=type_: _integer(t, a) * _integer(t, b) + c,
                )
            )
        if type_[0] == "s":
            case("neg", (type_,), lambda a: -a)
            case("abs", (type_,), abs)
        if width > 16:
            case("bfind", (type_,), _leading)
            cases[-1] = Case(f"bfind.{type_}", "u32", (type_,), _values(type_, _leading))
            cases.append(
                Case(f"bfe.{type_}", type_, (type_, "u32", "u32"), lambda a, p, n, t=type_: _extract(t, a, p, n))
            )
    cases.append(
        Case("add.sat.s32", "s32", ("s32", "s32"), _values("s32", lambda a, b: max(min(a + b, 2**31 - 1), -(2**31))))
    )
    cases.append(
        Case("sub.sat.s32", "s32", ("s32", "s32"), _values("s32", lambda a, b: max(min(a - b, 2**31 - 1), -(2**31))))
    )
    for width in (16, 32, 64):
        type_ = f"b{width}"
        mask = (1 << width) - 1
        two = (type_, type_)
        cases += [
            Case(f"and.{type_}", type_, two, lambda a, b: a & b),
            Case(f"or.{type_}", type_, two, lambda a, b: a | b),
            Case(f"xor.{type_}", type_, two, lambda a, b: a ^ b),
            Case(f"not.{type_}", type_, (type_,), lambda a: ~a),
            Case(f"cnot.{type_}", type_, (type_,), lambda a: int(a == 0)),
            Case(f"shl.{type_}", type_, (type_, "u32"), lambda a, n, width=width: a << n if n < width else 0),
        ]
        if width > 16:
            cases += [
                Case(f"popc.{type_}", "u32", (type_,), lambda a: a.bit_count()),
                Case(f"clz.{type_}", "u32", (type_,), lambda a, width=width: width - a.bit_length()),
                Case(f"brev.{type_}", type_, (type_,), lambda a, width=width: int(f"{a:0{width}b}"[::-1], 2)),
                Case(f"bfi.{type_}", type_, (*two, "=7", "=11"), lambda a, b, mask=mask: _insert(a, b, 7, 11, mask)),
                Case(
                    f"bfi.{type_}", type_, (*two, "=20", "=200"), lambda a, b, mask=mask: _insert(a, b, 20, 200, mask)
                ),
            ]
    cases += [
        Case("lop3.b32", "b32", ("b32",) * 3 + ("=0xe8",), lambda a, b, c: (a & b) | (a & c) | (b & c)),
        Case("lop3.b32", "b32", ("b32",) * 3 + ("=0x1b",), lambda a, b, c: _logic(a, b, c, 0x1B)),
        Case("prmt.b32", "b32", ("b32",) * 3, lambda a, b, c: _permute(a, b, [c >> (4 * i) & 15 for i in range(4)])),
        Case("prmt.b32.f4e", "b32", ("b32",) * 3, lambda a, b, c: _permute(a, b, [(c & 3) + i for i in range(4)])),
        Case(
            "prmt.b32.b4e", "b32", ("b32",) * 3, lambda a, b, c: _permute(a, b, [((c & 3) - i) % 8 for i in range(4)])
        ),
        Case("prmt.b32.rc8", "b32", ("b32",) * 3, lambda a, b, c: _permute(a, b, [c & 3] * 4)),
        Case("prmt.b32.ecl", "b32", ("b32",) * 3, lambda a, b, c: _permute(a, b, [max(c & 3, i) for i in range(4)])),
        Case("prmt.b32.ecr", "b32", ("b32",) * 3, lambda a, b, c: _permute(a, b, [min(c & 3, i) for i in range(4)])),
        Case("prmt.b32.rc16", "b32", ("b32",) * 3, lambda a, b, c: _permute(a, b, [2 * (c & 1), 2 * (c & 1) + 1] * 2)),
        Case("dp4a.u32.u32", "u32", ("u32",) * 3, lambda a, b, c: _dot(a, b, c, "u8", "u8")),
        Case("dp4a.s32.u32", "s32", ("s32", "u32", "s32"), lambda a, b, c: _dot(a, b, c, "s8", "u8")),
        Case("dp4a.s32.s32", "s32", ("s32",) * 3, lambda a, b, c: _dot(a, b, c, "s8", "s8")),
        Case("bfind.shiftamt.u32", "u32", ("u32",), lambda a: 31 - (a.bit_length() - 1) if a else 2**32 - 1),
        Case("shf.l.wrap.b32", "b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
        Case("shf.r.wrap.b32", "b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) >> (c & 31)),
        Case("shf.l.clamp.b32", "b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32),
        Case("shf.r.clamp.b32", "b32", ("b32",) * 3, lambda a, b, c: (b << 32 | a) >> min(c, 32)),
        Case("mul24.lo.s32", "s32", ("s32",) * 2, lambda a, b: signed(a, 24) * signed(b, 24)),
        Case("mul24.hi.u32", "u32", ("u32",) * 2, lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 16),
        Case("bmsk.clamp.b32", "b32", ("b32",) * 2, lambda a, b: ((1 << min(b, 32)) - 1) << min(a, 32)),
    ]
    return cases


def _divide(a: int, b: int) -> tuple[int, int]:
    # the quotient by zero is left to the machine
    if b == 0:
        return -1, a
    quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return quotient, a - quotient * b


def _leading(a: int) -> int:
    a = ~a if a < 0 else a
    return a.bit_length() - 1


def _extract(type_: str, a: int, position: int, length: int) -> int:
    width, position, length = WIDTHS[type_], position & 255, length & 255
    field = a >> position & ((1 << length) - 1)
    if type_[0] == "u" or length == 0:
        return field
    sign = a >> min(position + length - 1, width - 1) & 1
    # beyond the top bit of the value, and of the field, are copies of the sign
    valid = max(min(length, width - position), 0)
    return field | ((-1 << valid) if sign else 0)


def _insert(a: int, b: int, position: int, length: int, mask: int) -> int:
    field = (((1 << length) - 1) << position) & mask
    return (b & ~field) | ((a << position) & field)


def _logic(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def _permute(a: int, b: int, selectors: list[int]) -> int:
    bytes_ = (b << 32 | a).to_bytes(8, "little")
    result = 0
    for i, selector in enumerate(selectors):
        byte = bytes_[selector & 7]
        result |= ((0xFF if byte & 0x80 else 0) if selector & 8 else byte) << (8 * i)
    return result


def _dot(a: int, b: int, c: int, first: str, second: str) -> int:
    return c + sum(_integer(first, a >> 8 * i) * _integer(second, b >> 8 * i) for i in range(4))


def _float(type_: str, function: Callable[..., Real], rounding: str = "rn", ftz: bool = False) -> Reference:
    """A reference in exact arithmetic, of operands and result of one format."""
    form: Format = FORMATS[type_]

    def reference(*bits: int) -> int:
        values = [form.decode(value) for value in bits]
        result = function(*(map(form.flushed, values) if ftz else values))
        encoded = form.encode(result, rounding)
        # a subnormal that rounds up to a normal stays
        return form.encode(form.flushed(form.decode(encoded))) if ftz else encoded

    return reference


def _pair(reference: Reference) -> Reference:
    def both(*bits: int) -> int:
        low = reference(*(value & 0xFFFF for value in bits)) & 0xFFFF
        return low | (reference(*(value >> 16 for value in bits)) & 0xFFFF) << 16

    return both


def _saturated(value: Real) -> Real:
    return Fraction(0) if math.isnan(value) or value <= 0 else Fraction(1) if value >= 1 else value


def _relu(value: Real) -> Real:
    return value if math.isnan(value) or value > 0 else Fraction(0)


def _maximum(a: Real, b: Real) -> Real:
    return b if math.isnan(a) or formats.greater(b, a) else a


def _minimum(a: Real, b: Real) -> Real:
    return b if math.isnan(a) or formats.greater(a, b) else a


def _nan_or(function: Callable[[Real, Real], Real]) -> Callable[[Real, Real], Real]:
    return lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else function(a, b)


def _xor_sign(function: Callable[[Real, Real], Real]) -> Callable[[Real, Real], Real]:
    """Of the magnitudes, with the sign of the operands' product."""

    def signed_magnitude(a: Real, b: Real) -> Real:
        magnitude = function(abs(a), abs(b))
        differ = math.copysign(1, a) != math.copysign(1, b)
        return formats.negate(magnitude) if differ else magnitude

    return signed_magnitude


def _arithmetic(rounding: str) -> dict[str, tuple[int, Callable[..., Real]]]:
    return {
        "add": (2, lambda a, b: formats.add(a, b, rounding)),
        "sub": (2, lambda a, b: formats.add(a, formats.negate(b), rounding)),
        "mul": (2, formats.multiply),
        "div": (2, formats.divide),
        "fma": (3, lambda a, b, c: formats.add(formats.multiply(a, b), c, rounding)),
        "sqrt": (1, formats.square_root),
        "rcp": (1, lambda a: formats.divide(Fraction(1), a)),
    }


def float_cases() -> list[Case]:
    cases = []
    for type_ in ("f32", "f64"):
        for rounding in ("rn", "rz", "rm", "rp"):
            for name, (count, function) in _arithmetic(rounding).items():
                reference = _float(type_, function, rounding)
                cases.append(Case(f"{name}.{rounding}.{type_}", type_, (type_,) * count, reference))
        for name, function in {"min": _minimum, "max": _maximum}.items():
            cases.append(Case(f"{name}.{type_}", type_, (type_,) * 2, _float(type_, function)))
        cases.append(Case(f"neg.{type_}", type_, (type_,), lambda a, width=WIDTHS[type_]: a ^ 1 << (width - 1)))
        cases.append(Case(f"abs.{type_}", type_, (type_,), lambda a, width=WIDTHS[type_]: a & ~(1 << (width - 1))))
        cases.append(
            Case(f"copysign.{type_}", type_, (type_,) * 2, lambda a, b, width=WIDTHS[type_]: _copy_sign(a, b, width))
        )
        cases += _property_cases(type_)
    for name in ("add", "sub", "mul", "div", "fma", "sqrt", "rcp"):
        count, function = _arithmetic("rn")[name]
        cases.append(Case(f"{name}.rn.ftz.f32", "f32", ("f32",) * count, _float("f32", function, ftz=True)))
    for name in ("add", "mul", "fma"):
        count, function = _arithmetic("rn")[name]
        saturated = lambda *values, function=function: _saturated(function(*values))  # noqa: E731
        cases.append(Case(f"{name}.rn.sat.f32", "f32", ("f32",) * count, _float("f32", saturated)))
    for name, function in {"min": _minimum, "max": _maximum}.items():
        cases.append(Case(f"{name}.NaN.f32", "f32", ("f32",) * 2, _float("f32", _nan_or(function))))
        cases.append(Case(f"{name}.ftz.f32", "f32", ("f32",) * 2, _float("f32", function, ftz=True)))
        cases.append(Case(f"{name}.xorsign.abs.f32", "f32", ("f32",) * 2, _float("f32", _xor_sign(function))))
    return cases


def _copy_sign(sign: int, magnitude: int, width: int) -> int:
    top = 1 << (width - 1)
    return (sign & top) | (magnitude & ~top)


def _property_cases(type_: str) -> list[Case]:
    form = FORMATS[type_]
    tests: dict[str, Callable[[Real], bool]] = {
        "finite": formats.is_finite,
        "infinite": lambda a: a in (math.inf, -math.inf),
        "number": lambda a: not math.isnan(a),
        "notanumber": math.isnan,
        "normal": lambda a: formats.is_finite(a) and abs(a) >= form.least_normal,
        "subnormal": lambda a: formats.is_finite(a) and 0 < abs(a) < form.least_normal,
    }
    return [
        Case(f"testp.{name}.{type_}", "pred", (type_,), lambda a, test=test: int(test(form.decode(a))))
        for name, test in tests.items()
    ]


def half_cases() -> list[Case]:
    cases = []
    for type_ in ("f16", "bf16"):
        arithmetic = {name: _arithmetic("rn")[name] for name in ("add", "sub", "mul", "fma")}
        operations = {f"{name}.rn": pair for name, pair in arithmetic.items()}
        operations |= {"min": (2, _minimum), "max": (2, _maximum)}
        operations |= {"min.NaN": (2, _nan_or(_minimum)), "max.NaN": (2, _nan_or(_maximum))}
        fma = arithmetic["fma"][1]
        operations |= {"min.xorsign.abs": (2, _xor_sign(_minimum)), "max.xorsign.abs": (2, _xor_sign(_maximum))}
        operations["fma.rn.relu"] = (3, lambda a, b, c, fma=fma: _relu(fma(a, b, c)))
        if type_ == "f16":
            operations["fma.rn.sat"] = (3, lambda a, b, c, fma=fma: _saturated(fma(a, b, c)))
        for name, (count, function) in operations.items():
            reference = _float(type_, function)
            cases.append(Case(f"{name}.{type_}", type_, (type_,) * count, reference))
            cases.append(Case(f"{name}.{type_}x2", f"{type_}x2", (f"{type_}x2",) * count, _pair(reference)))
        cases.append(Case(f"neg.{type_}x2", f"{type_}x2", (f"{type_}x2",), lambda a: a ^ 0x80008000))
        cases.append(Case(f"abs.{type_}", type_, (type_,), lambda a: a & 0x7FFF))
    reference = _float("f16", _arithmetic("rn")["fma"][1], ftz=True)
    cases.append(Case("fma.rn.ftz.f16x2", "f16x2", ("f16x2",) * 3, _pair(reference)))
    return cases
