// the approximations of transcendental functions: the exact value, disturbed within the bound that
// is documented
//
// The bounds are those that the PTX ISA, version 9.0, states in the section of each instruction, as
// far as we know it: those of sqrt and rsqrt were compared with public quotations of it, the others
// were not. The disturbance is a hash of the arguments, so a kernel gives the same each time, and
// one that needs more exactness than hardware gives is found out.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "arithmetic.h"

namespace emulation {

// in units in the last place of the result
constexpr double kEx2Ulp = 2, kRcpUlp = 1, kDivApproxUlp = 2, kDivFullUlp = 2;
// relative
constexpr double kRsqrtError = 0x1.0p-22 * 0.5358867312681466, kSqrtError = 0x1.0p-23,
                 kTanhError = 0x1.0p-11, kLg2RelativeError = 0x1.0p-22;
// absolute: lg2 between 1/2 and 2, sine and cosine between -2 pi and 2 pi, and up to 100 pi
constexpr double kLg2AbsoluteError = 0x1.0p-22, kSineError = 0x1.0p-21 * 1.4142135623730951,
                 kSineErrorFar = 0x1.0p-15 * 1.2311444133449163;
constexpr double kEx2F16Error = 0x1.0p-10 * 1.0717734625362931, kEx2Bf16Error = 0x1.0p-7,
                 kTanhF16Error = 0x1.0p-11 * 1.0090504795, kTanhBf16Error = 0x1.0p-8;

// -1 to 1, by the argument's bits
inline double disturbance(double argument) {
  uint64_t hash = as_bits(argument) * 0x9e3779b97f4a7c15ull;
  hash ^= hash >> 29;
  hash *= 0xbf58476d1ce4e5b9ull;
  return double(int32_t(hash >> 32)) * 0x1p-31;
}

inline double disturbed(double exact, double argument, double relative_bound) {
  return exact * (1 + relative_bound * disturbance(argument));
}

// rounding to float adds half a unit, so the rest of the bound is what disturbs
inline float disturbed_units(double exact, double argument, double units) {
  const auto rounded = float(exact);
  if (!std::isfinite(rounded) || rounded == 0) return rounded;
  const double unit = double(std::nextafter(std::fabs(rounded), HUGE_VALF)) - std::fabs(rounded);
  return float(exact + (units - 0.5) * unit * disturbance(argument));
}

// bounds of a relative error, which rounding shares as well
inline float disturbed_relative(double exact, double argument, double bound) {
  return float(disturbed(exact, argument, bound - 0x1p-24));
}

inline float ex2_approx(float x) {
  return x == 0 ? 1.0f : disturbed_units(std::exp2(double(x)), x, kEx2Ulp);
}

inline float rcp_approx(float x) { return disturbed_units(1 / double(x), x, kRcpUlp); }

inline float sqrt_approx(float x) {
  return disturbed_relative(std::sqrt(double(x)), x, kSqrtError);
}

inline float rsqrt_approx(float x) {
  return disturbed_relative(1 / std::sqrt(double(x)), x, kRsqrtError);
}

inline float tanh_approx(float x) {
  if (std::isinf(x)) return std::copysign(1.0f, x);
  // the magnitude of the result is never above one
  const float result = disturbed_relative(std::tanh(double(x)), x, kTanhError);
  return std::fabs(result) > 1 ? std::copysign(1.0f, result) : result;
}

inline float lg2_approx(float x) {
  const double exact = std::log2(double(x));
  if (x > 0.5f && x < 2) return float(exact + (kLg2AbsoluteError - 0x1p-25) * disturbance(x));
  return disturbed_relative(exact, x, kLg2RelativeError);
}

inline float disturbed_sine(double exact, float x) {
  const double bound = std::fabs(x) <= 6.2831855f ? kSineError : kSineErrorFar;
  return float(std::clamp(exact + (bound - 0x1p-25) * disturbance(x), -1.0, 1.0));
}

inline float sin_approx(float x) { return x == 0 ? x : disturbed_sine(std::sin(double(x)), x); }

inline float cos_approx(float x) { return x == 0 ? 1.0f : disturbed_sine(std::cos(double(x)), x); }

inline double argument_of(float first, float second) {
  return as_double(uint64_t{as_bits(first)} << 32 | as_bits(second));
}

inline float div_full(float x, float y) {
  return disturbed_units(double(x) / double(y), argument_of(x, y), kDivFullUlp);
}

inline float div_approx(float x, float y) {
  // the reciprocal of such a divisor is subnormal, and flushed
  if (std::fabs(y) > 0x1p126f && !std::isinf(y)) {
    return std::isinf(x) ? canonical_nan(x) : std::copysign(0.0f, std::signbit(y) ? -x : x);
  }
  return disturbed_units(double(x) / double(y), argument_of(x, y), kDivApproxUlp);
}

}  // namespace emulation
