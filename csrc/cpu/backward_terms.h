// The tile with softcap and dropout, and the gradients of relative keys and queries.
//
// The slower path, for softcap and dropout:
//
//   s  = all terms of the score in units of log2, capped if there is a softcap
//   p  = 2^(s - lse),   dropped = keep p / (1 - dropout)
//   ds = p (keep dp / (1 - dropout) - delta) tanh'(s before the cap / softcap)
//
//   dqr_i = scale sum_j ds_ij rel_key[c_ij]      drel_key[c]   = scale sum of ds_ij qr_i at c
//   dkr_j = scale sum_i ds_ij rel_query[c_ij]    drel_query[c] = scale sum of ds_ij kr_j at c
//
// dS summed by query (or key) and table entry is a matrix, and both gradients are products with it.
// Where coordinates step by one and no offset is clamped, that matrix is dS itself with each row
// moved one column further than the last: it is read in place, by a stride. Elsewhere it is
// gathered, kBlock entries at a time. `scale` is left to whoever stores the gradients.
#pragma once

#include "backward_tables.h"
#include "dropout.h"
#include "scores.h"

namespace lcattn::cpu::LCATTN_ISA {

// one query tile against one key block
struct Tile {
  int64_t b, h, g, phase;
  int64_t query, rows, key, keys;                     // first and number of both
  Rows q, dout;                                       // q times log2(e) scale
  const float *packed_k, *packed_v;                   // K^T and V^T
  const float *minus_lse, *minus_delta, *minus_rest;  // [rows]
  const Visibility* visible;
  // set for the gradients by offset only
  int64_t offset;              // of the first query and key
  bool steps;                  // coordinates of both sides step by one
  const int32_t *q_at, *k_at;  // the coordinates otherwise
};

LCATTN_INLINE const int32_t* q_positions(const Problem& p, int64_t phase, int64_t b) {
  return p.q_pos ? p.q_pos + phase * p.q_pos_phase_stride + b * p.q_pos_batch_stride : nullptr;
}
LCATTN_INLINE const int32_t* k_positions(const Problem& p, int64_t phase, int64_t b) {
  return p.k_pos ? p.k_pos + phase * p.k_pos_phase_stride + b * p.k_pos_batch_stride : nullptr;
}

LCATTN_INLINE int64_t offset_of(const Tile& tile, int64_t r, int64_t j) {
  return tile.steps ? tile.offset + j - r : int64_t{tile.k_at[j]} - tile.q_at[r];
}

// f(query, key) for each visible element
template <typename F>
LCATTN_INLINE void for_each_visible(const Tile& tile, const F& f) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (uint64_t bits = tile.visible->bits.row[r]; bits; bits &= bits - 1) {
      f(r, static_cast<int64_t>(__builtin_ctzll(bits)));
    }
  }
}

class SlowTile {
  // a row of dS between zeros, which strips of kTileRows rows reach into
  static constexpr int64_t kMargin = 8, kSkewed = kBlock + 2 * kMargin;
  static constexpr int64_t kDiagonals = 2 * kBlock - 1;
  static_assert(kTileRows <= kMargin);

 public:
  static int64_t scratch_bytes(const Problem& p) {
    return 2 * padded<float>(kTile) + padded<float>(kBlock * kSkewed) +
           3 * padded<float>(kBlock * padded_dim(p.D));
  }

  SlowTile(const Problem& p, Scratch& scratch)
      : p_(p),
        scores_(scratch.take<float>(kTile)),
        by_entry_(scratch.take<float>(kTile)),
        operand_rows_(scratch.take<float>(kBlock * padded_dim(p.D))),
        table_rows_(scratch.take<float>(2 * kBlock * padded_dim(p.D))),
        skewed_(scratch.take<float>(kBlock * kSkewed)) {
    for (int64_t i = 0; i < kBlock * kSkewed; i += kWidth) store(skewed_ + i, zero());
  }

  // ds, and in p what dv is made of; p is dropped in place once ds is known
  void run(const Tile& tile, TermTile terms, float* p, float* ds) {
    plain_product(tile.q, tile.packed_k, p_.D, tile.rows, *tile.visible, scores_);
    plain_product(tile.dout, tile.packed_v, p_.D, tile.rows, *tile.visible, ds);
    BitTile kept;
    if (p_.dropout > 0.0f) {
      kept_bits(p_, tile.b, tile.h, tile.query, tile.rows, tile.key, kept);
      transpose(kept);
    }
    const float cap = p_.softcap * kLog2e;
    const Vec keep_factor = broadcast(1.0f / (1.0f - p_.dropout));
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t j = 0; j < kBlock; j += kWidth) {
        const int64_t at = r * kBlock + j;
        Capped capped = {load(scores_ + at) + terms.at(r, j), broadcast(1.0f)};
        if (cap > 0.0f) capped = soft_cap(capped.score, cap);
        const Mask seen = lanes_of(tile.visible->bits, r, j);
        const Vec shifted =
            capped.score + broadcast(tile.minus_lse[r]) + broadcast(tile.minus_rest[r]);
        const Vec prob = zero_unless(seen, exp2(shifted));
        Vec dropped = prob, dprob = load(ds + at);
        if (p_.dropout > 0.0f) {
          const Mask keep = lanes_of(kept, r, j);
          dropped = zero_unless(keep, prob * keep_factor);
          dprob = zero_unless(keep, dprob * keep_factor);
        }
        store(p + at, dropped);
        dprob = dprob + broadcast(tile.minus_delta[r]);
        store(ds + at, zero_unless(seen, prob * dprob * capped.slope));
      }
    }
  }

  // dqr [rows][padded D], drel_key [L][padded D] of the head
  void relative_key_gradient(const Tile& tile, const float* ds, float* dqr, float* dtable) {
    relative<true>(tile, p_.rel_key, p_.qr, tile.h, tile.query, tile.rows, ds, dqr, dtable);
  }

  // dkr [keys][padded D], drel_query [L][padded D] of the head
  void relative_query_gradient(const Tile& tile, const float* ds, float* dkr, float* dtable) {
    relative<false>(tile, p_.rel_query, p_.kr, tile.g, tile.key, tile.keys, ds, dkr, dtable);
  }

 private:
  static LCATTN_INLINE Mask lanes_of(const BitTile& bits, int64_t r, int64_t j) {
    constexpr uint32_t kLanes = (1u << kWidth) - 1;
    return mask_from_bits(static_cast<uint32_t>(bits.row[r] >> j) & kLanes);
  }

  // rows of the operand are queries for relative keys, keys for relative queries
  template <bool kRelKey>
  void relative(const Tile& tile, const OffsetTable& table, const View& operand, int64_t head,
                int64_t first_row, int64_t rows, const float* ds, float* doperand, float* dtable) {
    const Rows x =
        rows_of(operand, p_.dtype, tile.b, head, first_row, rows, p_.D, true, operand_rows_);
    const int64_t lowest = tile.offset - (kBlock - 1) - table.min_offset;
    if (tile.steps && lowest >= 0 && lowest + kDiagonals <= table.length) {
      relative_by_diagonal<kRelKey>(tile, table, x, rows, lowest, ds, doperand, dtable);
    } else {
      relative_by_entry<kRelKey>(tile, table, x, rows, ds, doperand, dtable);
    }
  }

  View entries_of(const Tile& tile, const OffsetTable& table) const {
    return {const_cast<float*>(table.data + tile.h * table.head_stride), 0, 0, p_.D};
  }

  // Diagonal t of row r is column r + t - 63 of dS. Diagonals go up with the table's entries for
  // relative keys; dS is transposed for relative queries, and they go down.
  template <bool kRelKey>
  void relative_by_diagonal(const Tile& tile, const OffsetTable& table, Rows x, int64_t rows,
                            int64_t lowest, const float* ds, float* doperand, float* dtable) {
    const int64_t stride = padded_dim(p_.D), vectors = stride / kWidth;
    if (!kRelKey) {
      const View square = {const_cast<float*>(ds), 0, 0, kBlock};
      copy_transposed(square, DType::kFloat32, 0, 0, 0, kBlock, kBlock, 1.0f, by_entry_);
      ds = by_entry_;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < kBlock; j += kWidth) {
        store(skewed_ + r * kSkewed + kMargin + j, load(ds + r * kBlock + j));
      }
    }
    const float* diagonals = skewed_ + kMargin - (kBlock - 1);
    const auto range = [](int64_t first, int64_t end) {
      first = first < 0 ? 0 : first;
      return Extent{static_cast<uint8_t>(first < end ? first : end), static_cast<uint8_t>(end)};
    };
    if (doperand) {
      Extent seen[kStrips];
      for (int64_t r = 0; r < kBlock; r += kTileRows) {
        seen[r / kTileRows] = range(kBlock - kTileRows - r, kDiagonals - r);
      }
      Rows strip = rows_of(entries_of(tile, table), DType::kFloat32, 0, 0, lowest, kDiagonals, p_.D,
                           true, table_rows_);
      if (!kRelKey) strip = {strip.data + (kDiagonals - 1) * strip.stride, -strip.stride};
      accumulate(AlongDepth{diagonals, kSkewed + 1}, strip, rows, vectors, seen,
                 Memory{doperand, stride});
    }
    if (dtable) {
      Extent seen[(kDiagonals + kTileRows - 1) / kTileRows];
      for (int64_t t = 0; t < kDiagonals; t += kTileRows) {
        const int64_t end = kDiagonals - t;
        seen[t / kTileRows] = range(kBlock - kTileRows - t, end < rows ? end : rows);
      }
      Memory sum = {dtable + lowest * stride, stride};
      if (!kRelKey) sum = {sum.data + (kDiagonals - 1) * stride, -stride};
      accumulate(AlongRows{diagonals, kSkewed + 1}, x, kDiagonals, vectors, seen, sum);
    }
  }

  template <bool kRelKey>
  void relative_by_entry(const Tile& tile, const OffsetTable& table, Rows x, int64_t rows,
                         const float* ds, float* doperand, float* dtable) {
    const auto entry_of = [&](int64_t r, int64_t j) {
      const int64_t entry = offset_of(tile, r, j) - table.min_offset;
      return entry < 0 ? 0 : entry < table.length ? entry : table.length - 1;
    };
    int64_t low = table.length, high = -1;
    for_each_visible(tile, [&](int64_t r, int64_t j) {
      const int64_t entry = entry_of(r, j);
      low = entry < low ? entry : low;
      high = entry > high ? entry : high;
    });
    const int64_t stride = padded_dim(p_.D), vectors = stride / kWidth;
    for (int64_t first = low; first <= high; first += kBlock) {
      const int64_t count = high - first + 1 < kBlock ? high - first + 1 : kBlock;
      bool any = false;
      for (int64_t i = 0; i < kTile; i += kWidth) store(by_entry_ + i, zero());
      for_each_visible(tile, [&](int64_t r, int64_t j) {
        const int64_t entry = entry_of(r, j) - first;
        if (entry < 0 || entry >= count) return;
        any = true;
        by_entry_[(kRelKey ? r : j) * kBlock + entry] += ds[r * kBlock + j];
      });
      if (!any) continue;
      Extent all_entries[kStrips], all_rows[kStrips];
      for (int s = 0; s < kStrips; ++s) {
        all_entries[s] = {0, static_cast<uint8_t>(count)};
        all_rows[s] = {0, static_cast<uint8_t>(rows)};
      }
      if (doperand) {
        const Rows strip = rows_of(entries_of(tile, table), DType::kFloat32, 0, 0, first, count,
                                   p_.D, true, table_rows_);
        accumulate(AlongDepth{by_entry_, kBlock}, strip, rows, vectors, all_entries,
                   Memory{doperand, stride});
      }
      if (dtable) {
        accumulate(AlongRows{by_entry_, kBlock}, x, count, vectors, all_rows,
                   Memory{dtable + first * stride, stride});
      }
    }
  }

  const Problem& p_;
  float *scores_, *by_entry_, *operand_rows_, *table_rows_, *skewed_;
};

}  // namespace lcattn::cpu::LCATTN_ISA
