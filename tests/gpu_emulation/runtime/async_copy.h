// cp.async: the destination is NaN, and to be left alone, until the thread waits for the copy's
// group
#pragma once
#include "thread.h"

namespace emulation {

// copies `copied` bytes and fills with zeros up to `bytes`
void async_copy(Thread& thread, uint64_t destination, uint64_t source, uint32_t bytes,
                uint32_t copied, uint32_t site);
void async_commit(Thread& thread);
// until at most `groups` of the latest groups are in flight
void async_wait(Thread& thread, uint32_t groups, uint32_t site);
void async_wait_all(Thread& thread, uint32_t site);

}  // namespace emulation
