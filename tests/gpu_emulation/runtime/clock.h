// Vector clocks: which accesses of which threads happened before.
//
// Every thread counts epochs, and starts a new one where it releases: at barriers, __syncwarp and
// fences. An access is stamped with its thread's epoch, and is ordered before whatever a thread
// does that knows of that epoch.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace emulation {

struct Thread;
enum class Scope;

using Times = std::vector<uint32_t>;
// by block, the epochs of its threads that were released to a memory location
using Releases = std::map<uint32_t, std::shared_ptr<const Times>>;

struct Clock {
  // by thread of the block, the last epoch known
  Times times;
  // of other blocks, where they released and this block acquired
  std::shared_ptr<const Releases> others;
  // what threads had fenced before a barrier, which an atomic operation of any thread after it
  // releases
  std::shared_ptr<const Releases> fenced;
  // what atomic operations had read before a barrier, which a fence of any thread after it acquires
  std::shared_ptr<const Releases> observed;
};

// all threads know of each other's accesses so far, as after a barrier
void join(const std::vector<Thread*>& threads);

// for barriers at which some arrive without waiting
void contribute(Clock& clock, Thread& thread);
void take(const std::shared_ptr<const Clock>& clock, Thread& thread);

// the pattern of fences around an atomic or volatile access, PTX ISA, "Release and acquire
// patterns"; those of a block's scope order no other block's threads
void release(Thread& thread, Scope scope);
void acquire(Thread& thread, Scope scope);
void strong_write(Thread& thread, uint64_t address, bool read_modify_write);
void strong_read(Thread& thread, uint64_t address);
void forget_releases();
void forget_releases_between(uint64_t begin, uint64_t end);

// whether the running thread knows of an access
bool is_ordered(const Thread& thread, uint32_t block, uint32_t other, uint32_t epoch);

}  // namespace emulation
