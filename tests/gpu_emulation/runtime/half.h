// .f16, .bf16 and .tf32: widened to double exactly, and rounded once
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "approximate.h"
#include "arithmetic.h"

namespace emulation {

// rounds to 53 bits such that a second rounding to fewer than 51 gives what one rounding would: the
// last bit is set if anything was cut off
inline double round_to_odd(double sum, double error) {
  if (error == 0 || !std::isfinite(sum)) return sum;
  uint64_t bits = as_bits(sum);
  if (bits & 1) return sum;
  // the exact value is on one side of an even sum, and the neighbour on that side is odd
  const bool away = (error > 0) == (sum > 0);
  return as_double(away ? bits + 1 : bits - 1);
}

// to `digits` significant bits, or fewer below 2^(minimum_exponent), by `rounding`
template <Rounding kRounding>
double round_to_digits(double value, int digits, int minimum_exponent) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), minimum_exponent);
  const double unit = std::ldexp(1.0, exponent - digits + 1);
  const double scaled = value / unit;
  const double rounded = kRounding == Rounding::kNearest      ? std::nearbyint(scaled)
                         : kRounding == Rounding::kTowardZero ? std::trunc(scaled)
                         : kRounding == Rounding::kDown       ? std::floor(scaled)
                                                              : std::ceil(scaled);
  return std::copysign(rounded * unit, value);
}

template <Rounding kRounding>
double overflowed(double value, double greatest) {
  const bool stays = kRounding == Rounding::kTowardZero ||
                     (kRounding == Rounding::kDown && value > 0) ||
                     (kRounding == Rounding::kUp && value < 0);
  if (std::fabs(value) <= greatest) return value;
  return std::copysign(stays ? greatest : HUGE_VAL, value);
}

struct F16 {
  static constexpr int kDigits = 11, kMinimumExponent = -14;
  static constexpr double kGreatest = 65504, kUnit = 0x1p-10;
  static double value(uint16_t bits) { return double(std::bit_cast<_Float16>(bits)); }
  static uint16_t bits(double value) {
    if (std::isnan(value)) return 0x7fff;
    return std::bit_cast<uint16_t>(_Float16(float(value)));
  }
  static uint16_t round(double value) {
    // a float holds what has at most 24 bits
    if (double(float(value)) == value || std::isnan(value)) return bits(value);
    return bits(overflowed<Rounding::kNearest>(
        round_to_digits<Rounding::kNearest>(value, kDigits, kMinimumExponent), kGreatest));
  }
};

struct Bf16 {
  static constexpr int kDigits = 8, kMinimumExponent = -126;
  static constexpr double kGreatest = 0x1.fep127, kUnit = 0x1p-7;
  static double value(uint16_t bits) { return as_float(uint32_t{bits} << 16); }
  static uint16_t bits(double value) {
    if (std::isnan(value)) return 0x7fff;
    const uint32_t word = as_bits(float(value));
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  static uint16_t round(double value) {
    if (double(float(value)) == value || std::isnan(value)) return bits(value);
    return bits(overflowed<Rounding::kNearest>(
        round_to_digits<Rounding::kNearest>(value, kDigits, kMinimumExponent), kGreatest));
  }
};

enum HalfFlags { kFtz = 1, kSat = 2, kRelu = 4, kSatfinite = 8 };

template <class Format>
double flush_half(double value) {
  return std::fabs(value) < std::ldexp(1.0, Format::kMinimumExponent) ? std::copysign(0.0, value)
                                                                      : value;
}

template <class Format>
uint32_t flush_halves(uint32_t bits) {
  const auto flushed = [](uint16_t half) {
    return std::isnan(Format::value(half)) ? half
                                           : Format::bits(flush_half<Format>(Format::value(half)));
  };
  return flushed(uint16_t(bits)) | uint32_t{flushed(uint16_t(bits >> 16))} << 16;
}

struct Add {
  double operator()(double a, double b) const { return a + b; }
};
struct Subtract {
  double operator()(double a, double b) const { return a - b; }
};
struct Multiply {
  double operator()(double a, double b) const { return a * b; }
};
struct FusedMultiplyAdd {
  double operator()(double a, double b, double c) const {
    // the product of two halves is exact, and the sum's error is found exactly, by Knuth's two-sum
    const double product = a * b, sum = product + c;
    const double shadow = sum - product;
    return round_to_odd(sum, (product - (sum - shadow)) + (c - shadow));
  }
};
template <bool kNan>
struct Maximum {
  double operator()(double a, double b) const { return maximum<kNan>(a, b); }
};
template <bool kNan>
struct Minimum {
  double operator()(double a, double b) const { return minimum<kNan>(a, b); }
};
template <bool kNan>
struct XorSignMaximum {
  double operator()(double a, double b) const { return xor_sign_maximum<kNan>(a, b); }
};
template <bool kNan>
struct XorSignMinimum {
  double operator()(double a, double b) const { return xor_sign_minimum<kNan>(a, b); }
};
template <class Format>
struct Exp2Approx {
  double operator()(double a) const {
    // rounding shares in the bound, as it does of a tanh next to one
    constexpr double kBound =
        (std::is_same_v<Format, F16> ? kEx2F16Error : kEx2Bf16Error) - Format::kUnit / 2;
    return a == 0 ? 1 : disturbed(std::exp2(a), a, kBound);
  }
};
template <class Format>
struct TanhApprox {
  double operator()(double a) const {
    constexpr double kBound =
        (std::is_same_v<Format, F16> ? kTanhF16Error : kTanhBf16Error) - Format::kUnit / 4;
    if (a == 0 || std::isinf(a)) return std::tanh(a);
    return std::clamp(std::tanh(a) + kBound * disturbance(a), -1.0, 1.0);
  }
};

template <class Format, class Operation, int kFlags, class... Values>
uint16_t half(Values... values) {
  const auto value = [](uint16_t bits) {
    return kFlags & kFtz ? flush_half<Format>(Format::value(bits)) : Format::value(bits);
  };
  double result = Operation()(value(uint16_t(values))...);
  if (kFlags & kSat) result = saturate(result);
  if ((kFlags & kRelu) && !std::isnan(result)) result = result > 0 ? result : 0;
  uint16_t bits = Format::round(result);
  if (kFlags & kFtz) bits = uint16_t(flush_halves<Format>(bits));
  return bits;
}

template <class Format, class Operation, int kFlags, class... Values>
uint32_t half_pair(Values... values) {
  return half<Format, Operation, kFlags>(uint16_t(values)...) |
         uint32_t{half<Format, Operation, kFlags>(uint16_t(values >> 16)...)} << 16;
}

template <class Format, Rounding kRounding, int kFlags, class Value>
uint16_t to_half(Value value) {
  if constexpr (kRounding == Rounding::kNearest && kFlags == 0 && std::is_same_v<Value, float>) {
    return Format::bits(value);
  }
  double wide = value;
  if (std::isnan(wide)) return kFlags & kSat ? 0 : 0x7fff;
  if (kFlags & kSat) wide = saturate(wide);
  if (kFlags & kRelu) wide = wide > 0 ? wide : 0;
  if (kFlags & kSatfinite) wide = std::clamp(wide, -Format::kGreatest, Format::kGreatest);
  if (std::isinf(wide)) return Format::bits(wide);
  const double rounded =
      round_to_digits<kRounding>(wide, Format::kDigits, Format::kMinimumExponent);
  return Format::bits(overflowed<kRounding>(rounded, Format::kGreatest));
}

template <class Format, Rounding kRounding, class Value>
uint16_t integer_to_half(Value value) {
  // any but a long is exact in double, and a long's halves are put together by rounding to odd
  const double high = double(int64_t(value >> (sizeof(Value) == 8 ? 32 : 0)));
  if constexpr (sizeof(Value) < 8) return to_half<Format, kRounding, 0>(double(value));
  const double low = double(uint32_t(value)),
               scaled = (std::is_signed_v<Value> ? high : double(uint64_t(value) >> 32)) * 0x1p32;
  const double sum = scaled + low, part = sum - scaled;
  return to_half<Format, kRounding, 0>(round_to_odd(sum, (scaled - (sum - part)) + (low - part)));
}

template <Tf32Rounding kRounding, int kFlags>
uint32_t to_tf32(float value) {
  constexpr int kDropped = 13;
  constexpr uint32_t kMask = ~((1u << kDropped) - 1);
  if (std::isnan(value)) return 0x7fffffffu;
  if (kFlags & kRelu) value = value > 0 ? value : 0;
  uint32_t bits = as_bits(value);
  if (std::isinf(value)) return kFlags & kSatfinite ? (bits & 0x80000000u) | 0x7f7fe000u : bits;
  if (kRounding == Tf32Rounding::kRna) bits += 1u << (kDropped - 1);
  if (kRounding == Tf32Rounding::kRn) bits += (1u << (kDropped - 1)) - 1 + (bits >> kDropped & 1);
  bits &= kMask;
  if ((kFlags & kSatfinite) && std::isinf(as_float(bits)))
    bits = (bits & 0x80000000u) | 0x7f7fe000u;
  return bits;
}

}  // namespace emulation
