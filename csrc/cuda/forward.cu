// The forward pass on tensor cores, for compute capability 8.0 and later.
//
//   score = softcap(scale q_i . k_j + bias[clamp(o)] + slope |o|),   out_i = sum_j p_ij v_j
//
// Grid: (rows of the block table that hold queries, H, B). A block of four warps owns the 64
// queries of one row and walks the key blocks that the row names, full runs and bit tiles alike; a
// warp owns 16 of the queries, all keys of a block. The K and V tiles of the next block are copied
// to shared memory while those of the current one are used; Q lives in registers. float32
// accumulation; the softmax is in units of log2.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "mma.cuh"
#include "walk.cuh"

namespace lcattn::cuda {
namespace {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr int kWarpRows = 16;
// 16-byte chunks hold 8 elements
constexpr int kChunk = 8;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// The address of the first element of a row. Elements are 2 bytes; rows are adjacent elements.
__device__ __forceinline__ const uint16_t* row_of(const View& view, int b, int head, int64_t row) {
  return static_cast<const uint16_t*>(view.data) + b * view.batch + head * view.head +
         row * view.row;
}

// Where a 16-byte chunk of a row lies in a tile [64, D]: the exclusive or lets the eight rows that
// ldmatrix reads at once fall into different banks.
template <int kD>
__device__ __forceinline__ int chunk_at(int row, int chunk) {
  return row * (kD / kChunk) + (chunk ^ (row & 7));
}

// starts copying rows [first, first + 64) of a [S, D] tensor to a tile; rows at or beyond S are
// zeros
template <int kD>
__device__ __forceinline__ void copy_tile(uint4* tile, const View& view, int b, int head,
                                          int64_t first, int64_t S) {
  constexpr int kRowChunks = kD / kChunk;
#pragma unroll
  for (int at = 0; at < kBlock * kRowChunks; at += kThreads) {
    const int row = (at + threadIdx.x) / kRowChunks, chunk = (at + threadIdx.x) % kRowChunks;
    const bool wanted = first + row < S;
    const uint16_t* from = row_of(view, b, head, wanted ? first + row : 0) + chunk * kChunk;
    copy_async(tile + chunk_at<kD>(row, chunk), from, wanted);
  }
}

// a learned value by offset, both ends of the table clamp
__device__ __forceinline__ float value_at(const OffsetTable& table, int phase, int h, int64_t o) {
  const int64_t index = min(max(o - table.min_offset, int64_t{0}), table.length - 1);
  return table.data[phase * table.phase_stride + h * table.head_stride + index];
}

// One lane's part of what it holds of its warp's 16 queries: rows g and g + 8 of the fragments.
template <typename Element, int kD>
class Rows {
 public:
  __device__ Rows(const Problem& p, int b, int h, int64_t q_row)
      : p_(p),
        b_(b),
        h_(h),
        lane_(threadIdx.x % 32),
        tile_row_(threadIdx.x / 32 * kWarpRows + lane_ / 4),
        first_(q_row * kBlock - p.row_start + tile_row_) {}

  // this phase's queries as fragments; rows outside the problem are zeros
  __device__ void load_queries(int phase) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = first_ + 8 * half;
      const bool wanted = i >= 0 && i < p_.T;
      const uint32_t* row =
          reinterpret_cast<const uint32_t*>(row_of(p_.q[p_.q_of[phase]], b_, h_, wanted ? i : 0));
#pragma unroll
      for (int step = 0; step < kD / 16; ++step) {
        // columns 16 step + 2 t and 16 step + 8 + 2 t
        const int word = step * 8 + lane_ % 4;
        q_[step][half] = wanted ? row[word] : 0;
        q_[step][half + 2] = wanted ? row[word + 4] : 0;
      }
    }
  }

  // one block of keys: scores, softmax, and p v added to the sums
  __device__ void attend(const Visit& visit, const uint4* k_tile, const uint4* v_tile) {
    // [16, 64] of the warp: 8 columns each
    float scores[kBlock / 8][4] = {};
    multiply_keys(scores, k_tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      add_terms(scores, visit, half);
      soften(scores, half);
    }
    multiply_values(scores, v_tile);
  }

  __device__ void store() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = row_sum_[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      float top = row_max_[half], keep = 1.0f;
      if (p_.sink != nullptr) {
        const float sink = p_.sink[h_] * kLog2e, above = fmaxf(top, sink);
        if (above > minus_infinity()) {
          keep = exp2_approximate(top - above);
          sum = sum * keep + exp2_approximate(sink - above);
          top = above;
        }
      }
      const int64_t i = first_ + 8 * half;
      if (i < 0 || i >= p_.T) continue;
      // a row that sees nothing is zero
      const float factor = sum > 0.0f ? keep / sum : 0.0f;
      uint32_t* row = reinterpret_cast<uint32_t*>(const_cast<uint16_t*>(row_of(p_.out, b_, h_, i)));
#pragma unroll
      for (int column = 0; column < kD / 8; ++column) {
        row[column * 4 + lane_ % 4] =
            Element::pack(acc_[column][2 * half] * factor, acc_[column][2 * half + 1] * factor);
      }
      if (lane_ % 4 == 0) {
        const float lse = sum > 0.0f ? (top + log2f(sum)) * kLn2 : minus_infinity();
        p_.lse[(b_ * p_.H + h_) * p_.T + i] = lse;
      }
    }
  }

 private:
  __device__ void multiply_keys(float (&scores)[kBlock / 8][4], const uint4* tile) const {
    const int matrix = lane_ / 8, row = lane_ % 8;
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
#pragma unroll
      for (int column = 0; column < kBlock / 8; column += 2) {
        uint32_t k[4];
        const int key = (column + matrix / 2) * 8 + row;
        load_matrices(k, tile + chunk_at<kD>(key, step * 2 + matrix % 2));
        Element::mma(scores[column], q_[step], k[0], k[1]);
        Element::mma(scores[column + 1], q_[step], k[2], k[3]);
      }
    }
  }

  __device__ void multiply_values(const float (&weights)[kBlock / 8][4], const uint4* tile) {
    const int matrix = lane_ / 8, row = lane_ % 8;
#pragma unroll
    for (int step = 0; step < kBlock / 16; ++step) {
      const float *left = weights[2 * step], *right = weights[2 * step + 1];
      const uint32_t p[4] = {Element::pack(left[0], left[1]), Element::pack(left[2], left[3]),
                             Element::pack(right[0], right[1]), Element::pack(right[2], right[3])};
#pragma unroll
      for (int column = 0; column < kD / 8; column += 2) {
        uint32_t v[4];
        const int key = step * 16 + matrix % 2 * 8 + row;
        load_matrices_transposed(v, tile + chunk_at<kD>(key, column + matrix / 2));
        Element::mma(acc_[column], p, v[0], v[1]);
        Element::mma(acc_[column + 1], p, v[2], v[3]);
      }
    }
  }

  // which keys of the block the row sees, one bit each
  __device__ uint64_t visible(const Visit& visit, int half) const {
    uint64_t bits = ~uint64_t{0};
    if (visit.tile >= 0) {
      const uint2* tile =
          reinterpret_cast<const uint2*>(p_.mask_tiles) + int64_t{kBlock} * visit.tile;
      const uint2 words = tile[tile_row_ + 8 * half];
      bits = words.x | uint64_t{words.y} << 32;
    }
    const int64_t n_left = p_.S - int64_t{kBlock} * visit.k_block;
    if (n_left < kBlock) bits &= (uint64_t{1} << n_left) - 1;
    if (p_.key_bits != nullptr) {
      const int64_t n_words = (p_.S + 31) / 32;
      const int32_t* words = p_.key_bits + b_ * n_words + 2 * visit.k_block;
      const uint32_t high = 2 * visit.k_block + 1 < n_words ? words[1] : 0;
      bits &= static_cast<uint32_t>(words[0]) | uint64_t{high} << 32;
    }
    return bits;
  }

  // scores of one row from products: scaled, with bias and slope, capped, masked, in units of log2
  __device__ void add_terms(float (&scores)[kBlock / 8][4], const Visit& visit, int half) const {
    // this lane's first column becomes bit 0, so that each test is of a constant bit
    const uint64_t bits = visible(visit, half) >> lane_ % 4 * 2;
    const int64_t i = min(max(first_ + 8 * half, int64_t{0}), p_.T - 1);
    const bool by_offset = p_.bias.data != nullptr || p_.slope != nullptr;
    const int f = visit.phase;
    const int64_t q_pos =
        p_.q_pos == nullptr ? p_.row_start + i
                            : p_.q_pos[f * p_.q_pos_phase_stride + b_ * p_.q_pos_batch_stride + i];
    const float slope = p_.slope == nullptr ? 0.0f : p_.slope[h_];
#pragma unroll
    for (int column = 0; column < kBlock / 8; ++column) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[column][2 * half + e];
        if ((bits >> (column * 8 + e) & 1) == 0) {
          score = minus_infinity();
          continue;
        }
        score *= p_.scale;
        if (by_offset) {
          const int64_t j = int64_t{kBlock} * visit.k_block + column * 8 + lane_ % 4 * 2 + e;
          const int64_t k_pos =
              p_.k_pos == nullptr
                  ? j
                  : p_.k_pos[f * p_.k_pos_phase_stride + b_ * p_.k_pos_batch_stride + j];
          const int64_t o = k_pos - q_pos;
          if (p_.bias.data != nullptr) score += value_at(p_.bias, f, h_, o);
          score += slope * static_cast<float>(o < 0 ? -o : o);
        }
        if (p_.softcap > 0.0f) score = p_.softcap * tanhf(score / p_.softcap);
        score *= kLog2e;
      }
    }
  }

  // scores to weights, relative to the row's new maximum; what was summed before is scaled to it
  __device__ void soften(float (&scores)[kBlock / 8][4], int half) {
    float top = row_max_[half];
#pragma unroll
    for (int column = 0; column < kBlock / 8; ++column) {
      top = fmaxf(top, fmaxf(scores[column][2 * half], scores[column][2 * half + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    // nothing seen so far: any finite reference gives weights of zero
    const float reference = top == minus_infinity() ? 0.0f : top;
    const float keep = exp2_approximate(row_max_[half] - reference);
    row_max_[half] = top;
    row_sum_[half] *= keep;
#pragma unroll
    for (int column = 0; column < kD / 8; ++column) {
      acc_[column][2 * half] *= keep;
      acc_[column][2 * half + 1] *= keep;
    }
#pragma unroll
    for (int column = 0; column < kBlock / 8; ++column) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[column][2 * half + e];
        score = exp2_approximate(score - reference);
        row_sum_[half] += score;
      }
    }
  }

  const Problem& p_;
  const int b_, h_;
  const int lane_, tile_row_;
  const int64_t first_;  // query of the upper row; outside [0, T) where the problem ends in a block
  uint32_t q_[kD / 16][4];
  float acc_[kD / 8][4] = {};
  float row_max_[2] = {minus_infinity(), minus_infinity()};
  float row_sum_[2] = {};
};

template <typename Element, int kD>
__device__ __forceinline__ void forward_block(const Problem& p) {
  constexpr int kTile = kBlock * kD / kChunk;
  extern __shared__ uint4 tiles[];
  const int b = blockIdx.z, h = blockIdx.y, g = h / static_cast<int>(p.H / p.G);
  const int64_t q_row = p.row_start / kBlock + blockIdx.x;
  Rows<Element, kD> rows(p, b, h, q_row);
  Walk walk(p, b, h, q_row);

  const auto copy = [&](const Visit& visit, int stage) {
    const int64_t first = int64_t{kBlock} * visit.k_block;
    copy_tile<kD>(tiles + 2 * stage * kTile, p.k[p.k_of[visit.phase]], b, g, first, p.S);
    copy_tile<kD>(tiles + (2 * stage + 1) * kTile, p.v[p.v_of[visit.phase]], b, g, first, p.S);
  };
  Visit visit, upcoming;
  bool more = walk.next(upcoming);
  if (more) copy(upcoming, 0);
  commit_copies();
  int loaded_phase = -1;
  for (int stage = 0; more; stage ^= 1) {
    visit = upcoming;
    more = walk.next(upcoming);
    if (more) copy(upcoming, stage ^ 1);
    commit_copies();
    if (visit.phase != loaded_phase) rows.load_queries(loaded_phase = visit.phase);
    wait_copies<1>();
    __syncthreads();
    rows.attend(visit, tiles + 2 * stage * kTile, tiles + (2 * stage + 1) * kTile);
    // before the tiles are written again
    __syncthreads();
  }
  wait_copies<0>();
  rows.store();
}

}  // namespace

// named plainly, so that a launch can name its kernel
extern "C" {
__global__ void __launch_bounds__(kThreads)
    lcattn_cuda_forward_bf16_d64(const __grid_constant__ Problem p) {
  forward_block<Bf16, 64>(p);
}
__global__ void __launch_bounds__(kThreads)
    lcattn_cuda_forward_bf16_d128(const __grid_constant__ Problem p) {
  forward_block<Bf16, 128>(p);
}
__global__ void __launch_bounds__(kThreads)
    lcattn_cuda_forward_f16_d64(const __grid_constant__ Problem p) {
  forward_block<F16, 64>(p);
}
__global__ void __launch_bounds__(kThreads)
    lcattn_cuda_forward_f16_d128(const __grid_constant__ Problem p) {
  forward_block<F16, 128>(p);
}
}

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("lcattn: ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace

void forward(const Problem& p, const Launch& launch, int device, void* stream) {
  const bool bf16 = p.dtype == DType::kBFloat16;
  const auto kernel = p.D == 64
                          ? (bf16 ? lcattn_cuda_forward_bf16_d64 : lcattn_cuda_forward_f16_d64)
                          : (bf16 ? lcattn_cuda_forward_bf16_d128 : lcattn_cuda_forward_f16_d128);
  int before = device;
  check(cudaGetDevice(&before), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(launch.shared_bytes)),
        "cudaFuncSetAttribute");
  const dim3 grid(launch.grid[0], launch.grid[1], launch.grid[2]);
  kernel<<<grid, launch.threads, launch.shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  const cudaError_t error = cudaGetLastError();
  check(cudaSetDevice(before), "cudaSetDevice");
  check(error, launch.kernel);
}

}  // namespace lcattn::cuda
