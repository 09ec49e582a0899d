// Memory that a thread keeps between calls: one growing buffer for each use, cut into aligned
// pieces.
//
//   Scratch scratch(kWorkerScratch, bytes);      bytes: the sum of padded() over the pieces
//   float* tile = scratch.take<float>(4096);
//
// A buffer belongs to one Scratch at a time. The thread that starts a call may run workers too, so
// what the whole call shares and what one worker needs are different buffers. With poison_scratch
// every take() is filled with NaN (all bits set), so that an element read before it is written
// shows.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace lcattn::cpu {

// set by tests
extern bool poison_scratch;

namespace LCATTN_ISA {

enum ScratchUse { kCallScratch, kSharedScratch, kWorkerScratch, kScratchUses };

constexpr int64_t kScratchAlign = 64;

// what a piece of count Ts costs
template <typename T>
constexpr int64_t padded(int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  return (bytes + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
}

struct ScratchBuffer {
  char* data = nullptr;
  int64_t capacity = 0;

  ~ScratchBuffer() { std::free(data); }
};

inline ScratchBuffer& scratch_buffer(ScratchUse use) {
  static thread_local ScratchBuffer buffers[kScratchUses];
  return buffers[use];
}

class Scratch {
 public:
  Scratch(ScratchUse use, int64_t bytes) {
    ScratchBuffer& buffer = scratch_buffer(use);
    if (buffer.capacity < bytes) {
      std::free(buffer.data);
      buffer.capacity = padded<char>(bytes);
      buffer.data = static_cast<char*>(
          std::aligned_alloc(kScratchAlign, static_cast<size_t>(buffer.capacity)));
      if (buffer.data == nullptr) std::abort();
    }
    next_ = buffer.data;
    end_ = buffer.data + buffer.capacity;
  }

  template <typename T>
  T* take(int64_t count) {
    char* piece = next_;
    next_ += padded<T>(count);
    if (next_ > end_) std::abort();
    if (poison_scratch && count > 0)
      std::memset(piece, 0xff, static_cast<size_t>(count) * sizeof(T));
    return reinterpret_cast<T*>(piece);
  }

 private:
  char* next_;
  char* end_;
};

}  // namespace LCATTN_ISA
}  // namespace lcattn::cpu
