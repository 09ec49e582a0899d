// tensor-core products and the instructions that move their fragments
#pragma once
#include <cstdint>

#include "scheduler.h"
#include "thread.h"

namespace emulation {

enum class Factor { kBf16, kF16, kTf32 };

// of mma.m16n8k<kDepth>; a result of f16 is in packed pairs
template <Factor kFactor, int kDepth, bool kFloatResult>
void run_mma(Warp& warp, uint32_t lanes);

template <int kCount, bool kTransposed>
void run_ldmatrix(Warp& warp, uint32_t lanes);

template <int kCount, bool kTransposed>
void run_stmatrix(Warp& warp, uint32_t lanes);

void run_movmatrix(Warp& warp, uint32_t lanes);

// 32-bit registers of a lane
template <Factor kFactor, int kDepth>
constexpr uint32_t kLeftRegisters = kDepth * 16 / kLanes / (kFactor == Factor::kTf32 ? 1 : 2);

template <Factor kFactor, int kDepth, bool kFloatResult>
void mma(Thread& thread, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d,
         uint32_t site) {
  constexpr uint32_t kLeft = kLeftRegisters<kFactor, kDepth>, kRight = kLeft / 2;
  constexpr uint32_t kResult = kFloatResult ? 4 : 2;
  auto* in = thread.warp->in;
  const uint32_t lane = thread.lane;
  for (uint32_t i = 0; i < kLeft; ++i) in[i][lane] = a[i];
  for (uint32_t i = 0; i < kRight; ++i) in[kLeft + i][lane] = b[i];
  for (uint32_t i = 0; i < kResult; ++i) in[kLeft + kRight + i][lane] = c[i];
  rendezvous(thread, ~0u, run_mma<kFactor, kDepth, kFloatResult>, site, site);
  for (uint32_t i = 0; i < kResult; ++i) d[i] = thread.warp->out[i][lane];
}

template <int kCount, bool kTransposed>
void ldmatrix(Thread& thread, uint64_t address, uint32_t* rows, uint32_t site) {
  thread.warp->address[thread.lane] = address;
  rendezvous(thread, ~0u, run_ldmatrix<kCount, kTransposed>, site, site);
  for (int i = 0; i < kCount; ++i) rows[i] = thread.warp->out[i][thread.lane];
}

template <int kCount, bool kTransposed>
void stmatrix(Thread& thread, uint64_t address, const uint32_t* rows, uint32_t site) {
  thread.warp->address[thread.lane] = address;
  for (int i = 0; i < kCount; ++i) thread.warp->in[i][thread.lane] = rows[i];
  rendezvous(thread, ~0u, run_stmatrix<kCount, kTransposed>, site, site);
}

inline uint32_t movmatrix(Thread& thread, uint32_t value, uint32_t site) {
  thread.warp->in[0][thread.lane] = value;
  rendezvous(thread, ~0u, run_movmatrix, site, site);
  return thread.warp->out[0][thread.lane];
}

}  // namespace emulation
