// shadow memory: what is known of each byte of a region, and who last touched it
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulation {

enum ByteState : uint8_t {
  // part of the tensor, rather than of a gap between its rows
  kOwned = 1,
  kWritten = 2,
  // the destination of an asynchronous copy that has not been waited for
  kPending = 4,
  // the last write was atomic or volatile
  kStrong = 8,
  // the last write was an atomic addition of floats
  kFloatSum = 16,
  // the last write was strong to its block's threads only
  kBlockScope = 32,
};

// thread and epoch, or warp and epoch
struct Stamp {
  uint32_t block;
  uint32_t who : 10, epoch : 22;
};

// the lanes of a warp that read in one epoch
struct Readers {
  Stamp warp;
  uint32_t lanes;
};

// of a word, or of a byte where a word is split
struct Cell {
  // block 0 means never
  Stamp write;
  uint32_t write_site;
  Readers readers;
  // an index that begins at 1 of readers besides
  uint32_t more_readers;
  // a block of this launch that read before the readers' did
  uint32_t other_block;
  // an index that begins at 1 of the cells of the word's bytes
  uint32_t split;
};

struct Shadow {
  std::vector<uint8_t> state;
  std::vector<Cell> cells;
  std::vector<std::array<Cell, 4>> splits;
  std::vector<uint32_t> free_splits;
  std::vector<std::vector<Readers>> reader_lists;
  std::vector<uint32_t> free_reader_lists;

  void resize(size_t bytes);
  void reset(size_t bytes);
  void mark_written(size_t begin, size_t end);
  uint32_t new_split(const Cell& cell);
  void free_split(Cell& cell);
  std::vector<Readers>& more_readers(Cell& cell);
  void forget_readers(Cell& cell);
};

}  // namespace emulation
