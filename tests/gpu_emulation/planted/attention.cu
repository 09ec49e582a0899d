// Attention forward over chunks, in bfloat16 on tensor cores, with defects to plant in it.
//
// Query i sees the keys of its own chunk and of the one before it that are no later than i and no
// earlier than first_key. A row that sees nothing gives zeros and a log-sum-exp of minus infinity.
#include "fragments.cuh"

namespace {

enum Defect : int {
  kNone,
  kMissingWait,
  kWaitsForTooFew,
  kMissingLastWait,
  kMissingBarrierAfterWait,
  kMissingBarrierBeforeRefill,
  kBarrierInTwoWarps,
  kRefillsBufferInUse,
  kReadsOtherBuffer,
  kCopiesPastTile,
  kTailRowsRead,
  kTailRowsWritten,
  kFourLanesWriteLse,
  kDivergentLdmatrix,
  kDivergentMma,
  kUnswizzledRead,
  kSwizzleOfNextRow,
  kFragmentHalvesSwapped,
  kValuesNotTransposed,
  kMaximumOverWrongLanes,
  kSumOverTooFewLanes,
  kSumNotRescaled,
  kOutputNotRescaled,
  kNaturalExponent,
  kBinaryLogarithm,
  kEmptyRowsSubtractInfinities,
  kMaskBeforeChunkEdge,
  kMaskAfterChunkEdge,
  kMaskSeesNextKey,
  kLoopStartsLate,
  kLoopEndsEarly,
};

struct Problem {
  const __nv_bfloat16 *q, *k, *v;
  __nv_bfloat16* out;
  float* lse;
  int length, chunk, first_key;
  float scale_log2e;
};

constexpr int kTile = 64;
constexpr int kFeatures = 64;
constexpr int kThreads = 128;
constexpr int kTileElements = kTile * kFeatures;
constexpr float kLn2 = 0.69314718f;

__device__ int swizzled(int row, int group, int key) {
  return row * kFeatures + ((group ^ (key & 7)) << 3);
}

__device__ void copy_tile(__nv_bfloat16* tile, const __nv_bfloat16* rows, int first_row, int length,
                          int defect) {
#pragma unroll
  for (int i = 0; i < kTileElements / 8 / kThreads; ++i) {
    const int row = (i * kThreads + threadIdx.x) / 8, group = threadIdx.x % 8;
    const bool inside = first_row + row < length || defect == kTailRowsRead;
    int to = swizzled(row, group, row + (defect == kSwizzleOfNextRow));
    if (defect == kCopiesPastTile && row == kTile - 1) to += 4 * kTileElements;
    const int64_t from = int64_t{first_row + row} * kFeatures + group * 8;
    copy_async(tile + to, rows + (inside ? from : 0), inside ? 16 : 0);
  }
}

__device__ float exponential(float x, int defect) {
  return defect == kNaturalExponent ? __expf(x) : exp2f(x);
}

__device__ __forceinline__ void attention_forward(const Problem& problem, int defect) {
  extern __shared__ __align__(128) __nv_bfloat16 shared[];
  __nv_bfloat16* const queries = shared;
  __nv_bfloat16* const keys = queries + kTileElements;
  __nv_bfloat16* const values = keys + 2 * kTileElements;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // of the four 8x8 matrices that a warp loads, the row that this lane points at
  const int matrix = lane / 8, matrix_row = lane % 8;
  const int length = problem.length, chunk = problem.chunk, first_key = problem.first_key;
  const int first_query = blockIdx.x * kTile;
  const int64_t head = int64_t{blockIdx.y} * length;
  const __nv_bfloat16* const k = problem.k + head * kFeatures;
  const __nv_bfloat16* const v = problem.v + head * kFeatures;

  const int oldest = max(first_key, (first_query / chunk - 1) * chunk);
  const int newest = min(length, first_query + kTile) - 1;
  const int begin = oldest / kTile + (defect == kLoopStartsLate);
  const int end = newest / kTile + (defect != kLoopEndsEarly);
  copy_tile(queries, problem.q + head * kFeatures, first_query, length, defect);
  if (begin < end) {
    copy_tile(keys, k, begin * kTile, length, defect);
    copy_tile(values, v, begin * kTile, length, defect);
  }
  commit_copies();

  uint32_t query[4][4];
  float output[8][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  for (int tile = begin; tile < end; ++tile) {
    const int buffer = ((tile - begin) & 1) ^ (defect == kReadsOtherBuffer);
    if (tile + 1 < end) {
      const int next = ((tile - begin) & 1) ^ (defect != kRefillsBufferInUse);
      copy_tile(keys + next * kTileElements, k, (tile + 1) * kTile, length, defect);
      copy_tile(values + next * kTileElements, v, (tile + 1) * kTile, length, defect);
    }
    commit_copies();
    if (defect == kWaitsForTooFew) {
      wait_for_all_but<2>();
    } else if (defect != kMissingWait) {
      wait_for_all_but<1>();
    }
    if (defect == kBarrierInTwoWarps) {
      if (warp < 2) __syncthreads();
    } else if (defect != kMissingBarrierAfterWait) {
      __syncthreads();
    }
    if (tile == begin) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int row = warp * 16 + (matrix & 1) * 8 + matrix_row;
        ldmatrix(query[step], queries + swizzled(row, step * 2 + (matrix >> 1), row));
      }
    }

    float score[8][4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        const int row = (n + (matrix >> 1)) * 8 + matrix_row, group = step * 2 + (matrix & 1);
        const int from = swizzled(row, group, defect == kUnswizzledRead ? 0 : row);
        uint32_t key[4] = {};
        if (defect != kDivergentLdmatrix || lane < 16) {
          ldmatrix(key, keys + buffer * kTileElements + from);
        }
        if (defect != kDivergentMma || lane < 16) mma(score[n], query[step], key[0], key[1]);
        const bool swapped = defect == kFragmentHalvesSwapped;
        mma(score[n + 1], query[step], swapped ? key[3] : key[2], swapped ? key[2] : key[3]);
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_query + warp * 16 + half * 8 + lane / 4;
      int edge = (row / chunk - 1) * chunk;
      if (defect == kMaskBeforeChunkEdge) --edge;
      if (defect == kMaskAfterChunkEdge) ++edge;
      const int first_visible = max(first_key, edge);
      const int last_visible = min(length - 1, row + (defect == kMaskSeesNextKey));
      float largest = maximum[half];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int column = tile * kTile + i / 2 * 8 + lane % 4 * 2 + i % 2;
        float& x = score[i / 2][half * 2 + i % 2];
        const bool visible = column >= first_visible && column <= last_visible;
        x = visible ? x * problem.scale_log2e : -INFINITY;
        largest = fmaxf(largest, x);
      }
      const int other = defect == kMaximumOverWrongLanes ? 4 : 1;
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const bool empty = largest == -INFINITY && defect != kEmptyRowsSubtractInfinities;
      const float base = empty ? 0.0f : largest;
      const float rescale = exponential(maximum[half] - base, defect);
      maximum[half] = largest;
      if (defect != kSumNotRescaled) sum[half] *= rescale;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& x = score[i / 2][half * 2 + i % 2];
        x = exponential(x - base, defect);
        sum[half] += x;
        if (defect != kOutputNotRescaled) output[i / 2][half * 2 + i % 2] *= rescale;
      }
    }

#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const auto& low = score[2 * step];
      const auto& high = score[2 * step + 1];
      const uint32_t weight[4] = {pack(low[0], low[1]), pack(low[2], low[3]),
                                  pack(high[0], high[1]), pack(high[2], high[3])};
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        const int row = step * 16 + (matrix & 1) * 8 + matrix_row;
        const int from = buffer * kTileElements + swizzled(row, n + (matrix >> 1), row);
        uint32_t value[4];
        if (defect == kValuesNotTransposed) {
          ldmatrix(value, values + from);
        } else {
          ldmatrix_transposed(value, values + from);
        }
        mma(output[n], weight, value[0], value[1]);
        mma(output[n + 1], weight, value[2], value[3]);
      }
    }
    if (defect != kMissingBarrierBeforeRefill) __syncthreads();
  }
  // a block that saw no tile has copied its queries all the same
  if (defect != kMissingLastWait) wait_for_all_but<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_query + warp * 16 + half * 8 + lane / 4;
    sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
    if (defect != kSumOverTooFewLanes) sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    if (row >= length && defect != kTailRowsWritten) continue;
    const float inverse = sum[half] == 0 ? 0.0f : 1.0f / sum[half];
    __nv_bfloat16* const out = problem.out + (head + row) * kFeatures + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float* pair = output[n] + half * 2;
      *reinterpret_cast<uint32_t*>(out + n * 8) = pack(pair[0] * inverse, pair[1] * inverse);
    }
    const float logarithm = maximum[half] + log2f(sum[half]);
    if (lane % 4 == 0 || defect == kFourLanesWriteLse) {
      problem.lse[head + row] = logarithm * (defect == kBinaryLogarithm ? 1 : kLn2);
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) attention(Problem problem, int defect) {
  attention_forward(problem, defect);
}

// the same with nothing to plant: as an ordinary kernel is compiled
extern "C" __global__ void __launch_bounds__(kThreads) attention_plain(Problem problem) {
  attention_forward(problem, kNone);
}
