// Query blocks, each of one head, against one key block after another, with a running softmax.
// Several are under way in turn, so that key blocks that they share are read, or copied, once for
// all.
//
// Scores are held transposed, [key][query], in units of log2: queries are the lanes, so row maxima
// and sums are vectors and never reduced across lanes, K rows are read in place as the broadcast
// operand, and V rows in place as the vectors of out += P V. Q is packed once a block; K and V are
// copied only where they can't be read in place (RowCache).
//
//   visit():  S^T = K Q^T  ->  P^T = exp2(S^T - row_max)  ->  row_sum += P^T,  out += P V
//
// row_max is a reference, not the maximum: while no exponential of a tile exceeds kLargest,
// exponents are taken in the epilogue of K Q^T and nothing is rescaled. A tile that does, the first
// tile of a row, and capped scores take the slower way, which stores the scores first. In masked
// tiles, register blocks that no query sees are skipped, in both products.
#pragma once

#include "dropout.h"
#include "load.h"
#include "mask.h"
#include "partial.h"
#include "scores.h"
#include "scratch.h"
#include "tile_gemm.h"

namespace lcattn::cpu::LCATTN_ISA {

// A row's reference moves only when a score exceeds it by more than this: farther from it, rounding
// the difference would show in p. The sum that sends a tile the slower way is no larger, so that a
// row which must move does so whatever the other rows of its tile are.
constexpr float kLargestLog2 = 14.0f, kLargest = 16384.0f;

struct QueryBlock {
  int64_t b, h, g;
  // first query and number of queries; row of the table's tiles that the first one stands in
  int64_t query, count, shift;
};

// a query block that is under way
struct RowState {
  // [kBlock][padded_dim(D)] and [D][kBlock], the queries of tensor `packed`
  float *out, *queries;
  float *row_max, *row_sum;
  QueryBlock block;
  int packed;
  // something was accumulated; every query has seen a key
  bool started, all_started;
};

// keys as rows; which blocks of the two products hold anything
struct TileMask {
  BitTile by_key;
  // queries that each strip of keys is seen by, keys that each strip of queries sees
  Extent of_keys[kStrips], of_queries[kStrips];
};

template <bool kMasked>
struct Exponentials {
  TermTile terms;
  const float* row_max;
  const BitTile* by_key;
  float* tile_sum;
  float* tile;

  template <int R, int C>
  LCATTN_INLINE void operator()(const Acc<R, C>& acc, int64_t row, int64_t vector) const {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const int64_t lane = (vector + c) * kWidth;
      const Vec reference = load(row_max + lane);
      // small ones first: added to a large sum one by one, each would round it
      Vec sum = zero();
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec score = acc.at[r][c] + terms.at(row + r, lane);
        Vec value = exp2(score - reference);
        if constexpr (kMasked) {
          const uint64_t bits = by_key->row[row + r] >> lane;
          value = zero_unless(mask_from_bits(static_cast<uint32_t>(bits)), value);
        }
        sum = sum + value;
        store(tile + (row + r) * kBlock + lane, value);
      }
      store(tile_sum + lane, load(tile_sum + lane) + sum);
    }
  }
};

class ForwardTile {
 public:
  // how many query blocks may be under way
  static constexpr int64_t kMinRows = 4, kMaxRows = 16;
  static int64_t n_rows(const Problem& p) {
    const int64_t fit = kStateBytes / (2 * kBlock * padded_dim(p.D) * 4);
    return fit < kMinRows ? kMinRows : fit < kMaxRows ? fit : kMaxRows;
  }

  static int64_t scratch_bytes(const Problem& p) {
    const int64_t state = padded<float>(kBlock * padded_dim(p.D)) + padded<float>(kBlock * p.D) +
                          2 * padded<float>(kBlock);
    return n_rows(p) * state + 2 * padded<float>(RowCache::floats(p.D)) + padded<float>(kTile) +
           padded<float>(kBlock) + padded<TileMask>(kCachedMasks + 1) +
           ScoreTerms<true>::scratch_bytes(p);
  }

  ForwardTile(const Problem& p, Scratch& scratch)
      : p_(p),
        out_stride_(padded_dim(p.D)),
        tile_(scratch.take<float>(kTile)),
        keys_(scratch.take<float>(RowCache::floats(p.D))),
        values_(scratch.take<float>(RowCache::floats(p.D))),
        tile_sum_(scratch.take<float>(kBlock)),
        masks_(scratch.take<TileMask>(kCachedMasks + 1)),
        terms_(p, kLog2e, false, scratch) {
    for (int64_t n = 0; n < n_rows(p); ++n) {
      rows_[n].out = scratch.take<float>(kBlock * out_stride_);
      rows_[n].queries = scratch.take<float>(kBlock * p.D);
      rows_[n].row_max = scratch.take<float>(kBlock);
      rows_[n].row_sum = scratch.take<float>(kBlock);
    }
    forget_masks();
  }

  Partial result(int64_t n) const {
    return {rows_[n].out, out_stride_, rows_[n].row_max, rows_[n].row_sum};
  }

  void begin(int64_t n, const QueryBlock& block) {
    RowState& row = rows_[n];
    row.block = block;
    row.packed = -1;
    row.started = row.all_started = false;
    for (int64_t r = 0; r < kBlock; ++r) row.row_max[r] = -kInf, row.row_sum[r] = 0.0f;
    for (int64_t d = 0; d < kBlock * out_stride_; d += kWidth) store(row.out + d, zero());
  }

  // query block n is the one that visits
  void resume(int64_t n) {
    row_ = &rows_[n];
    if (row_->block.shift != mask_shift_) forget_masks();
    vectors_ = (row_->block.count + kWidth - 1) / kWidth;
    phase_ = -1;
  }

  // tile: of the table, or -1 for a block that is seen whole
  void visit(int phase, int64_t k_block, int64_t tile) {
    const int64_t key = k_block * kBlock;
    if (key >= p_.S) return;
    const int64_t n_k = p_.S - key < kBlock ? p_.S - key : kBlock;
    const uint64_t word = key_word(p_, row_->block.b, key);
    const bool whole = tile < 0 && word == low_bits(n_k);
    const TileMask* mask = whole ? nullptr : find_mask(tile, word);
    if (!whole && mask == nullptr) return;

    set_phase(phase);
    terms_.set_keys(row_->block.b, row_->block.g, phase, key, n_k);
    const Rows keys = keys_.rows_of(p_.k[p_.k_of[phase]], p_.dtype, row_->block.b, row_->block.g,
                                    key, n_k, p_.D, false);
    const TermTile terms = terms_.sum();
    const bool simple = p_.softcap == 0.0f && row_->all_started;
    if (!(simple && exponentials(keys, n_k, mask, terms))) {
      exponentials_after_scores(keys, n_k, mask, terms);
    }
    if (p_.dropout > 0.0f) drop(key, n_k);
    const Rows values = values_.rows_of(p_.v[p_.v_of[phase]], p_.dtype, row_->block.b,
                                        row_->block.g, key, n_k, p_.D, true);
    accumulate(values, n_k, mask);
    row_->started = true;
  }

 private:
  static constexpr int kCachedMasks = 8;
  // what query blocks under way take of a second-level cache of 2 MiB
  static constexpr int64_t kStateBytes = 512 * 1024;

  void forget_masks() {
    for (int m = 0; m < kCachedMasks; ++m) cached_tile_[m] = -1;
    mask_shift_ = row_ ? row_->block.shift : 0;
  }

  void set_phase(int phase) {
    if (phase == phase_) return;
    phase_ = phase;
    terms_.set_queries(row_->block.b, row_->block.h, phase, row_->block.query, row_->block.count);
    if (p_.q_of[phase] == row_->packed) return;
    row_->packed = p_.q_of[phase];
    // [D][kBlock]
    copy_transposed(p_.q[row_->packed], p_.dtype, row_->block.b, row_->block.h, row_->block.query,
                    row_->block.count, p_.D, p_.scale, row_->queries, kLog2e);
  }

  static void fill_mask(BitTile& by_query, uint64_t word, TileMask& mask) {
    for (int r = 0; r < kBlock; ++r) by_query.row[r] &= word;
    find_extents(by_query, mask.of_queries);
    mask.by_key = by_query;
    transpose(mask.by_key);
    find_extents(mask.by_key, mask.of_keys);
  }

  // null if nothing is visible
  const TileMask* find_mask(int64_t tile, uint64_t word) {
    BitTile bits;
    TileMask* mask = masks_ + kCachedMasks;
    const bool cacheable = tile >= 0 && word == ~uint64_t{0};
    const int64_t at = cacheable ? tile % kCachedMasks : 0;
    if (cacheable && cached_tile_[at] == tile) {
      mask = masks_ + at;
    } else {
      if (tile >= 0) {
        load_bits(p_, tile, row_->block.shift, bits);
      } else {
        for (int r = 0; r < kBlock; ++r) bits.row[r] = ~uint64_t{0};
      }
      if (cacheable) {
        mask = masks_ + at;
        cached_tile_[at] = tile;
      }
      fill_mask(bits, word, *mask);
    }
    for (int s = 0; s * kTileRows < row_->block.count; ++s) {
      if (mask->of_queries[s].end > 0) return mask;
    }
    return nullptr;
  }

  // S^T into `finish`, register blocks that nobody sees left out
  template <typename Finish, typename Skip>
  LCATTN_INLINE void scores(Rows keys, int64_t n_k, const TileMask* mask, const Finish& finish,
                            const Skip& skip) {
    int64_t step = n_k, first = 0, end = vectors_;
    for (int64_t row = 0; row < n_k; row += step) {
      if (mask != nullptr) {
        const Extent extent = mask->of_keys[row / kTileRows];
        step = n_k - row < kTileRows ? n_k - row : kTileRows;
        first = extent.first / kWidth;
        end = (extent.end + kWidth - 1) / kWidth;
        if (end > vectors_) end = vectors_;
        if (first > end) first = end;
        skip(row, step, 0, first);
        skip(row, step, end, vectors_);
      }
      product(AlongDepth{keys.data, keys.stride}, Rows{row_->queries, kBlock}, p_.D, row, step,
              first, end - first, StartAtZero{}, finish);
    }
  }

  template <bool kMasked>
  __attribute__((noinline)) void exponentials_of(Rows keys, int64_t n_k, const TileMask* mask,
                                                 TermTile terms) {
    const Exponentials<kMasked> finish = {terms, row_->row_max, kMasked ? &mask->by_key : nullptr,
                                          tile_sum_, tile_};
    scores(keys, n_k, kMasked ? mask : nullptr, finish,
           [this](int64_t row, int64_t rows, int64_t first, int64_t end) {
             for (int64_t r = row; r < row + rows; ++r) {
               for (int64_t v = first; v < end; ++v) store(tile_ + r * kBlock + v * kWidth, zero());
             }
           });
  }

  // false, with nothing changed, if an exponential was too large
  bool exponentials(Rows keys, int64_t n_k, const TileMask* mask, TermTile terms) {
    for (int64_t v = 0; v < vectors_; ++v) store(tile_sum_ + v * kWidth, zero());
    if (mask == nullptr) {
      exponentials_of<false>(keys, n_k, mask, terms);
    } else {
      exponentials_of<true>(keys, n_k, mask, terms);
    }
    for (int64_t v = 0; v < vectors_; ++v) {
      const uint32_t fine = bits_from_mask(less(load(tile_sum_ + v * kWidth), broadcast(kLargest)));
      const uint32_t rows = bits_from_mask(first_lanes(row_->block.count - v * kWidth));
      if ((fine & rows) != rows) return false;
    }
    for (int64_t v = 0; v < vectors_; ++v) {
      float* sum = row_->row_sum + v * kWidth;
      store(sum, load(sum) + load(tile_sum_ + v * kWidth));
    }
    return true;
  }

  __attribute__((noinline)) void exponentials_after_scores(Rows keys, int64_t n_k,
                                                           const TileMask* mask, TermTile terms) {
    const Memory tile = {tile_, kBlock};
    scores(keys, n_k, mask, tile.set(), [](int64_t, int64_t, int64_t, int64_t) {});
    const float cap = p_.softcap * kLog2e;

    bool all_started = true;
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t lane = v * kWidth;
      const Vec old_max = load(row_->row_max + lane);
      Vec new_max = old_max;
      for (int64_t r = 0; r < n_k; ++r) {
        Vec score = load(tile_ + r * kBlock + lane) + terms.at(r, lane);
        if (cap > 0.0f) score = soft_cap(score, cap).score;
        if (mask) {
          const Mask seen = mask_from_bits(static_cast<uint32_t>(mask->by_key.row[r] >> lane));
          score = select(seen, score, broadcast(-kInf));
        }
        store(tile_ + r * kBlock + lane, score);
        new_max = max(new_max, score);
      }
      // only where it must: what a row gives does not depend on the other rows of its tile
      const Mask grew = less(old_max + broadcast(kLargestLog2), new_max);
      new_max = select(grew, new_max, old_max);
      const Mask empty = equal(new_max, broadcast(-kInf));
      const Vec reference = select(empty, zero(), new_max);
      const Vec factor = exp2(old_max - reference);
      Vec sum = zero();
      // in the groups of the other way's register tiles, to the same sum
      for (int64_t row = 0, rows; row < n_k; row += rows) {
        const int64_t left = n_k - row;
        rows = left >= kTileRows ? kTileRows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        Vec few = zero();
        for (int64_t r = row; r < row + rows; ++r) {
          float* at = tile_ + r * kBlock + lane;
          const Vec value = exp2(load(at) - reference);
          few = few + value;
          store(at, value);
        }
        sum = sum + few;
      }
      store(row_->row_max + lane, new_max);
      store(row_->row_sum + lane, fma(load(row_->row_sum + lane), factor, sum));
      store(tile_sum_ + lane, factor);
      const uint32_t rows = bits_from_mask(first_lanes(row_->block.count - lane));
      if (bits_from_mask(empty) & rows) all_started = false;
    }
    row_->all_started = all_started;
    if (!row_->started) return;
    for (int64_t q = 0; q < row_->block.count; ++q) {
      const Vec factor = broadcast(tile_sum_[q]);
      float* row = row_->out + q * out_stride_;
      for (int64_t d = 0; d < out_stride_; d += kWidth) store(row + d, load(row + d) * factor);
    }
  }

  void drop(int64_t key, int64_t n_k) {
    BitTile kept;
    kept_bits(p_, row_->block.b, row_->block.h, row_->block.query, row_->block.count, key, kept);
    for (int64_t r = 0; r < n_k; ++r) {
      for (int64_t v = 0; v < vectors_; ++v) {
        float* at = tile_ + r * kBlock + v * kWidth;
        const uint32_t bits = static_cast<uint32_t>(kept.row[r] >> (v * kWidth));
        store(at, zero_unless(mask_from_bits(bits), load(at)));
      }
    }
  }

  // out += P V
  __attribute__((noinline)) void accumulate(Rows values, int64_t n_k, const TileMask* mask) {
    const Memory out = {row_->out, out_stride_};
    int64_t step = row_->block.count, first = 0, end = n_k;
    for (int64_t row = 0; row < row_->block.count; row += step) {
      if (mask != nullptr) {
        const Extent extent = mask->of_queries[row / kTileRows];
        step = row_->block.count - row < kTileRows ? row_->block.count - row : kTileRows;
        first = extent.first;
        end = extent.end;
      }
      product(AlongRows{tile_ + first * kBlock, kBlock}, values.from(first), end - first, row, step,
              0, out_stride_ / kWidth, StartAtZero{}, out.add());
    }
  }

  const Problem& p_;
  const int64_t out_stride_;
  float* tile_;
  RowCache keys_, values_;
  float* tile_sum_;
  TileMask* masks_;
  int64_t cached_tile_[kCachedMasks], mask_shift_ = 0;
  ScoreTerms<true> terms_;
  RowState rows_[kMaxRows];
  RowState* row_ = nullptr;
  int64_t vectors_ = 0;
  int phase_ = -1;
};

}  // namespace lcattn::cpu::LCATTN_ISA
