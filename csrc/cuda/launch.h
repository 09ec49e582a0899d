// How a problem is launched on a GPU: plain C++, so that launches can be made, and tested, without
// one.
#pragma once

#include <cstdint>
#include <cstdio>

#include "../common/problem.h"

namespace lcattn::cuda {

// threads of a block; each warp of 32 owns 16 of the 64 query rows
constexpr int kThreads = 128;

struct Launch {
  char kernel[64];
  uint32_t grid[3];
  uint32_t threads;
  uint32_t shared_bytes;
};

// one block a row of the block table that holds queries, head and batch row
inline Launch plan_forward(const Problem& p) {
  const int64_t first = p.row_start / kBlock, end = (p.row_start + p.T + kBlock - 1) / kBlock;
  Launch launch{.kernel = {},
                .grid = {static_cast<uint32_t>(end - first), static_cast<uint32_t>(p.H),
                         static_cast<uint32_t>(p.B)},
                .threads = kThreads,
                // two stages of a K and a V tile, 2 bytes an element
                .shared_bytes = static_cast<uint32_t>(2 * 2 * kBlock * p.D * 2)};
  std::snprintf(launch.kernel, sizeof launch.kernel, "lcattn_cuda_forward_%s_d%d",
                p.dtype == DType::kBFloat16 ? "bf16" : "f16", static_cast<int>(p.D));
  return launch;
}

// defined where there is an nvcc; throws std::runtime_error with CUDA's message
void forward(const Problem& p, const Launch& launch, int device, void* stream);

}  // namespace lcattn::cuda
