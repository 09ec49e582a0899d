#include "barrier.h"

#include "launch.h"
#include "scheduler.h"

namespace emulation {

namespace {

uint32_t whole_count(const Block& block) { return block.warp_count * kLanes; }

Barrier& arrive(Thread& thread, uint32_t number, uint32_t count, uint32_t site) {
  Block& block = *thread.warp->block;
  if (number >= kNamedBarriers) fail(thread, site, "barrier %u, but there are 16", number);
  if (count % kLanes) {
    fail(thread, site, "barrier %u for %u threads, which is no multiple of the warp size", number,
         count);
  }
  const uint32_t expected = count ? count : whole_count(block);
  if (expected > whole_count(block)) {
    fail(thread, site, "barrier %u for %u threads, but the block has %u", number, expected,
         block.thread_count);
  }
  Barrier& barrier = block.barriers[number];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.site = site;
  } else if (barrier.expected != expected) {
    fail(thread, site, "barrier %u for %u threads, but others wait at it for %u, at %s", number,
         expected, barrier.expected, describe_site(barrier.site).c_str());
  }
  ++barrier.arrived;
  // it counts warps, so the block's last thread arrives for the lanes that its warp lacks as well
  if (thread.index + 1 == block.thread_count) {
    barrier.arrived += whole_count(block) - block.thread_count;
  }
  thread.site = site;
  thread.barrier = number;
  ++block.progress;
  return barrier;
}

void check_aligned(const Barrier& barrier) {
  // lanes of a warp stand next to each other only after sorting, so compare with the warp's first
  uint32_t first_site[kMaxWarps], lanes[kMaxWarps] = {};
  bool aligned[kMaxWarps] = {};
  for (const Thread* thread : barrier.waiting) aligned[thread->warp->index] |= thread->aligned;
  for (const Thread* thread : barrier.waiting) {
    const uint32_t warp = thread->warp->index;
    if (lanes[warp]++ == 0) first_site[warp] = thread->site;
    if (aligned[warp] && first_site[warp] != thread->site) {
      fail(*thread, thread->site,
           "divergent barrier: lanes of the warp wait at different instructions, also at %s",
           describe_site(first_site[warp]).c_str());
    }
  }
  for (const Thread* thread : barrier.waiting) {
    const Warp& warp = *thread->warp;
    if (aligned[warp.index] && lanes[warp.index] != uint32_t(__builtin_popcount(warp.present))) {
      fail(*thread, thread->site, "divergent barrier: %u of %d lanes of the warp are at it",
           lanes[warp.index], __builtin_popcount(warp.present));
    }
  }
}

// barrier 0 for the whole block is __syncthreads(), which all threads must reach at the same line
void check_same_line(const Barrier& barrier, uint32_t number, bool whole_block) {
  if (number != 0 || !whole_block || !launched().options.check) return;
  const Site* sites = launched().module->sites;
  for (const Thread* thread : barrier.waiting) {
    if (std::string(sites[thread->site].where) != sites[barrier.waiting.front()->site].where) {
      fail(*thread, thread->site, "divergent barrier: other threads wait at %s",
           sites[barrier.waiting.front()->site].where);
    }
  }
}

void complete(Barrier& barrier, uint32_t number) {
  const Block& block = *barrier.waiting.front()->warp->block;
  check_aligned(barrier);
  check_same_line(barrier, number, barrier.expected == whole_count(block));
  if (launched().options.check) {
    join(barrier.waiting);
    if (barrier.contributed) {
      const std::shared_ptr<const Clock> clock = std::move(barrier.contributed);
      for (Thread* thread : barrier.waiting) take(clock, *thread);
    }
  }
  barrier.last_waiting = uint32_t(barrier.waiting.size());
  barrier.last_set = barrier.set;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
  barrier.arrived = barrier.set = 0;
}

void arrive_without_waiting(Thread& thread, uint32_t number, uint32_t count, uint32_t site) {
  Barrier& barrier = arrive(thread, number, count, site);
  if (launched().options.check) {
    if (!barrier.contributed) barrier.contributed = std::make_unique<Clock>();
    contribute(*barrier.contributed, thread);
  }
  if (barrier.arrived < barrier.expected) return;
  if (!barrier.waiting.empty()) return complete(barrier, number);
  barrier.contributed = nullptr;
  barrier.arrived = barrier.set = 0;
}

enum ArriveOperand { kNumber, kCount };

void run_arrive(Warp& warp, uint32_t lanes) {
  for (; lanes; lanes &= lanes - 1) {
    const uint32_t lane = uint32_t(__builtin_ctz(lanes));
    Thread& thread = warp.threads[lane];
    arrive_without_waiting(thread, warp.in[kNumber][lane], warp.in[kCount][lane], thread.site);
  }
}

}  // namespace

BarrierCount barrier_count(Thread& thread, uint32_t number, uint32_t count, bool predicate,
                           bool aligned, uint32_t site) {
  Barrier& barrier = arrive(thread, number, count, site);
  barrier.set += predicate;
  barrier.waiting.push_back(&thread);
  thread.state = State::kAtBarrier;
  thread.aligned = aligned;
  thread.warp->ready &= ~(1u << thread.lane);
  if (barrier.arrived >= barrier.expected) {
    complete(barrier, number);
    // this thread goes on at once, so that its turn is not the order of arrival's
    thread.warp->turn &= ~(1u << thread.lane);
  } else {
    switch_away(thread);
  }
  return {barrier.last_set, barrier.last_waiting};
}

void barrier_sync(Thread& thread, uint32_t number, uint32_t count, bool aligned, uint32_t site) {
  barrier_count(thread, number, count, false, aligned, site);
}

void barrier_arrive(Thread& thread, uint32_t number, uint32_t count, bool aligned, uint32_t site) {
  if (!count) fail(thread, site, "bar.arrive needs a count of threads");
  if (!aligned) return arrive_without_waiting(thread, number, count, site);
  thread.warp->in[kNumber][thread.lane] = number;
  thread.warp->in[kCount][thread.lane] = count;
  rendezvous(thread, ~0u, run_arrive, site, site);
}

}  // namespace emulation
