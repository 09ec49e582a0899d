// Attention of few queries over many keys, the same formula as forward.cpp.
//
// Here reading K and V is what costs, so the query rows of the heads of one kv head go over a key
// block together, and every block is read once, or once for each kDecodeRows of them. A unit
// is rows that share one list of key blocks: a kv head's (or one head's, if the table has a list
// for each), within one row of the table. Its list is cut into parts, a part has one owner, and
// whoever finishes the last part of a unit merges them, in their order. Scores are [row][key], keys
// are the lanes.
#include "decode.h"

#include "dropout.h"
#include "partial.h"
#include "schedule.h"
#include "scores.h"

namespace lcattn::cpu::LCATTN_ISA {
namespace {

// a part is at least so many key blocks; there are about so many parts for each thread
constexpr int64_t kMinPart = 8;
constexpr int64_t kPartsPerThread = 4;
// rows asked for ahead of their use; a block of them ahead cost 15% of the time
constexpr int64_t kRowsAhead = 16;

struct Unit {
  int64_t b, g, head, n_heads, query, n_queries;
  const int32_t* table;
  // the table's row within its tiles that `query` stands in
  int64_t tile_row;
  int64_t n_blocks, first_part, n_parts;
  int64_t unfinished;

  int64_t rows() const { return n_heads * n_queries; }
};

// rows of K or V: their dtype, and whole vectors in each
struct Source {
  const char* data;
  int64_t stride_bytes;
  DType dtype;

  LCATTN_INLINE const char* row(int64_t index) const { return data + index * stride_bytes; }
  // a row is short and the next is not always beside it: the processor's own prefetch falls behind
  LCATTN_INLINE void prefetch_ahead(int64_t index, int64_t dim) const {
    __builtin_prefetch(row(index + kRowsAhead) + dim * element_bytes(dtype), 0, 3);
  }
};

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// the running softmax of a unit's rows over one part
class DecodeTile {
 public:
  static int64_t scratch_bytes(const Problem& p) {
    return padded<float>(kDecodeRows * padded_dim(p.D)) + padded<float>(kDecodeRows * kBlock) +
           2 * padded<float>(kBlock * padded_dim(p.D)) + ScoreTerms<false>::scratch_bytes(p);
  }

  DecodeTile(const Problem& p, Scratch& scratch)
      : p_(p),
        stride_(padded_dim(p.D)),
        queries_(scratch.take<float>(kDecodeRows * stride_)),
        scores_(scratch.take<float>(kDecodeRows * kBlock)),
        key_rows_(scratch.take<float>(kBlock * stride_)),
        value_rows_(scratch.take<float>(kBlock * stride_)),
        terms_(p, kLog2e, true, scratch) {
    has_terms_ = p.bias.data || p.slope || p.rel_key.data || p.rel_query.data;
  }

  void begin(const Unit& unit, float* out, float* row_max, float* row_sum) {
    unit_ = &unit;
    out_ = out, row_max_ = row_max, row_sum_ = row_sum;
    packed_ = -1;
    for (int64_t r = 0; r < unit.rows(); ++r) {
      row_max_[r] = -kInf, row_sum_[r] = 0.0f;
      for (int64_t d = 0; d < stride_; d += kWidth) store(out_ + r * stride_ + d, zero());
    }
  }

  void visit(int phase, int64_t k_block, int64_t tile) {
    const Unit& unit = *unit_;
    const int64_t key = k_block * kBlock;
    const int64_t n_k = p_.S - key < kBlock ? p_.S - key : kBlock;
    const uint64_t word = key_word(p_, unit.b, key);
    uint64_t seen[kDecodeRows], any = 0;
    for (int64_t r = 0; r < unit.rows(); ++r) {
      seen[r] = word & (tile < 0 ? ~uint64_t{0} : tile_bits(tile, r % unit.n_queries));
      any |= seen[r];
    }
    if (any == 0) return;

    pack_queries(phase);
    const Source keys = p_.turn_table ? turned_keys(p_.k_of[phase], key, n_k)
                                      : source(p_.k[p_.k_of[phase]], key, n_k, key_rows_);
    over_rows(keys.dtype, [&](auto type, auto rows, int64_t row) {
      dots<type.value, rows.value>(keys, n_k, row);
    });
    if (has_terms_) add_terms(phase, key, n_k);
    for (int64_t r = 0; r < unit.rows(); ++r) exponentials(r, seen[r]);
    if (p_.dropout > 0.0f) drop(key);
    const Source values = source(p_.v[p_.v_of[phase]], key, n_k, value_rows_);
    over_rows(values.dtype, [&](auto type, auto rows, int64_t row) {
      accumulate<type.value, rows.value>(values, n_k, row);
    });
  }

 private:
  uint64_t tile_bits(int64_t tile, int64_t query) const {
    const int32_t* words =
        p_.mask_tiles + (tile * kBlock + unit_->tile_row + query) * (kBlock / 32);
    return static_cast<uint32_t>(words[0]) | static_cast<uint64_t>(static_cast<uint32_t>(words[1]))
                                                 << 32;
  }

  void pack_queries(int phase) {
    if (p_.q_of[phase] == packed_) return;
    packed_ = p_.q_of[phase];
    for (int64_t n = 0; n < unit_->n_heads; ++n) {
      copy_rows(p_.q[packed_], p_.dtype, unit_->b, unit_->head + n, unit_->query, unit_->n_queries,
                p_.D, p_.scale, queries_ + n * unit_->n_queries * stride_, kLog2e);
    }
  }

  // scores of rows [row, row + kRows): each vector of K meets all of them; the tail of the block is
  // 0
  template <DType kType, int kRows>
  void dots(const Source& keys, int64_t n_k, int64_t row) {
    constexpr int kKeys = kWidth / kRows;
    const float* query = queries_ + row * stride_;
    float* to = scores_ + row * kBlock;
    int64_t first = 0;
    for (; first + kKeys <= n_k; first += kKeys) {
      Vec sums[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) sums[i] = zero();
      for (int64_t d = 0; d < stride_; d += kWidth) {
        Vec part[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) part[r] = load(query + r * stride_ + d);
#pragma GCC unroll 16
        for (int i = 0; i < kKeys; ++i) {
          const Vec key = load_vector(keys.row(first + i), d, kType);
          keys.prefetch_ahead(first + i, d);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r)
            sums[r * kKeys + i] = fma(part[r], key, sums[r * kKeys + i]);
        }
      }
      float each[kWidth];
      store(each, reduce_add_each(sums));
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kKeys; ++i) to[r * kBlock + first + i] = each[r * kKeys + i];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int64_t k = first; k < kBlock; ++k) {
        Vec sum = zero();
        for (int64_t d = 0; k < n_k && d < stride_; d += kWidth) {
          sum = fma(load(query + r * stride_ + d), load_vector(keys.row(k), d, kType), sum);
        }
        to[r * kBlock + k] = reduce_add(sum);
      }
    }
  }

  // out of rows [row, row + kRows) += P V
  template <DType kType, int kRows>
  void accumulate(const Source& values, int64_t n_k, int64_t row) {
    int64_t d = 0;
    for (; d + kTileVectors * kWidth <= stride_; d += kTileVectors * kWidth) {
      accumulate_columns<kType, kRows, kTileVectors>(values, n_k, row, d);
    }
    for (; d < stride_; d += kWidth) accumulate_columns<kType, kRows, 1>(values, n_k, row, d);
  }

  template <DType kType, int kRows, int kVectors>
  LCATTN_INLINE void accumulate_columns(const Source& values, int64_t n_k, int64_t row, int64_t d) {
    const Memory out = {out_ + row * stride_ + d, stride_};
    const float* p = scores_ + row * kBlock;
    Acc<kRows, kVectors> acc;
    StartAtZero{}(acc, 0, 0);
    for (int64_t k = 0; k < n_k; ++k) {
      Vec value[kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        value[c] = load_vector(values.row(k), d + c * kWidth, kType);
        values.prefetch_ahead(k, d + c * kWidth);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec weight = broadcast(p[r * kBlock + k]);
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) acc.at[r][c] = fma(weight, value[c], acc.at[r][c]);
      }
    }
    out.add()(acc, 0, 0);
  }

  // step(type, rows, first row), with type and rows as constants, over all rows
  template <typename Step>
  LCATTN_INLINE void over_rows(DType dtype, const Step& step) {
    auto rows = [&](auto type) {
      const int64_t end = unit_->rows();
      int64_t row = 0;
      for (; row + 4 <= end; row += 4) step(type, Constant<4>{}, row);
      for (; row + 2 <= end; row += 2) step(type, Constant<2>{}, row);
      for (; row < end; ++row) step(type, Constant<1>{}, row);
    };
    if (dtype == DType::kFloat32) {
      rows(Constant<DType::kFloat32>{});
    } else if (dtype == DType::kBFloat16) {
      rows(Constant<DType::kBFloat16>{});
    } else {
      rows(Constant<DType::kFloat16>{});
    }
  }

  // rows as they lie if whole vectors can be read, else copied
  Source source(const View& view, int64_t key, int64_t n_k, float* tile) const {
    if (view.dim == 1 && p_.D % kWidth == 0) {
      return {row_address(view, p_.dtype, unit_->b, unit_->g, key),
              view.row * element_bytes(p_.dtype), p_.dtype};
    }
    copy_rows(view, p_.dtype, unit_->b, unit_->g, key, n_k, p_.D, 1.0f, tile);
    return {reinterpret_cast<const char*>(tile), stride_ * 4, DType::kFloat32};
  }

  // keys turned by the rows of the table that are theirs
  Source turned_keys(int which, int64_t key, int64_t n_k) const {
    copy_rows(p_.k[which], p_.dtype, unit_->b, unit_->g, key, n_k, p_.D, 1.0f, key_rows_);
    const int32_t* at = p_.turn_at[which] + unit_->b * p_.turn_batch_stride + key;
    turn_rows(key_rows_, stride_, n_k, p_.turn_table, p_.turn_pairs, at);
    return {reinterpret_cast<const char*>(key_rows_), stride_ * 4, DType::kFloat32};
  }

  void add_terms(int phase, int64_t key, int64_t n_k) {
    terms_.set_keys(unit_->b, unit_->g, phase, key, n_k);
    for (int64_t n = 0; n < unit_->n_heads; ++n) {
      terms_.set_queries(unit_->b, unit_->head + n, phase, unit_->query, unit_->n_queries);
      const TermTile terms = terms_.sum();
      for (int64_t q = 0; q < unit_->n_queries; ++q) {
        float* at = scores_ + (n * unit_->n_queries + q) * kBlock;
        for (int64_t lane = 0; lane < n_k; lane += kWidth) {
          store(at + lane, load(at + lane) + terms.at(q, lane));
        }
      }
    }
  }

  // scores become exponentials; out and row_sum are brought to the new maximum
  void exponentials(int64_t row, uint64_t seen) {
    float* at = scores_ + row * kBlock;
    const float cap = p_.softcap * kLog2e;
    Vec largest = broadcast(-kInf);
    for (int64_t lane = 0; lane < kBlock; lane += kWidth) {
      Vec score = load(at + lane);
      if (cap > 0.0f) score = soft_cap(score, cap).score;
      const Mask mask = mask_from_bits(static_cast<uint32_t>(seen >> lane));
      score = select(mask, score, broadcast(-kInf));
      store(at + lane, score);
      largest = max(largest, score);
    }
    const float old_max = row_max_[row], tile_max = reduce_max(largest);
    const float new_max = tile_max > old_max ? tile_max : old_max;
    const float reference = new_max == -kInf ? 0.0f : new_max;
    Vec sum = zero();
    for (int64_t lane = 0; lane < kBlock; lane += kWidth) {
      const Vec value = exp2(load(at + lane) - broadcast(reference));
      store(at + lane, value);
      sum = sum + value;
    }
    row_max_[row] = new_max;
    if (new_max == old_max) {
      row_sum_[row] += reduce_add(sum);
      return;
    }
    const float factor = exp2_scalar(old_max - reference);
    row_sum_[row] = row_sum_[row] * factor + reduce_add(sum);
    float* out = out_ + row * stride_;
    for (int64_t d = 0; d < stride_; d += kWidth) {
      store(out + d, load(out + d) * broadcast(factor));
    }
  }

  void drop(int64_t key) {
    BitTile kept;
    for (int64_t n = 0; n < unit_->n_heads; ++n) {
      kept_bits(p_, unit_->b, unit_->head + n, unit_->query, unit_->n_queries, key, kept);
      for (int64_t q = 0; q < unit_->n_queries; ++q) {
        float* at = scores_ + (n * unit_->n_queries + q) * kBlock;
        for (int64_t k = 0; k < kBlock; ++k) at[k] = kept.row[k] >> q & 1 ? at[k] : 0.0f;
      }
    }
  }

  const Problem& p_;
  const int64_t stride_;
  float *queries_, *scores_, *key_rows_, *value_rows_;
  ScoreTerms<false> terms_;
  bool has_terms_;
  const Unit* unit_ = nullptr;
  float *out_ = nullptr, *row_max_ = nullptr, *row_sum_ = nullptr;
  int packed_ = -1;
};

class Decode {
 public:
  Decode(const Problem& p, const Parallel& parallel) : p_(p), parallel_(parallel) {
    const int64_t first = p.row_start / kBlock;
    n_table_rows_ = (p.row_start + p.T - 1) / kBlock - first + 1;
    // one list of key blocks for all heads of a kv head
    shared_ = p.by_query.heads <= p.G;
    n_groups_ = shared_ ? p.G : p.H;
    n_heads_ = shared_ ? p.H / p.G : 1;
    heads_at_once_ = kDecodeRows / p.T < n_heads_ ? kDecodeRows / p.T : n_heads_;
    n_cuts_ = (n_heads_ + heads_at_once_ - 1) / heads_at_once_;
    n_units_ = p.B * n_groups_ * n_cuts_ * n_table_rows_;
  }

  void run() {
    const int64_t n_threads = parallel_.n_threads > 0 ? parallel_.n_threads : 1;
    int64_t total = 0;
    for (int64_t u = 0; u < n_units_; ++u) total += count_key_blocks(p_, unit(u).table);
    int64_t limit = total / (kPartsPerThread * n_threads);
    if (limit < kMinPart) limit = kMinPart;
    if (n_threads == 1) limit = INT64_MAX;
    int64_t n_parts = 0;
    for (int64_t u = 0; u < n_units_; ++u) {
      n_parts += parts(count_key_blocks(p_, unit(u).table), limit);
    }
    // threads cost more than they bring where there is little to read
    const int64_t useful = (total + kMinPart - 1) / kMinPart;
    int64_t n_workers = n_parts < n_threads ? n_parts : n_threads;
    if (useful < n_workers) n_workers = useful > 0 ? useful : 1;
    Scratch scratch(kCallScratch, padded<Unit>(n_units_) + padded<float>(n_parts * part_size()) +
                                      padded<WorkQueue>(n_workers));
    units_ = scratch.take<Unit>(n_units_);
    parts_ = scratch.take<float>(n_parts * part_size());
    int64_t first_part = 0;
    for (int64_t u = 0; u < n_units_; ++u) {
      units_[u] = unit(u);
      units_[u].n_blocks = count_key_blocks(p_, units_[u].table);
      units_[u].first_part = first_part;
      units_[u].n_parts = units_[u].unfinished = parts(units_[u].n_blocks, limit);
      first_part += units_[u].n_parts;
    }
    queue_ = {scratch.take<WorkQueue>(n_workers), n_workers, n_parts};
    for (int64_t run = 0; run < n_workers; ++run) queue_.runs[run] = {};
    run_workers(parallel_, n_workers, *this);
  }

  // one worker
  void operator()(int64_t worker) {
    const FlushSubnormals flush;
    Scratch scratch(kWorkerScratch,
                    DecodeTile::scratch_bytes(p_) + padded<float>(kDecodeRows * padded_dim(p_.D)));
    DecodeTile tile(p_, scratch);
    float* merged = scratch.take<float>(kDecodeRows * padded_dim(p_.D));
    int64_t u = 0;
    queue_.for_each(worker, [&](int64_t part) {
      if (part < units_[u].first_part) u = 0;
      while (part >= units_[u].first_part + units_[u].n_parts) ++u;
      Unit& unit = units_[u];
      float* out = parts_ + part * part_size();
      float* row_max = out + kDecodeRows * padded_dim(p_.D);
      tile.begin(unit, out, row_max, row_max + kDecodeRows);
      const int64_t n = part - unit.first_part;
      for_each_key_block(
          p_, unit.table, n * unit.n_blocks / unit.n_parts, (n + 1) * unit.n_blocks / unit.n_parts,
          [&tile](int phase, int64_t k_block, int64_t mask) { tile.visit(phase, k_block, mask); });
      if (__atomic_sub_fetch(&unit.unfinished, 1, __ATOMIC_ACQ_REL) > 0) return;
      for (int64_t h = 0; h < unit.n_heads; ++h) {
        finish_rows(
            p_, unit.b, unit.head + h, unit.query, unit.n_queries, unit.n_parts,
            [&](int64_t index) { return part_at(unit.first_part + index, h * unit.n_queries); },
            merged);
      }
    });
  }

 private:
  static int64_t parts(int64_t blocks, int64_t limit) {
    return blocks <= limit ? 1 : (blocks + limit - 1) / limit;
  }

  // with room to read whole vectors from any row's scalars on
  int64_t part_size() const { return kDecodeRows * (padded_dim(p_.D) + 2) + kWidth; }

  // from a row on
  Partial part_at(int64_t part, int64_t row) const {
    const float* out = parts_ + part * part_size();
    const float* row_max = out + kDecodeRows * padded_dim(p_.D) + row;
    return {out + row * padded_dim(p_.D), padded_dim(p_.D), row_max, row_max + kDecodeRows};
  }

  // without its parts
  Unit unit(int64_t index) const {
    const int64_t cut = index / n_table_rows_ % n_cuts_, heads = index / n_table_rows_ / n_cuts_;
    const int64_t first = cut * heads_at_once_, left = n_heads_ - first;
    const int64_t table_row = p_.row_start / kBlock + index % n_table_rows_;
    const int64_t top = table_row * kBlock - p_.row_start;
    Unit unit = {};
    unit.b = heads / n_groups_;
    unit.head = heads % n_groups_ * n_heads_ + first;
    unit.g = unit.head / (p_.H / p_.G);
    unit.n_heads = heads_at_once_ < left ? heads_at_once_ : left;
    unit.query = top > 0 ? top : 0;
    unit.n_queries = (top + kBlock < p_.T ? top + kBlock : p_.T) - unit.query;
    unit.tile_row = unit.query - top;
    unit.table = p_.by_query.row(unit.b, unit.head, p_.H, table_row, p_.P);
    return unit;
  }

  const Problem& p_;
  const Parallel& parallel_;
  // lists of key blocks, heads of each, and how these are cut into units
  int64_t n_table_rows_, n_groups_, n_heads_, heads_at_once_, n_cuts_;
  int64_t n_units_;
  bool shared_;
  Unit* units_ = nullptr;
  float* parts_ = nullptr;
  DealtQueue queue_ = {};
};

}  // namespace

void decode(const Problem& p, const Parallel& parallel) { Decode(p, parallel).run(); }

}  // namespace lcattn::cpu::LCATTN_ISA
