// C[rows x columns] = A B, register tile by register tile, with the results handed over in
// registers.
//
// B is read as vectors along its columns and A one scalar at a time, broadcast, so A may be walked
// along either of its dimensions and neither operand is ever repacked. The widest register tile is
// 6 rows of kTileVectors vectors: on AVX-512 24 accumulators, 4 vectors of B and a broadcast fill
// the 32 registers.
//
// start(acc, row, vector) gives a register tile its first value, finish(acc, row, vector) takes the
// result. Both get Acc<R, C>& and the tile's first row and first vector (not column) within the
// product. Sums over several products start at zero each time and are added at the end: one
// rounding of the growing sum for each product, not for each of its terms.
#pragma once

#include "simd.h"

namespace lcattn::cpu::LCATTN_ISA {

constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

// a register tile of R rows and C vectors
template <int R, int C>
struct Acc {
  Vec at[R][C];
  static constexpr int kRows = R, kVectors = C;
};

// the operand A, element (row, depth) at data[row * stride + depth]
struct AlongDepth {
  const float* data;
  int64_t stride;

  LCATTN_INLINE AlongDepth from(int64_t row) const { return {data + row * stride, stride}; }
  LCATTN_INLINE float at(int row) const { return data[row * stride]; }
  LCATTN_INLINE void advance() { ++data; }
};

// the operand A, element (row, depth) at data[depth * stride + row]
struct AlongRows {
  const float* data;
  int64_t stride;

  LCATTN_INLINE AlongRows from(int64_t row) const { return {data + row, stride}; }
  LCATTN_INLINE float at(int row) const { return data[row]; }
  LCATTN_INLINE void advance() { data += stride; }
};

// a row-major block of floats, element (row, column) at data[row * stride + column]
struct Rows {
  const float* data;
  int64_t stride;

  LCATTN_INLINE Rows from(int64_t row, int64_t column = 0) const {
    return {data + row * stride + column, stride};
  }
};

struct StartAtZero {
  template <int R, int C>
  LCATTN_INLINE void operator()(Acc<R, C>& acc, int64_t, int64_t) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc.at[r][c] = zero();
    }
  }
};

// finish into a row-major matrix in memory: its new value, or what is added to it
struct Memory {
  float* data;
  int64_t stride;

  struct Add {
    float* data;
    int64_t stride;
    template <int R, int C>
    LCATTN_INLINE void operator()(const Acc<R, C>& acc, int64_t row, int64_t vector) const {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          float* at = data + (row + r) * stride + (vector + c) * kWidth;
          store(at, load(at) + acc.at[r][c]);
        }
      }
    }
  };
  struct Set {
    float* data;
    int64_t stride;
    template <int R, int C>
    LCATTN_INLINE void operator()(const Acc<R, C>& acc, int64_t row, int64_t vector) const {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          store(data + (row + r) * stride + (vector + c) * kWidth, acc.at[r][c]);
        }
      }
    }
  };
  Add add() const { return {data, stride}; }
  Set set() const { return {data, stride}; }
};

// acc[r][c] += sum over depth of A(r, depth) * B[depth][c]
template <int R, int C, typename A>
LCATTN_INLINE void multiply(Acc<R, C>& acc, A a, Rows b, int64_t depth) {
  Acc<R, C> sum = acc;
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; ++d) {
    Vec columns[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) columns[c] = load(b.data + c * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec row = broadcast(a.at(r));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum.at[r][c] = fma(row, columns[c], sum.at[r][c]);
    }
    a.advance();
    b.data += b.stride;
  }
  acc = sum;
}

template <int R, int C, typename A, typename Start, typename Finish>
LCATTN_INLINE void register_tile(A a, Rows b, int64_t depth, int64_t row, int64_t vector,
                                 const Start& start, const Finish& finish) {
  Acc<R, C> acc;
  start(acc, row, vector);
  multiply(acc, a.from(row), b.from(0, vector * kWidth), depth);
  finish(acc, row, vector);
}

template <int C, typename A, typename Start, typename Finish>
LCATTN_INLINE void register_tile_column(A a, Rows b, int64_t depth, int64_t row, int64_t rows,
                                        int64_t vector, const Start& start, const Finish& finish) {
  const int64_t end = row + rows;
  for (; end - row >= kTileRows; row += kTileRows) {
    register_tile<kTileRows, C>(a, b, depth, row, vector, start, finish);
  }
  if (end - row >= 4) {
    register_tile<4, C>(a, b, depth, row, vector, start, finish);
    row += 4;
  }
  if (end - row >= 2) {
    register_tile<2, C>(a, b, depth, row, vector, start, finish);
    row += 2;
  }
  if (end - row >= 1) register_tile<1, C>(a, b, depth, row, vector, start, finish);
}

// The part of the product in rows [row, row + rows) and vectors [vector, vector + vectors) of C;
// the whole product starts at 0, 0. A and B are given from their own first row and column.
template <typename A, typename Start, typename Finish>
LCATTN_INLINE void product(A a, Rows b, int64_t depth, int64_t row, int64_t rows, int64_t vector,
                           int64_t vectors, const Start& start, const Finish& finish) {
  const int64_t end = vector + vectors;
  for (; end - vector >= kTileVectors; vector += kTileVectors) {
    register_tile_column<kTileVectors>(a, b, depth, row, rows, vector, start, finish);
  }
  if constexpr (kTileVectors > 2) {
    if (end - vector >= 2) {
      register_tile_column<2>(a, b, depth, row, rows, vector, start, finish);
      vector += 2;
    }
  }
  if (end - vector >= 1) {
    register_tile_column<1>(a, b, depth, row, rows, vector, start, finish);
  }
}

}  // namespace lcattn::cpu::LCATTN_ISA
