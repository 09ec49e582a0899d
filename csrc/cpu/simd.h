// One vector of floats and what the kernels do with it, for AVX-512, AVX2 and anything else.
//
// kWidth lanes of float32. Everything lives in the namespace of the instruction set that this file
// is compiled for, so that the linker can never give one processor a function made for another.
// exp2 is within 1 ulp where the result is a normal number, inf from 127.5 or 128 on, 0 far below
// and at -inf; tanh is within 2 ulp.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define LCATTN_INLINE inline __attribute__((always_inline))

namespace lcattn::cpu::LCATTN_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t UVec __attribute__((vector_size(kWidth * 4)));

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kInf = __builtin_inff();

// lanes that take part: a mask register on AVX-512, all-ones lanes elsewhere
#if defined(__AVX512F__)
typedef __mmask16 Mask;
#else
typedef IVec Mask;
#endif

LCATTN_INLINE Vec zero() { return Vec{}; }

LCATTN_INLINE IVec lane_index() {
  IVec v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

#if defined(__AVX512F__)

// the maskz forms of some intrinsics, because gcc 12 warns about the plain ones
constexpr Mask kAllLanes = 0xffff;

LCATTN_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
LCATTN_INLINE IVec broadcast(int32_t x) { return (IVec)_mm512_set1_epi32(x); }
LCATTN_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
LCATTN_INLINE IVec load(const int32_t* p) { return (IVec)_mm512_loadu_si512(p); }
LCATTN_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
LCATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
LCATTN_INLINE Vec max(Vec a, Vec b) { return _mm512_maskz_max_ps(kAllLanes, a, b); }
LCATTN_INLINE IVec min(IVec a, IVec b) {
  return (IVec)_mm512_maskz_min_epi32(kAllLanes, (__m512i)a, (__m512i)b);
}
LCATTN_INLINE IVec max(IVec a, IVec b) {
  return (IVec)_mm512_maskz_max_epi32(kAllLanes, (__m512i)a, (__m512i)b);
}
LCATTN_INLINE Vec gather(const float* base, IVec index) {
  return _mm512_mask_i32gather_ps(zero(), kAllLanes, (__m512i)index, base, 4);
}
LCATTN_INLINE Vec to_float(IVec v) { return _mm512_maskz_cvtepi32_ps(kAllLanes, (__m512i)v); }
LCATTN_INLINE Vec swap_halves(Vec v) {
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
}
LCATTN_INLINE Vec swap_quarters(Vec v) {
  return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
}
LCATTN_INLINE float reduce_add(Vec v) {
  v = v + swap_halves(v);
  v = v + swap_quarters(v);
  return (v[0] + v[2]) + (v[1] + v[3]);
}
LCATTN_INLINE float reduce_max(Vec v) {
  v = max(v, swap_halves(v));
  v = max(v, swap_quarters(v));
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}

LCATTN_INLINE Mask mask_from_bits(uint32_t bits) { return static_cast<Mask>(bits); }
LCATTN_INLINE uint32_t bits_from_mask(Mask mask) { return mask; }
LCATTN_INLINE Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
LCATTN_INLINE Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
LCATTN_INLINE Vec select(Mask mask, Vec yes, Vec no) { return _mm512_mask_mov_ps(no, mask, yes); }

LCATTN_INLINE uint32_t bits_at_least(UVec v, uint32_t bound) {
  return _mm512_cmpge_epu32_mask((__m512i)v, _mm512_set1_epi32(static_cast<int32_t>(bound)));
}
LCATTN_INLINE Vec reverse(Vec v) {
  return __builtin_shufflevector(v, v, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

LCATTN_INLINE Vec load_bfloat16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)((IVec)_mm512_maskz_cvtepu16_epi32(kAllLanes, half) << 16);
}
LCATTN_INLINE Vec load_float16(const uint16_t* p) {
  return _mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

#elif defined(__AVX2__)

LCATTN_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
LCATTN_INLINE IVec broadcast(int32_t x) { return (IVec)_mm256_set1_epi32(x); }
LCATTN_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
LCATTN_INLINE IVec load(const int32_t* p) {
  return (IVec)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
LCATTN_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
LCATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
LCATTN_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
LCATTN_INLINE IVec min(IVec a, IVec b) { return (IVec)_mm256_min_epi32((__m256i)a, (__m256i)b); }
LCATTN_INLINE IVec max(IVec a, IVec b) { return (IVec)_mm256_max_epi32((__m256i)a, (__m256i)b); }
LCATTN_INLINE Vec gather(const float* base, IVec index) {
  return _mm256_i32gather_ps(base, (__m256i)index, 4);
}
LCATTN_INLINE Vec to_float(IVec v) { return _mm256_cvtepi32_ps((__m256i)v); }
LCATTN_INLINE float reduce_add(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
LCATTN_INLINE float reduce_max(Vec v) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

LCATTN_INLINE Mask mask_from_bits(uint32_t bits) {
  const IVec lane_bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return (broadcast(static_cast<int32_t>(bits)) & lane_bit) == lane_bit;
}
LCATTN_INLINE uint32_t bits_from_mask(Mask mask) { return _mm256_movemask_ps((__m256)mask); }
LCATTN_INLINE Mask less(Vec a, Vec b) { return a < b; }
LCATTN_INLINE Mask equal(Vec a, Vec b) { return a == b; }
LCATTN_INLINE Vec select(Mask mask, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, (__m256)mask);
}

LCATTN_INLINE uint32_t bits_at_least(UVec v, uint32_t bound) {
  return bits_from_mask((Mask)(v >= (UVec)broadcast(static_cast<int32_t>(bound))));
}
LCATTN_INLINE Vec reverse(Vec v) { return __builtin_shufflevector(v, v, 7, 6, 5, 4, 3, 2, 1, 0); }

LCATTN_INLINE Vec load_bfloat16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
LCATTN_INLINE Vec load_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

#else

LCATTN_INLINE Vec broadcast(float x) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = x;
  return v;
}
LCATTN_INLINE IVec broadcast(int32_t x) {
  IVec v;
  for (int i = 0; i < kWidth; ++i) v[i] = x;
  return v;
}
LCATTN_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LCATTN_INLINE IVec load(const int32_t* p) {
  IVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LCATTN_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
LCATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
LCATTN_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
LCATTN_INLINE IVec min(IVec a, IVec b) { return a < b ? a : b; }
LCATTN_INLINE IVec max(IVec a, IVec b) { return a > b ? a : b; }
LCATTN_INLINE Vec gather(const float* base, IVec index) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = base[index[i]];
  return v;
}
LCATTN_INLINE Vec to_float(IVec v) { return __builtin_convertvector(v, Vec); }
LCATTN_INLINE float reduce_add(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
LCATTN_INLINE float reduce_max(Vec v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}

LCATTN_INLINE Mask mask_from_bits(uint32_t bits) {
  const IVec lane_bit = {1, 2, 4, 8};
  return (broadcast(static_cast<int32_t>(bits)) & lane_bit) == lane_bit;
}
LCATTN_INLINE uint32_t bits_from_mask(Mask mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (mask[i] ? 1u : 0u) << i;
  return bits;
}
LCATTN_INLINE Mask less(Vec a, Vec b) { return a < b; }
LCATTN_INLINE Mask equal(Vec a, Vec b) { return a == b; }
LCATTN_INLINE Vec select(Mask mask, Vec yes, Vec no) { return mask ? yes : no; }

LCATTN_INLINE uint32_t bits_at_least(UVec v, uint32_t bound) {
  return bits_from_mask((Mask)(v >= (UVec)broadcast(static_cast<int32_t>(bound))));
}
LCATTN_INLINE Vec reverse(Vec v) { return __builtin_shufflevector(v, v, 3, 2, 1, 0); }

LCATTN_INLINE Vec load_bfloat16(const uint16_t* p) {
  IVec v;
  for (int i = 0; i < kWidth; ++i) v[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return (Vec)v;
}

#endif

LCATTN_INLINE Vec abs(Vec v) { return (Vec)((IVec)v & broadcast(int32_t{0x7fffffff})); }
LCATTN_INLINE IVec abs(IVec v) { return max(v, -v); }
LCATTN_INLINE Vec zero_unless(Mask mask, Vec v) { return select(mask, v, zero()); }
LCATTN_INLINE IVec clamp(IVec v, int32_t low, int32_t high) {
  return min(max(v, broadcast(low)), broadcast(high));
}

template <int kGroup, int... kLane>
LCATTN_INLINE Vec add_halves(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  const Vec low = __builtin_shufflevector(a, b, (kLane / kGroup * 2 * kGroup + kLane % kGroup)...);
  const Vec high =
      __builtin_shufflevector(a, b, (kLane / kGroup * 2 * kGroup + kLane % kGroup + kGroup)...);
  return low + high;
}

// lane i of the result is the sum of the lanes of v[i]; v is used up
template <int kCount = kWidth>
LCATTN_INLINE Vec reduce_add_each(Vec* v) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount / 2; ++i) {
    v[i] =
        add_halves<kCount / 2>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kWidth>{});
  }
  if constexpr (kCount > 2) {
    return reduce_add_each<kCount / 2>(v);
  } else {
    return v[0];
  }
}

template <int kStep, int... kLane>
LCATTN_INLINE void swap_blocks(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
  const Vec first =
      __builtin_shufflevector(a, b, (kLane & kStep ? kWidth + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kWidth + kLane : kLane + kStep)...);
  a = first;
}

// lane j of v[i] and lane i of v[j] change places
template <int kStep = kWidth / 2>
LCATTN_INLINE void transpose(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if ((i & kStep) == 0) {
      swap_blocks<kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, kWidth>{});
    }
  }
  if constexpr (kStep > 1) transpose<kStep / 2>(v);
}

// lanes 0 .. count - 1
LCATTN_INLINE Mask first_lanes(int64_t count) {
  return mask_from_bits(count >= kWidth ? (1u << kWidth) - 1 : (1u << (count > 0 ? count : 0)) - 1);
}

// sum_n coefficient[n] f^n
LCATTN_INLINE Vec polynomial(Vec f, const float (&coefficient)[7]) {
  Vec p = broadcast(coefficient[6]);
#pragma GCC unroll 6
  for (int n = 5; n >= 0; --n) p = fma(p, f, broadcast(coefficient[n]));
  return p;
}

// 2^x: the minimax polynomial of degree 6 on one octave (relative error 2e-9 before rounding) with
// value 1 at 0, scaled by the whole part
#if defined(__AVX512F__)
LCATTN_INLINE Vec exp2(Vec x) {
  // on [0, 1]
  constexpr float kCoefficient[] = {1.0f,
                                    6.931470633e-01f,
                                    2.402293086e-01f,
                                    5.548528209e-02f,
                                    9.675451554e-03f,
                                    1.246784581e-03f,
                                    2.161291777e-04f};
  // x - floor(x), which is 0 at -inf; scalef multiplies by 2^floor(x)
  const Vec fraction = _mm512_maskz_reduce_ps(kAllLanes, x, 1);
  return _mm512_maskz_scalef_ps(kAllLanes, polynomial(fraction, kCoefficient), x);
}
#else
LCATTN_INLINE Vec exp2(Vec x) {
  // on [-1/2, 1/2]
  constexpr float kCoefficient[] = {1.0f,
                                    6.931471825e-01f,
                                    2.402264774e-01f,
                                    5.550332367e-02f,
                                    9.618436918e-03f,
                                    1.339887502e-03f,
                                    1.535336196e-04f};
  // max returns its second operand when one is NaN, so that a NaN stays one
  const Vec low = max(broadcast(-127.0f), x);
  const Vec inside = -max(broadcast(-128.0f), -low);
  // added to this, a number is rounded to a whole one, which with the exponent's bias is in the low
  // bits
  const Vec rounder = broadcast(12582912.0f + 127.0f);
  const Vec rounded = inside + rounder;
  const Vec fraction = inside - (rounded - rounder);
  // 0 at -127, inf at 128
  const Vec power = (Vec)((IVec)rounded << 23);
  return polynomial(fraction, kCoefficient) * power;
}
#endif

struct Tanh {
  Vec value, slope;
};

// tanh, Cephes' rational split: an odd polynomial near 0, 1 - 2 / (e^2|x| + 1) elsewhere. Its slope
// is 1 - tanh^2, of which near 1 the square would leave nothing but its rounding.
LCATTN_INLINE Tanh tanh_and_slope(Vec x) {
  const Vec size = abs(x), square = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fma(p, square, broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  const Vec near = fma(p * square, x, x);
  const Vec one = broadcast(1.0f), two = broadcast(2.0f);
  const Vec rest = two / (exp2(size * broadcast(2.0f * kLog2e)) + one);
  const IVec sign = (IVec)x & broadcast(INT32_MIN);
  const Vec far = (Vec)((IVec)(one - rest) | sign);
  return {select(less(size, broadcast(0.625f)), near, far), rest * (two - rest)};
}

// While it lives, results too small for a normal float become 0: products with subnormals are slow,
// and exponentials far below their row's maximum would be subnormal. Inputs are read as they are.
class FlushSubnormals {
#if defined(__SSE2__)
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  uint32_t saved_;
#else
 public:
  FlushSubnormals() {}
#endif
};

}  // namespace lcattn::cpu::LCATTN_ISA
