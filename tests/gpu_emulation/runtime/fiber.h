// one fiber per CUDA thread; only ever one runs, on the thread of the host that called launch
#pragma once
#include <cstddef>

#if !defined(__x86_64__) || defined(GPU_EMULATION_UCONTEXT)
#define GPU_EMULATION_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulation {

struct Fiber {
#ifdef GPU_EMULATION_USES_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

// `entry` must never return
void prepare_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace emulation
