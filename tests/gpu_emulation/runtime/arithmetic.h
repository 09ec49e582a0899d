// integer and floating-point operations as PTX defines them, where C++ differs
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "rounding.h"

namespace emulation {

typedef unsigned __int128 Bits128;

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline double as_double(uint64_t bits) { return std::bit_cast<double>(bits); }
inline uint32_t as_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline uint64_t as_bits(double value) { return std::bit_cast<uint64_t>(value); }

template <class T>
constexpr uint32_t kBits = sizeof(T) * 8;

// ---------------------------------------------------------------- integers

template <class T>
T add_carry(T first, T second, bool& carry) {
  const T sum = T(first + second);
  carry = sum < first;
  return sum;
}

template <class T>
T sub_carry(T first, T second, bool& borrow) {
  borrow = first < second;
  return T(first - second);
}

template <class T, bool kCarryOut>
T add_with_carry(T first, T second, bool& carry) {
  const T sum = T(first + second), result = T(sum + carry);
  if (kCarryOut) carry = sum < first || result < sum;
  return result;
}

template <class T, bool kBorrowOut>
T sub_with_borrow(T first, T second, bool& borrow) {
  const T difference = T(first - second), result = T(difference - borrow);
  if (kBorrowOut) borrow = first < second || difference < T(borrow);
  return result;
}

template <class To, class From>
To saturate_integer(From value) {
  typedef __int128 Wide;
  return To(std::clamp(Wide(value), Wide(std::numeric_limits<To>::min()),
                       Wide(std::numeric_limits<To>::max())));
}

inline int32_t add_saturated(int32_t first, int32_t second) {
  return saturate_integer<int32_t>(int64_t{first} + second);
}
inline int32_t sub_saturated(int32_t first, int32_t second) {
  return saturate_integer<int32_t>(int64_t{first} - second);
}

template <class T>
T multiply_high(T first, T second) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return T(Wide(first) * Wide(second) >> kBits<T>);
}

template <class T>
T multiply_24(T first, T second, bool high) {
  const auto narrow = [](T value) {
    return std::is_signed_v<T> ? int64_t(int32_t(uint32_t(value) << 8) >> 8)
                               : int64_t(uint32_t(value) & 0xffffffu);
  };
  const uint64_t product = uint64_t(narrow(first) * narrow(second));
  return T(high ? product >> 16 : product);
}

// PTX leaves division by zero to the machine, which gives all ones
template <class T>
T integer_divide(T first, T second) {
  if (second == 0) return T(~T(0));
  if (std::is_signed_v<T> && second == T(-1)) return T(std::make_unsigned_t<T>(0) - first);
  return T(first / second);
}

template <class T>
T integer_remainder(T first, T second) {
  if (second == 0) return first;
  if (std::is_signed_v<T> && second == T(-1)) return 0;
  return T(first % second);
}

template <class T>
T relu(T value) {
  return value > 0 ? value : T(0);
}

template <class T>
T shift_left(T value, uint32_t amount) {
  return amount >= kBits<T> ? T(0) : T(std::make_unsigned_t<T>(value) << amount);
}

template <class T>
T shift_right(T value, uint32_t amount) {
  return T(value >> std::min(amount, kBits<T> - 1) >> (amount >= kBits<T> ? 1 : 0));
}

template <bool kClamp>
uint32_t funnel_amount(uint32_t amount) {
  return kClamp ? std::min(amount, 32u) : amount & 31;
}

template <bool kClamp>
uint32_t funnel_shift_left(uint32_t low, uint32_t high, uint32_t amount) {
  return uint32_t((uint64_t{high} << 32 | low) << funnel_amount<kClamp>(amount) >> 32);
}

template <bool kClamp>
uint32_t funnel_shift_right(uint32_t low, uint32_t high, uint32_t amount) {
  return uint32_t((uint64_t{high} << 32 | low) >> funnel_amount<kClamp>(amount));
}

template <class T>
T bit_field_extract(T value, uint32_t position, uint32_t length) {
  position &= 255;
  length &= 255;
  if (length == 0) return 0;
  const uint32_t top = std::min(position + length - 1, kBits<T> - 1);
  const bool sign = std::is_signed_v<T> && (value >> top & 1);
  T result = 0;
  for (uint32_t i = 0; i < kBits<T>; ++i) {
    const bool bit = i < length && position + i < kBits<T> ? value >> (position + i) & 1 : sign;
    result |= T(std::make_unsigned_t<T>(bit) << i);
  }
  return result;
}

template <class T>
T bit_field_insert(T value, T base, uint32_t position, uint32_t length) {
  position &= 255;
  length &= 255;
  if (length == 0 || position >= kBits<T>) return base;
  const T mask = T((length >= kBits<T> ? ~T(0) : T((T(1) << length) - 1)) << position);
  return T((base & ~mask) | (T(value << position) & mask));
}

template <class T, bool kShiftAmount>
uint32_t find_leading(T value) {
  using Unsigned = std::make_unsigned_t<T>;
  const auto bits = Unsigned(std::is_signed_v<T> && value < 0 ? ~value : value);
  if (bits == 0) return ~0u;
  const auto position = uint32_t(kBits<T> - 1 - std::countl_zero(bits));
  return kShiftAmount ? kBits<T> - 1 - position : position;
}

template <class T>
T bit_reverse(T value) {
  T result = 0;
  for (uint32_t i = 0; i < kBits<T>; ++i) result |= T(value >> i & 1) << (kBits<T> - 1 - i);
  return result;
}

template <bool kClamp>
uint32_t bit_mask(uint32_t position, uint32_t width) {
  position = kClamp ? std::min(position, 32u) : position & 31;
  width = kClamp ? std::min(width, 32u) : width & 31;
  return shift_left((width == 32 ? ~0u : (1u << width) - 1), position);
}

template <class T, bool kClamp>
T extend(T value, uint32_t width) {
  width = kClamp ? std::min(width, 32u) : width & 31;
  return bit_field_extract(value, 0, width);
}

template <uint32_t kTable>
uint32_t logic_of_three(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (uint32_t i = 0; i < 8; ++i) {
    if (kTable >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

enum class Permutation { kIndex, kF4e, kB4e, kRc8, kEcl, kEcr, kRc16 };

// PTX ISA, "prmt": the selector of byte `i` of the result, by mode and the two bits of the control
template <Permutation kMode>
uint32_t permute_selector(uint32_t control, uint32_t i) {
  const uint32_t c = control & 3;
  switch (kMode) {
    case Permutation::kIndex:
      return control >> (4 * i) & 15;
    case Permutation::kF4e:
      return c + i;
    case Permutation::kB4e:
      return (c - i) & 7;
    case Permutation::kRc8:
      return c;
    case Permutation::kEcl:
      return std::max(c, i);
    case Permutation::kEcr:
      return std::min(c, i);
    case Permutation::kRc16:
      return (c & 1) * 2 + (i & 1);
  }
}

template <Permutation kMode>
uint32_t permute(uint32_t a, uint32_t b, uint32_t control) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t selector = permute_selector<kMode>(control, i);
    auto byte = uint8_t(bytes >> (8 * (selector & 7)));
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= uint32_t{byte} << (8 * i);
  }
  return result;
}

template <class First, class Second>
uint32_t dot_product_4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i)
    c += uint32_t(int32_t(First(a >> 8 * i)) * int32_t(Second(b >> 8 * i)));
  return c;
}

template <class First, class Second, int kHalf>
uint32_t dot_product_2(uint32_t a, uint32_t b, uint32_t c) {
  using Wide = std::conditional_t<std::is_signed_v<First>, int16_t, uint16_t>;
  for (int i = 0; i < 2; ++i) {
    c += uint32_t(int64_t(Wide(a >> 16 * i)) * int64_t(Second(b >> (8 * (2 * kHalf + i)))));
  }
  return c;
}

// ---------------------------------------------------------------- floats

inline float flush(float value) {
  return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value;
}

// NaN becomes zero
template <class T>
T saturate(T value) {
  return value >= 1 ? T(1) : value > 0 ? value : T(0);
}

template <class T>
bool is_unordered(T first, T second) {
  return std::isnan(first) || std::isnan(second);
}

inline float canonical_nan(float) { return as_float(0x7fffffffu); }
inline double canonical_nan(double) { return as_double(0x7ff8000000000000ull); }

template <bool kNan, class T>
T maximum(T first, T second) {
  if (std::isnan(first)) return kNan || std::isnan(second) ? canonical_nan(first) : second;
  if (std::isnan(second)) return kNan ? canonical_nan(first) : first;
  // +0 is greater than -0
  if (first == second) return std::signbit(first) ? second : first;
  return first > second ? first : second;
}

template <bool kNan, class T>
T minimum(T first, T second) {
  if (std::isnan(first)) return kNan || std::isnan(second) ? canonical_nan(first) : second;
  if (std::isnan(second)) return kNan ? canonical_nan(first) : first;
  if (first == second) return std::signbit(first) ? first : second;
  return first < second ? first : second;
}

// the greater or lesser magnitude, with the sign that the operands' product has
template <class T>
T with_xor_sign(T magnitude, T first, T second) {
  if (std::isnan(magnitude)) return magnitude;
  return std::signbit(first) != std::signbit(second) ? -magnitude : magnitude;
}

template <bool kNan, class T>
T xor_sign_maximum(T first, T second) {
  return with_xor_sign(maximum<kNan>(std::fabs(first), std::fabs(second)), first, second);
}

template <bool kNan, class T>
T xor_sign_minimum(T first, T second) {
  return with_xor_sign(minimum<kNan>(std::fabs(first), std::fabs(second)), first, second);
}

// of a value that is rounded to an integer already; PTX ISA, "cvt": clamped, and NaN is zero unless
// a 64-bit type is involved
template <class To, bool kFromDouble, class From>
To float_to_integer(From value) {
  using Limits = std::numeric_limits<To>;
  if (std::isnan(value)) {
    return kFromDouble || sizeof(To) == 8 ? To(std::make_unsigned_t<To>(1) << (kBits<To> - 1))
                                          : To(0);
  }
  // one more than the greatest integer is a power of two, which floats hold exactly
  const From above = std::ldexp(From(1), Limits::digits);
  if (value >= above) return Limits::max();
  if (value < From(Limits::min())) return Limits::min();
  return To(value);
}

enum class Tf32Rounding { kRna, kRn, kRz };

}  // namespace emulation
