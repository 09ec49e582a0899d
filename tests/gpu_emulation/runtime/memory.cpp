#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "clock.h"
#include "launch.h"

namespace emulation {

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kGuard = size_t{1} << 20;
constexpr size_t kSharedWindow = size_t{1} << 32;
// what any GPU gives a block, with room for red zones
constexpr size_t kMaxShared = 1 << 20;
// swizzled layouts assume that dynamic shared memory begins at a multiple of this
constexpr size_t kSharedAlignment = 1024;

std::map<uint64_t, Region*> regions;
Region shared;
char* shared_window;
// the last region that was found
Region* found_region;

size_t round_up(size_t bytes, size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

char* reserve(size_t bytes) {
  void* address =
      mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) throw Error("cannot reserve " + std::to_string(bytes) + " bytes");
  return static_cast<char*>(address);
}

void open(char* address, size_t bytes) {
  if (bytes && mprotect(address, bytes, PROT_READ | PROT_WRITE) != 0) {
    throw Error("cannot allocate " + std::to_string(bytes) + " bytes");
  }
}

}  // namespace

Region* allocate(size_t bytes) {
  // allocations of the driver are aligned to 256 bytes; the rest of the last 256 is checked by
  // shadow alone
  constexpr size_t kAlignment = 256;
  const size_t used = round_up(std::max<size_t>(bytes, 1), kAlignment);
  const size_t opened = round_up(used, kPage);
  auto* region = new Region{};
  region->mapped_bytes = opened + 2 * kGuard;
  region->mapped = reserve(region->mapped_bytes);
  open(region->mapped + kGuard, opened);
  region->begin = region->mapped + kGuard + opened - used;
  region->bytes = bytes;
  memset(region->begin, 0xff, used);
  region->shadow.resize(bytes);
  regions[reinterpret_cast<uint64_t>(region->mapped)] = region;
  return region;
}

void retire(Region* region) {
  regions.erase(reinterpret_cast<uint64_t>(region->mapped));
  found_region = nullptr;
  delete region;
}

void unmap(char* mapped, size_t bytes) { munmap(mapped, bytes); }

void register_variable(const char* name, char* address, size_t bytes, bool read_only) {
  const auto key = reinterpret_cast<uint64_t>(address);
  if (regions.contains(key)) return;
  auto* region = new Region{};
  region->begin = region->mapped = address;
  region->bytes = region->mapped_bytes = bytes;
  region->is_read_only = read_only;
  region->label = name;
  region->shadow.resize(bytes);
  region->shadow.mark_written(0, bytes);
  regions[key] = region;
}

Region* find_region(uint64_t address) {
  const auto contains = [&](const Region* region) {
    return address - reinterpret_cast<uint64_t>(region->mapped) < region->mapped_bytes;
  };
  if (found_region && contains(found_region)) return found_region;
  const auto next = regions.upper_bound(address);
  if (next == regions.begin() || !contains(std::prev(next)->second)) return nullptr;
  return found_region = std::prev(next)->second;
}

Region& shared_region() { return shared; }

char* shared_memory(size_t bytes) {
  if (bytes > kMaxShared) {
    throw Error("shared memory with its red zones is " + std::to_string(bytes) +
                " bytes, more than " + std::to_string(kMaxShared));
  }
  if (!shared_window) {
    shared_window = reserve(kGuard + kMaxShared + kSharedWindow + kGuard);
    open(shared_window + kGuard, kMaxShared);
    shared.is_shared = true;
    shared.mapped = shared_window;
    shared.mapped_bytes = kGuard + kMaxShared + kSharedWindow + kGuard;
  }
  // what follows is not accessible
  return shared_window + kGuard + kMaxShared - round_up(bytes, kSharedAlignment);
}

void begin_shared(char* address, size_t bytes) {
  memset(address, 0xff, round_up(bytes, kSharedAlignment));
  if (!launched().options.check) return;
  shared.begin = address;
  shared.bytes = bytes;
  shared.shadow.reset(bytes);
  const Module& module = *launched().module;
  for (uint32_t i = 0; i < module.red_zone_count; ++i) {
    shared.shadow.disown(module.red_zones[i].begin, module.red_zones[i].end);
  }
  forget_releases_between(reinterpret_cast<uint64_t>(address),
                          reinterpret_cast<uint64_t>(address) + bytes);
}

bool is_in_shared_window(uint64_t address) {
  return address - reinterpret_cast<uint64_t>(shared.mapped) < shared.mapped_bytes;
}

}  // namespace emulation
