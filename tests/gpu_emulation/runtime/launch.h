// the launch that is running, and how it ends in an error
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "thread.h"

namespace emulation {

struct Options {
  // 0 forward, 1 reverse, otherwise a seed
  uint64_t order;
  bool check, truncating_mma, allow_unordered, allow_equal_writes;
};

struct Launch {
  const Module* module;
  const char* parameters;
  Options options;
  Dim3 grid, block;
  uint32_t dynamic_shared_bytes;
  // the serial number of its first block; accesses of earlier ones are ordered before all of this
  // launch's
  uint32_t first_block;
};

const Launch& launched();

// with red zones
size_t shared_bytes(const Launch& launch);

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ends the launch from within a fiber; the message is printf's
[[noreturn]] void fail(const Thread& thread, uint32_t site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

std::string describe_site(uint32_t site);

}  // namespace emulation
