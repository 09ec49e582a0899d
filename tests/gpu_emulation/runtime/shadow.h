// shadow memory: what is known of each byte of a region, and who last touched it
#pragma once
#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
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
  // the last write was an atomic operation, which observes the strong writes before it
  kReadModifyWrite = 64,
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

// for whom an access is atomic or volatile: nobody, its block's threads, all threads; a read-only
// load is weaker than all, as it may meet no write of its launch even in order
enum class Strength : uint32_t { kReadOnly, kPlain, kBlock, kDevice };

// the lanes of a warp that read in one epoch, or that wrote strongly, so that others' strong writes
// could come after theirs without order
struct Readers {
  Stamp warp;
  uint32_t lanes;
  Strength strength;
  bool wrote;
};

// a block that did so before the cell's readers did, and the first epoch in which it did
struct OtherReader {
  uint32_t block, epoch;
  Strength strength;
  bool wrote;
  auto operator<=>(const OtherReader&) const = default;
};

// a list of them by its last; cells that the same blocks read share one
struct OtherReaders {
  // an index, 0 for the empty list
  uint32_t before;
  OtherReader last;
  Strength weakest;
  auto operator<=>(const OtherReaders&) const = default;
};

// of 16 bytes, or of a word where those are divided, or of a byte where a word is
struct Cell {
  // block 0 means never
  Stamp write;
  uint32_t write_site;
  Readers readers;
  // an index that begins at 1 of readers besides
  uint32_t more_readers;
  // an index of blocks of this launch that read before the readers' did
  uint32_t other_readers;
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
  std::vector<OtherReaders> other_reader_lists;
  std::map<OtherReaders, uint32_t> other_reader_indices;
  // the index that was asked for last
  uint32_t latest_list = 0;

  void resize(size_t bytes);
  void reset(size_t bytes);
  void mark_written(size_t begin, size_t end);
  void disown(size_t begin, size_t end);
  void divide(Cell& cell);
  // once all quarters were written by one access, if that leaves no readers
  void unite(Cell& cell);
  // the smallest that has the byte
  const Cell& cell_at(size_t offset) const;
  std::vector<Readers>& more_readers(Cell& cell);
  // those without lanes
  void drop_empty_readers(Cell& cell);
  void forget_readers(Cell& cell);
  void add(uint32_t& other_readers, const OtherReader& reader);
  // the readers become other blocks' of which the first in this launch is `first_block`
  void hand_on_readers(Cell& cell, uint32_t first_block);

  // visit(Readers&) of the block that read last
  template <typename Visit>
  void for_each_readers(Cell& cell, Visit&& visit) {
    if (cell.readers.lanes) visit(cell.readers);
    if (!cell.more_readers) return;
    for (Readers& readers : reader_lists[cell.more_readers - 1]) visit(readers);
  }

  // visit(OtherReader) from `first_block` on, the last first
  template <typename Visit>
  void for_each_other(uint32_t other_readers, uint32_t first_block, Visit&& visit) const {
    for (uint32_t i = other_readers; i; i = other_reader_lists[i - 1].before) {
      const OtherReader& reader = other_reader_lists[i - 1].last;
      if (reader.block < first_block) return;
      visit(reader);
    }
  }
};

}  // namespace emulation
