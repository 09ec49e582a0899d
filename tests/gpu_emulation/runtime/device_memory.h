// loads, stores and atomic operations of a kernel
#pragma once
#include <array>
#include <cstdint>
#include <cstring>

#include "checker.h"
#include "half.h"
#include "launch.h"
#include "scheduler.h"
#include "thread.h"
#include "traffic.h"

namespace emulation {

enum class Order { kWeak, kRelaxed, kAcquire, kRelease, kAcquireRelease };

template <class Element, int kCount>
using Vector = std::array<Element, kCount>;

// of the last access, for the handler of invalid addresses
extern volatile uint32_t current_site;

inline uint64_t shared_address(Thread& thread, uint64_t offset, uint32_t site) {
  if (offset >> 32) [[unlikely]] {
    fail(thread, site, "out of bounds: shared address %#lx is beyond 32 bits",
         (unsigned long)offset);
  }
  return reinterpret_cast<uint64_t>(thread.shared) + offset;
}

inline void check_alignment(Thread& thread, uint64_t address, uint32_t bytes, uint32_t site) {
  if (address & (bytes - 1)) [[unlikely]] {
    fail(thread, site, "misaligned: address %#lx of a %u-byte access", (unsigned long)address,
         bytes);
  }
}

void fence(Thread& thread, Scope scope);

// what memory order asks of the checker before a strong store and after a strong load
template <Order kOrder, Scope kScope>
void before_strong_write(Thread& thread, uint64_t address, bool read_modify_write) {
  if constexpr (kOrder == Order::kRelease || kOrder == Order::kAcquireRelease) {
    release(thread, kScope);
  }
  strong_write(thread, address, read_modify_write);
}

template <Order kOrder, Scope kScope>
void after_strong_read(Thread& thread, uint64_t address) {
  strong_read(thread, address);
  if constexpr (kOrder == Order::kAcquire || kOrder == Order::kAcquireRelease) {
    acquire(thread, kScope);
  }
}

bool is_shared_address(uint64_t address);

template <class Element, int kCount, Space kSpace, Access kAccess, Order kOrder, Scope kScope>
inline Vector<Element, kCount> load(Thread& thread, uint64_t address, uint32_t site) {
  constexpr uint32_t kBytes = sizeof(Element) * kCount;
  current_site = site;
  check_alignment(thread, address, kBytes, site);
  if (thread.checking) [[unlikely]] {
    if (kSpace != Space::kLocal) {
      note_traffic(thread, site, address, kBytes, is_shared_address(address), false);
    }
    check_access(thread, address, kBytes,
                 {kAccess, kSpace, kOrder != Order::kWeak, kScope == Scope::kBlock}, site);
  }
  Vector<Element, kCount> values;
  memcpy(&values, reinterpret_cast<const void*>(address), kBytes);
  if constexpr (kOrder != Order::kWeak) {
    if (thread.checking) after_strong_read<kOrder, kScope>(thread, address);
    note_strong_load(thread, address, uint64_t(values[0]), site);
  }
  return values;
}

template <class Element, int kCount, Space kSpace, Access kAccess, Order kOrder, Scope kScope>
inline void store(Thread& thread, uint64_t address, const Vector<Element, kCount>& values,
                  uint32_t site) {
  constexpr uint32_t kBytes = sizeof(Element) * kCount;
  current_site = site;
  check_alignment(thread, address, kBytes, site);
  if (thread.checking) [[unlikely]] {
    if (kSpace != Space::kLocal) {
      note_traffic(thread, site, address, kBytes, is_shared_address(address), true);
    }
    check_access(thread, address, kBytes,
                 {kAccess, kSpace, kOrder != Order::kWeak, kScope == Scope::kBlock, false, &values},
                 site);
    if constexpr (kOrder != Order::kWeak) {
      before_strong_write<kOrder, kScope>(thread, address, false);
    }
  }
  memcpy(reinterpret_cast<void*>(address), &values, kBytes);
}

// parameters and constants, which only the kernel's own code can reach
template <class Element, int kCount>
inline Vector<Element, kCount> load_plain(uint64_t address) {
  Vector<Element, kCount> values;
  memcpy(&values, reinterpret_cast<const void*>(address), sizeof values);
  return values;
}

template <class Values>
inline void store_plain(uint64_t address, const Values& values) {
  memcpy(reinterpret_cast<void*>(address), &values, sizeof values);
}

// operations on what memory holds
template <class T>
struct AtomicAdd {
  using Type = T;
  static T apply(T old, T value) {
    if constexpr (std::is_integral_v<T>) {
      return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value));
    } else {
      return old + value;
    }
  }
};
template <class T>
struct AtomicMin {
  using Type = T;
  static T apply(T old, T value) { return value < old ? value : old; }
};
template <class T>
struct AtomicMax {
  using Type = T;
  static T apply(T old, T value) { return value > old ? value : old; }
};
template <class T>
struct AtomicAnd {
  using Type = T;
  static T apply(T old, T value) { return old & value; }
};
template <class T>
struct AtomicOr {
  using Type = T;
  static T apply(T old, T value) { return old | value; }
};
template <class T>
struct AtomicXor {
  using Type = T;
  static T apply(T old, T value) { return old ^ value; }
};
template <class T>
struct AtomicExch {
  using Type = T;
  static T apply(T, T value) { return value; }
};
template <class T>
struct AtomicInc {
  using Type = T;
  static T apply(T old, T limit) { return old >= limit ? 0 : old + 1; }
};
template <class T>
struct AtomicDec {
  using Type = T;
  static T apply(T old, T limit) { return old == 0 || old > limit ? limit : old - 1; }
};
template <class T>
struct AtomicCas {
  using Type = T;
  static T apply(T old, T expected, T value) { return old == expected ? value : old; }
};
template <class Format>
struct AtomicHalfAdd {
  using Type = uint16_t;
  static uint16_t apply(uint16_t old, uint16_t value) { return half<Format, Add, 0>(old, value); }
};
template <class Format>
struct AtomicHalfPairAdd {
  using Type = uint32_t;
  static uint32_t apply(uint32_t old, uint32_t value) {
    return half_pair<Format, Add, 0>(old, value);
  }
};

template <class Operation, Space kSpace, Order kOrder, Scope kScope, bool kFloatSum,
          class... Values>
inline typename Operation::Type atomic(Thread& thread, uint64_t address, uint32_t site,
                                       Values... values) {
  using Type = typename Operation::Type;
  current_site = site;
  check_alignment(thread, address, sizeof(Type), site);
  if (thread.checking) {
    note_traffic(thread, site, address, sizeof(Type), is_shared_address(address), true);
    check_access(thread, address, sizeof(Type),
                 {Access::kReadWrite, kSpace, true, kScope == Scope::kBlock, kFloatSum}, site);
    after_strong_read<kOrder, kScope>(thread, address);
    before_strong_write<kOrder, kScope>(thread, address, true);
  }
  Type old;
  memcpy(&old, reinterpret_cast<const void*>(address), sizeof old);
  const Type result = Operation::apply(old, Type(values)...);
  memcpy(reinterpret_cast<void*>(address), &result, sizeof result);
  // one that changes nothing may be a lock's that another thread holds
  uint64_t seen = 0;
  memcpy(&seen, &old, sizeof old);
  if (memcmp(&old, &result, sizeof old) == 0) note_strong_load(thread, address, seen, site);
  return old;
}

// registers a variable of local memory with the checker for as long as it lives
struct LocalVariable {
  Thread& thread;

  LocalVariable(Thread& owner, char* address, uint32_t bytes) : thread(owner) {
    memset(address, 0xff, bytes);
    thread.local.push_back({address, bytes, std::vector<bool>(bytes)});
  }
  ~LocalVariable() { thread.local.pop_back(); }
};

bool is_in_space(const Thread& thread, uint64_t address, Space space);

}  // namespace emulation
