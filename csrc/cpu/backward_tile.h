// The five products of one query tile against one key block.
//
//   P  = 2^(Q2 K^T + terms - lse)             [queries x keys], 0 where not visible
//   dS = P (dO V^T - delta)                   [queries x keys]
//   dV += P^T dO    dK += dS^T Q2             [keys x D], dK still in units of log2
//   dQ += dS K                                [queries x D], still without scale
//
// Q2 = log2(e) scale Q, terms and lse in units of log2, all rounded as in the forward pass: a key
// that has all the weight gets p = 1 exactly, however large its score.
//
// The exponential and the product with P happen on finished accumulators, in registers. Nothing of
// the tile is computed twice. K^T and V^T are packed once per key block; P^T and dS^T are read from
// the row-major tiles as broadcasts. A masked tile carries, for each register tile, the range of
// keys (or queries) it can see at all; all five products stay inside it.
#pragma once

#include "load.h"
#include "mask.h"
#include "scores.h"

namespace lcattn::cpu::LCATTN_ISA {

constexpr int kBlockVectors = kBlock / kWidth;

// rounds as one lane of the vectors' fma
LCATTN_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// what of a tile is visible, and what of it the products can skip
struct Visibility {
  BitTile bits;                // queries as rows
  Extent keys_of[kStrips];     // by strip of queries
  Extent queries_of[kStrips];  // by strip of keys
  bool any;

  // `rows` rows of a tile of the table (-1: all ones) from its row `shift` on, with the keys of
  // key_word
  void read(const Problem& p, int64_t tile, int64_t shift, int64_t rows, uint64_t key_word) {
    if (tile >= 0) load_bits(p, tile, shift, bits);
    uint64_t seen = 0;
    for (int64_t r = 0; r < kBlock; ++r) {
      const uint64_t word = tile >= 0 ? bits.row[r] : ~uint64_t{0};
      bits.row[r] = r < rows ? word & key_word : 0;
      seen |= bits.row[r];
    }
    any = seen != 0;
    find_extents(bits, keys_of);
    BitTile transposed = bits;
    transpose(transposed);
    find_extents(transposed, queries_of);
  }

  // everything in rows x kBlock
  void fill(int64_t rows) {
    any = true;
    for (int64_t r = 0; r < kBlock; ++r) bits.row[r] = r < rows ? ~uint64_t{0} : 0;
    for (int strip = 0; strip < kStrips; ++strip) {
      keys_of[strip] = {0, kBlock};
      queries_of[strip] = {0, static_cast<uint8_t>(rows)};
    }
  }
};

template <bool kMasked>
struct FinishProbabilities {
  const float* minus_lse;
  const float* minus_rest;
  TermTile terms;
  const uint64_t* bits;
  float* p;

  template <int R, int C>
  LCATTN_INLINE void operator()(const Acc<R, C>& acc, int64_t row, int64_t vector) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec shift = broadcast(minus_lse[row + r]), rest = broadcast(minus_rest[row + r]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const int64_t key = (vector + c) * kWidth;
        // the score first, rounded as in the forward pass
        const Vec score = acc.at[r][c] + terms.at(row + r, key);
        Vec value = exp2(score + shift + rest);
        if constexpr (kMasked) {
          const uint32_t lanes = static_cast<uint32_t>(bits[row + r] >> key) & ((1u << kWidth) - 1);
          value = zero_unless(mask_from_bits(lanes), value);
        }
        store(p + (row + r) * kBlock + key, value);
      }
    }
  }
};

struct FinishScoreGradients {
  const float* minus_delta;
  const float* p;
  float* ds;

  template <int R, int C>
  LCATTN_INLINE void operator()(const Acc<R, C>& acc, int64_t row, int64_t vector) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // delta last: it cancels dout . v exactly where a row sees one key
      const Vec shift = broadcast(minus_delta[row + r]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const int64_t at = (row + r) * kBlock + (vector + c) * kWidth;
        store(ds + at, (acc.at[r][c] + shift) * load(p + at));
      }
    }
  }
};

// [rows x kBlock] = rows of a times the packed [depth][kBlock]; a masked tile is zero outside its
// extents
template <bool kMasked, typename Start, typename Finish>
LCATTN_INLINE void square_product(Rows a, const float* packed, int64_t depth, int64_t rows,
                                  const Visibility& visible, float* tile, const Start& start,
                                  const Finish& finish) {
  const AlongDepth left = {a.data, a.stride};
  const Rows right = {packed, kBlock};
  if constexpr (kMasked) {
    for (int64_t row = 0, strip = 0; row < rows; row += kTileRows, ++strip) {
      const int64_t count = rows - row < kTileRows ? rows - row : kTileRows;
      const Extent keys = visible.keys_of[strip];
      const int64_t begin = keys.first / kWidth, end = (keys.end + kWidth - 1) / kWidth;
      for (int64_t r = row; r < row + count; ++r) {
        for (int64_t c = 0; c < kBlockVectors; ++c) {
          if (c < begin || c >= end) store(tile + r * kBlock + c * kWidth, zero());
        }
      }
      product(left, right, depth, row, count, begin, end - begin, start, finish);
    }
  } else {
    product(left, right, depth, 0, rows, 0, kBlockVectors, start, finish);
  }
}

template <bool kMasked>
__attribute__((noinline)) void probabilities(Rows q, const float* packed_k, int64_t dim,
                                             int64_t rows, const Visibility& visible,
                                             const float* minus_lse, const float* minus_rest,
                                             TermTile terms, float* p) {
  square_product<kMasked>(
      q, packed_k, dim, rows, visible, p, StartAtZero{},
      FinishProbabilities<kMasked>{minus_lse, minus_rest, terms, visible.bits.row, p});
}

template <bool kMasked>
__attribute__((noinline)) void score_gradients(Rows dout, const float* packed_v, int64_t dim,
                                               int64_t rows, const Visibility& visible,
                                               const float* minus_delta, const float* p,
                                               float* ds) {
  square_product<kMasked>(dout, packed_v, dim, rows, visible, ds, StartAtZero{},
                          FinishScoreGradients{minus_delta, p, ds});
}

// the product alone
inline void plain_product(Rows a, const float* packed, int64_t dim, int64_t rows,
                          const Visibility& visible, float* tile) {
  square_product<true>(a, packed, dim, rows, visible, tile, StartAtZero{},
                       Memory{tile, kBlock}.set());
}

LCATTN_INLINE AlongDepth skip_depth(AlongDepth a, int64_t depth) {
  return {a.data + depth, a.stride};
}
LCATTN_INLINE AlongRows skip_depth(AlongRows a, int64_t depth) {
  return {a.data + depth * a.stride, a.stride};
}

template <int C, typename A>
LCATTN_INLINE void accumulate_vectors(A a, Rows b, int64_t rows, int64_t vector,
                                      const Extent* extents, Memory sum) {
  for (int64_t row = 0, strip = 0; row < rows; row += kTileRows, ++strip) {
    const int64_t count = rows - row < kTileRows ? rows - row : kTileRows;
    const Extent depth = extents[strip];
    register_tile_column<C>(skip_depth(a, depth.first), b.from(depth.first),
                            depth.end - depth.first, row, count, vector, StartAtZero{}, sum.add());
  }
}

// sum[rows x vectors] += a b, each group of rows of a only over its extent of the depth
template <typename A>
__attribute__((noinline)) void accumulate(A a, Rows b, int64_t rows, int64_t vectors,
                                          const Extent* extents, Memory sum) {
  int64_t vector = 0;
  for (; vectors - vector >= kTileVectors; vector += kTileVectors) {
    accumulate_vectors<kTileVectors>(a, b, rows, vector, extents, sum);
  }
  if constexpr (kTileVectors > 2) {
    if (vectors - vector >= 2) {
      accumulate_vectors<2>(a, b, rows, vector, extents, sum);
      vector += 2;
    }
  }
  if (vectors - vector >= 1) accumulate_vectors<1>(a, b, rows, vector, extents, sum);
}

}  // namespace lcattn::cpu::LCATTN_ISA
