// threads, warps and blocks, and the description of a translated kernel
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "fiber.h"

namespace emulation {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxWarps = kMaxThreads / kLanes;
constexpr uint32_t kNamedBarriers = 16;
// the most registers that a lane hands to a collective, or takes from it
constexpr uint32_t kCollectiveRegisters = 12;

// a loop that goes round so often in a launch does not end
constexpr unsigned long long kEndless = 1'000'000'000;

struct Dim3 {
  uint32_t x, y, z;
};

// an instruction of the kernel: its source line and opcode, and its PTX
struct Site {
  const char* where;
  const char* ptx;
};

struct Variable {
  const char* name;
  char* address;
  uint32_t bytes;
  bool read_only;
};

// bytes of shared memory between arrays, which are none's
struct RedZone {
  uint32_t begin, end;
};

// what a translated kernel's library exports
struct Module {
  const char* name;
  const char* target;
  void (*run)(Thread& thread, const char* parameters);
  const Site* sites;
  uint32_t site_count;
  uint64_t* block_counts;
  uint32_t block_count;
  const Variable* variables;
  uint32_t variable_count;
  // without what red zones add, and what a block of the target may have at most with dynamic memory
  uint32_t static_shared_bytes, most_shared_bytes;
  const RedZone* red_zones;
  uint32_t red_zone_count, red_zone_bytes;
  uint32_t stack_bytes;
};

struct Warp;
struct Block;

enum class State : uint8_t { kReady, kAtCollective, kAtBarrier, kExited };

struct Collective {
  void (*run)(Warp& warp, uint32_t lanes);
  uint32_t mask;
  // what else lanes must have in common: the site, if they must be at the same instruction
  uint32_t key;
  bool operator==(const Collective&) const = default;
};

struct AsyncCopy {
  char* destination;
  const char* source;
  uint32_t bytes, copied, site;
  std::array<char, 16> data;
};

// how far an atomic operation, or a fence, reaches
enum class Scope { kBlock, kDevice };

struct LocalMemory {
  const char* address;
  uint32_t bytes;
  // for each byte, whether it was ever written
  std::vector<bool> written;
};

struct Thread {
  Dim3 tid, ntid, ctaid, nctaid;
  uint32_t index, lane;
  // the address that is zero in the shared state space
  char* shared;
  uint32_t dynamic_shared_bytes, total_shared_bytes;
  bool checking;
  Warp* warp;

  State state;
  Fiber fiber;
  Collective collective;
  uint32_t site;
  uint32_t barrier;
  // whether all lanes of its warp must wait there together
  bool aligned;

  uint32_t epoch;
  // the times of `clock`, or null
  const uint32_t* known;
  std::shared_ptr<const Clock> clock;
  std::shared_ptr<const Releases> released, to_acquire;
  // the same of fences and accesses that only the block's threads are ordered by
  std::shared_ptr<const Releases> released_in_block, to_acquire_in_block;

  // the copies of group i are those from group_ends[i - 1] to group_ends[i]; later ones are not
  // committed yet
  std::vector<AsyncCopy> copies;
  std::vector<size_t> group_ends;
  std::vector<LocalMemory> local;

  // what loads that may be a spin's saw last, by address, and how many have seen nothing new since
  std::unordered_map<uint64_t, uint64_t> seen;
  uint32_t spins;
};

// a set of lanes is a mask of 32 bits
struct Warp {
  Block* block;
  Thread* threads;
  uint32_t index, present;
  uint32_t ready, waiting, exited;
  // lanes that this turn has still to run
  uint32_t turn;
  // whether all that wait do so at `collective`
  bool uniform;
  Collective collective;
  // by register and lane
  alignas(64) uint32_t in[kCollectiveRegisters][kLanes];
  alignas(64) uint32_t out[kCollectiveRegisters][kLanes];
  uint64_t address[kLanes];
};

struct Barrier {
  uint32_t expected, arrived, set, site;
  // what threads found that waited, and those who wait
  uint32_t last_waiting, last_set;
  std::vector<Thread*> waiting;
  // of those who arrived without waiting
  std::unique_ptr<Clock> contributed;
};

struct Block {
  // counts the blocks of all launches
  uint32_t serial;
  Dim3 index;
  uint32_t thread_count, warp_count;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::array<Barrier, kNamedBarriers> barriers;
  uint32_t exited;
  // collectives, barriers and exits: what tells a spin from progress
  uint64_t progress;
  // of threads that spin, since there was progress
  uint32_t fruitless_yields;
};

}  // namespace emulation
