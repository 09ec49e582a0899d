// Walking one row of the block table, and sharing rows among workers.
#pragma once

#include "../common/problem.h"
#include "simd.h"

namespace lcattn::cpu::LCATTN_ISA {

// Calls visit(phase, k_block, tile) for the key blocks of a row of `by_query`, in the table's
// order; tile is -1 for blocks seen whole. Only those whose place in the row is in [first, end).
template <typename Visit>
LCATTN_INLINE void for_each_key_block(const Problem& p, const int32_t* row, int64_t first,
                                      int64_t end, Visit&& visit) {
  const int32_t* entries = p.by_query.entries;
  const int64_t n_blocks = (p.S + kBlock - 1) / kBlock;
  int64_t place = 0;
  for (int phase = 0; phase < p.P; ++phase) {
    const int64_t full = row[2 * phase], tiled = row[2 * phase + 1], next = row[2 * phase + 2];
    for (int64_t e = full; e < tiled && place < end; ++e) {
      const int64_t from = entries[2 * e];
      int64_t count = entries[2 * e + 1];
      if (from + count > n_blocks) count = from < n_blocks ? n_blocks - from : 0;
      const int64_t low = first > place ? first - place : 0;
      const int64_t high = end - place < count ? end - place : count;
      for (int64_t c = low; c < high; ++c) visit(phase, from + c, int64_t{-1});
      place += count;
    }
    for (int64_t e = tiled; e < next && place < end; ++e) {
      if (entries[2 * e] >= n_blocks) continue;
      if (place >= first) visit(phase, static_cast<int64_t>(entries[2 * e]), entries[2 * e + 1]);
      ++place;
    }
  }
}

// key blocks in a row
LCATTN_INLINE int64_t count_key_blocks(const Problem& p, const int32_t* row) {
  const int32_t* entries = p.by_query.entries;
  const int64_t n_blocks = (p.S + kBlock - 1) / kBlock;
  int64_t total = 0;
  for (int phase = 0; phase < p.P; ++phase) {
    const int64_t full = row[2 * phase], tiled = row[2 * phase + 1], next = row[2 * phase + 2];
    for (int64_t e = full; e < tiled; ++e) {
      const int64_t from = entries[2 * e], count = entries[2 * e + 1];
      total += from + count > n_blocks ? (from < n_blocks ? n_blocks - from : 0) : count;
    }
    for (int64_t e = tiled; e < next; ++e) total += entries[2 * e] < n_blocks;
  }
  return total;
}

// a counter that workers take work from; results must not depend on who takes what
struct WorkQueue {
  int64_t next = 0;

  int64_t take(int64_t count) { return __atomic_fetch_add(&next, count, __ATOMIC_RELAXED); }
};

// Items [0, n_items) dealt to workers in runs, each to the same worker in every call: what it read
// then may still be in its cache. A worker that is done with its own run helps with the next.
struct DealtQueue {
  WorkQueue* runs;
  int64_t n_runs, n_items;

  template <typename Visit>
  LCATTN_INLINE void for_each(int64_t worker, const Visit& visit) {
    for (int64_t ahead = 0; ahead < n_runs; ++ahead) {
      const int64_t run = (worker + ahead) % n_runs;
      const int64_t first = run * n_items / n_runs, end = (run + 1) * n_items / n_runs;
      for (int64_t item; (item = first + runs[run].take(1)) < end;) visit(item);
    }
  }
};

// worker(index) on every thread
template <typename Worker>
void run_workers(const Parallel& parallel, int64_t n_workers, Worker& worker) {
  parallel.run(
      n_workers, [](int64_t index, void* context) { (*static_cast<Worker*>(context))(index); },
      &worker);
}

}  // namespace lcattn::cpu::LCATTN_ISA
