// finds races, and accesses to memory that is out of bounds, not written, or still being copied to
#pragma once
#include <cstdint>

#include "thread.h"

namespace emulation {

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kConst };

enum class Access : uint8_t {
  kRead,
  // promises that the launch does not write it
  kReadOnly,
  kWrite,
  kReadWrite,
  // an asynchronous copy's destination, when it is issued and when it has been waited for
  kCopyIssued,
  kCopyDone,
};

struct AccessKind {
  Access access;
  Space space = Space::kGeneric;
  // atomic or volatile
  bool is_strong = false;
  // strong to other threads of the block only
  bool is_block_scope = false;
  bool is_float_sum = false;
  // of a plain write, what it is to write
  const void* values = nullptr;
};

// ends the launch if the access is wrong
void check_access(Thread& thread, uint64_t address, uint32_t bytes, AccessKind kind, uint32_t site);

}  // namespace emulation
