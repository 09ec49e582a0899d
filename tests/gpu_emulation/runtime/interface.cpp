// the C interface that Python calls
#include <sys/mman.h>

#include <algorithm>
#include <csignal>
#include <cstring>

#include "device_memory.h"
#include "memory.h"
#include "run_launch.h"
#include "traffic.h"

namespace emulation {

namespace {

constexpr size_t kPage = 4096;
// for the runtime's functions, which run on the fibers
constexpr size_t kRuntimeStack = 64 << 10;

std::string message;
uint32_t serial = 1;

void on_invalid_address(int, siginfo_t* info, void*) {
  Thread* thread = running_thread();
  if (!thread) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  // the kernel does not tell which address it was if it is not a canonical one
  if (info->si_code == SI_KERNEL) fail(*thread, current_site, "out of bounds: invalid address");
  fail(*thread, current_site, "out of bounds: invalid address %p", info->si_addr);
}

// turns invalid addresses into errors for as long as it lives
class Signals {
 public:
  Signals() {
    static char stack[64 << 10];
    stack_t own{};
    own.ss_sp = stack;
    own.ss_size = sizeof stack;
    sigaltstack(&own, &saved_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_invalid_address;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &saved_segv_);
    sigaction(SIGBUS, &action, &saved_bus_);
  }
  ~Signals() {
    sigaction(SIGSEGV, &saved_segv_, nullptr);
    sigaction(SIGBUS, &saved_bus_, nullptr);
    sigaltstack(&saved_stack_, nullptr);
  }

 private:
  stack_t saved_stack_{};
  struct sigaction saved_segv_{}, saved_bus_{};
};

class Stacks {
 public:
  void provide(uint32_t count, size_t bytes) {
    if (count <= count_ && bytes <= bytes_) return;
    if (stacks_) munmap(stacks_, count_ * bytes_);
    count_ = std::max(count, count_);
    bytes_ = std::max(bytes, bytes_);
    void* mapped = mmap(nullptr, count_ * bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw Error("cannot allocate the threads' stacks");
    stacks_ = static_cast<char*>(mapped);
    // overflow hits a page that is not accessible
    for (uint32_t i = 0; i < count_; ++i) mprotect(stacks_ + i * bytes_, kPage, PROT_NONE);
  }
  char* begin() const { return stacks_; }
  size_t bytes() const { return bytes_; }

 private:
  char* stacks_ = nullptr;
  uint32_t count_ = 0;
  size_t bytes_ = 0;
};

void check_size(const Launch& launch) {
  const Dim3 block = launch.block, grid = launch.grid;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads) {
    throw Error("a block of " + std::to_string(threads) + " threads; 1 to 1024 are possible");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw Error("a grid of (" + std::to_string(grid.x) + "," + std::to_string(grid.y) + "," +
                std::to_string(grid.z) + ") blocks; y and z are from 1 to 65535");
  }
  const Module& module = *launch.module;
  const uint64_t shared = uint64_t{module.static_shared_bytes} + launch.dynamic_shared_bytes;
  if (shared > module.most_shared_bytes) {
    throw Error("the launch needs " + std::to_string(shared) +
                " bytes of shared memory, more than the " +
                std::to_string(module.most_shared_bytes) + " of " + module.target);
  }
}

void run(Launch launch) {
  static Stacks stacks;
  const Module& module = *launch.module;
  char* shared;
  try {
    check_size(launch);
    shared = shared_memory(shared_bytes(launch));
    const size_t stack_bytes = (kRuntimeStack + 2 * module.stack_bytes + kPage - 1) / kPage * kPage;
    stacks.provide(launch.block.x * launch.block.y * launch.block.z, stack_bytes);
  } catch (const Error& error) {
    throw Error(std::string(module.name) + ": " + error.what());
  }
  for (uint32_t i = 0; i < module.variable_count; ++i) {
    const Variable& variable = module.variables[i];
    register_variable(variable.name, variable.address, variable.bytes, variable.read_only);
  }
  memset(module.block_counts, 0, module.block_count * sizeof(uint64_t));
  reset_traffic(module.site_count);
  forget_releases();
  launch.first_block = serial;
  const Signals signals;
  run_grid(launch, shared, stacks.begin(), stacks.bytes(), serial);
}

}  // namespace

}  // namespace emulation

using namespace emulation;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void* gpu_emulation_allocate(size_t bytes, char** begin, char** mapped,
                                    size_t* mapped_bytes) {
  try {
    Region* region = allocate(bytes);
    *begin = region->begin;
    *mapped = region->mapped;
    *mapped_bytes = region->mapped_bytes;
    return region;
  } catch (const Error& error) {
    message = error.what();
    return nullptr;
  }
}

EXPORT void gpu_emulation_retire(void* region) { retire(static_cast<Region*>(region)); }

EXPORT void gpu_emulation_unmap(char* mapped, size_t bytes) { unmap(mapped, bytes); }

EXPORT void gpu_emulation_label(void* region, const char* label) {
  static_cast<Region*>(region)->label = label;
}

// one byte of the region's state for each of its bytes, as in ByteState
EXPORT void gpu_emulation_set_state(void* region, const uint8_t* state) {
  Region& of = *static_cast<Region*>(region);
  memcpy(of.shadow.state.data(), state, of.bytes);
}

EXPORT void gpu_emulation_get_state(void* region, uint8_t* state) {
  const Region& of = *static_cast<Region*>(region);
  memcpy(state, of.shadow.state.data(), of.bytes);
}

EXPORT const char* gpu_emulation_launch(const Module* module, const char* parameters,
                                        const uint32_t* grid, const uint32_t* block,
                                        uint32_t dynamic_shared_bytes, uint64_t order, bool check,
                                        bool truncating_mma, bool allow_unordered,
                                        bool allow_equal_writes) {
  try {
    run({module,
         parameters,
         {order, check, truncating_mma, allow_unordered, allow_equal_writes},
         {grid[0], grid[1], grid[2]},
         {block[0], block[1], block[2]},
         dynamic_shared_bytes,
         0});
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

EXPORT const char* gpu_emulation_message() { return message.c_str(); }

EXPORT uint32_t gpu_emulation_traffic(Traffic* into, uint32_t capacity) {
  uint32_t count = 0;
  for (const Traffic& entry : traffic()) {
    if (entry.requests && count < capacity) into[count++] = entry;
  }
  return count;
}
