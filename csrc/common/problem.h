// The plain data that every kernel reads: what lcattn/problem.py lowers a call to.
//
// Kernels know no semantics. For batch b, query head h, kv head g = h / (H / G), query i, key j,
// phase f:
//
//   o     = k_pos[f, b, j] - q_pos[f, b, i]
//   score = scale * (q_f[i] . k_f[j] + qr[i] . rel_key[clamp(o)] + kr[j] . rel_query[clamp(o)])
//         + bias[f, h, clamp(o)] + slope[h] * |o|
//   score = softcap * tanh(score / softcap)                         if softcap > 0
//   p     = exp(score - lse[i]) for visible (i, j), 0 otherwise
//   out_i = sum_j drop(p_ij) v_f[j],   lse_i = log(exp(sink_h) + sum_j exp(score_ij))
//
// A row that sees nothing gives out = 0 and lse = sink_h, or -inf without a sink.
#pragma once

#include <cstdint>

namespace lcattn {

// rows and columns of a block of the table, on every backend that uses this header
constexpr int kBlock = 64;
constexpr int kMaxPhases = 5;
constexpr int kMaxHeadDim = 256;

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// a [B, heads, rows, D] tensor; strides in elements, any value (an expanded dimension has stride 0)
struct View {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, dim = 1;
};

// One direction of the block table. Row r of (b, h) has, for phase f, the full runs
// entries[seg_ptr[2f] .. seg_ptr[2f+1]) as (first block, number of blocks), no mask at all, then
// the tiled entries [seg_ptr[2f+1] .. seg_ptr[2f+2]) as (block, tile).
struct BlockTable {
  const int32_t* seg_ptr = nullptr;  // [Bt, Ht, n_rows, 2 P + 1], indices into entries
  const int32_t* entries = nullptr;  // [n_entries, 2]
  int64_t n_rows = 0;                // blocks in this direction
  int64_t batch = 1, heads = 1;      // Bt in {1, B}; Ht in {1, G, H}

  constexpr const int32_t* row(int64_t b, int64_t h, int64_t H, int64_t r, int64_t P) const {
    const int64_t bt = batch == 1 ? 0 : b, ht = h / (H / heads);
    return seg_ptr + ((bt * heads + ht) * n_rows + r) * (2 * P + 1);
  }
};

// a learned table indexed by clamp(o): entry c is for offset min_offset + c
struct OffsetTable {
  const float* data = nullptr;  // null: the term is absent
  int64_t phase_stride = 0;     // 0 when shared by all phases
  int64_t head_stride = 0;      // 0 when shared by all heads
  int64_t length = 0,
          min_offset = 0;  // L, lo; bias rows hold 1 float, rel_key and rel_query rows D
};

struct Problem {
  int64_t B = 0, H = 0, G = 0, T = 0, S = 0, D = 0, P = 1;
  DType dtype = DType::kFloat32;

  // distinct tensors, and which of them each phase uses
  View q[kMaxPhases], k[kMaxPhases], v[kMaxPhases];
  int32_t n_q = 1, n_k = 1, n_v = 1;
  int32_t q_of[kMaxPhases] = {}, k_of[kMaxPhases] = {}, v_of[kMaxPhases] = {};

  // Query i stands in row row_start + i of the table. The table may be larger than the problem:
  // blocks at or beyond S (or outside the T query rows, in the transposed one) are skipped, and the
  // last block is cut at S by the kernel, whatever its bits say.
  int64_t row_start = 0;
  BlockTable by_query;  // rows are query blocks, entries name key blocks
  BlockTable by_key;    // rows are key blocks, entries name query blocks
  const int32_t* mask_tiles =
      nullptr;  // [n_tiles, kBlock, kBlock / 32], bit j % 32 of word [i][j / 32]
  const int32_t* key_bits = nullptr;  // [B, ceil(S / 32)] or null, anded into visibility

  // coordinates; null means k_pos = j and q_pos = row_start + i
  const int32_t* q_pos = nullptr;  // [P or 1, B or 1, T]
  const int32_t* k_pos = nullptr;  // [P or 1, B or 1, S]
  int64_t q_pos_phase_stride = 0, q_pos_batch_stride = 0;
  int64_t k_pos_phase_stride = 0, k_pos_batch_stride = 0;

  // Keys still to be turned (rotary positions), where decoding reads them; elsewhere they must have
  // been. The row of the table for key j of tensor k[n], or -1: turn_at[n][b * turn_batch_stride +
  // j].
  const float* turn_table = nullptr;  // [n_turns, 2 turn_pairs], cos then sin; null: none
  int64_t turn_pairs = 0;             // feature d turns with feature d + turn_pairs
  const int32_t* turn_at[kMaxPhases] = {};
  int64_t turn_batch_stride = 0;

  float scale = 1.0f;
  float softcap = 0.0f;            // 0: none
  OffsetTable bias;                // [P or 1, H or 1, L]
  const float* slope = nullptr;    // [H] or null
  OffsetTable rel_key, rel_query;  // [H or 1, L, D]
  View qr;                         // [B, H, T, D], dtype; used with rel_key
  View kr;                         // [B, G, S, D], dtype; used with rel_query
  const float* sink = nullptr;     // [H] or null

  // Philox 4x32-10: key = (seed low, seed high), counter (j >> 2, i, h, b), word j & 3;
  // keep iff word >= floor(dropout * 2^32); kept values times 1 / (1 - dropout)
  float dropout = 0.0f;
  uint64_t seed = 0;

  View out;              // [B, H, T, D], dtype
  float* lse = nullptr;  // [B, H, T], natural log
  // [B, H, T], what rounding took from lse, so that the backward's p sums to one for large scores
  // too; null where no backward follows, and scores may then be summed in any order
  float* lse_rest = nullptr;
};

// Gradients. With delta_i = sum_d dout_i out_i - dlse_i:  ds_ij = p_ij (drop'(dout_i . v_j) -
// delta_i)
struct Gradients {
  View dout;                    // [B, H, T, D], dtype
  const float* dlse = nullptr;  // [B, H, T] or null
  // written whole; one view per distinct tensor, as in Problem; dtype
  View dq[kMaxPhases], dk[kMaxPhases], dv[kMaxPhases];
  // float32, laid out as the tables themselves (contiguous); null: not wanted; written whole
  float* dbias = nullptr;       // [P or 1, H or 1, L]
  float* dslope = nullptr;      // [H]
  float* drel_key = nullptr;    // [H or 1, L, D]
  float* drel_query = nullptr;  // [H or 1, L, D]
  float* dsink = nullptr;       // [H]
  View dqr, dkr;                // as qr, kr; data null: not wanted
};

// How kernels reach threads: run task(i, context) for i in [0, n), on up to n_threads threads at
// once. With one task a thread or fewer, a task is the same thread's in every call.
struct Parallel {
  int n_threads = 1;
  void (*run)(int64_t n, void (*task)(int64_t index, void* context), void* context) = nullptr;
};

}  // namespace lcattn
