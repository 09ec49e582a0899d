// Attention over block tables, forward: out = softmax(scores) V and lse, as in common/problem.h.
//
// A query block of one head is one piece of work and has one owner, which writes its rows of out
// and lse. Workers take runs of neighbouring query blocks, whose keys overlap, so that these stay
// in cache. A row that holds far more key blocks than its share (a token that sees all) is cut into
// parts over its key blocks; parts are written to scratch and merged afterwards in their order.
// Where cuts fall depends on the problem and the number of threads alone, so results do too.
#include "decode.h"
#include "forward_tile.h"
#include "partial.h"
#include "schedule.h"

namespace lcattn::cpu::LCATTN_ISA {
namespace {

// a row is cut when it is heavier than 1 / kShares of a thread's fair share, and never below
// kMinPart blocks
constexpr int64_t kShares = 8;
constexpr int64_t kMinPart = 32;
// neighbouring query blocks taken at once
constexpr int64_t kRun = 4;

struct HeavyRow {
  int64_t row;
  int64_t first_part, n_parts, n_blocks;
};

class Forward {
 public:
  Forward(const Problem& p, const Parallel& parallel)
      : p_(p),
        parallel_(parallel),
        first_block_(p.row_start / kBlock),
        n_q_blocks_((p.row_start + p.T - 1) / kBlock - p.row_start / kBlock + 1),
        n_rows_(p.B * p.H * n_q_blocks_) {}

  void run() {
    const int64_t n_threads = parallel_.n_threads > 0 ? parallel_.n_threads : 1;
    weigh(n_threads);
    Scratch scratch(kCallScratch,
                    padded<HeavyRow>(n_heavy_) + padded<float>(n_parts_ * part_size()));
    heavy_ = scratch.take<HeavyRow>(n_heavy_);
    parts_ = scratch.take<float>(n_parts_ * part_size());
    list_heavy();
    const int64_t pieces = n_parts_ + (n_rows_ + kRun - 1) / kRun;
    run_workers(parallel_, pieces < n_threads ? pieces : n_threads, *this);
    if (n_heavy_ == 0) return;
    auto merge = [this] { merge_heavy(); };
    run_workers(parallel_, n_heavy_ < n_threads ? n_heavy_ : n_threads, merge);
  }

  // one worker
  void operator()() {
    const FlushSubnormals flush;
    Scratch scratch(kWorkerScratch, ForwardTile::scratch_bytes(p_));
    ForwardTile tile(p_, scratch);
    int64_t heavy = 0;
    for (int64_t part; (part = part_queue_.take(1)) < n_parts_;) {
      while (part >= heavy_[heavy].first_part + heavy_[heavy].n_parts) ++heavy;
      attend_part(tile, heavy_[heavy], part);
    }
    for (int64_t done; (done = row_queue_.take(kRun)) < n_rows_;) {
      // the last rows first: with causality they are the heaviest
      const int64_t end = n_rows_ - done, first = end > kRun ? end - kRun : 0;
      for (int64_t row = first; row < end; ++row) {
        const int32_t* table = table_row(row);
        if (count_key_blocks(p_, table) > limit_) continue;
        attend(tile, row, table, 0, INT64_MAX);
        const QueryBlock block = query_block(row);
        const Partial whole = {tile.out(), padded_dim(p_.D), tile.row_max(), tile.row_sum()};
        finish_rows(
            p_, block.b, block.h, block.query, block.count, 1, [&whole](int64_t) { return whole; },
            nullptr);
      }
    }
  }

 private:
  int64_t part_size() const { return kBlock * padded_dim(p_.D) + 2 * kBlock; }

  // rows are ordered (b, h, q_block)
  const int32_t* table_row(int64_t row) const {
    const int64_t head = row / n_q_blocks_;
    return p_.by_query.row(head / p_.H, head % p_.H, p_.H, first_block_ + row % n_q_blocks_, p_.P);
  }

  QueryBlock query_block(int64_t row) const {
    const int64_t head = row / n_q_blocks_, h = head % p_.H;
    const int64_t top = (first_block_ + row % n_q_blocks_) * kBlock - p_.row_start;
    const int64_t query = top > 0 ? top : 0, bottom = top + kBlock < p_.T ? top + kBlock : p_.T;
    return {head / p_.H, h, h / (p_.H / p_.G), query, bottom - query, query - top};
  }

  // the heaviest a row may be, and how many rows and parts lie beyond
  void weigh(int64_t n_threads) {
    int64_t total = 0, heaviest = 0;
    for (int64_t row = 0; row < n_rows_; ++row) {
      const int64_t blocks = count_key_blocks(p_, table_row(row));
      total += blocks;
      if (blocks > heaviest) heaviest = blocks;
    }
    limit_ = total / (kShares * n_threads);
    if (limit_ < kMinPart) limit_ = kMinPart;
    if (n_threads == 1) limit_ = INT64_MAX;
    if (heaviest <= limit_) return;
    for (int64_t row = 0; row < n_rows_; ++row) {
      const int64_t blocks = count_key_blocks(p_, table_row(row));
      if (blocks <= limit_) continue;
      ++n_heavy_;
      n_parts_ += (blocks + limit_ - 1) / limit_;
    }
  }

  void list_heavy() {
    int64_t heavy = 0, parts = 0;
    for (int64_t row = 0; heavy < n_heavy_; ++row) {
      const int64_t blocks = count_key_blocks(p_, table_row(row));
      if (blocks <= limit_) continue;
      const int64_t n_parts = (blocks + limit_ - 1) / limit_;
      heavy_[heavy++] = {row, parts, n_parts, blocks};
      parts += n_parts;
    }
  }

  void attend(ForwardTile& tile, int64_t row, const int32_t* table, int64_t first, int64_t end) {
    tile.begin(query_block(row));
    for_each_key_block(p_, table, first, end, [&tile](int phase, int64_t k_block, int64_t mask) {
      tile.visit(phase, k_block, mask);
    });
  }

  Partial part_at(int64_t part) const {
    const float* out = parts_ + part * part_size();
    const float* row_max = out + kBlock * padded_dim(p_.D);
    return {out, padded_dim(p_.D), row_max, row_max + kBlock};
  }

  void attend_part(ForwardTile& tile, const HeavyRow& heavy, int64_t part) {
    const int64_t n = part - heavy.first_part;
    attend(tile, heavy.row, table_row(heavy.row), n * heavy.n_blocks / heavy.n_parts,
           (n + 1) * heavy.n_blocks / heavy.n_parts);
    float* out = parts_ + part * part_size();
    float* row_max = out + kBlock * padded_dim(p_.D);
    std::memcpy(out, tile.out(), sizeof(float) * static_cast<size_t>(kBlock * padded_dim(p_.D)));
    std::memcpy(row_max, tile.row_max(), sizeof(float) * kBlock);
    std::memcpy(row_max + kBlock, tile.row_sum(), sizeof(float) * kBlock);
  }

  void merge_heavy() {
    const FlushSubnormals flush;
    Scratch scratch(kWorkerScratch, padded<float>(kBlock * padded_dim(p_.D)));
    float* merged = scratch.take<float>(kBlock * padded_dim(p_.D));
    for (int64_t n; (n = merge_queue_.take(1)) < n_heavy_;) {
      const HeavyRow& heavy = heavy_[n];
      const QueryBlock block = query_block(heavy.row);
      finish_rows(
          p_, block.b, block.h, block.query, block.count, heavy.n_parts,
          [&](int64_t part) { return part_at(heavy.first_part + part); }, merged);
    }
  }

  const Problem& p_;
  const Parallel& parallel_;
  const int64_t first_block_, n_q_blocks_, n_rows_;
  int64_t limit_ = INT64_MAX, n_heavy_ = 0, n_parts_ = 0;
  HeavyRow* heavy_ = nullptr;
  float* parts_ = nullptr;
  WorkQueue part_queue_, row_queue_, merge_queue_;
};

}  // namespace

void forward(const Problem& p, const Parallel& parallel);

void forward(const Problem& p, const Parallel& parallel) {
  if (p.B * p.H * p.T == 0) return;
  if (decodes(p)) {
    decode(p, parallel);
    return;
  }
  Forward(p, parallel).run();
}

}  // namespace lcattn::cpu::LCATTN_ISA
