// Rotary turning of rows by a table of cosines and sines, as kernels.h says.
//
// Worker: 64 rows of every head of a batch row, in turn, so that rows of a [B, T, H, D] tensor are
// read in the order in which they lie.
#include "kernels.h"
#include "load.h"
#include "schedule.h"
#include "scratch.h"

namespace lcattn::cpu::LCATTN_ISA {

void turn(const Turn& t, const Parallel& parallel);

void turn(const Turn& t, const Parallel& parallel) {
  const int64_t blocks = (t.n + kBlock - 1) / kBlock, stride = padded_dim(t.D);
  WorkQueue queue;
  auto worker = [&](int64_t) {
    Scratch scratch(kWorkerScratch, padded<float>(kBlock * stride));
    float* rows = scratch.take<float>(kBlock * stride);
    for (int64_t piece; (piece = queue.take(1)) < t.B * blocks;) {
      const int64_t b = piece / blocks, row = piece % blocks * kBlock;
      const int64_t count = t.n - row < kBlock ? t.n - row : kBlock;
      for (int64_t head = 0; head < t.heads; ++head) {
        copy_rows(t.x, t.dtype, b, head, row, count, t.D, 1.0f, rows);
        turn_rows(rows, stride, count, t.table, t.pairs, t.at + b * t.at_batch_stride + row,
                  t.back);
        store_rows(t.out, t.dtype, b, head, row, count, t.D, rows, stride, nullptr);
      }
    }
  };
  const int64_t pieces = t.B * blocks;
  run_workers(parallel, pieces < parallel.n_threads ? pieces : parallel.n_threads, worker);
}

}  // namespace lcattn::cpu::LCATTN_ISA
