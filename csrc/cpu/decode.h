// Few queries against many keys: see decode.cpp.
#pragma once

#include "kernels.h"

namespace lcattn::cpu::LCATTN_ISA {

void decode(const Problem& p, const Parallel& parallel);

}  // namespace lcattn::cpu::LCATTN_ISA
