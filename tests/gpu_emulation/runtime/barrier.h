// barriers of a block, by number, among all of its threads or a count of them
#pragma once
#include "thread.h"

namespace emulation {

struct BarrierCount {
  uint32_t set, waiting;
};

// a count of 0 means all threads of the block
void barrier_sync(Thread& thread, uint32_t number, uint32_t count, bool aligned, uint32_t site);
void barrier_arrive(Thread& thread, uint32_t number, uint32_t count, bool aligned, uint32_t site);
BarrierCount barrier_count(Thread& thread, uint32_t number, uint32_t count, bool predicate,
                           bool aligned, uint32_t site);

}  // namespace emulation
