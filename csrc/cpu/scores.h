// What stands in a score beside the content: every term that depends on the offset o = k_pos -
// q_pos.
//
//   unit * (bias[clamp(o)] + slope |o| + scale * (qr_i . rel_key[clamp(o)] + kr_j .
//   rel_query[clamp(o)]))
//
// for one tile of up to 64 queries x 64 keys, with `unit` = log2(e) where scores are exponents of
// two. A tile of scores is [kBlock][kBlock]: keys as rows and queries as lanes, or the other way
// round. Where the coordinates of both sides step by one, all pairs of a diagonal have one offset:
// bias and slope are then a strip of 127 values, relative products one small matrix product over
// the strip's table rows.
#pragma once

#include "load.h"
#include "mask.h"
#include "scratch.h"

namespace lcattn::cpu::LCATTN_ISA {

constexpr int kTile = kBlock * kBlock;
// offsets that a tile reaches, to whole vectors
constexpr int kStrip = 2 * kBlock;

// the coordinates of up to 64 queries or keys
struct Coordinates {
  int64_t first = 0;
  // each is the one before plus one
  bool steps = true;
  int64_t count = 0;
  int32_t at[kBlock];

  // position: the explicit coordinate of the first row, or null: from `first_default` on
  void set(const int32_t* position, int64_t first_default, int64_t n, bool fill) {
    count = n;
    steps = true;
    first = position ? position[0] : first_default;
    if (position) {
      for (int64_t r = 1; r < n; ++r) steps &= position[r] == position[0] + r;
    }
    if (!fill) return;
    for (int64_t r = 0; r < kBlock; ++r) {
      at[r] = position ? position[r < n ? r : n - 1] : static_cast<int32_t>(first_default + r);
    }
  }
};

LCATTN_INLINE float dot(const float* a, const float* b, int64_t dim) {
  Vec sum = zero();
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) sum = fma(load(a + d), load(b + d), sum);
  float total = reduce_add(sum);
  for (; d < dim; ++d) total += a[d] * b[d];
  return total;
}

LCATTN_INLINE Vec soft_cap(Vec score, float cap) {
  return broadcast(cap) * tanh(score * broadcast(1.0f / cap));
}

template <bool kQueryLanes>
class ScoreTerms {
 public:
  static int64_t scratch_bytes(const Problem& p) {
    int64_t bytes = padded<float>(kStrip);
    if (p.rel_key.data) bytes += 2 * padded<float>(kBlock * padded_dim(p.D));
    if (p.rel_query.data) bytes += 2 * padded<float>(kBlock * padded_dim(p.D));
    if (p.rel_key.data || p.rel_query.data) bytes += padded<float>(kStrip * kBlock);
    return bytes;
  }

  // pairwise: no strips, and relative products as one dot product a pair, for tiles of few queries
  ScoreTerms(const Problem& p, float unit, bool pairwise, Scratch& scratch)
      : p_(p), unit_(unit), pairwise_(pairwise), strip_(scratch.take<float>(kStrip)) {
    relative_ = p.rel_key.data || p.rel_query.data;
    by_offset_ = p.bias.data || p.slope;
    for (int t = 0; t < kStrip; ++t) strip_[t] = 0.0f;
    for (Operand* operand : {&query_, &key_}) {
      if ((operand == &query_ ? p.rel_key : p.rel_query).data == nullptr) continue;
      operand->rows = scratch.take<float>(kBlock * padded_dim(p.D));
      operand->transposed = scratch.take<float>(kBlock * padded_dim(p.D));
    }
    if (relative_) products_ = scratch.take<float>(kStrip * kBlock);
  }

  void set_queries(int64_t b, int64_t h, int phase, int64_t query, int64_t n_q) {
    b_ = b, h_ = h, phase_ = phase;
    const int32_t* position =
        p_.q_pos ? p_.q_pos + phase * p_.q_pos_phase_stride + b * p_.q_pos_batch_stride + query
                 : nullptr;
    q_.set(position, p_.row_start + query, n_q, each_coordinate());
    query_.set(h, query, n_q);
  }

  void set_keys(int64_t b, int64_t g, int phase, int64_t key, int64_t n_k) {
    const int32_t* position =
        p_.k_pos ? p_.k_pos + phase * p_.k_pos_phase_stride + b * p_.k_pos_batch_stride + key
                 : nullptr;
    k_.set(position, key, n_k, each_coordinate());
    key_.set(g, key, n_k);
  }

  bool steps() const { return q_.steps && k_.steps; }

  // the whole of the terms is the strip
  bool only_strip() const { return !relative_ && (!by_offset_ || steps()); }

  // Bias and slope by diagonal, for row r and lane l at strip()[kBlock - 1 - r + l]; only where
  // steps(). Zeros without either.
  const float* strip() {
    if (!by_offset_) return strip_;
    const int64_t base = k_.first - q_.first;
    const IVec lanes = lane_index();
    for (int t = 0; t < kStrip; t += kWidth) {
      const IVec step = lanes + (t - (kBlock - 1));
      const IVec offset = broadcast(static_cast<int32_t>(base)) + (kQueryLanes ? -step : step);
      store(strip_ + t, by_offset(offset));
    }
    return strip_;
  }

  // scores[row][lane] += all terms
  void add(float* scores) {
    if (by_offset_) steps() && !pairwise_ ? add_strip(scores) : add_gathered(scores);
    if (p_.rel_key.data) add_relative<true>(scores);
    if (p_.rel_query.data) add_relative<false>(scores);
  }

 private:
  // rows of qr or kr, copied when first needed
  struct Operand {
    float *rows = nullptr, *transposed = nullptr;
    int64_t head = 0, row = 0, count = 0;
    bool has_rows = false, has_transposed = false;

    void set(int64_t new_head, int64_t new_row, int64_t new_count) {
      head = new_head, row = new_row, count = new_count;
      has_rows = has_transposed = false;
    }
  };

  bool each_coordinate() const { return p_.q_pos || p_.k_pos || pairwise_; }
  int64_t n_rows() const { return kQueryLanes ? k_.count : q_.count; }
  int64_t n_lanes() const { return kQueryLanes ? q_.count : k_.count; }

  // unit * (bias + slope |o|); a finite bias stays finite
  LCATTN_INLINE Vec by_offset(IVec offset) const {
    Vec value = zero();
    if (p_.bias.data) {
      const float* row = p_.bias.data + phase_ * p_.bias.phase_stride + h_ * p_.bias.head_stride;
      const int32_t last = static_cast<int32_t>(p_.bias.length - 1);
      const IVec entry = clamp(offset - static_cast<int32_t>(p_.bias.min_offset), 0, last);
      const int32_t from = entry[0], to = entry[kWidth - 1];
      if (to - from == kWidth - 1 && steps()) {
        value = load(row + from);
      } else if (from - to == kWidth - 1 && steps()) {
        value = reverse(load(row + to));
      } else {
        value = gather(row, entry);
      }
      const Mask never = equal(value, broadcast(-kInf));
      value = max(value * broadcast(unit_), broadcast(-__FLT_MAX__));
      value = select(never, broadcast(-kInf), value);
    }
    if (p_.slope) value = fma(broadcast(p_.slope[h_] * unit_), to_float(abs(offset)), value);
    return value;
  }

  void add_strip(float* scores) {
    const float* values = strip();
    for (int64_t r = 0; r < n_rows(); ++r) {
      for (int64_t lane = 0; lane < n_lanes(); lane += kWidth) {
        float* at = scores + r * kBlock + lane;
        store(at, load(at) + load(values + kBlock - 1 - r + lane));
      }
    }
  }

  // offsets of a row and the lanes from `lane` on
  LCATTN_INLINE IVec offsets(int64_t row, int64_t lane) const {
    return kQueryLanes ? broadcast(k_.at[row]) - load(q_.at + lane)
                       : load(k_.at + lane) - broadcast(q_.at[row]);
  }

  void add_gathered(float* scores) {
    for (int64_t r = 0; r < n_rows(); ++r) {
      for (int64_t lane = 0; lane < n_lanes(); lane += kWidth) {
        float* at = scores + r * kBlock + lane;
        store(at, load(at) + by_offset(offsets(r, lane)));
      }
    }
  }

  template <bool kRelKey>
  void add_relative(float* scores) {
    const OffsetTable& table = kRelKey ? p_.rel_key : p_.rel_query;
    const float* rows = table.data + h_ * table.head_stride;
    Operand& operand = kRelKey ? query_ : key_;
    const View& view = kRelKey ? p_.qr : p_.kr;
    if (!steps() || pairwise_) {
      if (!operand.has_rows) {
        copy_rows(view, p_.dtype, b_, operand.head, operand.row, operand.count, p_.D, p_.scale,
                  operand.rows, unit_);
        operand.has_rows = true;
      }
      add_pairwise<kRelKey>(table, rows, operand.rows, scores);
      return;
    }
    if (!operand.has_transposed) {
      copy_transposed(view, p_.dtype, b_, operand.head, operand.row, operand.count, p_.D, p_.scale,
                      operand.transposed, unit_);
      operand.has_transposed = true;
    }
    add_products<kRelKey>(table, rows, operand.transposed, scores);
  }

  template <bool kRelKey>
  void add_pairwise(const OffsetTable& table, const float* rows, const float* operand,
                    float* scores) {
    const int64_t stride = padded_dim(p_.D);
    for (int64_t i = 0; i < q_.count; ++i) {
      for (int64_t j = 0; j < k_.count; ++j) {
        const int64_t offset =
            steps() ? k_.first + j - q_.first - i : static_cast<int64_t>(k_.at[j]) - q_.at[i];
        int64_t entry = offset - table.min_offset;
        entry = entry < 0 ? 0 : entry >= table.length ? table.length - 1 : entry;
        scores[kQueryLanes ? j * kBlock + i : i * kBlock + j] +=
            dot(operand + (kRelKey ? i : j) * stride, rows + entry * p_.D, p_.D);
      }
    }
  }

  // products_[t][c] = table row of offset base - 63 + t, times query or key c
  template <bool kRelKey>
  void add_products(const OffsetTable& table, const float* rows, const float* transposed,
                    float* scores) {
    const int64_t entry_of_t0 = k_.first - q_.first - (kBlock - 1) - table.min_offset;
    // the tile's diagonals, cut to those that have an entry of their own
    int64_t first = kBlock - q_.count, last = kBlock - 2 + k_.count;
    const int64_t low = -entry_of_t0, high = table.length - 1 - entry_of_t0;
    if (low > last) {
      first = last;
    } else if (high < first) {
      last = first;
    } else {
      if (low > first) first = low;
      if (high < last) last = high;
    }
    int64_t entry = entry_of_t0 + first;
    entry = entry < 0 ? 0 : entry >= table.length ? table.length - 1 : entry;
    const Memory result = {products_ + first * kBlock, kBlock};
    product(AlongDepth{rows + entry * p_.D, p_.D}, Rows{transposed, kBlock}, p_.D, 0,
            last - first + 1, 0, kBlock / kWidth, StartAtZero{}, result.set());
    // within a row of scores: lanes walk the diagonals down if they are queries, and the columns of
    // products_ if these belong to the lanes
    constexpr bool kColumnIsLane = kRelKey == kQueryLanes;
    const IVec lanes = lane_index();
    for (int64_t r = 0; r < n_rows(); ++r) {
      for (int64_t lane = 0; lane < n_lanes(); lane += kWidth) {
        const IVec at_lane = lanes + static_cast<int32_t>(lane);
        const IVec row = broadcast(static_cast<int32_t>(kQueryLanes ? r : -r));
        const IVec diagonal = row + (kQueryLanes ? -at_lane : at_lane) + (kBlock - 1);
        const IVec t = clamp(diagonal, static_cast<int32_t>(first), static_cast<int32_t>(last));
        const IVec column = kColumnIsLane ? at_lane : broadcast(static_cast<int32_t>(r));
        float* at = scores + r * kBlock + lane;
        store(at, load(at) + gather(products_, t * kBlock + column));
      }
    }
  }

  const Problem& p_;
  const float unit_;
  const bool pairwise_;
  float* strip_;
  float* products_ = nullptr;
  bool relative_, by_offset_;
  int64_t b_ = 0, h_ = 0;
  int phase_ = 0;
  Coordinates q_, k_;
  Operand query_, key_;
};

}  // namespace lcattn::cpu::LCATTN_ISA
