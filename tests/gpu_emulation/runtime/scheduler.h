// runs blocks one after another, each warp's lanes one after another, switching where they must
// wait
#pragma once
#include "thread.h"

namespace emulation {

// waits until all lanes of `mask` that have not exited are at an instruction of the same `run` and
// `key`, and the last runs it; PTX lets lanes meet at different instructions if their opcodes are
// equal, unless those are .aligned
void rendezvous(Thread& thread, uint32_t mask, void (*run)(Warp&, uint32_t), uint32_t key,
                uint32_t site);

// to the next lane, or back to the block's loop; returns when this thread is ready and chosen
void switch_away(Thread& thread);

// lets other warps run
void yield(Thread& thread, uint32_t site);

// loads that may be a spin's yield if their addresses keep giving the same
void note_strong_load(Thread& thread, uint64_t address, uint64_t value, uint32_t site);

// makes a thread ready that waited at a barrier
void wake(Thread& thread);

uint32_t random_below(uint32_t bound);

}  // namespace emulation
