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

// Terms of a tile, of row r and the lanes from l on at data[r * stride + l]: a strip goes by
// diagonal, with a stride of -1.
struct TermTile {
  const float* data;
  int64_t stride;

  LCATTN_INLINE Vec at(int64_t row, int64_t lane) const { return load(data + row * stride + lane); }
};

struct Capped {
  // the slope by the score before the cap
  Vec score, slope;
};

LCATTN_INLINE Capped soft_cap(Vec score, float cap) {
  const Tanh tanh = tanh_and_slope(score * broadcast(1.0f / cap));
  return {broadcast(cap) * tanh.value, tanh.slope};
}

template <bool kQueryLanes>
class ScoreTerms {
 public:
  static int64_t scratch_bytes(const Problem& p) {
    int64_t bytes = padded<float>(kStrip) + padded<float>(kTerms);
    for (const OffsetTable* table : {&p.rel_key, &p.rel_query}) {
      if (table->data == nullptr) continue;
      bytes += padded<float>(kBlock * padded_dim(p.D)) + padded<float>(padded_dim(p.D) * kColumns) +
               padded<float>(kTerms);
    }
    return bytes;
  }

  // pairwise: no strips, and relative products as one dot product a pair, for tiles of few queries
  ScoreTerms(const Problem& p, float unit, bool pairwise, Scratch& scratch)
      : p_(p),
        unit_(unit),
        pairwise_(pairwise),
        strip_(scratch.take<float>(kStrip)),
        tile_(scratch.take<float>(kTerms)) {
    relative_ = p.rel_key.data || p.rel_query.data;
    by_offset_ = p.bias.data || p.slope;
    for (int t = 0; t < kStrip; ++t) strip_[t] = 0.0f;
    for (Operand* operand : {&query_, &key_}) {
      if ((operand == &query_ ? p.rel_key : p.rel_query).data == nullptr) continue;
      operand->rows = scratch.take<float>(kBlock * padded_dim(p.D));
      operand->columns = scratch.take<float>(padded_dim(p.D) * kColumns);
      square_ = scratch.take<float>(kTerms);
    }
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

  // The sum of all terms, to be added to the finished content, so that every pass rounds a score
  // alike. Lanes past the last hold anything.
  TermTile sum() {
    if (!relative_ && (!by_offset_ || by_strip())) return {strip() + kBlock - 1, -1};
    empty_ = true;
    if (by_offset_) by_strip() ? put_strip() : put_gathered();
    if (p_.rel_key.data) add_relative<true>();
    if (p_.rel_query.data) add_relative<false>();
    return {tile_ + kSpill, kStride};
  }

 private:
  // Offsets that a register tile of rows reaches, to whole vectors; those of the whole tile, with
  // what the last register tile reaches beyond.
  static constexpr int kReach = (kBlock + kTileRows - 1 + kWidth - 1) / kWidth * kWidth;
  static constexpr int kDiagonals = kBlock + kReach;
  // Rows of a tile of terms stand apart: each takes all that its register tile reaches.
  static constexpr int kSpill = 16, kStride = kBlock + 2 * kSpill, kTerms = kBlock * kStride;
  static_assert(kTileRows <= kSpill && kReach <= kBlock + kSpill);
  // Columns of a table that are kept: an odd number of cache lines, to spread over all sets.
  static constexpr int kColumns = 85 * 16, kKept = kColumns - 16;

  // rows of qr or kr, and the table's rows as columns, copied when first needed
  struct Operand {
    float *rows = nullptr, *columns = nullptr;
    int64_t head = 0, row = 0, count = 0;
    bool has_rows = false;
    // of which table; columns [low, high) stand from columns + low - first on
    const float* table = nullptr;
    int64_t first = 0, low = 0, high = 0;

    void set(int64_t new_head, int64_t new_row, int64_t new_count) {
      head = new_head, row = new_row, count = new_count;
      has_rows = false;
    }
  };

  bool each_coordinate() const { return p_.q_pos || p_.k_pos || pairwise_; }
  bool steps() const { return q_.steps && k_.steps; }
  bool by_strip() const { return steps() && !pairwise_; }
  int64_t n_rows() const { return kQueryLanes ? k_.count : q_.count; }
  int64_t n_lanes() const { return kQueryLanes ? q_.count : k_.count; }

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

  float* tile_at(int64_t row, int64_t lane) const { return tile_ + kSpill + row * kStride + lane; }

  void put_strip() {
    const TermTile values = {strip() + kBlock - 1, -1};
    for (int64_t r = 0; r < n_rows(); ++r) {
      for (int64_t lane = 0; lane < n_lanes(); lane += kWidth) {
        store(tile_at(r, lane), values.at(r, lane));
      }
    }
    empty_ = false;
  }

  // offsets of a row and the lanes from `lane` on
  LCATTN_INLINE IVec offsets(int64_t row, int64_t lane) const {
    return kQueryLanes ? broadcast(k_.at[row]) - load(q_.at + lane)
                       : load(k_.at + lane) - broadcast(q_.at[row]);
  }

  void put_gathered() {
    for (int64_t r = 0; r < n_rows(); ++r) {
      for (int64_t lane = 0; lane < n_lanes(); lane += kWidth) {
        store(tile_at(r, lane), by_offset(offsets(r, lane)));
      }
    }
    empty_ = false;
  }

  template <bool kRelKey>
  void add_relative() {
    const OffsetTable& table = kRelKey ? p_.rel_key : p_.rel_query;
    const float* rows = table.data + h_ * table.head_stride;
    Operand& operand = kRelKey ? query_ : key_;
    const View& view = kRelKey ? p_.qr : p_.kr;
    if (!operand.has_rows) {
      copy_rows(view, p_.dtype, b_, operand.head, operand.row, operand.count, p_.D, p_.scale,
                operand.rows, unit_);
      operand.has_rows = true;
    }
    if (by_strip()) {
      add_products<kRelKey>(table, rows, operand);
    } else {
      add_pairwise<kRelKey>(table, rows, operand.rows);
    }
    empty_ = false;
  }

  template <bool kRelKey>
  void add_pairwise(const OffsetTable& table, const float* rows, const float* operand) {
    const int64_t stride = padded_dim(p_.D);
    for (int64_t r = 0; r < n_rows() && empty_; ++r) {
      for (int64_t lane = 0; lane < n_lanes(); lane += kWidth) store(tile_at(r, lane), zero());
    }
    for (int64_t i = 0; i < q_.count; ++i) {
      for (int64_t j = 0; j < k_.count; ++j) {
        const int64_t offset =
            steps() ? k_.first + j - q_.first - i : static_cast<int64_t>(k_.at[j]) - q_.at[i];
        int64_t entry = offset - table.min_offset;
        entry = entry < 0 ? 0 : entry >= table.length ? table.length - 1 : entry;
        *(kQueryLanes ? tile_at(j, i) : tile_at(i, j)) +=
            dot(operand + (kRelKey ? i : j) * stride, rows + entry * p_.D, p_.D);
      }
    }
  }

  // With a the operand's rows and b the other side's, pairs of one b - a have one entry.
  template <bool kRelKey>
  void add_products(const OffsetTable& table, const float* rows, Operand& operand) {
    constexpr bool kTransposed = kRelKey == kQueryLanes;
    const int64_t n_a = kRelKey ? q_.count : k_.count, n_b = kRelKey ? k_.count : q_.count;
    const int64_t stride = padded_dim(p_.D), step = kRelKey ? 1 : -1;
    const int64_t entry = k_.first - q_.first - table.min_offset;  // of a = b
    const float* diagonals = columns_of(table, rows, entry, step, operand);
    float* to = kTransposed ? square_ : tile_;
    for (int64_t a = 0; a < n_a; a += kTileRows) {
      const int64_t count = n_a - a < kTileRows ? n_a - a : kTileRows;
      // from the offset of the last row and b = 0 on; each row is one further than the next
      const Rows reached = {diagonals + kBlock - a, kColumns};
      const Memory out = {to + kSpill + a * kStride - (kTileRows - 1), kStride + 1};
      const AlongDepth left = {operand.rows + a * stride, stride};
      if (kTransposed || empty_) {
        product(left, reached, p_.D, 0, count, 0, kReach / kWidth, StartAtZero{}, out.set());
      } else {
        product(left, reached, p_.D, 0, count, 0, kReach / kWidth, StartAtZero{}, out.add());
      }
    }
    if (kTransposed) add_transposed(n_a, n_b);
  }

  // the table's rows as columns, by b - a, from 1 - kBlock - kTileRows on
  const float* columns_of(const OffsetTable& table, const float* rows, int64_t entry, int64_t step,
                          Operand& kept) {
    // Column x holds row clamp(step x). Past either end of the table all columns are alike.
    const int64_t end = table.length - 1;
    const int64_t low = (step > 0 ? 0 : -end) - kDiagonals, high = step > 0 ? end : 0;
    int64_t from = step * entry + 1 - kBlock - kTileRows;
    from = from < low ? low : from > high ? high : from;
    const bool inside = from >= kept.first && from + kDiagonals + kWidth <= kept.first + kKept;
    if (kept.table != rows || !inside) {
      const bool all = high + kDiagonals + kWidth <= low + kKept;
      kept.table = rows;
      kept.first = all ? low : from - (kKept - kDiagonals) / 2;
      kept.low = kept.high = kept.first + (from - kept.first) / kWidth * kWidth;
    }
    for (; kept.low > from; kept.low -= kWidth) {
      put_columns(rows, kept.low - kWidth, step, end, kept);
    }
    for (; kept.high < from + kDiagonals; kept.high += kWidth) {
      put_columns(rows, kept.high, step, end, kept);
    }
    return kept.columns + (from - kept.first);
  }

  // columns [x, x + kWidth)
  void put_columns(const float* rows, int64_t x, int64_t step, int64_t end, const Operand& kept) {
    float* to = kept.columns + (x - kept.first);
    const float* from[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const int64_t row = step * (x + i);
      from[i] = rows + (row < 0 ? 0 : row < end ? row : end) * p_.D;
    }
    const int64_t whole = p_.D / kWidth * kWidth;
    for (int64_t d = 0; d < whole; d += kWidth) {
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) square[i] = load(from[i] + d);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (d + i) * kColumns, square[i]);
    }
    for (int64_t d = whole; d < p_.D; ++d) {
      for (int i = 0; i < kWidth; ++i) to[d * kColumns + i] = from[i][d];
    }
  }

  // tile_[b][a] += square_[a][b]
  void add_transposed(int64_t n_a, int64_t n_b) {
    for (int64_t a = 0; a < n_a; a += kWidth) {
      for (int64_t b = 0; b < n_b; b += kWidth) {
        Vec part[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) part[i] = load(square_ + kSpill + (a + i) * kStride + b);
        transpose(part);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) {
          float* at = tile_at(b + i, a);
          store(at, empty_ ? part[i] : load(at) + part[i]);
        }
      }
    }
  }

  const Problem& p_;
  const float unit_;
  const bool pairwise_;
  float *strip_, *tile_;
  // a tile of relative products, a side's rows as rows
  float* square_ = nullptr;
  bool relative_, by_offset_;
  // nothing stands in tile_ yet
  bool empty_ = true;
  int64_t b_ = 0, h_ = 0;
  int phase_ = 0;
  Coordinates q_, k_;
  Operand query_, key_;
};

}  // namespace lcattn::cpu::LCATTN_ISA
