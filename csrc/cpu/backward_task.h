// One task of the backward pass: a part of a sequence, key block by key block.
//
// dk and dv of a key block gather in a column of tiles, dq of a query block in a slot. A slot is
// taken when the part first touches its block and also holds what is needed of the block again and
// again: log2(e) scale Q, -lse, -delta and, unless it can be read in place, dO. After the last
// touch dq is written out and the slot reused, so a part of a banded layout never has more in use
// than the band is wide.
#pragma once

#include "backward_call.h"
#include "backward_terms.h"

namespace lcattn::cpu::LCATTN_ISA {

class Task {
  // rows whose dots run side by side, to hide the latency of a sum in order
  static constexpr int kDots = 4;

 public:
  static int64_t scratch_bytes(const Call& c, int64_t slots) {
    int64_t low, length = 0;
    if (c.g.dbias) BiasGradient::extent(c.p, c.offsets, low, length);
    return 4 * padded<float>(c.tile_floats()) + 2 * padded<float>(kTile) +
           padded<float>(c.column_floats()) + padded<float>(slots * c.slot_floats()) +
           padded<float*>(slots) + padded<float*>(c.shape.n_tiles) + padded<float>(kBlock) +
           padded<BiasGradient>(c.bias_rows()) +
           c.bias_rows() * (padded<float>(kWidth * length) + padded<double>(length)) +
           ScoreTerms<false>::scratch_bytes(c.p) + SlowTile::scratch_bytes(c.p);
  }

  Task(const Call& call, int64_t index, int64_t slots, Scratch& scratch)
      : c_(call),
        p_(call.p),
        index_(index),
        sequence_(index / call.shape.n_parts),
        part_(index % call.shape.n_parts),
        packed_k_(scratch.take<float>(call.tile_floats())),
        packed_v_(scratch.take<float>(call.tile_floats())),
        k_rows_(scratch.take<float>(call.tile_floats())),
        out_rows_(scratch.take<float>(call.tile_floats())),
        p_tile_(scratch.take<float>(kTile)),
        ds_tile_(scratch.take<float>(kTile)),
        column_(scratch.take<float>(call.column_floats())),
        factors_(scratch.take<float>(kBlock)),
        slots_(scratch.take<float>(slots * call.slot_floats())),
        free_slots_(scratch.take<float*>(slots)),
        slot_of_(scratch.take<float*>(call.shape.n_tiles)),
        terms_(call.p, kLog2e, false, scratch),
        slow_(call.p, scratch) {
    for (int64_t i = 0; i < slots; ++i) free_slots_[i] = slots_ + i * call.slot_floats();
    n_free_ = slots;
    for (int64_t i = 0; i < call.shape.n_tiles; ++i) slot_of_[i] = nullptr;
    for (int64_t i = 0; i < kBlock; ++i) factors_[i] = p_.scale;
    const Gradients& g = call.g;
    want_offsets_ = g.dbias || g.dslope || g.drel_key || g.drel_query || g.dqr.data || g.dkr.data;
    content_only_ = p_.softcap == 0.0f && p_.dropout == 0.0f;
    if (call.g.dbias) {
      bias_ = scratch.take<BiasGradient>(call.bias_rows());
      int64_t low, length;
      BiasGradient::extent(p_, call.offsets, low, length);
      for (int64_t row = 0; row < call.bias_rows(); ++row) {
        bias_[row].tables = scratch.take<float>(kWidth * length);
        bias_[row].scattered = scratch.take<double>(length);
        bias_[row].start(p_, call.offsets);
      }
    }
    if (call.g.dslope) {
      for (int64_t head = 0; head < call.shape.group; ++head) slope()[head] = 0.0;
    }
    if (call.g.drel_key) clear(rel_key(0), call.relative_floats(p_.rel_key));
    if (call.g.drel_query) clear(rel_query(0), call.relative_floats(p_.rel_query));
  }

  void run() {
    const int64_t G = p_.G, sequences = c_.shape.n_sequences;
    for (int64_t bg = sequence_; bg < p_.B * G; bg += sequences) {
      b_ = bg / G;
      g_ = bg % G;
      plan_ = c_.plans + bg;
      plan_->for_each_column(c_.shape, part_, [this](int64_t k_block) { column(k_block); });
      for (int64_t tile = 0; tile < c_.shape.n_tiles && part_ == 0; ++tile) {
        if (!plan_->untouched(c_.shape, tile)) continue;
        clear(out_rows_, c_.tile_floats());
        c_.write_query_tile(b_, g_, tile, out_rows_, nullptr);
      }
    }
    for (int64_t row = 0; c_.g.dbias && row < c_.bias_rows(); ++row) {
      float* to = c_.bias + (index_ * c_.bias_rows() + row) * p_.bias.length;
      clear(to, p_.bias.length);
      bias_[row].fold(to);
    }
  }

 private:
  static void clear(float* data, int64_t count) {
    std::memset(data, 0, static_cast<size_t>(count) * sizeof(float));
  }

  double* slope() const { return c_.slope + index_ * c_.shape.group; }
  static float* table(float* tables, int64_t floats, int64_t index, const OffsetTable& of,
                      int64_t head, int64_t dim) {
    return tables + index * floats + (of.head_stride ? head * of.length * dim : 0);
  }
  float* rel_key(int64_t head) const {
    return table(c_.rel_key, c_.relative_floats(p_.rel_key), index_, p_.rel_key, head,
                 c_.shape.dim);
  }
  float* rel_query(int64_t head) const {
    return table(c_.rel_query, c_.relative_floats(p_.rel_query), index_, p_.rel_query, head,
                 c_.shape.dim);
  }

  // all that the part computes of one key block
  void column(int64_t k_block) {
    const int64_t heavy = plan_->heavy_of[k_block];
    sums_ = heavy < 0 ? column_
                      : c_.heavy + ((plan_->first_heavy + heavy) * c_.shape.n_parts + part_) *
                                       c_.column_floats();
    clear(sums_, c_.column_floats());
    key_ = k_block * kBlock;
    keys_ = p_.S - key_ < kBlock ? p_.S - key_ : kBlock;
    seen_keys_ = key_word(p_, b_, key_);
    in_phase_ = in_k_ = in_v_ = -1;
    for (int64_t phase = 0; phase < p_.P; ++phase) {
      for (int64_t head = 0; head < c_.shape.group; ++head) {
        for_each_entry(p_, c_.shape, b_, g_ * c_.shape.group + head, k_block, phase,
                       [&](int64_t q_block, int64_t tile) {
                         if (plan_->mine(part_, k_block, q_block)) {
                           pair(phase, head, q_block, tile);
                         }
                       });
      }
    }
    if (heavy < 0) c_.write_column(b_, g_, k_block, sums_, factors_);
  }

  void load_keys(int64_t phase) {
    if (in_phase_ == phase) return;
    in_phase_ = phase;
    const int32_t* position = k_positions(p_, phase, b_);
    k_at_.set(position ? position + key_ : nullptr, key_, keys_, p_.q_pos || p_.k_pos);
    terms_.set_keys(b_, g_, static_cast<int>(phase), key_, keys_);
    if (in_k_ != p_.k_of[phase]) {
      in_k_ = p_.k_of[phase];
      copy_transposed(p_.k[in_k_], p_.dtype, b_, g_, key_, keys_, p_.D, 1.0f, packed_k_);
      copy_rows(p_.k[in_k_], p_.dtype, b_, g_, key_, keys_, p_.D, 1.0f, k_rows_);
    }
    if (in_v_ != p_.v_of[phase]) {
      in_v_ = p_.v_of[phase];
      copy_transposed(p_.v[in_v_], p_.dtype, b_, g_, key_, keys_, p_.D, 1.0f, packed_v_);
    }
  }

  float* acquire(int64_t tile) {
    float*& slot = slot_of_[tile];
    if (slot) return slot;
    const int32_t use = plan_->use[part_ * c_.shape.n_tiles + tile];
    slot = use == kExclusive ? free_slots_[--n_free_]
                             : c_.spills + (plan_->first_spill + use) * c_.slot_floats();
    clear(slot, c_.tile_floats());
    return slot;
  }

  void release(int64_t tile) {
    const int64_t at = part_ * c_.shape.n_tiles + tile;
    if (--plan_->touches[at] > 0) return;
    if (plan_->use[at] == kExclusive) {
      c_.write_query_tile(b_, g_, tile, slot_of_[tile], factors_);
      free_slots_[n_free_++] = slot_of_[tile];
    }
    slot_of_[tile] = nullptr;
  }

  // -lse, -delta and what rounding took from -lse; a row that sees nothing gets -inf, 0 and 0, so
  // that p and ds come out as 0
  void row_scalars(int64_t h, int64_t query, int64_t rows, Rows dout, float* minus_lse) {
    float *minus_delta = minus_lse + kBlock, *minus_rest = minus_delta + kBlock;
    const Rows out = rows_of(p_.out, p_.dtype, b_, h, query, rows, p_.D, false, out_rows_);
    const int64_t first = (b_ * p_.H + h) * p_.T + query;
    for (int64_t r = 0; r < rows; r += kDots) row_dots(out, dout, r, rows, minus_delta);
    for (int64_t r = 0; r < rows; ++r) {
      const float lse = p_.lse[first + r];
      const bool empty = lse == -kInf;
      const double exact =
          -1.4426950408889634 * (static_cast<double>(lse) + p_.lse_rest[first + r]);
      const float delta = minus_delta[r] - (c_.g.dlse ? c_.g.dlse[first + r] : 0.0f);
      minus_lse[r] = empty ? -kInf : static_cast<float>(exact);
      minus_rest[r] = empty ? 0.0f : static_cast<float>(exact - minus_lse[r]);
      minus_delta[r] = empty ? 0.0f : -delta;
    }
  }

  // out . dout of rows [first, first + kDots), summed exactly as the products sum, so that
  // dout . v - delta is 0 where a row sees one key
  void row_dots(Rows out, Rows dout, int64_t first, int64_t rows, float* dots) const {
    const float *a[kDots], *b[kDots];
    float sum[kDots] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kDots; ++i) {
      const int64_t row = first + i < rows ? first + i : rows - 1;
      a[i] = out.from(row).data;
      b[i] = dout.from(row).data;
    }
    for (int64_t d = 0; d < p_.D; ++d) {
#pragma GCC unroll 8
      for (int i = 0; i < kDots; ++i) sum[i] = fma(a[i][d], b[i][d], sum[i]);
    }
    for (int i = 0; i < kDots && first + i < rows; ++i) dots[first + i] = sum[i];
  }

  void find_mask(int64_t tile, int64_t shift, int64_t rows) {
    if (mask_tile_ == tile && mask_shift_ == shift && mask_rows_ == rows &&
        mask_keys_ == seen_keys_) {
      return;
    }
    mask_.read(p_, tile, shift, rows, seen_keys_);
    mask_tile_ = tile, mask_shift_ = shift, mask_rows_ = rows, mask_keys_ = seen_keys_;
  }

  // one query tile of one head against the key block
  void pair(int64_t phase, int64_t head, int64_t q_block, int64_t tile_bits) {
    const int64_t h = g_ * c_.shape.group + head;
    const int64_t query = c_.query_of(q_block), rows = c_.rows_of_block(q_block);
    const int64_t dq_at = c_.shape.tile(p_.q_of[phase], head, q_block);
    const int64_t dqr_at = c_.shape.tile(c_.shape.n_q - 1, head, q_block);
    const bool is_new = slot_of_[dq_at] == nullptr;
    float* dq = acquire(dq_at);
    float* dqr = c_.shape.want_dqr ? acquire(dqr_at) : nullptr;
    float* q = dq + c_.tile_floats();
    float* minus_lse = dq + c_.slot_floats() - kRowScalars * kBlock;

    load_keys(phase);
    Rows dout = {q + c_.tile_floats(), c_.shape.dim};
    if (!c_.keeps_dout()) dout = rows_of(c_.g.dout, p_.dtype, b_, h, query, rows, p_.D, true, q);
    if (is_new) {
      copy_rows(p_.q[p_.q_of[phase]], p_.dtype, b_, h, query, rows, p_.D, p_.scale, q, kLog2e);
      if (c_.keeps_dout()) {
        copy_rows(c_.g.dout, p_.dtype, b_, h, query, rows, p_.D, 1.0f, q + c_.tile_floats());
      }
      row_scalars(h, query, rows, dout, minus_lse);
    }
    terms_.set_queries(b_, h, static_cast<int>(phase), query, rows);

    const bool whole = content_only_ && tile_bits < 0 && seen_keys_ == ~uint64_t{0};
    if (whole && whole_rows_ != rows) {
      whole_.fill(rows);
      whole_rows_ = rows;
    } else if (!whole) {
      find_mask(tile_bits, (p_.row_start + query) % kBlock, rows);
    }
    if (whole || mask_.any) {
      Tile tile;
      tile.b = b_, tile.h = h, tile.g = g_, tile.phase = phase;
      tile.query = query, tile.rows = rows, tile.key = key_, tile.keys = keys_;
      tile.q = {q, c_.shape.dim};
      tile.dout = dout;
      tile.packed_k = packed_k_, tile.packed_v = packed_v_;
      tile.minus_lse = minus_lse, tile.minus_delta = minus_lse + kBlock;
      tile.minus_rest = minus_lse + 2 * kBlock;
      tile.visible = whole ? &whole_ : &mask_;
      if (content_only_) {
        fast_scores(tile, whole);
      } else {
        slow_.run(tile, terms_.sum(), p_tile_, ds_tile_);
      }
      content_gradients(tile, dq);
      if (want_offsets_) offset_gradients(tile, head, dqr);
    }
    release(dq_at);
    if (dqr) release(dqr_at);
  }

  void fast_scores(const Tile& t, bool whole) {
    const TermTile terms = terms_.sum();
    if (whole) {
      probabilities<false>(t.q, packed_k_, p_.D, t.rows, whole_, t.minus_lse, t.minus_rest, terms,
                           p_tile_);
      score_gradients<false>(t.dout, packed_v_, p_.D, t.rows, whole_, t.minus_delta, p_tile_,
                             ds_tile_);
    } else {
      probabilities<true>(t.q, packed_k_, p_.D, t.rows, mask_, t.minus_lse, t.minus_rest, terms,
                          p_tile_);
      score_gradients<true>(t.dout, packed_v_, p_.D, t.rows, mask_, t.minus_delta, p_tile_,
                            ds_tile_);
    }
  }

  void content_gradients(const Tile& t, float* dq) {
    const int64_t vectors = c_.shape.dim / kWidth;
    float* dk = sums_ + p_.k_of[t.phase] * c_.tile_floats();
    float* dv = sums_ + (p_.n_k + p_.v_of[t.phase]) * c_.tile_floats();
    accumulate(AlongRows{p_tile_, kBlock}, t.dout, keys_, vectors, t.visible->queries_of,
               Memory{dv, c_.shape.dim});
    accumulate(AlongRows{ds_tile_, kBlock}, t.q, keys_, vectors, t.visible->queries_of,
               Memory{dk, c_.shape.dim});
    accumulate(AlongDepth{ds_tile_, kBlock}, Rows{k_rows_, c_.shape.dim}, t.rows, vectors,
               t.visible->keys_of, Memory{dq, c_.shape.dim});
  }

  void offset_gradients(Tile& t, int64_t head, float* dqr) {
    const bool filled = p_.q_pos || p_.k_pos;
    const int32_t* position = q_positions(p_, t.phase, b_);
    q_at_.set(position ? position + t.query : nullptr, p_.row_start + t.query, t.rows, filled);
    t.offset = k_at_.first - q_at_.first;
    t.steps = q_at_.steps && k_at_.steps;
    t.q_at = q_at_.at;
    t.k_at = k_at_.at;
    if (t.steps) clear(ds_tile_ + t.rows * kBlock, (kBlock - t.rows) * kBlock);
    if (c_.g.dbias) {
      const int64_t phase = p_.bias.phase_stride ? t.phase : 0;
      const int64_t row = p_.bias.head_stride ? phase * c_.shape.group + head : phase;
      if (t.steps) {
        bias_[row].add_tile(ds_tile_, t.offset);
      } else {
        for_each_visible(t, [&](int64_t r, int64_t j) {
          bias_[row].add(ds_tile_[r * kBlock + j], offset_of(t, r, j));
        });
      }
    }
    if (c_.g.dslope) {
      if (t.steps) {
        slope()[head] += slope_gradient(ds_tile_, t.offset);
      } else {
        for_each_visible(t, [&](int64_t r, int64_t j) {
          const int64_t o = offset_of(t, r, j);
          slope()[head] += ds_tile_[r * kBlock + j] * static_cast<double>(o < 0 ? -o : o);
        });
      }
    }
    if (dqr || c_.g.drel_key) {
      slow_.relative_key_gradient(t, ds_tile_, dqr, c_.g.drel_key ? rel_key(head) : nullptr);
    }
    if (c_.g.dkr.data || c_.g.drel_query) {
      float* dkr = sums_ + (p_.n_k + p_.n_v) * c_.tile_floats();
      slow_.relative_query_gradient(t, ds_tile_, c_.g.dkr.data ? dkr : nullptr,
                                    c_.g.drel_query ? rel_query(head) : nullptr);
    }
  }

  const Call& c_;
  const Problem& p_;
  const int64_t index_, sequence_, part_;
  float *packed_k_, *packed_v_, *k_rows_, *out_rows_;
  float *p_tile_, *ds_tile_, *column_, *factors_, *slots_;
  float** free_slots_;
  float** slot_of_;
  int64_t n_free_;
  ScoreTerms<false> terms_;
  SlowTile slow_;
  BiasGradient* bias_ = nullptr;
  bool want_offsets_, content_only_;

  Plan* plan_ = nullptr;
  int64_t b_ = 0, g_ = 0, key_ = 0, keys_ = 0, in_phase_ = -1, in_k_ = -1, in_v_ = -1;
  uint64_t seen_keys_ = 0;
  float* sums_ = nullptr;
  Coordinates q_at_, k_at_;
  Visibility mask_, whole_;
  // what mask_ was read from
  int64_t mask_tile_ = 0, mask_shift_ = 0, mask_rows_ = 0;
  uint64_t mask_keys_ = 0;
  int64_t whole_rows_ = 0;
};

}  // namespace lcattn::cpu::LCATTN_ISA
