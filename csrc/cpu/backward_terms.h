// The tile with every term of the formula, and the gradients of relative keys and queries.
//
// The slower path, for softcap, dropout, relative terms, and coordinates that do not step by one:
//
//   s  = all terms of the score in units of log2, capped if there is a softcap
//   p  = 2^(s - lse),   dropped = keep p / (1 - dropout)
//   ds = p (keep dp / (1 - dropout) - delta) (1 - (s / softcap)^2)
//
//   dqr_i = scale sum_j ds_ij rel_key[c_ij]        drel_key[c] = scale sum of ds_ij qr_i where c_ij
//   = c dkr_j = scale sum_i ds_ij rel_query[c_ij]      drel_query[c] = scale sum of ds_ij kr_j
//   where c_ij = c
//
// The table entries that a tile reaches are taken kBlock at a time: dS summed by query (or key) and
// entry is a matrix, and both gradients are products with it. `scale` is left to whoever stores
// them.
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
 public:
  static int64_t scratch_bytes(const Problem& p) {
    return 2 * padded<float>(kTile) + 2 * padded<float>(kBlock * padded_dim(p.D));
  }

  SlowTile(const Problem& p, Scratch& scratch)
      : p_(p),
        scores_(scratch.take<float>(kTile)),
        by_entry_(scratch.take<float>(kTile)),
        operand_rows_(scratch.take<float>(kBlock * padded_dim(p.D))),
        table_rows_(scratch.take<float>(kBlock * padded_dim(p.D))) {}

  // ds, and in p what dv is made of; p is dropped in place once ds is known
  void run(const Tile& tile, ScoreTerms<false>& terms, float* p, float* ds) {
    plain_product(tile.q, tile.packed_k, p_.D, tile.rows, *tile.visible, scores_);
    terms.add(scores_);
    plain_product(tile.dout, tile.packed_v, p_.D, tile.rows, *tile.visible, ds);
    BitTile kept;
    if (p_.dropout > 0.0f) {
      kept_bits(p_, tile.b, tile.h, tile.query, tile.rows, tile.key, kept);
      transpose(kept);
    }
    const Vec one = broadcast(1.0f);
    const float cap = p_.softcap * kLog2e;
    const Vec keep_factor = broadcast(1.0f / (1.0f - p_.dropout));
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t j = 0; j < kBlock; j += kWidth) {
        const int64_t at = r * kBlock + j;
        Vec score = load(scores_ + at), slope = one;
        if (cap > 0.0f) {
          score = soft_cap(score, cap);
          const Vec share = score * broadcast(1.0f / cap);
          slope = one - share * share;
        }
        const Mask seen = lanes_of(tile.visible->bits, r, j);
        const Vec shifted = score + broadcast(tile.minus_lse[r]) + broadcast(tile.minus_rest[r]);
        const Vec prob = zero_unless(seen, exp2(shifted));
        Vec dropped = prob, dprob = load(ds + at);
        if (p_.dropout > 0.0f) {
          const Mask keep = lanes_of(kept, r, j);
          dropped = zero_unless(keep, prob * keep_factor);
          dprob = zero_unless(keep, dprob * keep_factor);
        }
        store(p + at, dropped);
        store(ds + at, prob * (dprob + broadcast(tile.minus_delta[r])) * slope);
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
    const Rows x =
        rows_of(operand, p_.dtype, tile.b, head, first_row, rows, p_.D, true, operand_rows_);
    const View entries = {const_cast<float*>(table.data + tile.h * table.head_stride), 0, 0, p_.D};
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
        const Rows strip =
            rows_of(entries, DType::kFloat32, 0, 0, first, count, p_.D, true, table_rows_);
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
  float *scores_, *by_entry_, *operand_rows_, *table_rows_;
};

}  // namespace lcattn::cpu::LCATTN_ISA
