#include "fiber.h"

#include <cstdint>

namespace emulation {

#ifdef GPU_EMULATION_USES_UCONTEXT

void prepare_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

extern "C" void gpu_emulation_switch(void** save, void* load);

// the System V ABI's callee-saved registers; the floating-point environment is the same for all
asm(R"(
.text
.globl gpu_emulation_switch
.hidden gpu_emulation_switch
.type gpu_emulation_switch, @function
gpu_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gpu_emulation_switch, .-gpu_emulation_switch
)");

void prepare_fiber(Fiber& fiber, char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{63};
  auto** slot = reinterpret_cast<void**>(top);
  // a return address that is never used keeps the stack aligned as after a call
  *--slot = nullptr;
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--slot = nullptr;
  fiber.stack_pointer = slot;
}

void switch_fiber(Fiber& from, Fiber& to) {
  gpu_emulation_switch(&from.stack_pointer, to.stack_pointer);
}

#endif

}  // namespace emulation
