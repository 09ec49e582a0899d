#include "shadow.h"

#include <algorithm>
#include <utility>

namespace emulation {

void Shadow::resize(size_t bytes) {
  state.assign(bytes, kOwned);
  cells.assign((bytes + kCellBytes - 1) / kCellBytes, Cell{});
}

void Shadow::reset(size_t bytes) {
  resize(bytes);
  quarters.clear();
  free_quarters.clear();
  reader_lists.clear();
  free_reader_lists.clear();
  other_reader_lists.clear();
  other_reader_indices.clear();
}

void Shadow::mark_written(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) state[i] |= kWritten;
}

void Shadow::disown(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) state[i] &= ~kOwned;
}

void Shadow::divide(Cell& cell) {
  if (free_quarters.empty()) free_quarters.push_back(&quarters.emplace_back());
  auto* parts = free_quarters.back();
  free_quarters.pop_back();
  for (Cell& part : *parts) {
    part = cell;
    part.more_readers = 0;
    // each part owns a list of its own
    if (cell.more_readers) {
      std::vector<Readers>& list = more_readers(part);
      list = reader_lists[cell.more_readers - 1];
    }
  }
  forget_readers(cell);
  cell.quarters = parts;
}

void Shadow::unite(Cell& cell) {
  auto* parts = cell.quarters;
  for (const Cell& part : *parts) {
    if (part.quarters || part.readers.lanes || part.other_readers) return;
  }
  cell = parts->front();
  free_quarters.push_back(parts);
}

const Cell& Shadow::cell_at(size_t offset) const {
  const Cell* cell = &cells[offset / kCellBytes];
  for (size_t part = kCellBytes / 4; cell->quarters; part /= 4) {
    cell = &(*cell->quarters)[offset / part % 4];
  }
  return *cell;
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

void Shadow::drop_empty_readers(Cell& cell) {
  if (cell.more_readers) {
    std::vector<Readers>& list = reader_lists[cell.more_readers - 1];
    std::erase_if(list, [](const Readers& readers) { return !readers.lanes; });
    if (!cell.readers.lanes && !list.empty()) {
      cell.readers = list.back();
      list.pop_back();
    }
    if (list.empty()) free_reader_lists.push_back(std::exchange(cell.more_readers, 0));
  }
}

void Shadow::forget_readers(Cell& cell) {
  if (cell.more_readers) {
    reader_lists[cell.more_readers - 1].clear();
    free_reader_lists.push_back(cell.more_readers);
    cell.more_readers = 0;
  }
  cell.readers = {};
  cell.other_readers = 0;
}

void Shadow::add(uint32_t& other_readers, const OtherReader& reader) {
  Strength weakest = reader.strength;
  if (other_readers) weakest = std::min(weakest, other_reader_lists[other_readers - 1].weakest);
  const OtherReaders list = {other_readers, reader, weakest};
  // neighbouring cells have been read alike
  if (other_reader_lists.empty() || other_reader_lists[latest_list - 1] != list) {
    const auto [found, is_new] = other_reader_indices.try_emplace(list, 0);
    if (is_new) {
      other_reader_lists.push_back(list);
      found->second = uint32_t(other_reader_lists.size());
    }
    latest_list = found->second;
  }
  other_readers = latest_list;
}

void Shadow::hand_on_readers(Cell& cell, uint32_t first_block) {
  const uint32_t block = cell.readers.warp.block;
  // what read before them is of earlier launches too
  uint32_t others = block < first_block ? 0 : cell.other_readers;
  if (block >= first_block) {
    // of each kind the first
    constexpr uint32_t kStrengths = uint32_t(Strength::kDevice) + 1;
    std::array<uint32_t, 2 * kStrengths> epochs;
    epochs.fill(~0u);
    for_each_readers(cell, [&](const Readers& readers) {
      uint32_t& epoch = epochs[readers.wrote * kStrengths + uint32_t(readers.strength)];
      epoch = std::min(epoch, readers.warp.epoch());
    });
    for (uint32_t kind = 0; kind < epochs.size(); ++kind) {
      if (epochs[kind] == ~0u) continue;
      add(others, {block, epochs[kind], Strength(kind % kStrengths), kind >= kStrengths});
    }
  }
  forget_readers(cell);
  cell.other_readers = others;
}

}  // namespace emulation
