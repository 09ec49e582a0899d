// shadow memory: what is known of each byte of a region, and who last touched it
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
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

// thread and epoch, or warp and epoch; bit fields, written apart and compared together, were slow
struct Stamp {
  uint32_t block, who_and_epoch;

  static constexpr uint32_t kEpochBits = 22, kEpochs = (1u << kEpochBits) - 1;
  static Stamp of(uint32_t block, uint32_t who, uint32_t epoch) {
    return {block, who << kEpochBits | (epoch & kEpochs)};
  }
  uint32_t who() const { return who_and_epoch >> kEpochBits; }
  uint32_t epoch() const { return who_and_epoch & kEpochs; }
  bool operator==(const Stamp&) const = default;
};

// the lanes of a warp that read in one epoch
struct Readers {
  Stamp warp;
  uint32_t lanes;
};

// of 16 bytes, or of a word where those are divided, or of a byte where a word is
struct Cell {
  // block 0 means never
  Stamp write;
  uint32_t write_site;
  Readers readers;
  // the first strong read of those that nothing orders before a later one
  Stamp strong_read;
  // an index that begins at 1 of readers besides
  uint32_t more_readers;
  // a block of this launch that read before the readers' did
  uint32_t other_block;
  // null if no access told them apart
  std::array<Cell, 4>* quarters;
};

constexpr size_t kCellBytes = 16;

struct Shadow {
  std::vector<uint8_t> state;
  std::vector<Cell> cells;
  // those in use stay where they are
  std::deque<std::array<Cell, 4>> quarters;
  std::vector<std::array<Cell, 4>*> free_quarters;
  std::vector<std::vector<Readers>> reader_lists;
  std::vector<uint32_t> free_reader_lists;

  void resize(size_t bytes);
  void reset(size_t bytes);
  void mark_written(size_t begin, size_t end);
  void disown(size_t begin, size_t end);
  void divide(Cell& cell);
  // once all quarters were written by one access
  void unite(Cell& cell);
  // the smallest that has the byte
  const Cell& cell_at(size_t offset) const;
  std::vector<Readers>& more_readers(Cell& cell);
  void forget_readers(Cell& cell);
};

}  // namespace emulation
