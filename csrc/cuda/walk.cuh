// The key blocks that one row of the block table names, one after the other.
#pragma once

#include <cstdint>

#include "../common/problem.h"

namespace lcattn::cuda {

struct Visit {
  int phase;
  int k_block;
  int tile;  // -1: every pair of the block is visible
};

class Walk {
 public:
  __device__ Walk(const Problem& p, int b, int h, int64_t q_row)
      : entries_(reinterpret_cast<const int2*>(p.by_query.entries)),
        bounds_(p.by_query.row(b, h, p.H, q_row, p.P)),
        n_segments_(static_cast<int>(2 * p.P)),
        n_k_blocks_(static_cast<int>((p.S + kBlock - 1) / kBlock)),
        entry_(bounds_[0]),
        entry_end_(bounds_[1]) {}

  // false at the end; blocks at or beyond S, which a table of larger capacity names, are passed
  // over
  __device__ bool next(Visit& visit) {
    while (true) {
      if (run_block_ < run_end_) {
        visit = {segment_ / 2, run_block_++, -1};
        return true;
      }
      while (entry_ == entry_end_) {
        if (++segment_ == n_segments_) return false;
        entry_end_ = bounds_[segment_ + 1];
      }
      const int2 entry = entries_[entry_++];
      if (segment_ % 2 == 0) {
        run_block_ = entry.x;
        run_end_ = min(entry.x + entry.y, n_k_blocks_);
      } else if (entry.x < n_k_blocks_) {
        visit = {segment_ / 2, entry.x, entry.y};
        return true;
      }
    }
  }

 private:
  const int2* entries_;
  const int32_t* bounds_;
  int n_segments_, n_k_blocks_;
  // segment 2 f holds the full runs of phase f, segment 2 f + 1 its tiles
  int segment_ = 0, entry_, entry_end_;
  int run_block_ = 0, run_end_ = 0;
};

}  // namespace lcattn::cuda
