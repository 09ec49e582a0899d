// Threads of one block that exchange values, with defects to plant in how they do it.
#include "fragments.cuh"

namespace {

enum Defect : int {
  kNone,
  kMissingSyncwarp,
  kSyncwarpOfHalf,
  kShuffleInsteadOfSyncwarp,
  kUnwrittenShared,
  kSharedOverrun,
  kAllWriteOne,
  kReadsUnwrittenOutput,
  kExitBeforeBarrier,
  kBarrierInOneWarp,
  kDivergentBarriers,
  kMissingBarrier,
  kDivergentShuffle,
  kShuffleFromOutsideMask,
  kBarrierCountTooSmall,
  kBarrierCountTooLarge,
  kConsumerDoesNotWait,
  kProducerDoesNotWait,
  kMissingWait,
  kOneThreadDoesNotWait,
  kMissingBarrierAfterWait,
  kOverwritesCopyUnderWay,
  kOverwritesSourceOfCopy,
  kExitsWithCopyUnderWay,
  kMisalignedCopy,
  kLaneArrivesForAnother,
};

constexpr int kThreads = 64;

__device__ void named_barrier(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ void arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

}  // namespace

// y = x with the 32 values of each warp reversed
extern "C" __global__ void reverse_warps(const float* x, float* y, int defect) {
  extern __shared__ float staged[];
  const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  const bool unwritten = defect == kUnwrittenShared && lane == 7;
  if (!unwritten) staged[threadIdx.x] = 0.0f;
  __syncwarp();
  if (!unwritten) staged[threadIdx.x] = x[threadIdx.x];
  if (defect == kSyncwarpOfHalf) {
    __syncwarp(lane < 16 ? 0x0000ffff : 0xffff0000);
  } else if (defect == kShuffleInsteadOfSyncwarp) {
    // the lanes meet, but what they wrote need not be visible to one another
    __shfl_sync(~0u, lane, 0);
  } else if (defect != kMissingSyncwarp) {
    __syncwarp();
  }
  const int mirrored = first + 31 - lane + (defect == kSharedOverrun ? kThreads : 0);
  const float value = staged[mirrored];
  float& to = y[defect == kAllWriteOne ? 0 : threadIdx.x];
  to = defect == kReadsUnwrittenOutput ? to + value : value;
}

// y = x reversed over the block
extern "C" __global__ void reverse_block(const float* x, float* y, int defect) {
  __shared__ float staged[kThreads];
  staged[threadIdx.x] = 0.0f;
  __syncthreads();
  staged[threadIdx.x] = x[threadIdx.x];
  if (defect == kExitBeforeBarrier && threadIdx.x == 3) return;
  if (defect == kDivergentBarriers && threadIdx.x % 2) {
    __syncthreads();
    staged[threadIdx.x] += 0.0f;
  } else if (defect != kMissingBarrier && (defect != kBarrierInOneWarp || threadIdx.x < 32)) {
    __syncthreads();
  }
  y[threadIdx.x] = staged[kThreads - 1 - threadIdx.x];
}

// y = the sum of x over each warp
extern "C" __global__ void sum_warps(const float* x, float* y, int defect) {
  const int lane = threadIdx.x % 32;
  float sum = x[threadIdx.x];
#pragma unroll
  for (int distance = 1; distance < 16; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (defect == kDivergentShuffle) {
    if (lane < 16) sum += __shfl_xor_sync(~0u, sum, 16);
    __syncwarp();
  } else if (defect == kShuffleFromOutsideMask) {
    if (lane < 16) sum += __shfl_xor_sync(0xffff, sum, 16);
  } else {
    sum += __shfl_xor_sync(~0u, sum, 16);
  }
  y[threadIdx.x] = sum;
}

// y = x: the first warp stages it, the second one stores it, by two named barriers
extern "C" __global__ void hand_over(const float* x, float* y, int rounds, int defect) {
  constexpr int kFull = 1, kEmpty = 2;
  __shared__ float staged[32];
  const int lane = threadIdx.x % 32;
  int count = kThreads;
  if (defect == kBarrierCountTooSmall) count = kThreads / 2;
  if (defect == kBarrierCountTooLarge) count = kThreads + 32;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < 32) {
      if (round > 0 && defect != kProducerDoesNotWait) named_barrier(kEmpty, kThreads);
      staged[lane] = x[round * 32 + lane];
      if (defect == kLaneArrivesForAnother) {
        // what the lanes wrote is ordered all the same
        __syncwarp();
        if (lane != 5) arrive(kFull, count);
        if (lane == 6) arrive(kFull, count);
      } else {
        arrive(kFull, count);
      }
    } else {
      if (defect != kConsumerDoesNotWait) named_barrier(kFull, count);
      y[round * 32 + lane] = staged[31 - lane];
      if (round + 1 < rounds && defect != kProducerDoesNotWait) arrive(kEmpty, kThreads);
    }
  }
}

// y = x, four values a thread by an asynchronous copy, those of the block reversed
extern "C" __global__ void reverse_copied(float* x, float* y, int defect) {
  __shared__ __align__(16) float staged[kThreads * 4];
  const int own = threadIdx.x * 4;
  copy_async(staged + own, x + own + (defect == kMisalignedCopy), 16);
  commit_copies();
  __syncthreads();
  if (defect == kOverwritesCopyUnderWay) staged[own] = 1.0f;
  if (defect == kOverwritesSourceOfCopy) x[own] = 1.0f;
  if (defect != kMissingWait && (defect != kOneThreadDoesNotWait || threadIdx.x != 5)) {
    wait_for_all_but<0>();
  }
  if (defect != kMissingBarrierAfterWait) __syncthreads();
  const int other = defect == kMissingWait ? own : (kThreads - 1) * 4 - own;
#pragma unroll
  for (int i = 0; i < 4; ++i) y[own + i] = staged[other + 3 - i];
  if (defect == kExitsWithCopyUnderWay) {
    __syncthreads();
    copy_async(staged + own, x + own, 16);
  }
}
