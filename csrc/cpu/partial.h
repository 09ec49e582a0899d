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

struct RowScale {
  float reference, total, factor;
};

LCATTN_INLINE float exp2_scalar(float x) { return exp2(broadcast(x))[0]; }

// Row `row` of parts [0, n_parts), normalised and written to query `query`; scratch: padded_dim(D)
// floats. part(index) gives a Partial.
template <typename Part>
LCATTN_INLINE void finish_row(const Problem& p, int64_t b, int64_t h, int64_t query, int64_t row,
                              int64_t n_parts, const Part& part, float* scratch) {
  const float sink = p.sink ? p.sink[h] * kLog2e : -kInf;
  float reference = sink;
  for (int64_t n = 0; n < n_parts; ++n) {
    const float row_max = part(n).row_max[row];
    if (row_max > reference) reference = row_max;
  }
  if (reference == -kInf) reference = 0.0f;
  float total = exp2_scalar(sink - reference);
  const int64_t stride = padded_dim(p.D);
  for (int64_t d = 0; d < stride; d += kWidth) store(scratch + d, zero());
  for (int64_t n = 0; n < n_parts; ++n) {
    const Partial one = part(n);
    const float factor = exp2_scalar(one.row_max[row] - reference);
    total += factor * one.row_sum[row];
    const float* out = one.out + row * one.stride;
    for (int64_t d = 0; d < stride; d += kWidth) {
      store(scratch + d, fma(broadcast(factor), load(out + d), load(scratch + d)));
    }
  }
  const float keep = p.dropout > 0.0f ? 1.0f - p.dropout : 1.0f;
  const float factor = total == 0.0f ? 0.0f : 1.0f / (total * keep);
  store_rows(p.out, p.dtype, b, h, query, 1, p.D, scratch, stride, &factor);
  const double lse = reference * 0.69314718055994531 + __builtin_log(total);
  const int64_t at = (b * p.H + h) * p.T + query;
  p.lse[at] = total == 0.0f ? -kInf : static_cast<float>(lse);
  p.lse_rest[at] = total == 0.0f ? 0.0f : static_cast<float>(lse - p.lse[at]);
}

}  // namespace lcattn::cpu::LCATTN_ISA
