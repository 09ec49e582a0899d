// what the lanes of a warp do together; of these only sync_warp orders memory
#pragma once
#include <cstdint>

#include "scheduler.h"
#include "thread.h"

namespace emulation {

enum class Shuffle : uint32_t { kUp, kDown, kBfly, kIdx };

struct ShuffleResult {
  uint32_t value;
  bool in_range;
};

struct Ballot {
  uint32_t set, lanes;
};

void sync_warp(Thread& thread, uint32_t mask, uint32_t site);
ShuffleResult shuffle(Thread& thread, Shuffle mode, uint32_t value, uint32_t position,
                      uint32_t clamp, uint32_t mask, uint32_t site);
Ballot ballot(Thread& thread, bool predicate, uint32_t mask, uint32_t site);
uint32_t match_any(Thread& thread, uint64_t value, uint32_t mask, uint32_t site);
uint32_t match_all(Thread& thread, uint64_t value, uint32_t mask, uint32_t site);
uint32_t elect(Thread& thread, uint32_t mask, uint32_t site);

template <class Operation, class Value>
void run_reduce(Warp& warp, uint32_t lanes) {
  Value result = Value(warp.in[0][__builtin_ctz(lanes)]);
  for (uint32_t rest = lanes & (lanes - 1); rest; rest &= rest - 1) {
    result = Operation::apply(result, Value(warp.in[0][__builtin_ctz(rest)]));
  }
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    warp.out[0][__builtin_ctz(rest)] = uint32_t(result);
  }
}

template <class Operation, class Value>
Value reduce(Thread& thread, Value value, uint32_t mask, uint32_t site) {
  thread.warp->in[0][thread.lane] = uint32_t(value);
  rendezvous(thread, mask, run_reduce<Operation, Value>, 0, site);
  return Value(thread.warp->out[0][thread.lane]);
}

}  // namespace emulation
