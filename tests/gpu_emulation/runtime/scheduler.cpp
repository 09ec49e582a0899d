#include "scheduler.h"

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <numeric>

#include "checker.h"
#include "launch.h"
#include "memory.h"
#include "run_launch.h"
#include "traffic.h"

namespace emulation {

namespace {

// after so many turns in which threads only spun, so often altogether, none will ever do anything
// else
constexpr uint32_t kFruitlessTurns = 2000, kFruitlessYields = 1 << 16;
constexpr uint32_t kSpinsBeforeYield = 16;

Launch launch;
Block block;
Fiber main_fiber;
Thread* current;
std::string error;
uint64_t random_state;

bool is_random() { return launch.options.order > 1; }

uint32_t nth_lane(uint32_t lanes, uint32_t n) {
  for (; n > 0; --n) lanes &= lanes - 1;
  return std::countr_zero(lanes);
}

uint32_t choose_lane(uint32_t lanes) {
  if (launch.options.order == 0) return std::countr_zero(lanes);
  if (launch.options.order == 1) return kLanes - 1 - std::countl_zero(lanes);
  return nth_lane(lanes, random_below(std::popcount(lanes)));
}

void run_collective(Warp& warp, const Collective& collective, uint32_t lanes) {
  if (launch.options.check) flush_traffic();
  collective.run(warp, lanes);
  ++block.progress;
  warp.waiting &= ~lanes;
  warp.ready |= lanes;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    warp.threads[std::countr_zero(rest)].state = State::kReady;
  }
}

// runs the collectives that are complete; true if lanes are ready
bool run_collectives(Warp& warp) {
  if (!warp.waiting) return warp.ready;
  if (warp.uniform) {
    if ((warp.collective.mask & ~warp.exited) == warp.waiting) {
      run_collective(warp, warp.collective, warp.waiting);
    }
    return warp.ready;
  }
  for (uint32_t rest = warp.waiting; rest;) {
    const Collective& collective = warp.threads[std::countr_zero(rest)].collective;
    uint32_t arrived = 0;
    for (uint32_t lanes = rest; lanes; lanes &= lanes - 1) {
      const uint32_t lane = std::countr_zero(lanes);
      if (warp.threads[lane].collective == collective) arrived |= 1u << lane;
    }
    rest &= ~arrived;
    if ((collective.mask & ~warp.exited) == arrived) run_collective(warp, collective, arrived);
  }
  return warp.ready;
}

Thread* next_lane(Warp& warp) {
  for (;;) {
    if (const uint32_t lanes = warp.turn & warp.ready) {
      const uint32_t lane = choose_lane(lanes);
      warp.turn &= ~(1u << lane);
      return &warp.threads[lane];
    }
    if (!run_collectives(warp)) return nullptr;
    warp.turn = warp.ready;
    // another warp may come in between, but for most of the time lanes go on
    if (is_random() && random_below(4) == 0) return nullptr;
  }
}

void switch_to(Fiber& from, Thread* next) {
  current = next;
  switch_fiber(from, next ? next->fiber : main_fiber);
}

void run_thread() {
  Thread& thread = *current;
  launch.module->run(thread, launch.parameters);
  if (!thread.copies.empty()) {
    fail(thread, thread.copies.front().site,
         "the thread exits with %zu copies in flight (no cp.async.wait_group)",
         thread.copies.size());
  }
  thread.state = State::kExited;
  thread.warp->ready &= ~(1u << thread.lane);
  thread.warp->exited |= 1u << thread.lane;
  ++block.exited;
  ++block.progress;
  switch_to(thread.fiber, next_lane(*thread.warp));
  __builtin_unreachable();
}

std::string describe_instruction(uint32_t site) {
  const std::string ptx = site < launch.module->site_count ? launch.module->sites[site].ptx : "";
  return describe_site(site) + " [" + ptx + "]";
}

std::string describe_wait(const Thread& thread) {
  char text[160];
  switch (thread.state) {
    case State::kExited:
      return "exited";
    case State::kReady:
      return "spins at " + describe_instruction(thread.site);
    case State::kAtBarrier:
      snprintf(text, sizeof text, "waits at barrier %u (%u of %u threads arrived), ",
               thread.barrier, block.barriers[thread.barrier].arrived,
               block.barriers[thread.barrier].expected);
      return text + describe_instruction(thread.site);
    case State::kAtCollective:
      snprintf(text, sizeof text, "waits for lanes %08x at ", thread.collective.mask);
      return text + describe_instruction(thread.site);
  }
  return "";
}

[[noreturn]] void deadlock(const char* what) {
  constexpr int kGroups = 12;
  std::string text = what;
  int groups = 0;
  for (uint32_t begin = 0; begin < block.thread_count;) {
    const std::string wait = describe_wait(block.threads[begin]);
    uint32_t end = begin + 1;
    while (end < block.thread_count && describe_wait(block.threads[end]) == wait) ++end;
    if (++groups > kGroups) {
      text += "; ...";
      break;
    }
    text += "; threads " + std::to_string(begin) + ".." + std::to_string(end - 1) + ": " + wait;
    begin = end;
  }
  char where[160];
  snprintf(where, sizeof where, "%s: block (%u,%u,%u): ", launch.module->name, block.index.x,
           block.index.y, block.index.z);
  throw Error(where + text);
}

const char* deadlock_kind() {
  bool at_barrier = false, at_collective = false;
  for (const Thread& thread : block.threads) {
    at_barrier |= thread.state == State::kAtBarrier;
    at_collective |= thread.state == State::kAtCollective;
  }
  if (at_collective) return "deadlock: a warp's collective is not reached by all lanes of its mask";
  if (at_barrier && block.exited) {
    return "deadlock: a barrier waits for threads of which some have exited";
  }
  return "deadlock: a barrier is not reached by all threads that it waits for";
}

void run_warp(Warp& warp) {
  warp.turn = warp.ready;
  if (Thread* next = next_lane(warp)) switch_to(main_fiber, next);
  current = nullptr;
  if (launch.options.check) flush_traffic();
  if (!error.empty()) throw Error(error);
}

}  // namespace

const Launch& launched() { return launch; }

size_t shared_bytes(const Launch& of) {
  const Module& module = *of.module;
  return size_t{module.static_shared_bytes} + module.red_zone_bytes + of.dynamic_shared_bytes;
}

uint32_t random_below(uint32_t bound) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t((random_state >> 33) % bound);
}

std::string describe_site(uint32_t site) {
  return site < launch.module->site_count ? launch.module->sites[site].where : "the kernel's start";
}

void fail(const Thread& thread, uint32_t site, const char* format, ...) {
  char what[1024], where[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  snprintf(where, sizeof where, "%s: block (%u,%u,%u), thread (%u,%u,%u): ", launch.module->name,
           thread.ctaid.x, thread.ctaid.y, thread.ctaid.z, thread.tid.x, thread.tid.y,
           thread.tid.z);
  const char* ptx = site < launch.module->site_count ? launch.module->sites[site].ptx : "";
  error = where + describe_site(site) + ": " + what + " [" + ptx + "]";
  if (!current) throw Error(error);
  // the fibers are abandoned, so nothing on their stacks may need a destructor
  switch_to(current->fiber, nullptr);
  __builtin_unreachable();
}

void rendezvous(Thread& thread, uint32_t mask, void (*run)(Warp&, uint32_t), uint32_t key,
                uint32_t site) {
  Warp& warp = *thread.warp;
  const uint32_t lane = 1u << thread.lane;
  if (!(mask & lane)) fail(thread, site, "lane %u is not in its own mask %08x", thread.lane, mask);
  mask &= warp.present;
  thread.collective = {run, mask, key};
  thread.site = site;
  thread.state = State::kAtCollective;
  if (!warp.waiting) {
    warp.collective = thread.collective;
    warp.uniform = true;
  } else if (!(thread.collective == warp.collective)) {
    warp.uniform = false;
  }
  warp.ready &= ~lane;
  warp.waiting |= lane;
  switch_away(thread);
}

void switch_away(Thread& thread) {
  Thread* next = next_lane(*thread.warp);
  if (next != &thread) switch_to(thread.fiber, next);
}

void yield(Thread& thread, uint32_t site) {
  thread.site = site;
  // the warp's other lanes come first, and then the other warps
  Warp& warp = *thread.warp;
  switch_to(thread.fiber, warp.turn & warp.ready ? next_lane(warp) : nullptr);
}

void note_strong_load(Thread& thread, uint64_t address, uint64_t value, uint32_t site) {
  const auto [seen, is_new] = thread.seen.try_emplace(address, value);
  if (is_new || seen->second != value) {
    seen->second = value;
    thread.spins = 0;
    ++block.progress;
  } else if (++thread.spins % kSpinsBeforeYield == 0) {
    ++block.fruitless_yields;
    yield(thread, site);
  }
}

void wake(Thread& thread) {
  thread.state = State::kReady;
  thread.warp->ready |= 1u << thread.lane;
}

namespace {

void start_block(uint32_t serial, Dim3 index, char* shared, char* stacks, size_t stack_bytes) {
  const Dim3 size = launch.block;
  const uint32_t threads = size.x * size.y * size.z;
  block.serial = serial;
  block.index = index;
  block.thread_count = threads;
  block.warp_count = (threads + kLanes - 1) / kLanes;
  block.threads.resize(threads);
  block.warps.resize(block.warp_count);
  for (Barrier& barrier : block.barriers) barrier = Barrier{};
  block.exited = 0;
  block.progress = 0;
  block.fruitless_yields = 0;
  for (uint32_t i = 0; i < block.warp_count; ++i) {
    Warp& warp = block.warps[i];
    warp.block = &block;
    warp.threads = &block.threads[i * kLanes];
    warp.index = i;
    const uint32_t lanes = std::min(kLanes, threads - i * kLanes);
    warp.present = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    warp.ready = warp.present;
    warp.waiting = warp.exited = warp.turn = 0;
  }
  for (uint32_t i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i];
    thread.tid = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.ntid = size;
    thread.ctaid = index;
    thread.nctaid = launch.grid;
    thread.index = i;
    thread.lane = i % kLanes;
    thread.shared = shared;
    thread.dynamic_shared_bytes = launch.dynamic_shared_bytes;
    thread.total_shared_bytes = launch.module->static_shared_bytes + launch.dynamic_shared_bytes;
    thread.checking = launch.options.check;
    thread.warp = &block.warps[i / kLanes];
    thread.state = State::kReady;
    thread.site = ~0u;
    thread.epoch = 1;
    thread.known = nullptr;
    thread.clock = nullptr;
    thread.released = thread.to_acquire = nullptr;
    thread.released_in_block = thread.to_acquire_in_block = nullptr;
    thread.copies.clear();
    thread.group_ends.clear();
    thread.local.clear();
    thread.seen.clear();
    thread.spins = 0;
    prepare_fiber(thread.fiber, stacks + i * stack_bytes, stack_bytes, run_thread);
  }
}

void run_block() {
  uint32_t fruitless_turns = 0;
  while (block.exited < block.thread_count) {
    bool ran = false;
    const uint64_t before = block.progress;
    const uint32_t first = is_random() ? random_below(block.warp_count) : 0;
    for (uint32_t i = 0; i < block.warp_count; ++i) {
      uint32_t number = (first + i) % block.warp_count;
      if (launch.options.order == 1) number = block.warp_count - 1 - i;
      Warp& warp = block.warps[number];
      if (!run_collectives(warp)) continue;
      ran = true;
      run_warp(warp);
    }
    if (!ran) deadlock(deadlock_kind());
    if (block.progress != before) {
      fruitless_turns = block.fruitless_yields = 0;
    } else if (++fruitless_turns > kFruitlessTurns && block.fruitless_yields > kFruitlessYields) {
      deadlock("deadlock: threads spin on memory that none changes (blocks run one after another)");
    }
  }
}

}  // namespace

void run_grid(const Launch& requested, char* shared, char* stacks, size_t stack_bytes,
              uint32_t& serial) {
  launch = requested;
  random_state = launch.options.order;
  error.clear();
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  // any odd stride that shares no factor with the count visits each block once
  uint64_t offset = 0, stride = 1;
  if (is_random()) {
    offset = random_below(uint32_t(blocks));
    do stride = random_below(uint32_t(blocks)) | 1;
    while (std::gcd(stride, blocks) != 1);
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    uint64_t number = (offset + i * stride) % blocks;
    if (launch.options.order == 1) number = blocks - 1 - i;
    const Dim3 index = {uint32_t(number % launch.grid.x),
                        uint32_t(number / launch.grid.x % launch.grid.y),
                        uint32_t(number / launch.grid.x / launch.grid.y)};
    begin_shared(shared, shared_bytes(launch));
    start_block(serial++, index, shared, stacks, stack_bytes);
    run_block();
  }
}

Thread* running_thread() { return current; }

}  // namespace emulation
