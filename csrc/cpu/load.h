// Rows of a tensor to and from padded float32 tiles, whatever the dtype, strides and head dim.
//
// A tile is row-major [kBlock][padded_dim(D)] with zeros from column D on. rows_of() reads float32
// with dim stride 1 where it lies and copies anything else, one tile at a time.
#pragma once

#include "../common/problem.h"
#include "simd.h"
#include "tile_gemm.h"

namespace lcattn::cpu::LCATTN_ISA {

// whole vectors
constexpr int64_t padded_dim(int64_t dim) { return (dim + kWidth - 1) / kWidth * kWidth; }

LCATTN_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

LCATTN_INLINE float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

LCATTN_INLINE float from_float16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, body = x & 0x7fff;
  uint32_t bits = sign | ((body << 13) + 0x38000000);
  if (body >= 0x7c00) bits = sign | 0x7f800000 | (body << 13);
  float y;
  std::memcpy(&y, &bits, 4);
  // subnormal: a multiple of 2^-24
  if (body < 0x400) y = (sign ? -1.0f : 1.0f) * static_cast<float>(body) * 5.9604644775390625e-8f;
  return y;
}

// round to nearest even, subnormals too
LCATTN_INLINE uint16_t to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000) {
    // adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the addition
    float size;
    std::memcpy(&size, &bits, 4);
    size += 0.5f;
    std::memcpy(&bits, &size, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13));
}

// element index of a dtype
LCATTN_INLINE float load_element(const void* data, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t half = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kBFloat16 ? from_bfloat16(half) : from_float16(half);
}

LCATTN_INLINE void store_element(void* data, int64_t index, DType dtype, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = x;
  } else {
    static_cast<uint16_t*>(data)[index] =
        dtype == DType::kBFloat16 ? to_bfloat16(x) : to_float16(x);
  }
}

// kWidth contiguous elements from an index on
LCATTN_INLINE Vec load_vector(const void* data, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) return load(static_cast<const float*>(data) + index);
  const uint16_t* half = static_cast<const uint16_t*>(data) + index;
  if (dtype == DType::kBFloat16) return load_bfloat16(half);
#if defined(__AVX2__)
  return load_float16(half);
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = from_float16(half[i]);
  return v;
#endif
}

LCATTN_INLINE int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// where row `row` of (b, head) starts
LCATTN_INLINE char* row_address(const View& view, DType dtype, int64_t b, int64_t head,
                                int64_t row) {
  const int64_t index = b * view.batch + head * view.head + row * view.row;
  return static_cast<char*>(view.data) + index * element_bytes(dtype);
}

template <DType kType>
inline void copy_whole_vectors(const char* from, int64_t stride_bytes, int64_t count, int64_t whole,
                               float factor, float unit, float* tile, int64_t stride) {
  const bool scaled = factor != 1.0f || unit != 1.0f;
  for (int64_t r = 0; r < count; ++r, from += stride_bytes, tile += stride) {
    for (int64_t d = 0; d < whole; d += kWidth) {
      Vec v = load_vector(from, d, kType);
      if (scaled) v = v * broadcast(factor) * broadcast(unit);
      store(tile + d, v);
    }
  }
}

// `count` rows of `dim` elements, times factor, then times unit, to float32 rows of padded_dim(dim)
inline void copy_rows(const View& view, DType dtype, int64_t b, int64_t head, int64_t row,
                      int64_t count, int64_t dim, float factor, float* tile, float unit = 1.0f) {
  const int64_t stride = padded_dim(dim), whole = view.dim == 1 ? dim / kWidth * kWidth : 0;
  const char* from = row_address(view, dtype, b, head, row);
  const int64_t stride_bytes = view.row * element_bytes(dtype);
  if (dtype == DType::kFloat32) {
    copy_whole_vectors<DType::kFloat32>(from, stride_bytes, count, whole, factor, unit, tile,
                                        stride);
  } else if (dtype == DType::kBFloat16) {
    copy_whole_vectors<DType::kBFloat16>(from, stride_bytes, count, whole, factor, unit, tile,
                                         stride);
  } else {
    copy_whole_vectors<DType::kFloat16>(from, stride_bytes, count, whole, factor, unit, tile,
                                        stride);
  }
  if (whole == stride) return;
  for (int64_t r = 0; r < count; ++r, from += stride_bytes, tile += stride) {
    for (int64_t d = whole; d < dim; ++d) {
      tile[d] = load_element(from, d * view.dim, dtype) * factor * unit;
    }
    for (int64_t d = dim; d < stride; ++d) tile[d] = 0.0f;
  }
}

// Rows as they lie where that is possible (float32, dim stride 1 and, if whole vectors of a row are
// to be read, whole vectors in a row), otherwise copied to `tile` [count][padded_dim(dim)].
inline Rows rows_of(const View& view, DType dtype, int64_t b, int64_t head, int64_t row,
                    int64_t count, int64_t dim, bool whole_vectors, float* tile) {
  if (dtype == DType::kFloat32 && view.dim == 1 && (!whole_vectors || dim % kWidth == 0)) {
    return {reinterpret_cast<const float*>(row_address(view, dtype, b, head, row)), view.row};
  }
  copy_rows(view, dtype, b, head, row, count, dim, 1.0f, tile);
  return {tile, padded_dim(dim)};
}

// columns [0, whole) of kWidth rows, of which the last may be missing, to rows of the tile
template <DType kType>
inline void transpose_whole_vectors(const char* from, int64_t stride_bytes, int64_t rows,
                                    int64_t whole, float factor, float unit, float* tile) {
  for (int64_t d = 0; d < whole; d += kWidth) {
    Vec square[kWidth];
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) {
      square[r] = r < rows ? load_vector(from + r * stride_bytes, d, kType) : zero();
    }
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      store(tile + (d + i) * kBlock, square[i] * broadcast(factor) * broadcast(unit));
    }
  }
}

// Rows of a tile turned in place (rotary positions) by the rows of `table` [n, 2 pairs], cosines
// then sines, that `at` names, or back by them; -1 leaves a row as it is.
inline void turn_rows(float* tile, int64_t stride, int64_t count, const float* table, int64_t pairs,
                      const int32_t* at, bool back = false) {
  const int64_t whole = pairs / kWidth * kWidth;
  const float sign = back ? -1.0f : 1.0f;
  for (int64_t r = 0; r < count; ++r) {
    if (at[r] < 0) continue;
    const float* cosine = table + at[r] * 2 * pairs;
    const float* sine = cosine + pairs;
    float *low = tile + r * stride, *high = low + pairs;
    for (int64_t d = 0; d < whole; d += kWidth) {
      const Vec a = load(low + d), b = load(high + d), c = load(cosine + d);
      const Vec s = load(sine + d) * broadcast(sign);
      store(low + d, a * c - b * s);
      store(high + d, b * c + a * s);
    }
    for (int64_t d = whole; d < pairs; ++d) {
      const float a = low[d], b = high[d], s = sine[d] * sign;
      low[d] = a * cosine[d] - b * s;
      high[d] = b * cosine[d] + a * s;
    }
  }
}

// Blocks of rows that several query blocks in turn read, copied once where they can't be read in
// place: as in rows_of, and where rows lie far apart, as in a [B, T, H, D] tensor, because these
// would fall into few sets of the cache and many pages. A block has one place, the last one copied
// there stays.
class RowCache {
 public:
  static int64_t blocks(int64_t dim) {
    const int64_t fit = kBytes / (kBlock * padded_dim(dim) * 4);
    return fit < 4 ? 4 : fit < kMaxBlocks ? fit : kMaxBlocks;
  }
  static int64_t floats(int64_t dim) { return blocks(dim) * kBlock * padded_dim(dim); }

  explicit RowCache(float* tiles) : tiles_(tiles) {
    for (Tag& tag : tags_) tag = {nullptr, -1, -1, -1};
  }

  Rows rows_of(const View& view, DType dtype, int64_t b, int64_t head, int64_t row, int64_t count,
               int64_t dim, bool whole_vectors) {
    if (dtype == DType::kFloat32 && view.dim == 1 && view.row <= 2 * dim &&
        (!whole_vectors || dim % kWidth == 0)) {
      return {reinterpret_cast<const float*>(row_address(view, dtype, b, head, row)), view.row};
    }
    const int64_t place = row / kBlock % blocks(dim);
    float* tile = tiles_ + place * kBlock * padded_dim(dim);
    Tag& tag = tags_[place];
    if (tag.view != &view || tag.b != b || tag.head != head || tag.row != row) {
      copy_rows(view, dtype, b, head, row, count, dim, 1.0f, tile);
      tag = {&view, b, head, row};
    }
    return {tile, padded_dim(dim)};
  }

 private:
  // of K and of V: together half of a second-level cache of 2 MiB
  static constexpr int64_t kBytes = 512 * 1024, kMaxBlocks = 64;

  struct Tag {
    const View* view;
    int64_t b, head, row;
  };

  float* tiles_;
  Tag tags_[kMaxBlocks];
};

// The transpose of `count` <= kBlock rows, times factor, then times unit: tile [dim][kBlock], zeros
// from column count on.
inline void copy_transposed(const View& view, DType dtype, int64_t b, int64_t head, int64_t row,
                            int64_t count, int64_t dim, float factor, float* tile,
                            float unit = 1.0f) {
  const int64_t whole = view.dim == 1 ? dim / kWidth * kWidth : 0;
  const int64_t stride_bytes = view.row * element_bytes(dtype);
  for (int64_t first = 0; first < kBlock; first += kWidth) {
    const int64_t rows = count - first < kWidth ? count - first : kWidth;
    const char* from = row_address(view, dtype, b, head, row + (rows > 0 ? first : 0));
    float* to = tile + first;
    if (dtype == DType::kFloat32) {
      transpose_whole_vectors<DType::kFloat32>(from, stride_bytes, rows, whole, factor, unit, to);
    } else if (dtype == DType::kBFloat16) {
      transpose_whole_vectors<DType::kBFloat16>(from, stride_bytes, rows, whole, factor, unit, to);
    } else {
      transpose_whole_vectors<DType::kFloat16>(from, stride_bytes, rows, whole, factor, unit, to);
    }
    for (int64_t d = whole; d < dim; ++d) {
      for (int64_t r = 0; r < kWidth; ++r) {
        to[d * kBlock + r] =
            r < rows ? load_element(from + r * stride_bytes, d * view.dim, dtype) * factor * unit
                     : 0.0f;
      }
    }
  }
}

// float32 rows, times the row's factor unless factors is null, to `count` rows of a tensor
inline void store_rows(const View& view, DType dtype, int64_t b, int64_t head, int64_t row,
                       int64_t count, int64_t dim, const float* tile, int64_t stride,
                       const float* factors) {
  for (int64_t r = 0; r < count; ++r) {
    char* to = row_address(view, dtype, b, head, row + r);
    const float* from = tile + r * stride;
    const float factor = factors ? factors[r] : 1.0f;
    if (dtype == DType::kFloat32 && view.dim == 1) {
      float* out = reinterpret_cast<float*>(to);
      for (int64_t d = 0; d < dim; ++d) out[d] = from[d] * factor;
    } else if (dtype == DType::kBFloat16 && view.dim == 1) {
      uint16_t* out = reinterpret_cast<uint16_t*>(to);
      for (int64_t d = 0; d < dim; ++d) out[d] = to_bfloat16(from[d] * factor);
    } else {
      for (int64_t d = 0; d < dim; ++d) store_element(to, d * view.dim, dtype, from[d] * factor);
    }
  }
}

}  // namespace lcattn::cpu::LCATTN_ISA
