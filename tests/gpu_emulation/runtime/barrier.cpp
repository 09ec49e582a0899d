#include "barrier.h"

#include "launch.h"
#include "scheduler.h"

namespace emulation {

namespace {

Barrier& arrive(Thread& thread, uint32_t number, uint32_t count, uint32_t site) {
  Block& block = *thread.warp->block;
  if (number >= kNamedBarriers) fail(thread, site, "barrier %u, but there are 16", number);
  if (count % kLanes) {
    fail(thread, site, "barrier %u for %u threads, which is no multiple of the warp size", number,
         count);
  }
  const uint32_t expected = count ? count : block.thread_count;
  if (expected > block.thread_count) {
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
  thread.site = site;
  thread.barrier = number;
  ++block.progress;
  return barrier;
}

void check_aligned(const Barrier& barrier, bool aligned) {
  if (!aligned) return;
  // lanes of a warp stand next to each other only after sorting, so compare with the warp's first
  uint32_t first_site[kMaxWarps], lanes[kMaxWarps] = {};
  for (const Thread* thread : barrier.waiting) {
    const uint32_t warp = thread->warp->index;
    if (lanes[warp]++ == 0) first_site[warp] = thread->site;
    if (first_site[warp] != thread->site) {
      fail(*thread, thread->site,
           "divergent barrier: lanes of the warp wait at different instructions, also at %s",
           describe_site(first_site[warp]).c_str());
    }
  }
  for (const Thread* thread : barrier.waiting) {
    const Warp& warp = *thread->warp;
    if (lanes[warp.index] != uint32_t(__builtin_popcount(warp.present))) {
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

void complete(Barrier& barrier, uint32_t number, bool aligned) {
  const uint32_t threads = barrier.waiting.front()->warp->block->thread_count;
  check_aligned(barrier, aligned);
  check_same_line(barrier, number, barrier.expected == threads);
  if (launched().options.check) {
    join(barrier.waiting);
    if (barrier.contributed) {
      const std::shared_ptr<const Clock> clock = std::move(barrier.contributed);
      for (Thread* thread : barrier.waiting) take(clock, *thread);
    }
  }
  barrier.last_arrived = barrier.arrived;
  barrier.last_set = barrier.set;
  for (Thread* thread : barrier.waiting) wake(*thread);
  barrier.waiting.clear();
  barrier.arrived = barrier.set = 0;
}

}  // namespace

BarrierCount barrier_count(Thread& thread, uint32_t number, uint32_t count, bool predicate,
                           bool aligned, uint32_t site) {
  Barrier& barrier = arrive(thread, number, count, site);
  barrier.set += predicate;
  barrier.waiting.push_back(&thread);
  thread.state = State::kAtBarrier;
  thread.warp->ready &= ~(1u << thread.lane);
  if (barrier.arrived == barrier.expected) {
    complete(barrier, number, aligned);
    // this thread goes on at once, so that its turn is not the order of arrival's
    thread.warp->turn &= ~(1u << thread.lane);
  } else {
    switch_away(thread);
  }
  return {barrier.last_set, barrier.last_arrived};
}

void barrier_sync(Thread& thread, uint32_t number, uint32_t count, bool aligned, uint32_t site) {
  barrier_count(thread, number, count, false, aligned, site);
}

void barrier_arrive(Thread& thread, uint32_t number, uint32_t count, bool aligned, uint32_t site) {
  if (!count) fail(thread, site, "bar.arrive needs a count of threads");
  Barrier& barrier = arrive(thread, number, count, site);
  if (aligned) {
    ++thread.arrivals;
    thread.arrival_hash = (thread.arrival_hash ^ (site << 4 | number)) * 16777619u;
    thread.last_arrival = site;
  }
  if (launched().options.check) {
    if (!barrier.contributed) barrier.contributed = std::make_unique<Clock>();
    contribute(*barrier.contributed, thread);
  }
  if (barrier.arrived < barrier.expected) return;
  if (barrier.waiting.empty()) {
    barrier.contributed = nullptr;
    barrier.arrived = barrier.set = 0;
    return;
  }
  complete(barrier, number, aligned);
}

void check_arrivals(const Warp& warp) {
  if (warp.exited != warp.present) return;
  const Thread& first = warp.threads[0];
  for (uint32_t lane = 1; lane < kLanes && warp.present >> lane & 1; ++lane) {
    const Thread& thread = warp.threads[lane];
    if (thread.arrivals == first.arrivals && thread.arrival_hash == first.arrival_hash) continue;
    fail(thread, (thread.arrivals < first.arrivals ? first : thread).last_arrival,
         "divergent bar.arrive: the lane executed %u of them, lane 0 of its warp %u, not the same",
         thread.arrivals, first.arrivals);
  }
}

}  // namespace emulation
