// Causal attention on tensor cores, without layouts, positions or bias: what csrc/cuda/forward.cu
// is measured against, compiled the same way.
//
// Contiguous [heads, rows, D] of bfloat16, rows a multiple of 64. Grid: (rows / 64, heads). Four
// warps own 64 queries, 16 each, and walk the key blocks up to theirs, the last of them masked; the
// next block's K and V are copied while the current one's are used.
#include "../csrc/cuda/mma.cuh"

namespace lcattn::cuda {
namespace {

constexpr int kTile = 64, kThreads = 128, kChunk = 8;

template <int kD>
class Plain {
 public:
  static constexpr int kTileChunks = kTile * kD / kChunk;

  __device__ Plain(const uint16_t* query, int first, float scale_log2)
      : lane_(threadIdx.x % 32), row_(first + lane_ / 4), scale_log2_(scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t* row = reinterpret_cast<const uint32_t*>(query + (row_ + 8 * half) * kD);
#pragma unroll
      for (int step = 0; step < kD / 16; ++step) {
        query_[step][half] = row[step * 8 + lane_ % 4];
        query_[step][half + 2] = row[step * 8 + 4 + lane_ % 4];
      }
    }
  }

  static __device__ void copy(uint4* tile, const uint16_t* from) {
#pragma unroll
    for (int at = threadIdx.x; at < kTileChunks; at += kThreads) {
      const int row = at / (kD / kChunk), chunk = at % (kD / kChunk);
      copy_async(tile + chunk_at(row, chunk), from + at * kChunk, true);
    }
  }

  template <bool kMasked>
  __device__ void attend(const uint4* keys, const uint4* values, int first_key) {
    float scores[kTile / 8][4] = {};
    const int matrix = lane_ / 8, row = lane_ % 8;
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
#pragma unroll
      for (int column = 0; column < kTile / 8; column += 2) {
        uint32_t k[4];
        load_matrices(k, keys + chunk_at((column + matrix / 2) * 8 + row, step * 2 + matrix % 2));
        Bf16::mma(scores[column], query_[step], k[0], k[1]);
        Bf16::mma(scores[column + 1], query_[step], k[2], k[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) soften<kMasked>(scores, half, first_key);
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) {
      const float *left = scores[2 * step], *right = scores[2 * step + 1];
      const uint32_t p[4] = {Bf16::pack(left[0], left[1]), Bf16::pack(left[2], left[3]),
                             Bf16::pack(right[0], right[1]), Bf16::pack(right[2], right[3])};
#pragma unroll
      for (int column = 0; column < kD / 8; column += 2) {
        uint32_t v[4];
        const int key = step * 16 + matrix % 2 * 8 + row;
        load_matrices_transposed(v, values + chunk_at(key, column + matrix / 2));
        Bf16::mma(out_[column], p, v[0], v[1]);
        Bf16::mma(out_[column + 1], p, v[2], v[3]);
      }
    }
  }

  __device__ void store(uint16_t* out, float* lse) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sum_[half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int i = row_ + 8 * half;
      uint32_t* row = reinterpret_cast<uint32_t*>(out + i * kD);
#pragma unroll
      for (int column = 0; column < kD / 8; ++column) {
        row[column * 4 + lane_ % 4] =
            Bf16::pack(out_[column][2 * half] / sum, out_[column][2 * half + 1] / sum);
      }
      if (lane_ % 4 == 0) lse[i] = (top_[half] + log2f(sum)) * 0.693147181f;
    }
  }

 private:
  static __device__ __forceinline__ int chunk_at(int row, int chunk) {
    return row * (kD / kChunk) + (chunk ^ (row & 7));
  }

  template <bool kMasked>
  __device__ void soften(float (&scores)[kTile / 8][4], int half, int first_key) {
    float top = top_[half];
#pragma unroll
    for (int column = 0; column < kTile / 8; ++column) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[column][2 * half + e];
        score *= scale_log2_;
        const int key = first_key + column * 8 + lane_ % 4 * 2 + e;
        if (kMasked && key > row_ + 8 * half) score = -1.0e6f;
        top = fmaxf(top, score);
      }
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float keep = exp2_approximate(top_[half] - top);
    top_[half] = top;
    sum_[half] *= keep;
#pragma unroll
    for (int column = 0; column < kD / 8; ++column) {
      out_[column][2 * half] *= keep;
      out_[column][2 * half + 1] *= keep;
    }
#pragma unroll
    for (int column = 0; column < kTile / 8; ++column) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[column][2 * half + e];
        score = exp2_approximate(score - top);
        sum_[half] += score;
      }
    }
  }

  const int lane_, row_;
  const float scale_log2_;
  uint32_t query_[kD / 16][4];
  float out_[kD / 8][4] = {};
  float top_[2] = {-1.0e30f, -1.0e30f}, sum_[2] = {};
};

template <int kD>
__device__ __forceinline__ void attention(const uint16_t* q, const uint16_t* k, const uint16_t* v,
                                          uint16_t* out, float* lse, int rows, float scale_log2) {
  constexpr int kTileChunks = Plain<kD>::kTileChunks;
  extern __shared__ uint4 tiles[];
  const int64_t head = static_cast<int64_t>(blockIdx.y) * rows;
  const int last = blockIdx.x;
  const int first_query = last * kTile + threadIdx.x / 32 * 16;
  Plain<kD> plain(q + head * kD, first_query, scale_log2);
  const auto copy = [&](int block) {
    uint4* tile = tiles + block % 2 * 2 * kTileChunks;
    const int64_t first = (head + block * kTile) * kD;
    Plain<kD>::copy(tile, k + first);
    Plain<kD>::copy(tile + kTileChunks, v + first);
    commit_copies();
  };
  copy(0);
  for (int block = 0; block < last; ++block) {
    copy(block + 1);
    wait_copies<1>();
    __syncthreads();
    const uint4* tile = tiles + block % 2 * 2 * kTileChunks;
    plain.template attend<false>(tile, tile + kTileChunks, block * kTile);
    // before the tiles are written again
    __syncthreads();
  }
  wait_copies<0>();
  __syncthreads();
  const uint4* tile = tiles + last % 2 * 2 * kTileChunks;
  plain.template attend<true>(tile, tile + kTileChunks, last * kTile);
  plain.store(out + head * kD, lse + head);
}

}  // namespace

extern "C" {
__global__ void __launch_bounds__(kThreads)
    plain_attention_d64(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out,
                        float* lse, int rows, float scale_log2) {
  attention<64>(q, k, v, out, lse, rows, scale_log2);
}
__global__ void __launch_bounds__(kThreads)
    plain_attention_d128(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out,
                         float* lse, int rows, float scale_log2) {
  attention<128>(q, k, v, out, lse, rows, scale_log2);
}
}

}  // namespace lcattn::cuda
