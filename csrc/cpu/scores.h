// What stands in a score beside the content: every term that depends on the offset o = k_pos -
// q_pos.
//
//   unit * (bias[clamp(o)] + slope |o| + scale * (qr_i . rel_key[clamp(o)] + kr_j .
//   rel_query[clamp(o)]))
//
// for one tile of up to 64 queries x 64 keys, with `unit` = log2(e) where scores are exponents of
// two. A tile of scores is [kBlock][kBlock]: keys as rows and queries as lanes, or the other way
// round. Where the coordinates of both sides step by one, all pairs of a diagonal have one offset:
// bias and slope are then a strip of 127 values, relative products one matrix product with the
// strip's table rows, of which a register tile takes those that its own rows reach.
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
    if (p.rel_key.data) bytes += padded<float>(kBlock * padded_dim(p.D));
    if (p.rel_query.data) bytes += padded<float>(kBlock * padded_dim(p.D));
    if (p.rel_key.data || p.rel_query.data) {
      bytes += padded<float>(padded_dim(p.D) * kDiagonals) + padded<float>(kTile) +
               padded<float>(kTileRows * kReach);
    }
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
    }
    if (!relative_) return;
    diagonals_ = scratch.take<float>(padded_dim(p.D) * kDiagonals);
    square_ = scratch.take<float>(kTile);
    reached_ = scratch.take<float>(kTileRows * kReach);
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
  // Offsets that a register tile of rows reaches, to whole vectors; those of the whole tile, and a
  // margin for the last register tile.
  static constexpr int kReach = (kBlock + kTileRows - 1 + kWidth - 1) / kWidth * kWidth;
  static constexpr int kMargin = kTileRows;
  static constexpr int kDiagonals =
      (kMargin + kBlock - kTileRows + kReach + kWidth - 1) / kWidth * kWidth;

  // rows of qr or kr, copied when first needed
  struct Operand {
    float* rows = nullptr;
    int64_t head = 0, row = 0, count = 0;
    bool has_rows = false;

    void set(int64_t new_head, int64_t new_row, int64_t new_count) {
      head = new_head, row = new_row, count = new_count;
      has_rows = false;
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
    if (!operand.has_rows) {
      copy_rows(view, p_.dtype, b_, operand.head, operand.row, operand.count, p_.D, p_.scale,
                operand.rows, unit_);
      operand.has_rows = true;
    }
    if (!steps() || pairwise_) {
      add_pairwise<kRelKey>(table, rows, operand.rows, scores);
    } else {
      add_products<kRelKey>(table, rows, operand.rows, scores);
    }
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

  // With a the operand's rows and b the other side's, pairs of one b - a have one entry.
  template <bool kRelKey>
  void add_products(const OffsetTable& table, const float* rows, const float* operand,
                    float* scores) {
    constexpr bool kTransposed = kRelKey == kQueryLanes;
    const int64_t n_a = kRelKey ? q_.count : k_.count, n_b = kRelKey ? k_.count : q_.count;
    const int64_t stride = padded_dim(p_.D), step = kRelKey ? 1 : -1;
    const int64_t entry = k_.first - q_.first - table.min_offset;  // of a = b
    set_diagonals(table, rows, entry, step);
    for (int64_t a = 0; a < n_a; a += kTileRows) {
      const int64_t count = n_a - a < kTileRows ? n_a - a : kTileRows;
      // from the offset of the last row and b = 0 on
      const float* reached = diagonals_ + kMargin + kBlock - kTileRows - a;
      product(AlongDepth{operand + a * stride, stride}, Rows{reached, kDiagonals}, p_.D, 0, count,
              0, kReach / kWidth, StartAtZero{}, Memory{reached_, kReach}.set());
      for (int64_t r = 0; r < count; ++r) {
        const float* from = reached_ + r * kReach + kTileRows - 1 - r;
        float* to = (kTransposed ? square_ : scores) + (a + r) * kBlock;
        for (int64_t b = 0; b < n_b; b += kWidth) {
          store(to + b, kTransposed ? load(from + b) : load(to + b) + load(from + b));
        }
      }
    }
    if (kTransposed) add_transposed(square_, n_a, n_b, scores);
  }

  // diagonals_[d][kMargin + t] = table[clamp(entry + step (t - 63))][d], t = b - a + 63
  void set_diagonals(const OffsetTable& table, const float* rows, int64_t entry, int64_t step) {
    const auto row_of = [&](int64_t t) {
      const int64_t at = entry + step * (t - (kBlock - 1));
      return rows + (at < 0 ? 0 : at < table.length ? at : table.length - 1) * p_.D;
    };
    // neighbouring tiles have most diagonals in common
    const bool same = rows == diagonals_of_ && step == diagonals_step_;
    const int64_t moved = same ? step * (entry - diagonals_entry_) : kDiagonals;
    diagonals_of_ = rows, diagonals_step_ = step, diagonals_entry_ = entry;
    if (moved == 0) return;
    int64_t fill = 0, end = kDiagonals;
    if (moved == kBlock || moved == -kBlock) {
      constexpr int64_t kKept = kDiagonals - kBlock;
      const int64_t kept = moved > 0 ? 0 : kBlock;
      for (int64_t d = 0; d < p_.D; ++d) {
        float* at = diagonals_ + d * kDiagonals;
        std::memmove(at + kept, at + kBlock - kept, sizeof(float) * kKept);
      }
      moved > 0 ? fill = kKept : end = kBlock;
    }
    const int64_t whole = p_.D / kWidth * kWidth;
    for (int64_t first = fill; first < end; first += kWidth) {
      const float* from[kWidth];
      for (int i = 0; i < kWidth; ++i) from[i] = row_of(first + i - kMargin);
      for (int64_t d = 0; d < whole; d += kWidth) {
        Vec square[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) square[i] = load(from[i] + d);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          store(diagonals_ + (d + i) * kDiagonals + first, square[i]);
      }
      for (int64_t d = whole; d < p_.D; ++d) {
        for (int i = 0; i < kWidth; ++i) diagonals_[d * kDiagonals + first + i] = from[i][d];
      }
    }
  }

  // scores[b][a] += square[a][b]
  static void add_transposed(const float* square, int64_t n_a, int64_t n_b, float* scores) {
    for (int64_t a = 0; a < n_a; a += kWidth) {
      for (int64_t b = 0; b < n_b; b += kWidth) {
        Vec part[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) part[i] = load(square + (a + i) * kBlock + b);
        transpose(part);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          float* at = scores + (b + i) * kBlock + a;
          store(at, load(at) + part[i]);
        }
      }
    }
  }

  const Problem& p_;
  const float unit_;
  const bool pairwise_;
  float* strip_;
  // whose diagonals these are: the head's table, and how they go through it
  const float* diagonals_of_ = nullptr;
  int64_t diagonals_step_ = 0, diagonals_entry_ = 0;
  float *diagonals_ = nullptr, *square_ = nullptr, *reached_ = nullptr;
  bool relative_, by_offset_;
  int64_t b_ = 0, h_ = 0;
  int phase_ = 0;
  Coordinates q_, k_;
  Operand query_, key_;
};

}  // namespace lcattn::cpu::LCATTN_ISA
