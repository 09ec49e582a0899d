// Few queries against many keys: see decode.cpp.
#pragma once

#include "../common/problem.h"

namespace lcattn::cpu::LCATTN_ISA {

// query rows of all heads of one kv head, at most
constexpr int64_t kDecodeRows = 16;

// the backward sums scores as the tiles do, so what it follows must be computed by tiles
inline bool decodes(const Problem& p) {
  return p.T * (p.H / p.G) <= kDecodeRows && p.lse_rest == nullptr;
}

void decode(const Problem& p, const Parallel& parallel);

}  // namespace lcattn::cpu::LCATTN_ISA
