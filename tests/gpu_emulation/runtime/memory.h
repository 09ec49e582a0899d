// device memory: regions between guard pages, and the shared memory of the running block
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "shadow.h"

namespace emulation {

struct Region {
  char* begin;
  size_t bytes;
  // with the guard pages
  char* mapped;
  size_t mapped_bytes;
  bool is_shared, is_read_only;
  std::string label;
  Shadow shadow;
};

// filled with 0xff, which is NaN in every type; ends at a guard page
Region* allocate(size_t bytes);
// the checker forgets it, and the host may still use it
void retire(Region* region);
void unmap(char* mapped, size_t bytes);
void register_variable(const char* name, char* address, size_t bytes, bool read_only);

// by an address in it or in its guard pages
Region* find_region(uint64_t address);

Region& shared_region();
char* shared_memory(size_t bytes);
void begin_shared(char* shared, size_t bytes);

// a shared address is an offset of 32 bits, all of which are reserved, so that none strays
// elsewhere
bool is_in_shared_window(uint64_t address);

}  // namespace emulation
