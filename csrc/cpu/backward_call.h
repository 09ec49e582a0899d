// What the tasks of one backward call share: the problem, the plans, and where partial results lie.
#pragma once

#include "backward_plan.h"
#include "backward_tables.h"

namespace lcattn::cpu::LCATTN_ISA {

// floats a slot keeps for each row: -lse, -delta, and the rest of -lse; lse in units of log2
constexpr int64_t kRowScalars = 3;

// what the tasks of one call share
struct Call {
  const Problem& p;
  const Gradients& g;
  Shape shape;
  OffsetRange offsets;
  Plan* plans;    // [B * G]
  float* heavy;   // [heavy key blocks of all plans][n_parts][column]
  float* spills;  // [spills of all plans][slot]
  // one of each per task
  float* bias;                 // [bias rows][L]
  double* slope;               // [group]
  float *rel_key, *rel_query;  // [rows][L][padded D]

  int64_t tile_floats() const { return kBlock * shape.dim; }
  int64_t slot_floats() const {
    return (keeps_dout() ? 3 : 2) * tile_floats() + kRowScalars * kBlock;
  }
  // rows of dout that are not dense float32 are copied; those of a [B, T, H, D] tensor fall into
  // few sets of the cache
  bool keeps_dout() const {
    return p.dtype != DType::kFloat32 || g.dout.dim != 1 || p.D % kWidth || g.dout.row > 2 * p.D;
  }
  int64_t column_tiles() const { return p.n_k + p.n_v + (g.dkr.data ? 1 : 0); }
  int64_t column_floats() const { return column_tiles() * tile_floats(); }
  // rows of a table that a task of one kv head reaches
  int64_t heads_of(const OffsetTable& table) const { return table.head_stride ? shape.group : 1; }
  int64_t phases_of(const OffsetTable& table) const { return table.phase_stride ? p.P : 1; }
  int64_t bias_rows() const { return phases_of(p.bias) * heads_of(p.bias); }
  int64_t relative_floats(const OffsetTable& table) const {
    return heads_of(table) * table.length * shape.dim;
  }
  const View& q_gradient(int64_t tensor) const {
    return shape.want_dqr && tensor == shape.n_q - 1 ? g.dqr : g.dq[tensor];
  }
  // first query and number of queries of a block that counts from the first
  int64_t query_of(int64_t q_block) const {
    const int64_t start = (shape.first_q_block + q_block) * kBlock - p.row_start;
    return start < 0 ? 0 : start;
  }
  int64_t rows_of_block(int64_t q_block) const {
    const int64_t end = (shape.first_q_block + q_block + 1) * kBlock - p.row_start;
    return (end < p.T ? end : p.T) - query_of(q_block);
  }
  // writes dq (or dqr) of a tile
  void write_query_tile(int64_t b, int64_t g_head, int64_t tile, const float* from,
                        const float* factors) const {
    const int64_t q_block = tile % shape.n_q_blocks, rest = tile / shape.n_q_blocks;
    store_rows(q_gradient(rest / shape.group), p.dtype, b,
               g_head * shape.group + rest % shape.group, query_of(q_block), rows_of_block(q_block),
               p.D, from, shape.dim, factors);
  }
  // writes dk, dv, dkr of a key block; factors: of dkr. dk gathered queries in units of log2.
  void write_column(int64_t b, int64_t g_head, int64_t k_block, const float* column,
                    const float* factors) const {
    const int64_t key = k_block * kBlock, keys = p.S - key < kBlock ? p.S - key : kBlock;
    float natural[kBlock];
    for (float& factor : natural) factor = 1.0f / kLog2e;
    for (int64_t t = 0; t < column_tiles(); ++t) {
      const bool is_k = t < p.n_k, is_v = !is_k && t < p.n_k + p.n_v;
      const View& view = is_k ? g.dk[t] : is_v ? g.dv[t - p.n_k] : g.dkr;
      store_rows(view, p.dtype, b, g_head, key, keys, p.D, column + t * tile_floats(), shape.dim,
                 is_k   ? natural
                 : is_v ? nullptr
                        : factors);
    }
  }
};

}  // namespace lcattn::cpu::LCATTN_ISA
