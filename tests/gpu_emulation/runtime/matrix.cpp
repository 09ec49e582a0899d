#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "checker.h"
#include "device_memory.h"
#include "half.h"
#include "launch.h"
#include "traffic.h"

namespace emulation {

namespace {

constexpr int kRows = 16, kColumns = 8;
typedef double Row __attribute__((vector_size(kColumns * sizeof(double))));

void require_whole_warp(const Warp& warp, uint32_t lanes) {
  if (lanes == ~0u) return;
  const Thread& thread = warp.threads[__builtin_ctz(lanes)];
  fail(thread, thread.site,
       "an aligned instruction needs all 32 lanes of the warp, of which %08x are there", lanes);
}

typedef float Floats __attribute__((vector_size(kColumns * sizeof(float))));
typedef uint16_t Halves __attribute__((vector_size(kColumns * sizeof(uint16_t))));
typedef uint32_t Words __attribute__((vector_size(kColumns * sizeof(uint32_t))));

// the eight elements of a row of a 16-bit tile, which four lanes hold
template <Factor kFactor>
Row widen_halves(const uint32_t* lanes) {
  Halves halves;
  memcpy(&halves, lanes, sizeof halves);
  if constexpr (kFactor == Factor::kBf16) {
    const Words words = __builtin_convertvector(halves, Words) << 16;
    return __builtin_convertvector(std::bit_cast<Floats>(words), Row);
  } else {
    Row row;
    for (int i = 0; i < kColumns; ++i) row[i] = F16::value(halves[i]);
    return row;
  }
}

// the lower 13 bits are not part of a .tf32
double widen_tf32(uint32_t bits) { return as_float(bits & 0xffffe000u); }

// PTX ISA, "Matrix fragments for mma": lane 4 r + c holds row r, and column c or 2 c and 2 c + 1,
// of each 8x4 or 8x8 tile; tiles of A go down its rows first, and B is column by column, so that a
// lane's row is a column
template <Factor kFactor, int kDepth>
struct Fragments {
  static constexpr int kTileDepth = kFactor == Factor::kTf32 ? 4 : 8;
  alignas(64) double left[kRows][kDepth];
  alignas(64) double right[kDepth][kColumns];

  explicit Fragments(const uint32_t (*in)[kLanes]) {
    constexpr int kTiles = kDepth / kTileDepth;
    for (int tile = 0; tile < kTiles; ++tile) {
      const int begin = tile * kTileDepth;
      for (int row = 0; row < 8; ++row) {
        load(in[2 * tile] + 4 * row, &left[row][begin], 1);
        load(in[2 * tile + 1] + 4 * row, &left[row + 8][begin], 1);
        load(in[2 * kTiles + tile] + 4 * row, &right[begin][row], kColumns);
      }
    }
  }

  static void load(const uint32_t* lanes, double* to, int stride) {
    if constexpr (kFactor == Factor::kTf32) {
      for (int i = 0; i < kTileDepth; ++i) to[i * stride] = widen_tf32(lanes[i]);
    } else {
      const Row row = widen_halves<kFactor>(lanes);
      for (int i = 0; i < kTileDepth; ++i) to[i * stride] = row[i];
    }
  }
};

// pessimistic: products of eight terms and the sum so far are aligned to the greatest exponent and
// cut off there to the 24 bits of float
template <int kDepth>
float truncating_sum(const double* left, const double (*right)[kColumns], int column, float sum) {
  constexpr int kTogether = std::min(kDepth, 8), kBits = 24;
  for (int begin = 0; begin < kDepth; begin += kTogether) {
    double terms[kTogether + 1] = {};
    int exponent = -1000;
    bool finite = true;
    for (int k = 0; k < kTogether; ++k) terms[k] = left[begin + k] * right[begin + k][column];
    terms[kTogether] = sum;
    for (double term : terms) {
      finite &= std::isfinite(term);
      if (term != 0) exponent = std::max(exponent, std::ilogb(term));
    }
    double total = 0;
    for (double term : terms) {
      total += finite ? std::ldexp(std::trunc(std::ldexp(term, kBits - exponent)), exponent - kBits)
                      : term;
    }
    sum = float(total);
    if (finite && std::fabs(double(sum)) > std::fabs(total)) sum = std::nextafterf(sum, 0.0f);
  }
  return sum;
}

// A times B; sums of different rows do not wait for each other
template <int kDepth>
void add_products(const double (*left)[kDepth], const double (*right)[kColumns], Row* sums) {
  if (launched().options.truncating_mma) {
    for (int row = 0; row < kRows; ++row) {
      for (int column = 0; column < kColumns; ++column) {
        sums[row][column] =
            truncating_sum<kDepth>(left[row], right, column, float(sums[row][column]));
      }
    }
    return;
  }
  for (int k = 0; k < kDepth; ++k) {
    Row terms;
    memcpy(&terms, right[k], sizeof terms);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) sums[row] += left[row][k] * terms;
  }
}

uint16_t element(const uint16_t (*rows)[8], bool transposed, int row, int column) {
  return transposed ? rows[column][row] : rows[row][column];
}

void check_row(Warp& warp, uint32_t lane, AccessKind kind) {
  Thread& thread = warp.threads[lane];
  current_site = thread.site;
  check_alignment(thread, warp.address[lane], 16, thread.site);
  if (thread.checking) check_access(thread, warp.address[lane], 16, kind, thread.site);
}

}  // namespace

template <Factor kFactor, int kDepth, bool kFloatResult>
void run_mma(Warp& warp, uint32_t lanes) {
  require_whole_warp(warp, lanes);
  constexpr uint32_t kAddend = kLeftRegisters<kFactor, kDepth> * 3 / 2;
  const Fragments<kFactor, kDepth> fragments(warp.in);
  Row sums[kRows];
  for (int row = 0; row < kRows; ++row) {
    const uint32_t half = uint32_t(row) / 8, lane = uint32_t(row) % 8 * 4;
    for (uint32_t column = 0; column < kColumns; ++column) {
      const uint32_t odd = column % 2;
      if constexpr (kFloatResult) {
        sums[row][column] = as_float(warp.in[kAddend + 2 * half + odd][lane + column / 2]);
      } else {
        sums[row][column] =
            F16::value(uint16_t(warp.in[kAddend + half][lane + column / 2] >> (odd * 16)));
      }
    }
  }
  add_products<kDepth>(fragments.left, fragments.right, sums);
  for (int row = 0; row < kRows; ++row) {
    const uint32_t half = uint32_t(row) / 8, lane = uint32_t(row) % 8 * 4;
    for (uint32_t column = 0; column < kColumns; column += 2) {
      const uint32_t to = lane + column / 2;
      const double even = sums[row][column], odd = sums[row][column + 1];
      if constexpr (kFloatResult) {
        warp.out[2 * half][to] = as_bits(float(even));
        warp.out[2 * half + 1][to] = as_bits(float(odd));
      } else {
        warp.out[half][to] = F16::round(even) | uint32_t{F16::round(odd)} << 16;
      }
    }
  }
}

template void run_mma<Factor::kBf16, 8, true>(Warp&, uint32_t);
template void run_mma<Factor::kBf16, 16, true>(Warp&, uint32_t);
template void run_mma<Factor::kF16, 8, true>(Warp&, uint32_t);
template void run_mma<Factor::kF16, 16, true>(Warp&, uint32_t);
template void run_mma<Factor::kF16, 8, false>(Warp&, uint32_t);
template void run_mma<Factor::kF16, 16, false>(Warp&, uint32_t);
template void run_mma<Factor::kTf32, 4, true>(Warp&, uint32_t);
template void run_mma<Factor::kTf32, 8, true>(Warp&, uint32_t);

// lanes 8 i to 8 i + 7 hold the addresses of the rows of matrix i
template <int kCount, bool kTransposed>
void run_ldmatrix(Warp& warp, uint32_t lanes) {
  require_whole_warp(warp, lanes);
  const Thread& first = warp.threads[0];
  if (first.checking) note_rows(first.site, warp.address, kCount * 8, false);
  for (int matrix = 0; matrix < kCount; ++matrix) {
    uint16_t rows[8][8];
    for (uint32_t row = 0; row < 8; ++row) {
      const uint32_t lane = uint32_t(matrix) * 8 + row;
      check_row(warp, lane, {Access::kRead, Space::kShared});
      memcpy(rows[row], reinterpret_cast<const char*>(warp.address[lane]), sizeof rows[row]);
    }
    for (int lane = 0; lane < int(kLanes); ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      warp.out[matrix][lane] = element(rows, kTransposed, row, column) |
                               uint32_t{element(rows, kTransposed, row, column + 1)} << 16;
    }
  }
}

template <int kCount, bool kTransposed>
void run_stmatrix(Warp& warp, uint32_t lanes) {
  require_whole_warp(warp, lanes);
  const Thread& first = warp.threads[0];
  if (first.checking) note_rows(first.site, warp.address, kCount * 8, true);
  for (int matrix = 0; matrix < kCount; ++matrix) {
    uint16_t rows[8][8];
    for (int lane = 0; lane < int(kLanes); ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t pair = warp.in[matrix][lane];
      (kTransposed ? rows[column][row] : rows[row][column]) = uint16_t(pair);
      (kTransposed ? rows[column + 1][row] : rows[row][column + 1]) = uint16_t(pair >> 16);
    }
    for (uint32_t row = 0; row < 8; ++row) {
      const uint32_t lane = uint32_t(matrix) * 8 + row;
      check_row(warp, lane, {Access::kWrite, Space::kShared, false, false, false, rows[row]});
      memcpy(reinterpret_cast<char*>(warp.address[lane]), rows[row], sizeof rows[row]);
    }
  }
}

template void run_ldmatrix<1, false>(Warp&, uint32_t);
template void run_ldmatrix<1, true>(Warp&, uint32_t);
template void run_ldmatrix<2, false>(Warp&, uint32_t);
template void run_ldmatrix<2, true>(Warp&, uint32_t);
template void run_ldmatrix<4, false>(Warp&, uint32_t);
template void run_ldmatrix<4, true>(Warp&, uint32_t);
template void run_stmatrix<1, false>(Warp&, uint32_t);
template void run_stmatrix<1, true>(Warp&, uint32_t);
template void run_stmatrix<2, false>(Warp&, uint32_t);
template void run_stmatrix<2, true>(Warp&, uint32_t);
template void run_stmatrix<4, false>(Warp&, uint32_t);
template void run_stmatrix<4, true>(Warp&, uint32_t);

void run_movmatrix(Warp& warp, uint32_t lanes) {
  require_whole_warp(warp, lanes);
  uint16_t rows[8][8];
  for (int lane = 0; lane < int(kLanes); ++lane) {
    rows[lane / 4][lane % 4 * 2] = uint16_t(warp.in[0][lane]);
    rows[lane / 4][lane % 4 * 2 + 1] = uint16_t(warp.in[0][lane] >> 16);
  }
  for (int lane = 0; lane < int(kLanes); ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    warp.out[0][lane] = rows[column][row] | uint32_t{rows[column + 1][row]} << 16;
  }
}

}  // namespace emulation
