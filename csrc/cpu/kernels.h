// What one instruction set offers, and the choice among them.
//
// forward.cpp, backward.cpp, decode.cpp are compiled once per instruction set, each time with
// LCATTN_ISA naming the namespace, so that no function compiled for one processor is ever linked
// into another's path.
#pragma once

#include <span>

#include "../common/problem.h"

namespace lcattn::cpu {

// query rows of all heads of one kv head that decode.cpp takes, at most
constexpr int64_t kDecodeRows = 16;

// the backward sums scores as the tiles do, so what it follows must be computed by tiles
inline bool decodes(const Problem& p) {
  return p.T * (p.H / p.G) <= kDecodeRows && p.lse_rest == nullptr;
}

struct Kernels {
  const char* isa;
  bool (*supported)();
  void (*forward)(const Problem&, const Parallel&);
  void (*backward)(const Problem&, const Gradients&, const Parallel&);
};

extern const Kernels kAvx512, kAvx2, kPortable;

// the tables in this build, fastest first
std::span<const Kernels* const> compiled();

// test hook, see scratch.h
extern bool poison_scratch;

}  // namespace lcattn::cpu
