// Who computes what in the backward pass.
//
// A sequence is one (b, g): all query heads of a kv group of one batch element. (If gradients of
// relative keys or queries are wanted it is one g with every b in turn, so that their tables need
// no copy per b.) Its key blocks are cut into n_parts runs of equal work; a task is one run. A key
// block that far more queries see than others (a global key) is not owned by one task: each takes
// those of its queries that it is home to.
//
// What leaves a task:
//   dk, dv of its own key blocks        written at once
//   dk, dv of heavy key blocks          one partial per part
//   dq of a block that no other part touches      kept in a slot while in use, then written
//   dq of a block that several parts touch        one partial ("spill") per part
// Partials are summed in the order of the parts, so results depend on the number of threads, never
// on timing.
#pragma once

#include "../common/problem.h"
#include "simd.h"

namespace lcattn::cpu::LCATTN_ISA {

constexpr int32_t kUntouched = -1, kExclusive = -2;

// sizes of the whole problem
struct Shape {
  int64_t group, dim;                 // query heads per kv head, padded head dim
  int64_t first_q_block, n_q_blocks;  // of the table
  int64_t n_k_blocks;
  int64_t n_q, n_tiles;  // gradient tiles of a sequence: [n_q][group][n_q_blocks]
  int64_t n_sequences, n_parts;
  bool want_dqr;  // then the last of the n_q tensors is qr

  int64_t tile(int64_t q_tensor, int64_t head, int64_t q_block) const {
    return (q_tensor * group + head) * n_q_blocks + q_block;
  }
};

// the smallest number of parts that keeps n_threads busy to 15/16, at 8 or more pairs of blocks
// each
inline int64_t choose_parts(int64_t n_sequences, int64_t n_blocks, int64_t n_threads) {
  const int64_t most = n_blocks / 8 < 4 * n_threads ? n_blocks / 8 : 4 * n_threads;
  for (int64_t parts = 1; parts < most; ++parts) {
    const int64_t tasks = n_sequences * parts, rounds = (tasks + n_threads - 1) / n_threads;
    if (16 * tasks >= 15 * rounds * n_threads) return parts;
  }
  return most > 1 ? most : 1;
}

// f(q_block, tile) for each entry of one phase of row k_block of (b, h); q_block counts from the
// problem's first, tile is -1 for a block without a mask
template <typename F>
LCATTN_INLINE void for_each_entry(const Problem& p, const Shape& shape, int64_t b, int64_t h,
                                  int64_t k_block, int64_t phase, const F& f) {
  const int32_t* seg = p.by_key.row(b, h, p.H, k_block, p.P) + 2 * phase;
  const int64_t first = shape.first_q_block, end = first + shape.n_q_blocks;
  for (int64_t e = seg[0]; e < seg[1]; ++e) {
    const int64_t begin = p.by_key.entries[2 * e], stop = begin + p.by_key.entries[2 * e + 1];
    for (int64_t q = begin < first ? first : begin; q < stop && q < end; ++q) {
      f(q - first, int64_t{-1});
    }
  }
  for (int64_t e = seg[1]; e < seg[2]; ++e) {
    const int64_t q = p.by_key.entries[2 * e];
    if (q >= first && q < end) f(q - first, int64_t{p.by_key.entries[2 * e + 1]});
  }
}

// f(tile, q_block) for each entry of a key block, all phases and heads of the group
template <typename F>
LCATTN_INLINE void for_each_touch(const Problem& p, const Shape& shape, int64_t b, int64_t g,
                                  int64_t k_block, const F& f) {
  for (int64_t phase = 0; phase < p.P; ++phase) {
    for (int64_t head = 0; head < shape.group; ++head) {
      for_each_entry(p, shape, b, g * shape.group + head, k_block, phase,
                     [&](int64_t q_block, int64_t) {
                       f(shape.tile(p.q_of[phase], head, q_block), q_block);
                       if (shape.want_dqr) f(shape.tile(shape.n_q - 1, head, q_block), q_block);
                     });
    }
  }
}

// The parts of one (b, g).
struct Plan {
  int32_t* part_begin;  // [n_parts + 1], key blocks
  int32_t* heavy_of;    // [n_k_blocks], index among the heavy key blocks or -1
  int32_t* home;        // [n_q_blocks], the part that computes a query block's heavy entries
  int32_t* use;         // [n_parts][n_tiles], kUntouched, kExclusive or the index of a spill
  int32_t* touches;     // [n_parts][n_tiles], entries that a part has still to compute
  int32_t* slots;       // [n_parts], how many exclusive tiles are in use at once
  int64_t n_heavy, n_spills;
  int64_t first_heavy, first_spill;  // among those of all plans

  static int64_t ints(const Shape& s) {
    return 2 * s.n_parts + 1 + s.n_k_blocks + s.n_q_blocks + 2 * s.n_parts * s.n_tiles;
  }

  void place(int32_t* memory, const Shape& s) {
    part_begin = memory;
    heavy_of = part_begin + s.n_parts + 1;
    home = heavy_of + s.n_k_blocks;
    use = home + s.n_q_blocks;
    touches = use + s.n_parts * s.n_tiles;
    slots = touches + s.n_parts * s.n_tiles;
  }

  bool mine(int64_t part, int64_t k_block, int64_t q_block) const {
    return heavy_of[k_block] < 0 || home[q_block] == part;
  }

  // f(k_block) for the key blocks of a part, in the order of its work
  template <typename F>
  LCATTN_INLINE void for_each_column(const Shape& s, int64_t part, const F& f) const {
    for (int64_t k = part_begin[part]; k < part_begin[part + 1]; ++k) {
      if (heavy_of[k] < 0) f(k);
    }
    for (int64_t k = 0; k < s.n_k_blocks && n_heavy > 0; ++k) {
      if (heavy_of[k] >= 0) f(k);
    }
  }

  template <typename F>
  LCATTN_INLINE void for_each_touch_of(const Problem& p, const Shape& s, int64_t b, int64_t g,
                                       int64_t part, const F& f) const {
    for_each_column(s, part, [&](int64_t k) {
      for_each_touch(p, s, b, g, k, [&](int64_t tile, int64_t q_block) {
        if (mine(part, k, q_block)) f(part * s.n_tiles + tile);
      });
    });
  }

  void make(const Problem& p, const Shape& s, int64_t b, int64_t g) {
    cut(p, s, b, g);
    find_homes(p, s, b, g);
    const int64_t all = s.n_parts * s.n_tiles;
    for (int64_t i = 0; i < all; ++i) touches[i] = 0;
    for (int64_t part = 0; part < s.n_parts; ++part) {
      for_each_touch_of(p, s, b, g, part, [&](int64_t i) { ++touches[i]; });
    }
    n_spills = 0;
    for (int64_t tile = 0; tile < s.n_tiles; ++tile) {
      int64_t parts = 0;
      for (int64_t i = tile; i < all; i += s.n_tiles) parts += touches[i] > 0;
      for (int64_t i = tile; i < all; i += s.n_tiles) {
        use[i] = touches[i] == 0 ? kUntouched
                 : parts == 1    ? kExclusive
                                 : static_cast<int32_t>(n_spills++);
      }
    }
    for (int64_t part = 0; part < s.n_parts; ++part) count_slots(p, s, b, g, part);
  }

  // whether no part touches a tile; its gradient is zero and still has to be written
  bool untouched(const Shape& s, int64_t tile) const {
    for (int64_t part = 0; part < s.n_parts; ++part) {
      if (use[part * s.n_tiles + tile] != kUntouched) return false;
    }
    return true;
  }

 private:
  // a key block is heavy if it has far more entries than others or than fits into one part
  void cut(const Problem& p, const Shape& s, int64_t b, int64_t g) {
    const auto weigh = [&](int64_t k_block) {
      int64_t entries = 0;
      for_each_touch(p, s, b, g, k_block, [&](int64_t, int64_t) { ++entries; });
      return entries;
    };
    int64_t total = 0, light = 0, done = 0, part = 0;
    for (int64_t k = 0; k < s.n_k_blocks; ++k) total += weigh(k);
    n_heavy = 0;
    for (int64_t k = 0; k < s.n_k_blocks; ++k) {
      const int64_t entries = weigh(k);
      const bool heavy =
          s.n_parts > 1 && (entries * s.n_k_blocks > 4 * total || 2 * entries * s.n_parts > total);
      heavy_of[k] = heavy ? static_cast<int32_t>(n_heavy++) : -1;
      if (!heavy) light += entries + 1;
    }
    part_begin[0] = 0;
    for (int64_t k = 0; k < s.n_k_blocks; ++k) {
      while (part + 1 < s.n_parts && done * s.n_parts >= light * (part + 1)) {
        part_begin[++part] = static_cast<int32_t>(k);
      }
      if (heavy_of[k] < 0) done += weigh(k) + 1;
    }
    while (part < s.n_parts) part_begin[++part] = static_cast<int32_t>(s.n_k_blocks);
  }

  // the first part that touches a query block anyway; parts in turn for those that none touches
  void find_homes(const Problem& p, const Shape& s, int64_t b, int64_t g) {
    for (int64_t i = 0; i < s.n_q_blocks; ++i) home[i] = -1;
    for (int64_t part = 0; part < s.n_parts; ++part) {
      for (int64_t k = part_begin[part]; k < part_begin[part + 1]; ++k) {
        if (heavy_of[k] >= 0) continue;
        for_each_touch(p, s, b, g, k, [&](int64_t, int64_t q_block) {
          if (home[q_block] < 0) home[q_block] = static_cast<int32_t>(part);
        });
      }
    }
    for (int64_t i = 0; i < s.n_q_blocks; ++i) {
      if (home[i] < 0) home[i] = static_cast<int32_t>(i * s.n_parts / s.n_q_blocks);
    }
  }

  // walks the part once, with negative counts for tiles in use, and counts again what that used up
  void count_slots(const Problem& p, const Shape& s, int64_t b, int64_t g, int64_t part) {
    int32_t in_use = 0, most = 0;
    for_each_touch_of(p, s, b, g, part, [&](int64_t i) {
      if (use[i] != kExclusive) return;
      if (touches[i] > 0) {
        touches[i] = -touches[i];
        if (++in_use > most) most = in_use;
      }
      if (++touches[i] == 0) --in_use;
    });
    for_each_touch_of(p, s, b, g, part, [&](int64_t i) {
      if (use[i] == kExclusive) ++touches[i];
    });
    // dq and dqr of a pair are in use together
    slots[part] = most + (s.want_dqr ? 1 : 0);
  }
};

}  // namespace lcattn::cpu::LCATTN_ISA
