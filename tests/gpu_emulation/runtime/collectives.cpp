#include "collectives.h"

#include "launch.h"

namespace emulation {

namespace {

template <class Function>
void for_each_lane(uint32_t lanes, Function&& function) {
  for (; lanes; lanes &= lanes - 1) function(uint32_t(__builtin_ctz(lanes)));
}

void run_sync(Warp& warp, uint32_t lanes) {
  if (!launched().options.check) return;
  std::vector<Thread*> threads;
  for_each_lane(lanes, [&](uint32_t lane) { threads.push_back(&warp.threads[lane]); });
  join(threads);
}

struct Target {
  uint32_t lane;
  bool in_range;
};

// PTX ISA, "shfl.sync"
Target shuffle_target(Shuffle mode, uint32_t lane, uint32_t position, uint32_t clamp) {
  const uint32_t segment = clamp >> 8 & 31, limit = clamp & 31, offset = position & 31;
  const uint32_t last = (lane & segment) | (limit & ~segment);
  const uint32_t first = lane & segment;
  uint32_t target = 0;
  bool in_range = false;
  switch (mode) {
    case Shuffle::kUp:
      target = lane - offset;
      in_range = int32_t(target) >= int32_t(last);
      break;
    case Shuffle::kDown:
      target = lane + offset;
      in_range = target <= last;
      break;
    case Shuffle::kBfly:
      target = lane ^ offset;
      in_range = target <= last;
      break;
    case Shuffle::kIdx:
      target = first | (offset & ~segment & 31);
      in_range = target <= last;
      break;
  }
  return in_range ? Target{target, true} : Target{lane, false};
}

enum ShuffleOperand { kValue, kMode, kPosition, kClamp };

void run_shuffle(Warp& warp, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t lane) {
    const Target target = shuffle_target(Shuffle(warp.in[kMode][lane]), lane,
                                         warp.in[kPosition][lane], warp.in[kClamp][lane]);
    if (!(lanes >> target.lane & 1)) {
      fail(warp.threads[lane], warp.threads[lane].site,
           "shuffle from lane %u, which is inactive (active lanes %08x)", target.lane, lanes);
    }
    warp.out[0][lane] = warp.in[kValue][target.lane];
    warp.out[1][lane] = target.in_range;
  });
}

void run_ballot(Warp& warp, uint32_t lanes) {
  uint32_t set = 0;
  for_each_lane(lanes, [&](uint32_t lane) { set |= warp.in[0][lane] << lane; });
  for_each_lane(lanes, [&](uint32_t lane) {
    warp.out[0][lane] = set;
    warp.out[1][lane] = lanes;
  });
}

uint64_t matched_value(const Warp& warp, uint32_t lane) {
  return uint64_t{warp.in[1][lane]} << 32 | warp.in[0][lane];
}

void run_match_any(Warp& warp, uint32_t lanes) {
  for_each_lane(lanes, [&](uint32_t lane) {
    warp.out[0][lane] = 0;
    for_each_lane(lanes, [&](uint32_t other) {
      if (matched_value(warp, lane) == matched_value(warp, other)) {
        warp.out[0][lane] |= 1u << other;
      }
    });
  });
}

void run_match_all(Warp& warp, uint32_t lanes) {
  const uint64_t value = matched_value(warp, uint32_t(__builtin_ctz(lanes)));
  bool all = true;
  for_each_lane(lanes, [&](uint32_t lane) { all &= matched_value(warp, lane) == value; });
  for_each_lane(lanes, [&](uint32_t lane) { warp.out[0][lane] = all ? lanes : 0; });
}

void run_elect(Warp& warp, uint32_t lanes) {
  const uint32_t leader = uint32_t(__builtin_ctz(lanes));
  for_each_lane(lanes, [&](uint32_t lane) { warp.out[0][lane] = leader; });
}

uint32_t match(Thread& thread, uint64_t value, uint32_t mask, void (*run)(Warp&, uint32_t),
               uint32_t site) {
  thread.warp->in[0][thread.lane] = uint32_t(value);
  thread.warp->in[1][thread.lane] = uint32_t(value >> 32);
  rendezvous(thread, mask, run, 0, site);
  return thread.warp->out[0][thread.lane];
}

}  // namespace

void sync_warp(Thread& thread, uint32_t mask, uint32_t site) {
  // diverged lanes may meet from different instructions here
  rendezvous(thread, mask, run_sync, 0, site);
}

ShuffleResult shuffle(Thread& thread, Shuffle mode, uint32_t value, uint32_t position,
                      uint32_t clamp, uint32_t mask, uint32_t site) {
  Warp& warp = *thread.warp;
  const uint32_t lane = thread.lane;
  warp.in[kValue][lane] = value;
  warp.in[kMode][lane] = uint32_t(mode);
  warp.in[kPosition][lane] = position;
  warp.in[kClamp][lane] = clamp;
  rendezvous(thread, mask, run_shuffle, uint32_t(mode), site);
  return {warp.out[0][lane], warp.out[1][lane] != 0};
}

Ballot ballot(Thread& thread, bool predicate, uint32_t mask, uint32_t site) {
  Warp& warp = *thread.warp;
  warp.in[0][thread.lane] = predicate;
  rendezvous(thread, mask, run_ballot, 0, site);
  return {warp.out[0][thread.lane], warp.out[1][thread.lane]};
}

uint32_t match_any(Thread& thread, uint64_t value, uint32_t mask, uint32_t site) {
  return match(thread, value, mask, run_match_any, site);
}

uint32_t match_all(Thread& thread, uint64_t value, uint32_t mask, uint32_t site) {
  return match(thread, value, mask, run_match_all, site);
}

uint32_t elect(Thread& thread, uint32_t mask, uint32_t site) {
  rendezvous(thread, mask, run_elect, 0, site);
  return thread.warp->out[0][thread.lane];
}

}  // namespace emulation
