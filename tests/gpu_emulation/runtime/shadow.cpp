#include "shadow.h"

#include <algorithm>

namespace emulation {

void Shadow::resize(size_t bytes) {
  state.assign(bytes, kOwned);
  cells.assign((bytes + 3) / 4, Cell{});
}

void Shadow::reset(size_t bytes) {
  resize(bytes);
  splits.clear();
  free_splits.clear();
  reader_lists.clear();
  free_reader_lists.clear();
}

void Shadow::mark_written(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) state[i] |= kWritten;
}

uint32_t Shadow::new_split(const Cell& cell) {
  uint32_t index;
  if (free_splits.empty()) {
    splits.emplace_back();
    index = uint32_t(splits.size());
  } else {
    index = free_splits.back();
    free_splits.pop_back();
  }
  for (Cell& byte : splits[index - 1]) {
    byte = cell;
    byte.more_readers = 0;
    // each byte owns a list of its own
    if (cell.more_readers) more_readers(byte) = reader_lists[cell.more_readers - 1];
  }
  return index;
}

void Shadow::free_split(Cell& cell) {
  for (Cell& byte : splits[cell.split - 1]) forget_readers(byte);
  free_splits.push_back(cell.split);
  cell.split = 0;
}

std::vector<Readers>& Shadow::more_readers(Cell& cell) {
  if (!cell.more_readers) {
    if (free_reader_lists.empty()) {
      reader_lists.emplace_back();
      cell.more_readers = uint32_t(reader_lists.size());
    } else {
      cell.more_readers = free_reader_lists.back();
      free_reader_lists.pop_back();
    }
  }
  return reader_lists[cell.more_readers - 1];
}

void Shadow::forget_readers(Cell& cell) {
  if (cell.more_readers) {
    reader_lists[cell.more_readers - 1].clear();
    free_reader_lists.push_back(cell.more_readers);
    cell.more_readers = 0;
  }
  cell.readers = {};
  cell.other_block = 0;
}

}  // namespace emulation
