// Rows of a strided matrix through global memory, with defects to plant in their addresses.
#include <cstdint>

namespace {

enum Defect : int {
  kNone,
  kReadsPastRow,
  kWritesPastRow,
  kTailRowsRead,
  kTailRowsWritten,
  kMisalignedVector,
  kAddressInInt32,
};

}  // namespace

// y = x with each row divided by its sum. A warp takes a row, and each of its lanes pairs of
// columns. Of x, whose rows are x_stride apart, only those from first_row on are in memory, at `x`.
extern "C" __global__ void normalize_rows(const float* x, float* y, int rows, int columns,
                                          int64_t x_stride, int64_t y_stride, int first_row,
                                          int defect) {
  const int row = blockIdx.x * blockDim.y + threadIdx.y, pairs = columns / 2;
  const int read = defect == kTailRowsRead ? row : min(row, rows - 1);
  int64_t offset = (int64_t{first_row} + read) * x_stride;
  if (defect == kAddressInInt32) offset = (first_row + read) * static_cast<int>(x_stride);
  const float* const start = x - first_row * x_stride + offset + (defect == kMisalignedVector);
  const float2* const from = reinterpret_cast<const float2*>(start);
  float* const to = y + row * y_stride;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < pairs + (defect == kReadsPastRow); i += 32) {
    sum += from[i].x + from[i].y;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(~0u, sum, distance);
  }
  if (row >= rows && defect != kTailRowsWritten) return;
  for (int i = threadIdx.x; i < pairs + (defect == kWritesPastRow); i += 32) {
    const float2 pair = i < pairs ? from[i] : float2{};
    to[2 * i] = pair.x / sum;
    to[2 * i + 1] = pair.y / sum;
  }
}
