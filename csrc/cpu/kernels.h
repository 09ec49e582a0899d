// What one instruction set offers, and the choice among them.
//
// forward.cpp, backward.cpp, decode.cpp, turn.cpp are compiled once per instruction set, each time
// with LCATTN_ISA naming the namespace, so that no function compiled for one processor is ever
// linked into another's path.
#pragma once

#include <span>

#include "../common/problem.h"

namespace lcattn::cpu {

// decode.cpp takes so many queries at most, or so many rows of those of all heads of a kv head;
// beyond, tiles of 64 rows are faster even if mostly empty
constexpr int64_t kDecodeQueries = 8, kDecodeRows = 16;

// the backward sums scores as the tiles do, so what it follows must be computed by tiles
inline bool decodes(const Problem& p) {
  const bool few = p.T <= kDecodeQueries || p.T * (p.H / p.G) <= kDecodeRows;
  return few && p.lse_rest == nullptr;
}

// Rotary turning: out[b, h, r] = x[b, h, r] with feature d < pairs turned with feature d + pairs by
// row at[b * at_batch_stride + r] of a table, or back by it; -1 leaves a row as it is.
struct Turn {
  View x, out;  // [B, heads, n, D], dtype
  DType dtype = DType::kFloat32;
  int64_t B = 0, heads = 0, n = 0, D = 0;
  const float* table = nullptr;  // [rows, 2 pairs], cos then sin
  int64_t pairs = 0;
  const int32_t* at = nullptr;  // [B or 1, n]
  int64_t at_batch_stride = 0;
  bool back = false;
};

struct Kernels {
  const char* isa;
  bool (*supported)();
  void (*forward)(const Problem&, const Parallel&);
  void (*backward)(const Problem&, const Gradients&, const Parallel&);
  void (*turn)(const Turn&, const Parallel&);
};

extern const Kernels kAvx512, kAvx2, kPortable;

// the tables in this build, fastest first
std::span<const Kernels* const> compiled();

// test hook, see scratch.h
extern bool poison_scratch;

}  // namespace lcattn::cpu
