// The sum of a vector over many blocks, of which the last to finish adds up what each has found;
// with defects to plant in how the blocks meet.
#include <cuda_bf16.h>

namespace {

enum Defect : int {
  kNone,
  kUnorderedSum,
  kUnorderedSumShared,
  kStoresPastArray,
  kMissingBarrier,
  kMissingBarrierBeforeRead,
  kMissingReleaseFence,
  kMissingAcquireFence,
  kFirstBlockReads,
  kCounterNotAtomic,
  kCounterReadPlainly,
  kNextBlockAwaited,
  kReadOnlyLoad,
  kSharedCounterNotAtomic,
};

constexpr int kThreads = 64;
constexpr int kWarps = kThreads / 32;

__device__ float sum_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

}  // namespace

// out[0] = the sum of x; partial holds one value a block, and counter starts as zero
extern "C" __global__ void sum(const float* x, float* partial, unsigned* counter, float* out, int n,
                               int defect) {
  __shared__ float of_warp[kWarps];
  __shared__ bool last;
  float mine = 0.0f;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) mine += x[i];
  mine = sum_warp(mine);
  if (defect == kUnorderedSum) {
    if (threadIdx.x % 32 == 0) atomicAdd(out, mine);
    return;
  }
  if (defect == kUnorderedSumShared) {
    if (threadIdx.x == 0) of_warp[0] = of_warp[1] = 0.0f;
    __syncthreads();
    if (threadIdx.x % 32 == 0) atomicAdd(of_warp, mine);
  } else if (threadIdx.x % 32 == 0) {
    of_warp[threadIdx.x / 32 + (defect == kStoresPastArray)] = mine;
  }
  if (defect != kMissingBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = of_warp[0] + of_warp[1];
    if (defect != kMissingReleaseFence) __threadfence();
    unsigned before;
    if (defect == kCounterNotAtomic) {
      before = *counter;
      *counter = before + 1;
    } else {
      before = atomicAdd(counter, 1);
    }
    if (defect == kCounterReadPlainly) before = *counter - 1;
    if (defect == kNextBlockAwaited) {
      while (atomicAdd(counter, 0) < gridDim.x) {
      }
    }
    if (defect != kMissingAcquireFence) __threadfence();
    last = defect == kFirstBlockReads ? blockIdx.x == 0 : before == gridDim.x - 1;
  }
  if (defect != kMissingBarrierBeforeRead) __syncthreads();
  if (!last || threadIdx.x >= 32) return;
  float total = 0.0f;
  for (int block = threadIdx.x; block < gridDim.x; block += 32) {
    total += defect == kReadOnlyLoad ? __ldg(partial + block) : partial[block];
  }
  total = sum_warp(total);
  if (threadIdx.x == 0) out[0] = total;
}

// counts[i] = how many of x are i: integers, whose sum has no order
extern "C" __global__ void histogram(const int* x, int* counts, int n, int defect) {
  __shared__ int of_block[16];
  if (threadIdx.x < 16) of_block[threadIdx.x] = 0;
  __syncthreads();
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) {
    if (defect == kSharedCounterNotAtomic) {
      ++of_block[x[i]];
    } else {
      atomicAdd(of_block + x[i], 1);
    }
  }
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(counts + threadIdx.x, of_block[threadIdx.x]);
}
