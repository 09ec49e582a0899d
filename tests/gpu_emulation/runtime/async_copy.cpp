#include "async_copy.h"

#include <cstring>

#include "checker.h"
#include "device_memory.h"
#include "launch.h"
#include "traffic.h"

namespace emulation {

namespace {

void finish(Thread& thread, const AsyncCopy& copy, uint32_t site) {
  if (thread.checking && copy.copied) {
    check_access(thread, reinterpret_cast<uint64_t>(copy.source), copy.copied,
                 {Access::kRead, Space::kGlobal}, copy.site);
  }
  if (memcmp(copy.source, copy.data.data(), copy.copied) != 0) {
    fail(thread, site, "the source of an asynchronous copy changed while it was in flight, from %s",
         describe_site(copy.site).c_str());
  }
  memcpy(copy.destination, copy.source, copy.copied);
  memset(copy.destination + copy.copied, 0, copy.bytes - copy.copied);
  if (thread.checking) {
    check_access(thread, reinterpret_cast<uint64_t>(copy.destination), copy.bytes,
                 {Access::kCopyDone, Space::kShared}, copy.site);
  }
}

}  // namespace

void async_copy(Thread& thread, uint64_t destination, uint64_t source, uint32_t bytes,
                uint32_t copied, uint32_t site) {
  current_site = site;
  if (copied > bytes) {
    fail(thread, site, "cp.async copies %u bytes to a destination of %u", copied, bytes);
  }
  check_alignment(thread, destination, bytes, site);
  check_alignment(thread, source, bytes, site);
  AsyncCopy copy = {reinterpret_cast<char*>(destination),
                    reinterpret_cast<const char*>(source),
                    bytes,
                    copied,
                    site,
                    {}};
  if (thread.checking) {
    if (copied) {
      note_traffic(thread, site, source, copied, false, false);
      check_access(thread, source, copied, {Access::kRead, Space::kGlobal}, site);
    }
    check_access(thread, destination, bytes, {Access::kCopyIssued, Space::kShared}, site);
  }
  memcpy(copy.data.data(), copy.source, copied);
  memset(copy.destination, 0xff, bytes);
  thread.copies.push_back(copy);
}

void async_commit(Thread& thread) { thread.group_ends.push_back(thread.copies.size()); }

void async_wait(Thread& thread, uint32_t groups, uint32_t site) {
  if (thread.group_ends.size() <= groups) return;
  const size_t done = thread.group_ends.size() - groups;
  const size_t end = thread.group_ends[done - 1];
  for (size_t i = 0; i < end; ++i) finish(thread, thread.copies[i], site);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + long(end));
  thread.group_ends.erase(thread.group_ends.begin(), thread.group_ends.begin() + long(done));
  for (size_t& group_end : thread.group_ends) group_end -= end;
}

void async_wait_all(Thread& thread, uint32_t site) {
  async_commit(thread);
  async_wait(thread, 0, site);
}

}  // namespace emulation
