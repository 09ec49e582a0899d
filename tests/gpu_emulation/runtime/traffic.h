// how well warps' accesses suit the memory: passes over the banks of shared memory, 32-byte sectors
// of global memory
#pragma once
#include <cstdint>

#include "thread.h"

namespace emulation {

struct Traffic {
  uint32_t site;
  bool is_shared, is_write;
  // `passes` are those over the banks, or the sectors; `ideal` is the least that the bytes need
  uint64_t requests, passes, ideal;
};

// comes before the access, as other lanes may run first
void note_traffic(Thread& thread, uint32_t site, uint64_t address, uint32_t bytes, bool is_shared,
                  bool is_write);
// one request of a warp, as of ldmatrix, whose rows of 16 bytes are served eight at a time
void note_rows(uint32_t site, const uint64_t* rows, uint32_t count, bool is_write);
// counts what a warp's lanes accessed since they last met
void flush_traffic();
void reset_traffic(uint32_t sites);
const std::vector<Traffic>& traffic();

}  // namespace emulation
