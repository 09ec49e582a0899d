// Visibility of one tile as bits, 64 queries x 64 keys, and what of it can be skipped.
//
// BitTile::row[r] bit c. A tile of the table has queries as rows; transposed() gives keys as rows.
// Rows and columns are those of the tile being computed: the first query block may start inside a
// block of the table (`shift` rows of the table's tile are dropped), the last ones end early.
#pragma once

#include "../common/problem.h"
#include "tile_gemm.h"

namespace lcattn::cpu::LCATTN_ISA {

struct BitTile {
  uint64_t row[kBlock];
};

// the low `count` bits
LCATTN_INLINE uint64_t low_bits(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// queries as rows, of a tile of the table without its first `shift` rows
inline void load_bits(const Problem& p, int64_t tile, int64_t shift, BitTile& bits) {
  const int32_t* words = p.mask_tiles + (tile * kBlock + shift) * (kBlock / 32);
  for (int64_t r = 0; r < kBlock - shift; ++r) {
    bits.row[r] = static_cast<uint32_t>(words[2 * r]) |
                  static_cast<uint64_t>(static_cast<uint32_t>(words[2 * r + 1])) << 32;
  }
  for (int64_t r = kBlock - shift; r < kBlock; ++r) bits.row[r] = 0;
}

inline void transpose(BitTile& bits) {
  uint64_t mask = 0x00000000ffffffff;
  for (int half = 32; half > 0; half >>= 1, mask ^= mask << half) {
    for (int r = 0; r < kBlock; r = (r + half + 1) & ~half) {
      const uint64_t swapped = ((bits.row[r] >> half) ^ bits.row[r + half]) & mask;
      bits.row[r] ^= swapped << half;
      bits.row[r + half] ^= swapped;
    }
  }
}

// which keys of the block that starts at key exist and are not padding
LCATTN_INLINE uint64_t key_word(const Problem& p, int64_t b, int64_t key) {
  const uint64_t inside = low_bits(p.S - key);
  if (p.key_bits == nullptr) return inside;
  const int64_t words = (p.S + 31) / 32, word = key / 32;
  const int32_t* row = p.key_bits + b * words;
  uint64_t bits = static_cast<uint32_t>(row[word]);
  if (word + 1 < words) bits |= static_cast<uint64_t>(static_cast<uint32_t>(row[word + 1])) << 32;
  return bits & inside;
}

constexpr int kStrips = (kBlock + kTileRows - 1) / kTileRows;

// a range of columns
struct Extent {
  uint8_t first, end;
};

// of each strip of kTileRows rows, the columns from the first to the last that any of its rows sees
inline void find_extents(const BitTile& bits, Extent extents[kStrips]) {
  for (int s = 0; s < kStrips; ++s) {
    uint64_t seen = 0;
    for (int r = s * kTileRows; r < (s + 1) * kTileRows && r < kBlock; ++r) seen |= bits.row[r];
    extents[s].first = seen ? static_cast<uint8_t>(__builtin_ctzll(seen)) : 0;
    extents[s].end = seen ? static_cast<uint8_t>(64 - __builtin_clzll(seen)) : 0;
  }
}

}  // namespace lcattn::cpu::LCATTN_ISA
