"""Comparisons, selections and conversions, each with its definition in exact arithmetic over the operands' bits."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from fractions import Fraction

from tests.gpu_emulation import formats
from tests.gpu_emulation.formats import FORMATS, Real
from tests.gpu_emulation.instruction_cases import WIDTHS, Case, _integer, _relu, _saturated

_ORDERED: dict[str, Callable[[Real, Real], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}


def _decoded(type_: str, bits: int) -> Real:
    return FORMATS[type_].decode(bits) if type_ in FORMATS else Fraction(_integer(type_, bits))


def _compare(name: str, type_: str) -> Callable[[int, int], int]:
    def reference(first: int, second: int) -> int:
        a, b = _decoded(type_, first), _decoded(type_, second)
        unordered = math.isnan(a) or math.isnan(b)
        if name in ("num", "nan"):
            return int(unordered == (name == "nan"))
        if unordered:
            return int(name.endswith("u"))
        return int(({**_ORDERED, **_UNSIGNED} | {f"{key}u": value for key, value in _ORDERED.items()})[name](a, b))

    return reference


def comparison_cases() -> list[Case]:
    cases = []
    for type_ in ("s16", "u16", "s32", "u32", "s64", "u64", "f16", "bf16", "f32", "f64"):
        names = list(_ORDERED)
        if type_ in FORMATS:
            names += [f"{name}u" for name in _ORDERED] + ["num", "nan"]
        elif type_[0] == "u":
            names += list(_UNSIGNED)
        cases += [Case(f"setp.{name}.{type_}", "pred", (type_,) * 2, _compare(name, type_)) for name in names]
    less = _compare("lt", "f32")
    cases += [
        Case("set.lt.u32.f32", "u32", ("f32", "f32"), lambda a, b: -less(a, b)),
        Case("set.lt.f32.f32", "f32", ("f32", "f32"), lambda a, b: 0x3F800000 * less(a, b)),
        Case("slct.b32.s32", "b32", ("b32", "b32", "s32"), lambda a, b, c: b if c >> 31 else a),
        Case("slct.b32.f32", "b32", ("b32", "b32", "f32"), lambda a, b, c: a if FORMATS["f32"].decode(c) >= 0 else b),
    ]
    return cases


def _rounded_integer(value: Real, rounding: str) -> Real:
    if not formats.is_finite(value):
        return value
    value = Fraction(value)
    functions = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    return Fraction(functions[rounding](value))


def _to_integer(source: str, destination: str, rounding: str) -> Callable[[int], int]:
    width = WIDTHS[destination]
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if destination[0] == "s" else (0, (1 << width) - 1)

    def reference(bits: int) -> int:
        value = FORMATS[source].decode(bits)
        if math.isnan(value):
            return 1 << (width - 1) if source == "f64" or width == 64 else 0
        return int(max(low, min(high, _rounded_integer(value, rounding))))

    return reference


def _to_float(source: str, destination: str, rounding: str, change: Callable[[Real], Real]) -> Callable[[int], int]:
    return lambda bits: FORMATS[destination].encode(change(_decoded(source, bits)), rounding)


def _unchanged(value: Real) -> Real:
    return value


def _finite(destination: str) -> Callable[[Real], Real]:
    greatest = FORMATS[destination].greatest
    return lambda value: value if math.isnan(value) else max(-greatest, min(greatest, value))


def conversion_cases() -> list[Case]:
    cases = []
    integers = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
    for source in integers:
        for destination in integers:
            # 8-bit values live in wider registers
            result = destination.replace("8", "16") if destination in ("u8", "s8") else destination
            operand = source.replace("8", "16") if source in ("u8", "s8") else source
            if source == destination:
                continue
            cases.append(
                Case(
                    f"cvt.{destination}.{source}",
                    result,
                    (operand,),
                    _narrowing(source, destination, _unchanged_integer),
                )
            )
            cases.append(
                Case(
                    f"cvt.sat.{destination}.{source}",
                    result,
                    (operand,),
                    _narrowing(source, destination, _clamped(destination)),
                )
            )
    for source in ("f16", "bf16", "f32", "f64"):
        for destination in ("s16", "u16", "s32", "u32", "s64", "u64"):
            for rounding in ("rni", "rzi", "rmi", "rpi"):
                reference = _to_integer(source, destination, rounding)
                cases.append(Case(f"cvt.{rounding}.{destination}.{source}", destination, (source,), reference))
    for source in ("s16", "u16", "s32", "u32", "s64", "u64"):
        for destination in ("f16", "f32", "f64"):
            for rounding in ("rn", "rz", "rm", "rp"):
                reference = _to_float(source, destination, rounding, _unchanged)
                cases.append(Case(f"cvt.{rounding}.{destination}.{source}", destination, (source,), reference))
    for rounding in ("rn", "rz", "rm", "rp"):
        cases.append(Case(f"cvt.{rounding}.f32.f64", "f32", ("f64",), _to_float("f64", "f32", rounding, _unchanged)))
    for rounding in ("rn", "rz"):
        for destination in ("f16", "bf16"):
            plain = _to_float("f32", destination, rounding, _unchanged)
            cases.append(Case(f"cvt.{rounding}.{destination}.f32", destination, ("f32",), plain))
            relu = _to_float("f32", destination, rounding, _relu)
            cases.append(Case(f"cvt.{rounding}.relu.{destination}.f32", destination, ("f32",), relu))
            cases.append(
                Case(f"cvt.{rounding}.{destination}x2.f32", f"{destination}x2", ("f32", "f32"), _packed(plain))
            )
    cases.append(Case("cvt.rn.satfinite.f16.f32", "f16", ("f32",), _to_float("f32", "f16", "rn", _finite("f16"))))
    cases.append(Case("cvt.rn.f16.f64", "f16", ("f64",), _to_float("f64", "f16", "rn", _unchanged)))
    for source, destination in (("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64")):
        cases.append(
            Case(
                f"cvt.{destination}.{source}", destination, (source,), _to_float(source, destination, "rn", _unchanged)
            )
        )
    cases.append(Case("cvt.sat.f32.f32", "f32", ("f32",), _to_float("f32", "f32", "rn", _saturated)))
    for rounding in ("rni", "rzi", "rmi", "rpi"):
        cases.append(
            Case(f"cvt.{rounding}.f32.f32", "f32", ("f32",), lambda a, rounding=rounding: _round_float(a, rounding))
        )
    cases.append(Case("cvt.rna.tf32.f32", "b32", ("f32",), _tf32))
    return cases


def _round_float(bits: int, rounding: str) -> int:
    form = FORMATS["f32"]
    value = form.decode(bits)
    rounded = _rounded_integer(value, rounding)
    # an integral zero keeps the sign
    return form.encode(math.copysign(0.0, value) if rounded == 0 and bits >> 31 else rounded)


def _tf32(bits: int) -> int:
    if math.isnan(FORMATS["f32"].decode(bits)):
        return 0x7FFFFFFF
    # ties away from zero are those of the magnitude, which infinity does not have
    return bits if bits & 0x7FFFFFFF == 0x7F800000 else (bits + (1 << 12)) & ~0x1FFF


def _unchanged_integer(value: int) -> int:
    return value


def _clamped(type_: str) -> Callable[[int], int]:
    width = WIDTHS[type_]
    low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if type_[0] == "s" else (0, (1 << width) - 1)
    return lambda value: max(low, min(high, value))


def _narrowing(source: str, destination: str, change: Callable[[int], int]) -> Callable[[int], int]:
    return lambda bits: _integer(destination, change(_integer(source, bits)))


def _packed(reference: Callable[[int], int]) -> Callable[[int, int], int]:
    return lambda high, low: reference(high) << 16 | reference(low)
