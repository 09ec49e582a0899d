"""Floating-point formats in exact arithmetic: the definition that emulated instructions are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

Real = Fraction | float


def is_finite(value: Real) -> bool:
    return isinstance(value, Fraction) or math.isfinite(value)


@dataclass(frozen=True)
class Format:
    """A binary format of IEEE 754; values are a Fraction, or a float for infinities, NaN and negative zero."""

    width: int
    fraction_bits: int

    @property
    def exponent_bits(self) -> int:
        return self.width - 1 - self.fraction_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def greatest(self) -> Fraction:
        return (2 - Fraction(1, 1 << self.fraction_bits)) * Fraction(2) ** self.bias

    @property
    def least_normal(self) -> Fraction:
        return Fraction(2) ** (1 - self.bias)

    def decode(self, bits: int) -> Real:
        sign = -1 if bits >> (self.width - 1) & 1 else 1
        exponent = bits >> self.fraction_bits & ((1 << self.exponent_bits) - 1)
        fraction = bits & ((1 << self.fraction_bits) - 1)
        if exponent == (1 << self.exponent_bits) - 1:
            return math.copysign(math.nan if fraction else math.inf, sign)
        if exponent == 0 and fraction == 0:
            return -0.0 if sign < 0 else Fraction(0)
        significand = fraction + ((1 << self.fraction_bits) if exponent else 0)
        return sign * Fraction(significand) * Fraction(2) ** (max(exponent, 1) - self.bias - self.fraction_bits)

    def encode(self, value: Real, rounding: str = "rn") -> int:
        """The bits of a value, rounded to nearest even (rn), to zero (rz), down (rm) or up (rp)."""
        if not is_finite(value) or value == 0:
            return self._special(value)
        value = Fraction(value)
        sign, magnitude = value < 0, abs(value)
        unit = Fraction(2) ** (max(_exponent(magnitude), 1 - self.bias) - self.fraction_bits)
        steps = _rounded(
            magnitude / unit, {"rm": "up" if sign else "zero", "rp": "zero" if sign else "up"}.get(rounding, rounding)
        )
        rounded = steps * unit
        if rounded > self.greatest:
            towards_infinity = rounding == "rn" or (rounding == "rp" and not sign) or (rounding == "rm" and sign)
            return (
                self._special(-math.inf if sign else math.inf) if towards_infinity else self._bits(sign, self.greatest)
            )
        return self._bits(sign, rounded)

    def _special(self, value: Real) -> int:
        sign = 1 << (self.width - 1) if math.copysign(1, value) < 0 and not math.isnan(value) else 0
        if value == 0:
            return sign
        exponent = ((1 << self.exponent_bits) - 1) << self.fraction_bits
        # the canonical NaN is all ones but for the sign
        return (1 << (self.width - 1)) - 1 if math.isnan(value) else sign | exponent

    def _bits(self, sign: bool, magnitude: Fraction) -> int:
        """Of a magnitude that the format holds."""
        exponent = max(_exponent(magnitude), 1 - self.bias) if magnitude else 1 - self.bias
        significand = int(magnitude / Fraction(2) ** (exponent - self.fraction_bits))
        biased = exponent + self.bias if significand >> self.fraction_bits else 0
        fraction = significand & ((1 << self.fraction_bits) - 1)
        return (int(sign) << (self.width - 1)) | (biased << self.fraction_bits) | fraction

    def flushed(self, value: Real) -> Real:
        """Subnormal values as zeros of their sign."""
        if is_finite(value) and value != 0 and abs(value) < self.least_normal:
            return -0.0 if value < 0 else Fraction(0)
        return value


F16, BF16, F32, F64 = Format(16, 10), Format(16, 7), Format(32, 23), Format(64, 52)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def _exponent(magnitude: Fraction) -> int:
    """The greatest e with 2^e <= magnitude."""
    estimate = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return estimate if Fraction(2) ** estimate <= magnitude else estimate - 1


def _rounded(value: Fraction, rounding: str) -> int:
    whole = value.numerator // value.denominator
    rest = value - whole
    if rounding == "up":
        return whole + (rest > 0)
    if rounding == "rn":
        return whole + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1))
    return whole


def _is_negative(value: Real) -> bool:
    return math.copysign(1, value) < 0


def multiply(first: Real, second: Real) -> Real:
    if is_finite(first) and is_finite(second) and first != 0 and second != 0:
        return Fraction(first) * Fraction(second)
    # zeros, infinities and NaN are right in any format
    return _sign_of(first) * _sign_of(second)


def _sign_of(value: Real) -> float:
    """A float of the same kind: zero, finite, infinite or NaN, and sign."""
    if is_finite(value) and value != 0:
        return 1.0 if value > 0 else -1.0
    return float(value)


def add(first: Real, second: Real, rounding: str = "rn") -> Real:
    if not is_finite(first) or not is_finite(second):
        return _sign_of(first) + _sign_of(second)
    total = Fraction(first) + Fraction(second)
    if total != 0:
        return total
    negative = [_is_negative(first), _is_negative(second)]
    return -0.0 if all(negative) or (rounding == "rm" and any(negative)) else Fraction(0)


def divide(first: Real, second: Real) -> Real:
    if is_finite(first) and is_finite(second) and first != 0 and second != 0:
        return Fraction(first) / Fraction(second)
    numerator, denominator = _sign_of(first), _sign_of(second)
    if denominator == 0 and numerator != 0 and not math.isnan(numerator):
        return math.copysign(math.inf, numerator) * math.copysign(1, denominator)
    return math.nan if denominator == 0 else numerator / denominator


def negate(value: Real) -> Real:
    return -value if value != 0 or isinstance(value, float) else -0.0


def square_root(value: Real) -> Real:
    """Exact enough: to 200 bits beyond the value's own, with a last bit that is set if anything was cut off."""
    if math.isnan(value) or value == 0 or value == math.inf:
        return value
    if value < 0:
        return math.nan
    value = Fraction(value)
    shift = 400 + 2 * max(-_exponent(value), 0)
    scaled = (value.numerator << shift) // value.denominator
    root = math.isqrt(scaled)
    exact = root * root * value.denominator == value.numerator << shift
    return Fraction(2 * root + (not exact), 2) / (1 << (shift // 2))


def greater(first: Real, second: Real) -> bool:
    """Whether first > second, with +0 above -0."""
    if first == 0 and second == 0:
        return not _is_negative(first) and _is_negative(second)
    return first > second
