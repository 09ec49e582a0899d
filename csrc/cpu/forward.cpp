// Attention over block tables, forward: out = softmax(scores) V and lse, as in common/problem.h.
//
// A query block of one head, a row of the table, has one owner, which writes its rows of out and
// lse. Workers take groups of neighbouring query blocks of heads that share their keys, and bring
// all of a group past a few key blocks before the next, so that these stay in cache. A row that
// holds far more key blocks than its share (a token that sees all) is cut into parts over its key
// blocks; parts are written to scratch and merged afterwards in their order. Where cuts fall
// depends on the problem and the number of threads alone, so results do too.
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
// neighbouring query blocks of a head taken at once, and groups a thread below which none holds
// several heads
constexpr int64_t kRun = 4, kMinGroups = 4;

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
    form_groups(n_threads);
    const int64_t pieces = n_parts_ + n_groups_;
    run_workers(parallel_, pieces < n_threads ? pieces : n_threads, *this);
    if (n_heavy_ == 0) return;
    auto merge = [this](int64_t) { merge_heavy(); };
    run_workers(parallel_, n_heavy_ < n_threads ? n_heavy_ : n_threads, merge);
  }

  // one worker
  void operator()(int64_t) {
    const FlushSubnormals flush;
    Scratch scratch(kWorkerScratch, ForwardTile::scratch_bytes(p_));
    ForwardTile tile(p_, scratch);
    int64_t heavy = 0;
    for (int64_t part; (part = part_queue_.take(1)) < n_parts_;) {
      while (part >= heavy_[heavy].first_part + heavy_[heavy].n_parts) ++heavy;
      attend_part(tile, heavy_[heavy], part);
    }
    // the last groups first: with causality they are the heaviest
    for (int64_t done; (done = group_queue_.take(1)) < n_groups_;) {
      attend_group(tile, n_groups_ - 1 - done);
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

  // how rows are grouped; no result depends on it
  void form_groups(int64_t n_threads) {
    const int64_t share = p_.H / p_.G, fit = ForwardTile::n_rows(p_) / kRun;
    runs_ = (n_q_blocks_ + kRun - 1) / kRun;
    heads_ = (share + (share + fit - 1) / fit - 1) / ((share + fit - 1) / fit);
    if (p_.B * p_.G * ((share + heads_ - 1) / heads_) * runs_ < kMinGroups * n_threads) heads_ = 1;
    head_groups_ = (share + heads_ - 1) / heads_;
    n_groups_ = p_.B * p_.G * head_groups_ * runs_;
  }

  void attend_group(ForwardTile& tile, int64_t group) {
    const int64_t first_block = group % runs_ * kRun, heads = group / runs_;
    const int64_t share = p_.H / p_.G, first_head = heads % head_groups_ * heads_;
    const int64_t top = heads / head_groups_ * share;
    int64_t n = 0, longest = 0, rows[ForwardTile::kMaxRows], blocks[ForwardTile::kMaxRows];
    for (int64_t h = first_head; h < first_head + heads_ && h < share; ++h) {
      for (int64_t q = first_block; q < first_block + kRun && q < n_q_blocks_; ++q) {
        const int64_t row = (top + h) * n_q_blocks_ + q,
                      count = count_key_blocks(p_, table_row(row));
        if (count > limit_) continue;
        tile.begin(n, query_block(row));
        if (count > longest) longest = count;
        rows[n] = row, blocks[n++] = count;
      }
    }
    const int64_t step = RowCache::blocks(p_.D) / 2;
    for (int64_t first = 0; first < longest; first += step) {
      for (int64_t at = 0; at < n; ++at) {
        if (first < blocks[at]) visit(tile, at, table_row(rows[at]), first, first + step);
      }
    }
    for (int64_t at = 0; at < n; ++at) {
      const QueryBlock block = query_block(rows[at]);
      finish_rows(
          p_, block.b, block.h, block.query, block.count, 1,
          [&](int64_t) { return tile.result(at); }, nullptr);
    }
  }

  void visit(ForwardTile& tile, int64_t n, const int32_t* table, int64_t first, int64_t end) {
    tile.resume(n);
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
    tile.begin(0, query_block(heavy.row));
    visit(tile, 0, table_row(heavy.row), n * heavy.n_blocks / heavy.n_parts,
          (n + 1) * heavy.n_blocks / heavy.n_parts);
    const Partial found = tile.result(0);
    float* out = parts_ + part * part_size();
    float* row_max = out + kBlock * padded_dim(p_.D);
    std::memcpy(out, found.out, sizeof(float) * static_cast<size_t>(kBlock * padded_dim(p_.D)));
    std::memcpy(row_max, found.row_max, sizeof(float) * kBlock);
    std::memcpy(row_max + kBlock, found.row_sum, sizeof(float) * kBlock);
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
  // groups: neighbouring query blocks of heads of one kv head
  int64_t runs_ = 0, heads_ = 1, head_groups_ = 1, n_groups_ = 0;
  HeavyRow* heavy_ = nullptr;
  float* parts_ = nullptr;
  WorkQueue part_queue_, group_queue_, merge_queue_;
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
