// Attention over a part of the keys, and how parts become the result.
//
// A part holds, for each query, out = sum_j 2^(score_j - row_max) v_j, not normalised, row_sum
// likewise and row_max, in units of log2. Parts are merged in the order in which they stand.
#pragma once

#include "load.h"

namespace lcattn::cpu::LCATTN_ISA {

struct Partial {
  const float* out;  // [rows][stride]
  int64_t stride;
  const float* row_max;
  const float* row_sum;
};

LCATTN_INLINE float exp2_scalar(float x) { return exp2(broadcast(x))[0]; }

// Rows [0, count) of parts [0, n_parts), normalised and written to queries [query, query + count);
// part(index) gives a Partial, whose row_max and row_sum can be read to whole vectors. merged:
// [count][padded_dim(D)], used if there are several parts.
template <typename Part>
LCATTN_INLINE void finish_rows(const Problem& p, int64_t b, int64_t h, int64_t query, int64_t count,
                               int64_t n_parts, const Part& part, float* merged) {
  const Vec sink = broadcast(p.sink ? p.sink[h] * kLog2e : -kInf);
  const float keep = p.dropout > 0.0f ? 1.0f - p.dropout : 1.0f;
  float references[kBlock], totals[kBlock], factors[kBlock];
  for (int64_t row = 0; row < count; row += kWidth) {
    Vec reference = sink;
    for (int64_t n = 0; n < n_parts; ++n) reference = max(reference, load(part(n).row_max + row));
    reference = select(equal(reference, broadcast(-kInf)), zero(), reference);
    Vec total = exp2(sink - reference);
    for (int64_t n = 0; n < n_parts; ++n) {
      const Vec factor = exp2(load(part(n).row_max + row) - reference);
      total = fma(factor, load(part(n).row_sum + row), total);
    }
    Vec factor = broadcast(1.0f) / (total * broadcast(keep));
    if (n_parts == 1) factor = factor * exp2(load(part(0).row_max + row) - reference);
    store(factors + row, select(equal(total, zero()), zero(), factor));
    store(references + row, reference);
    store(totals + row, total);
  }
  const int64_t stride = padded_dim(p.D), at = (b * p.H + h) * p.T + query;
  for (int64_t row = 0; row < count; ++row) {
    const bool empty = totals[row] == 0.0f;
    const double lse = references[row] * 0.69314718055994531 + __builtin_log(totals[row]);
    p.lse[at + row] = empty ? -kInf : static_cast<float>(lse);
    if (p.lse_rest) p.lse_rest[at + row] = empty ? 0.0f : static_cast<float>(lse - p.lse[at + row]);
  }
  if (n_parts == 1) {
    const Partial whole = part(0);
    store_rows(p.out, p.dtype, b, h, query, count, p.D, whole.out, whole.stride, factors);
    return;
  }
  for (int64_t row = 0; row < count; ++row) {
    float* to = merged + row * stride;
    for (int64_t d = 0; d < stride; d += kWidth) store(to + d, zero());
    for (int64_t n = 0; n < n_parts; ++n) {
      const Partial one = part(n);
      const Vec factor = exp2(broadcast(one.row_max[row] - references[row]));
      const float* out = one.out + row * one.stride;
      for (int64_t d = 0; d < stride; d += kWidth) {
        store(to + d, fma(factor, load(out + d), load(to + d)));
      }
    }
  }
  store_rows(p.out, p.dtype, b, h, query, count, p.D, merged, stride, factors);
}

}  // namespace lcattn::cpu::LCATTN_ISA
