// Which elements of a tile dropout keeps: Philox 4x32-10, the same bits on every backend.
//
// Key = the seed's two words, counter = (j >> 2, i, h, b), word j & 3; kept iff word >= floor(p *
// 2^32). Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
#pragma once

#include "../common/problem.h"
#include "mask.h"

namespace lcattn::cpu::LCATTN_ISA {

struct PhiloxWords {
  UVec word[4];
};

LCATTN_INLINE void multiply_wide(UVec a, uint32_t b, UVec& high, UVec& low) {
  typedef uint64_t Wide __attribute__((vector_size(kWidth * 8)));
  const Wide whole = __builtin_convertvector(a, Wide) * b;
  high = __builtin_convertvector(whole >> 32, UVec);
  low = a * b;
}

LCATTN_INLINE PhiloxWords philox(uint64_t seed, UVec c0, UVec c1, UVec c2, UVec c3) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    UVec high0, low0, high1, low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

LCATTN_INLINE uint32_t dropout_bound(float dropout) {
  return static_cast<uint32_t>(static_cast<double>(dropout) * 4294967296.0);
}

// keys as rows: bit r of row c is set iff element (query + r, key + c) is kept; key is a multiple
// of 4
inline void kept_bits(const Problem& p, int64_t b, int64_t h, int64_t query, int64_t n_q,
                      int64_t key, BitTile& kept) {
  const uint32_t bound = dropout_bound(p.dropout);
  const UVec lanes = (UVec)lane_index(), none = {};
  for (int r = 0; r < kBlock; ++r) kept.row[r] = 0;
  for (int quad = 0; quad < kBlock / 4; ++quad) {
    const uint32_t j = static_cast<uint32_t>(key / 4 + quad);
    for (int64_t first = 0; first < n_q; first += kWidth) {
      const PhiloxWords words =
          philox(p.seed, none + j, lanes + static_cast<uint32_t>(query + first),
                 none + static_cast<uint32_t>(h), none + static_cast<uint32_t>(b));
      for (int w = 0; w < 4; ++w) {
        kept.row[quad * 4 + w] |= static_cast<uint64_t>(bits_at_least(words.word[w], bound))
                                  << first;
      }
    }
  }
}

}  // namespace lcattn::cpu::LCATTN_ISA
