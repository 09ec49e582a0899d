#include "checker.h"

#include <algorithm>
#include <cstring>

#include "launch.h"
#include "memory.h"

namespace emulation {

namespace {

struct Checked {
  Thread& thread;
  Region& region;
  AccessKind kind;
  uint32_t site, bytes;
  size_t offset;
};

bool reads(Access access) {
  return access == Access::kRead || access == Access::kReadOnly || access == Access::kReadWrite;
}

bool writes(Access access) { return access != Access::kRead && access != Access::kReadOnly; }

const char* name(const AccessKind& kind) {
  switch (kind.access) {
    case Access::kRead:
    case Access::kReadOnly:
      return "read";
    case Access::kWrite:
      return "write";
    case Access::kReadWrite:
      return "atomic operation";
    case Access::kCopyIssued:
    case Access::kCopyDone:
      return "asynchronous copy";
  }
  return "";
}

std::string place(const Region& region, size_t offset) {
  std::string text = region.is_shared ? "shared memory" : "global memory";
  if (!region.label.empty()) text += " (" + region.label + ")";
  return text + " at byte " + std::to_string(offset);
}

[[noreturn]] void report(const Checked& checked, size_t offset, const char* what) {
  char text[400];
  snprintf(text, sizeof text, "%s: %u-byte %s of %s", what, checked.bytes, name(checked.kind),
           place(checked.region, offset).c_str());
  fail(checked.thread, checked.site, "%s", text);
}

[[noreturn]] void report_race(const Checked& checked, size_t offset, const char* what,
                              uint32_t block, uint32_t thread, const char* verb, uint32_t site) {
  char text[700], who[100];
  if (block == checked.thread.warp->block->serial) {
    snprintf(who, sizeof who, "thread %u", thread);
  } else {
    snprintf(who, sizeof who, "thread %u of another block", thread);
  }
  snprintf(text, sizeof text, "%s: %u-byte %s of %s, which %s %s%s%s", what, checked.bytes,
           name(checked.kind), place(checked.region, offset).c_str(), who, verb,
           site == ~0u ? "" : " at ", site == ~0u ? "" : describe_site(site).c_str());
  fail(checked.thread, checked.site, "%s", text);
}

bool are_ordered(const Thread& thread, const Readers& readers) {
  const uint32_t first = readers.warp.who() * kLanes, epoch = readers.warp.epoch();
  for (uint32_t lanes = readers.lanes; lanes; lanes &= lanes - 1) {
    const uint32_t lane = __builtin_ctz(lanes);
    if (!is_ordered(thread, readers.warp.block, first + lane, epoch)) return false;
  }
  return true;
}

Strength strength(const AccessKind& kind) {
  if (kind.access == Access::kReadOnly) return Strength::kReadOnly;
  if (!kind.is_strong) return Strength::kPlain;
  return kind.is_block_scope ? Strength::kBlock : Strength::kDevice;
}

bool are_alike(const Readers& first, const Readers& second) {
  return first.warp == second.warp && first.strength == second.strength &&
         first.wrote == second.wrote;
}

// whether an access that is ordered after `later`, or may meet it, is so with `earlier`, if those
// two are ordered
bool covers(const Readers& later, const Readers& earlier) {
  return earlier.strength >= later.strength && later.wrote >= earlier.wrote;
}

// adds to more readers than one
void record_besides(const Thread& thread, const Readers& mine, Shadow& shadow, Cell& cell) {
  bool is_known = false, has_empty = false;
  shadow.for_each_readers(cell, [&](Readers& have) {
    if (are_alike(have, mine)) {
      have.lanes |= mine.lanes;
      is_known = true;
    } else if (have.warp.who() == mine.warp.who() && covers(mine, have)) {
      have.lanes &= ~mine.lanes;
      has_empty |= !have.lanes;
    }
  });
  if (!is_known) {
    shadow.for_each_readers(cell, [&](Readers& have) {
      if (!covers(mine, have) || !are_ordered(thread, have)) return;
      have.lanes = 0;
      has_empty = true;
    });
  }
  if (has_empty) shadow.drop_empty_readers(cell);
  if (is_known) return;
  if (cell.readers.lanes) {
    shadow.more_readers(cell).push_back(mine);
  } else {
    cell.readers = mine;
  }
}

// remembers a read or a strong write
void record(const Checked& checked, Shadow& shadow, Cell& cell) {
  const Thread& thread = checked.thread;
  const Readers mine = {Stamp::of(thread.warp->block->serial, thread.warp->index, thread.epoch),
                        1u << thread.lane, strength(checked.kind), writes(checked.kind.access)};
  Readers& readers = cell.readers;
  if (readers.lanes && readers.warp.block != mine.warp.block) {
    shadow.hand_on_readers(cell, launched().first_block);
  }
  if (!readers.lanes) {
    readers = mine;
  } else if (are_alike(readers, mine) && !cell.more_readers) {
    readers.lanes |= mine.lanes;
  } else {
    record_besides(thread, mine, shadow, cell);
  }
}

// strong accesses may meet unordered, if each is strong to the other's block
bool may_meet(const Checked& checked, uint32_t block, Strength other) {
  const Strength least =
      block == checked.thread.warp->block->serial ? Strength::kBlock : Strength::kDevice;
  return other >= least && strength(checked.kind) >= least;
}

// of all blocks in the list
bool may_meet_others(const Checked& checked, const Shadow& shadow, const Cell& cell) {
  return !cell.other_readers ||
         (strength(checked.kind) == Strength::kDevice &&
          shadow.other_reader_lists[cell.other_readers - 1].weakest == Strength::kDevice);
}

// whether a thread knows of what all threads of another block did in an epoch
bool may_be_ordered(const Thread& thread, const OtherReader& reader) {
  if (!thread.clock || !thread.clock->others) return false;
  const auto found = thread.clock->others->find(reader.block);
  if (found == thread.clock->others->end()) return false;
  return std::ranges::any_of(*found->second, [&](uint32_t time) { return time >= reader.epoch; });
}

[[noreturn]] void report_earlier(const Checked& checked, size_t offset, Strength strength,
                                 bool wrote, uint32_t block, uint32_t thread) {
  const char* what = !wrote                        ? "race (write after read)"
                     : writes(checked.kind.access) ? "race (write after write)"
                                                   : "race (read after write)";
  if (strength == Strength::kReadOnly) {
    what = "write of memory that the launch has read by a read-only load";
  }
  report_race(checked, offset, what, block, thread, wrote ? "wrote" : "read", ~0u);
}

// that an access is ordered after those recorded that `concern` it, unless it may meet them
template <typename Concern>
void check_recorded(const Checked& checked, size_t offset, Shadow& shadow, Cell& cell,
                    Concern&& concern) {
  const Thread& thread = checked.thread;
  const uint32_t first_block = launched().first_block;
  shadow.for_each_readers(cell, [&](const Readers& readers) {
    const uint32_t block = readers.warp.block;
    if (block < first_block || !concern(readers) || may_meet(checked, block, readers.strength)) {
      return;
    }
    for (uint32_t lanes = readers.lanes; lanes; lanes &= lanes - 1) {
      const uint32_t other = readers.warp.who() * kLanes + __builtin_ctz(lanes);
      if (readers.strength == Strength::kReadOnly ||
          !is_ordered(thread, block, other, readers.warp.epoch())) {
        report_earlier(checked, offset, readers.strength, readers.wrote, block, other);
      }
    }
  });
  if (may_meet_others(checked, shadow, cell)) return;
  shadow.for_each_other(cell.other_readers, first_block, [&](const OtherReader& reader) {
    if (!concern(reader) || may_meet(checked, reader.block, reader.strength)) return;
    if (reader.strength == Strength::kReadOnly || !may_be_ordered(thread, reader)) {
      report_earlier(checked, offset, reader.strength, reader.wrote, reader.block, 0);
    }
  });
}

// after a write: those that it may meet are still unordered with what comes after it
void forget_checked(const Checked& checked, Shadow& shadow, Cell& cell) {
  bool has_empty = false;
  shadow.for_each_readers(cell, [&](Readers& readers) {
    if (may_meet(checked, readers.warp.block, readers.strength)) return;
    readers.lanes = 0;
    has_empty = true;
  });
  if (has_empty) shadow.drop_empty_readers(cell);
  if (may_meet_others(checked, shadow, cell)) return;
  std::vector<OtherReader> kept;
  shadow.for_each_other(cell.other_readers, launched().first_block, [&](const OtherReader& reader) {
    if (may_meet(checked, reader.block, reader.strength)) kept.push_back(reader);
  });
  cell.other_readers = 0;
  for (size_t i = kept.size(); i > 0; --i) shadow.add(cell.other_readers, kept[i - 1]);
}

// generated code may have threads that hold the same value all store it
bool is_equal_write(const Checked& checked, size_t offset, const Cell& cell, size_t bytes) {
  if (!launched().options.allow_equal_writes || !checked.kind.values) return false;
  if (!checked.region.is_shared || cell.write_site != checked.site) return false;
  const auto* values = static_cast<const char*>(checked.kind.values);
  return memcmp(checked.region.begin + offset, values + (offset - checked.offset), bytes) == 0;
}

void check_cell(const Checked& checked, size_t offset, uint8_t state, Cell& cell, size_t bytes) {
  const Thread& thread = checked.thread;
  Shadow& shadow = checked.region.shadow;
  const Access access = checked.kind.access;
  const Stamp written = cell.write;
  if (written.block) {
    if (access == Access::kReadOnly && written.block >= launched().first_block &&
        !checked.region.is_shared) {
      report_race(checked, offset, "read-only load of memory that the launch writes", written.block,
                  written.who(), "wrote", cell.write_site);
    }
    const bool other_block = written.block != thread.warp->block->serial;
    const bool both_strong =
        checked.kind.is_strong && (state & kStrong) &&
        !(other_block && (checked.kind.is_block_scope || (state & kBlockScope)));
    const bool sums =
        checked.kind.is_float_sum && (state & kFloatSum) && !launched().options.allow_unordered;
    if ((!both_strong || sums) &&
        !is_ordered(thread, written.block, written.who(), written.epoch()) &&
        !is_equal_write(checked, offset, cell, bytes)) {
      const char* what = sums && both_strong ? "unordered float reduction"
                         : reads(access) && access != Access::kReadWrite
                             ? "race (read after write)"
                             : "race (write after write)";
      report_race(checked, offset, what, written.block, written.who(),
                  sums && both_strong ? "added to" : "wrote", cell.write_site);
    }
  }
  if (!writes(access)) {
    if (state & kStrong) {
      check_recorded(checked, offset, shadow, cell, [](const auto& other) { return other.wrote; });
    }
    return record(checked, shadow, cell);
  }
  const Stamp mine = Stamp::of(thread.warp->block->serial, thread.index, thread.epoch);
  if (cell.readers.lanes || cell.other_readers) {
    // the thread's own atomic operation has observed the strong writes before it, so that it may
    // reset a counter that was the last to count
    const bool observed =
        (state & kReadModifyWrite) && written.block == mine.block && written.who() == thread.index;
    check_recorded(checked, offset, shadow, cell,
                   [&](const auto& other) { return !(other.wrote && observed); });
    forget_checked(checked, shadow, cell);
  }
  if (checked.kind.is_strong) record(checked, shadow, cell);
  cell.write = mine;
  cell.write_site = checked.site;
}

// whether of each byte these bits are the wanted ones
bool are_all(const uint8_t* state, uint32_t bytes, uint8_t bits, uint8_t wanted) {
  constexpr uint32_t kFour = 0x01010101;
  uint32_t wrong = 0, i = 0;
  for (; i + 4 <= bytes; i += 4) {
    uint32_t four;
    memcpy(&four, state + i, 4);
    wrong |= (four & bits * kFour) ^ wanted * kFour;
  }
  for (; i < bytes; ++i) wrong |= (state[i] & bits) ^ wanted;
  return !wrong;
}

void check_states(const Checked& checked) {
  const uint8_t* state = &checked.region.shadow.state[checked.offset];
  const Access access = checked.kind.access;
  const uint8_t wanted = reads(access) ? kOwned | kWritten : kOwned;
  const uint8_t unwanted = access == Access::kCopyDone ? 0 : kPending;
  if (are_all(state, checked.bytes, wanted | unwanted, wanted)) return;
  for (uint32_t i = 0; i < checked.bytes; ++i) {
    if (!(state[i] & kOwned)) {
      report(checked, checked.offset + i,
             checked.region.is_shared ? "out of bounds: between arrays"
                                      : "out of bounds: in a gap between the tensor's rows");
    }
    if ((state[i] & kPending) && access != Access::kCopyDone) {
      const Cell& cell = checked.region.shadow.cell_at(checked.offset + i);
      report_race(checked, checked.offset + i, "destination of a copy in flight (not waited for)",
                  cell.write.block, cell.write.who(), "copies to", cell.write_site);
    }
    if (reads(access) && !(state[i] & kWritten)) {
      report(checked, checked.offset + i, "uninitialised memory");
    }
  }
}

void set_states(const Checked& checked) {
  uint8_t* state = &checked.region.shadow.state[checked.offset];
  uint8_t value = kOwned;
  if (checked.kind.access == Access::kCopyIssued) {
    value |= kPending;
  } else {
    value |= kWritten;
  }
  if (checked.kind.is_strong) value |= kStrong;
  if (checked.kind.is_float_sum) value |= kFloatSum;
  if (checked.kind.is_block_scope) value |= kBlockScope;
  if (checked.kind.access == Access::kReadWrite) value |= kReadModifyWrite;
  memset(state, value, checked.bytes);
}

// of a cell of `kSize` bytes at `begin`, what the access touches
template <size_t kSize>
void check_cells(const Checked& checked, Cell& cell, size_t begin) {
  Shadow& shadow = checked.region.shadow;
  const size_t from = std::max(begin, checked.offset);
  const size_t end = std::min(begin + kSize, checked.offset + checked.bytes);
  const bool whole = end - from == kSize;
  if (whole && !cell.quarters) return check_cell(checked, begin, shadow.state[begin], cell, kSize);
  if constexpr (kSize > 1) {
    if (!cell.quarters) shadow.divide(cell);
    constexpr size_t kPart = kSize / 4;
    for (size_t i = (from - begin) / kPart; begin + i * kPart < end; ++i) {
      check_cells<kPart>(checked, (*cell.quarters)[i], begin + i * kPart);
    }
    if (whole && writes(checked.kind.access)) shadow.unite(cell);
  }
}

void check_region(const Checked& checked) {
  check_states(checked);
  Shadow& shadow = checked.region.shadow;
  const size_t last = (checked.offset + checked.bytes - 1) / kCellBytes;
  for (size_t i = checked.offset / kCellBytes; i <= last; ++i) {
    check_cells<kCellBytes>(checked, shadow.cells[i], i * kCellBytes);
  }
  if (writes(checked.kind.access)) set_states(checked);
}

LocalMemory* find_local(Thread& thread, uint64_t address, uint32_t bytes) {
  for (LocalMemory& local : thread.local) {
    const auto begin = reinterpret_cast<uint64_t>(local.address);
    if (address >= begin && address + bytes <= begin + local.bytes) return &local;
  }
  return nullptr;
}

// nobody else can reach it, so there is no race
void check_local(Thread& thread, LocalMemory& local, uint64_t address, uint32_t bytes,
                 const AccessKind& kind, uint32_t site) {
  if (kind.space != Space::kLocal && kind.space != Space::kGeneric) {
    fail(thread, site, "%u-byte %s of local memory, by an instruction for another space", bytes,
         name(kind));
  }
  const size_t offset = address - reinterpret_cast<uint64_t>(local.address);
  for (size_t at = offset; at < offset + bytes; ++at) {
    if (reads(kind.access) && !local.written[at]) {
      fail(thread, site, "uninitialised memory: %u-byte %s of local memory at byte %zu", bytes,
           name(kind), at);
    }
    if (writes(kind.access)) local.written[at] = true;
  }
}

[[noreturn]] void report_bounds(Thread& thread, const Region& region, uint64_t address,
                                uint32_t bytes, const AccessKind& kind, uint32_t site) {
  const auto distance = int64_t(address - reinterpret_cast<uint64_t>(region.begin));
  fail(thread, site, "out of bounds: %u-byte %s of %s%s%s%s at byte %ld of %zu", bytes, name(kind),
       region.is_shared ? "shared memory" : "global memory", region.label.empty() ? "" : " (",
       region.label.c_str(), region.label.empty() ? "" : ")", long(distance), region.bytes);
}

}  // namespace

void check_access(Thread& thread, uint64_t address, uint32_t bytes, AccessKind kind,
                  uint32_t site) {
  Region* region = is_in_shared_window(address) ? &shared_region() : find_region(address);
  if (!region) {
    if (LocalMemory* local = find_local(thread, address, bytes)) {
      return check_local(thread, *local, address, bytes, kind, site);
    }
    fail(thread, site, "out of bounds: %u-byte %s of %s memory that is not allocated, address %#lx",
         bytes, name(kind), kind.space == Space::kLocal ? "local" : "global",
         (unsigned long)address);
  }
  if (kind.space != Space::kGeneric && region->is_shared != (kind.space == Space::kShared)) {
    fail(thread, site, "%u-byte %s of %s memory, by an instruction for another space", bytes,
         name(kind), region->is_shared ? "shared" : "global");
  }
  const auto begin = reinterpret_cast<uint64_t>(region->begin);
  if (address < begin || address + bytes > begin + region->bytes) {
    report_bounds(thread, *region, address, bytes, kind, site);
  }
  if (region->is_read_only && writes(kind.access)) {
    fail(thread, site, "%u-byte %s of constant memory", bytes, name(kind));
  }
  check_region({thread, *region, kind, site, bytes, address - begin});
}

}  // namespace emulation
