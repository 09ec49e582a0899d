// the whole of a launch, from the host's side
#pragma once
#include <cstddef>
#include <cstdint>

#include "launch.h"

namespace emulation {

// throws Error; `serial` counts the blocks of all launches
void run_grid(const Launch& requested, char* shared, char* stacks, size_t stack_bytes,
              uint32_t& serial);

// null between fibers
Thread* running_thread();

}  // namespace emulation
