#include "clock.h"

#include <algorithm>
#include <unordered_map>

#include "launch.h"
#include "thread.h"

namespace emulation {

namespace {

std::unordered_map<uint64_t, std::shared_ptr<const Releases>> released_at;
// the same by block and location
std::map<std::pair<uint32_t, uint64_t>, std::shared_ptr<const Releases>> released_in_block_at;

void merge_times(Times& into, const Times& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

std::shared_ptr<const Releases> merged(const std::shared_ptr<const Releases>& first,
                                       const std::shared_ptr<const Releases>& second) {
  if (!first || first == second) return second;
  if (!second) return first;
  auto result = std::make_shared<Releases>(*first);
  for (const auto& [block, times] : *second) {
    auto& mine = (*result)[block];
    if (!mine) {
      mine = times;
    } else if (mine != times) {
      auto both = std::make_shared<Times>(*mine);
      merge_times(*both, *times);
      mine = both;
    }
  }
  return result;
}

void merge(Clock& into, const Clock& from) {
  merge_times(into.times, from.times);
  into.others = merged(into.others, from.others);
  into.fenced = merged(into.fenced, from.fenced);
  into.observed = merged(into.observed, from.observed);
}

// what a block's own threads released
std::shared_ptr<const Releases> part_of(uint32_t block,
                                        const std::shared_ptr<const Releases>& all) {
  if (!all) return nullptr;
  const auto own = all->find(block);
  if (own == all->end()) return nullptr;
  return std::make_shared<const Releases>(Releases{*own});
}

// what a thread hands on at a barrier besides its clock
void merge_own(Clock& into, const Thread& thread) {
  into.fenced = merged(into.fenced, thread.released);
  into.observed = merged(into.observed, thread.to_acquire);
}

void set_clock(Thread& thread, const std::shared_ptr<const Clock>& clock) {
  thread.clock = clock;
  thread.known = clock->times.data();
}

}  // namespace

void contribute(Clock& clock, Thread& thread) {
  clock.times.resize(thread.warp->block->thread_count, 0);
  if (thread.clock) merge(clock, *thread.clock);
  merge_own(clock, thread);
  clock.times[thread.index] = thread.epoch++;
}

void take(const std::shared_ptr<const Clock>& clock, Thread& thread) {
  if (!thread.clock || thread.clock == clock) return set_clock(thread, clock);
  auto both = std::make_shared<Clock>(*clock);
  merge(*both, *thread.clock);
  set_clock(thread, both);
}

void join(const std::vector<Thread*>& threads) {
  auto clock = std::make_shared<Clock>();
  clock->times.assign(threads.front()->warp->block->thread_count, 0);
  // threads that last met each other share their clock, which then is merged once
  const Clock* last = nullptr;
  for (const Thread* thread : threads) {
    merge_own(*clock, *thread);
    if (!thread->clock || thread->clock.get() == last) continue;
    last = thread->clock.get();
    merge(*clock, *last);
  }
  for (Thread* thread : threads) clock->times[thread->index] = thread->epoch++;
  for (Thread* thread : threads) set_clock(*thread, clock);
}

void release(Thread& thread, Scope scope) {
  auto times = std::make_shared<Times>();
  if (thread.clock) *times = thread.clock->times;
  times->resize(thread.warp->block->thread_count, 0);
  (*times)[thread.index] = thread.epoch++;
  auto own = std::make_shared<Releases>();
  (*own)[thread.warp->block->serial] = times;
  auto& released = scope == Scope::kBlock ? thread.released_in_block : thread.released;
  released = merged(own, thread.clock ? thread.clock->others : nullptr);
}

void acquire(Thread& thread, Scope scope) {
  const uint32_t block = thread.warp->block->serial;
  auto observed = merged(thread.to_acquire, thread.clock ? thread.clock->observed : nullptr);
  // what other blocks released stays to be acquired by a fence that reaches them
  if (scope == Scope::kBlock) observed = part_of(block, observed);
  observed = merged(observed, thread.to_acquire_in_block);
  if (!observed) return;
  auto clock = thread.clock ? std::make_shared<Clock>(*thread.clock) : std::make_shared<Clock>();
  clock->times.resize(thread.warp->block->thread_count, 0);
  if (const auto own = observed->find(block); own != observed->end()) {
    merge_times(clock->times, *own->second);
  }
  clock->others = merged(clock->others, observed);
  thread.to_acquire_in_block = nullptr;
  if (scope == Scope::kDevice) thread.to_acquire = nullptr;
  set_clock(thread, clock);
}

void strong_write(Thread& thread, uint64_t address, bool read_modify_write) {
  auto released = merged(thread.released, thread.clock ? thread.clock->fenced : nullptr);
  auto& record = released_at[address];
  // a read-modify-write continues the release sequence that it read
  record = read_modify_write ? merged(record, released) : released;
  const auto in_block = std::make_pair(thread.warp->block->serial, address);
  const auto found = released_in_block_at.find(in_block);
  if (found == released_in_block_at.end() && !thread.released_in_block) return;
  auto& narrow = released_in_block_at[in_block];
  narrow = read_modify_write ? merged(narrow, thread.released_in_block) : thread.released_in_block;
}

void strong_read(Thread& thread, uint64_t address) {
  if (auto record = released_at.find(address); record != released_at.end()) {
    thread.to_acquire = merged(thread.to_acquire, record->second);
  }
  const auto narrow = released_in_block_at.find({thread.warp->block->serial, address});
  if (narrow != released_in_block_at.end()) {
    thread.to_acquire_in_block = merged(thread.to_acquire_in_block, narrow->second);
  }
}

void forget_releases() {
  released_at.clear();
  released_in_block_at.clear();
}

void forget_releases_between(uint64_t begin, uint64_t end) {
  std::erase_if(released_at,
                [&](const auto& entry) { return entry.first >= begin && entry.first < end; });
  std::erase_if(released_in_block_at, [&](const auto& entry) {
    return entry.first.second >= begin && entry.first.second < end;
  });
}

bool is_ordered(const Thread& thread, uint32_t block, uint32_t other, uint32_t epoch) {
  if (block == thread.warp->block->serial) {
    return other == thread.index || (thread.known && thread.known[other] >= epoch);
  }
  if (block < launched().first_block) return true;
  if (!thread.clock || !thread.clock->others) return false;
  const auto found = thread.clock->others->find(block);
  return found != thread.clock->others->end() && (*found->second)[other] >= epoch;
}

}  // namespace emulation
