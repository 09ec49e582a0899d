#include "device_memory.h"

#include "memory.h"

namespace emulation {

volatile uint32_t current_site;

void fence(Thread& thread, Scope scope) {
  if (!thread.checking) return;
  acquire(thread, scope);
  release(thread, scope);
}

bool is_shared_address(uint64_t address) { return is_in_shared_window(address); }

bool is_in_space(const Thread& thread, uint64_t address, Space space) {
  if (is_in_shared_window(address)) return space == Space::kShared;
  for (const LocalMemory& local : thread.local) {
    const auto begin = reinterpret_cast<uint64_t>(local.address);
    if (address >= begin && address < begin + local.bytes) return space == Space::kLocal;
  }
  const Region* region = find_region(address);
  return region && space == (region->is_read_only ? Space::kConst : Space::kGlobal);
}

}  // namespace emulation
