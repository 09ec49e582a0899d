// Gradients of the terms that depend on the offset o = k_pos - q_pos alone: bias and slope.
//
//   dbias[c] = sum of dS over the pairs with clamp(o) = c        dslope = sum of dS |o|
//
// Where the coordinates of a tile step by one, an offset is a diagonal. Row r of dS goes into table
// r mod kWidth, shifted by that much, so that the vectors of a tile are added to a table at one
// alignment and those on one diagonal of vectors meet in a register first; fold() undoes the shifts
// once, at the end of a task. The tables reach two blocks beyond the bias on both sides: what lands
// there belongs to its first or last entry.
#pragma once

#include "backward_tile.h"

namespace lcattn::cpu::LCATTN_ISA {

// the offsets that occur between any query and any key
struct OffsetRange {
  int64_t low, high;

  int64_t size() const { return high - low + 1; }
};

inline OffsetRange offset_range(const Problem& p) {
  int64_t q_low = p.row_start, q_high = p.row_start + p.T - 1, k_low = 0, k_high = p.S - 1;
  const auto span = [&](const int32_t* pos, int64_t phase_stride, int64_t batch_stride,
                        int64_t count, int64_t& low, int64_t& high) {
    low = high = pos[0];
    for (int64_t f = 0; f < (phase_stride ? p.P : 1); ++f) {
      for (int64_t b = 0; b < (batch_stride ? p.B : 1); ++b) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t x = pos[f * phase_stride + b * batch_stride + i];
          if (x < low) low = x;
          if (x > high) high = x;
        }
      }
    }
  };
  if (p.q_pos) span(p.q_pos, p.q_pos_phase_stride, p.q_pos_batch_stride, p.T, q_low, q_high);
  if (p.k_pos) span(p.k_pos, p.k_pos_phase_stride, p.k_pos_batch_stride, p.S, k_low, k_high);
  return {k_low - q_high, k_high - q_low};
}

// The gradient of one row of the bias while a task runs.
struct BiasGradient {
  float* tables;      // [kWidth][length]
  double* scattered;  // [length], where coordinates do not step: many terms meet in one entry
  double ends[2];     // tiles that lie wholly at or beyond the first and the last entry
  int64_t low, length;
  int64_t first, last;  // offsets of the first and the last entry of the bias

  static int64_t clamp_to(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  }

  static void extent(const Problem& p, const OffsetRange& range, int64_t& low, int64_t& length) {
    const int64_t first = p.bias.min_offset, last = first + p.bias.length - 1;
    low = clamp_to(range.low - kBlock, first, last) - 2 * kBlock;
    const int64_t high = clamp_to(range.high + kBlock, first, last) + 2 * kBlock;
    length = padded_dim(high - low + 1 + kWidth);
  }

  void start(const Problem& p, const OffsetRange& range) {
    extent(p, range, low, length);
    first = p.bias.min_offset;
    last = first + p.bias.length - 1;
    ends[0] = ends[1] = 0.0;
    std::memset(tables, 0, static_cast<size_t>(kWidth * length) * sizeof(float));
    std::memset(scattered, 0, static_cast<size_t>(length) * sizeof(double));
  }

  // dS of a tile with steps of one; o is the offset of its first query and first key
  __attribute__((noinline)) void add_tile(const float* ds, int64_t o) {
    if (o + kBlock - 1 <= first || o - kBlock + 1 >= last) {
      Vec sum = zero();
      for (int64_t i = 0; i < kBlock * kBlock; i += kWidth) sum += load(ds + i);
      ends[o + kBlock - 1 <= first ? 0 : 1] += reduce_add(sum);
      return;
    }
    for (int64_t shift = 0; shift < kWidth; ++shift) {
      float* table = tables + shift * length + (o - low);
      const float* rows = ds + shift * kBlock;
#pragma GCC unroll 16
      for (int diagonal = 1 - kBlockVectors; diagonal < kBlockVectors; ++diagonal) {
        const int begin = diagonal < 0 ? -diagonal : 0;
        const int end = diagonal < 0 ? kBlockVectors : kBlockVectors - diagonal;
        Vec sum = load(table + diagonal * kWidth);
#pragma GCC unroll 4
        for (int row = begin; row < end; ++row) {
          sum += load(rows + row * kWidth * kBlock + (row + diagonal) * kWidth);
        }
        store(table + diagonal * kWidth, sum);
      }
    }
  }

  // one element of dS at any offset
  void add(float ds, int64_t o) { scattered[clamp_to(o, first, last) - low] += ds; }

  // adds what was collected to a row of the bias gradient
  void fold(float* row) const {
    const int64_t entries = last - first + 1;
    double at_first = ends[0], at_last = ends[1];
    for (int64_t x = 0; x < length - kWidth; ++x) {
      double sum = scattered[x];
      for (int64_t shift = 0; shift < kWidth; ++shift) sum += tables[shift * length + x + shift];
      const int64_t entry = low + x - first;
      if (entry <= 0) {
        at_first += sum;
      } else if (entry >= entries - 1) {
        at_last += sum;
      } else {
        row[entry] += static_cast<float>(sum);
      }
    }
    row[0] += static_cast<float>(at_first);
    row[entries - 1] += static_cast<float>(at_last);
  }
};

// sum of dS |o| of a tile with steps of one
inline double slope_gradient(const float* ds, int64_t o) {
  double total = 0.0;
  for (int64_t r = 0; r < kBlock; ++r) {
    Vec sum = zero();
    IVec offset = lane_index() + broadcast(static_cast<int32_t>(o - r));
    for (int64_t c = 0; c < kBlockVectors; ++c) {
      sum = fma(load(ds + r * kBlock + c * kWidth), to_float(abs(offset)), sum);
      offset += kWidth;
    }
    total += reduce_add(sum);
  }
  return total;
}

}  // namespace lcattn::cpu::LCATTN_ISA
