// The kernel tables and the processors they run on. Compiled once, for any processor.
#include "kernels.h"

namespace lcattn::cpu {

namespace portable {
void forward(const Problem&, const Parallel&);
void backward(const Problem&, const Gradients&, const Parallel&);
void turn(const Turn&, const Parallel&);
}  // namespace portable

const Kernels kPortable = {"portable", [] { return true; }, portable::forward, portable::backward,
                           portable::turn};

#if defined(__x86_64__) && defined(__linux__)

namespace avx2 {
void forward(const Problem&, const Parallel&);
void backward(const Problem&, const Gradients&, const Parallel&);
void turn(const Turn&, const Parallel&);

// these also ask the operating system whether it saves the registers
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}
}  // namespace avx2

namespace avx512 {
void forward(const Problem&, const Parallel&);
void backward(const Problem&, const Gradients&, const Parallel&);
void turn(const Turn&, const Parallel&);

bool supported() {
  return avx2::supported() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
}  // namespace avx512

const Kernels kAvx512 = {"avx512", avx512::supported, avx512::forward, avx512::backward,
                         avx512::turn};
const Kernels kAvx2 = {"avx2", avx2::supported, avx2::forward, avx2::backward, avx2::turn};

std::span<const Kernels* const> compiled() {
  static constexpr const Kernels* kTables[] = {&kAvx512, &kAvx2, &kPortable};
  return kTables;
}

#else

std::span<const Kernels* const> compiled() {
  static constexpr const Kernels* kTables[] = {&kPortable};
  return kTables;
}

#endif

}  // namespace lcattn::cpu
