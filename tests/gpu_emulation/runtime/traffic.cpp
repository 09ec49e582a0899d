#include "traffic.h"

#include <algorithm>

#include "scheduler.h"

namespace emulation {

namespace {

constexpr uint32_t kBanks = 32;
constexpr uint32_t kBankBytes = 4;
constexpr uint32_t kSectorBytes = 32;

// after so many of a site, a lane lets the others go on
constexpr uint32_t kMostRequests = 1024;

struct Request {
  uint32_t lanes, bytes;
  uint64_t address[kLanes];
};

// the lanes' n-th accesses of a site are one request of the warp
struct Pending {
  uint32_t count[kLanes];
  std::vector<Request> requests;
};

std::vector<Traffic> totals;
std::vector<Pending> pending;
std::vector<uint32_t> touched;

uint32_t bank_passes(const uint64_t* addresses, uint32_t count, uint32_t bytes) {
  // the distinct words of each bank; a group has at most 32 words
  uint64_t words[kBanks][kLanes];
  uint32_t by_bank[kBanks] = {}, most = 0;
  for (uint32_t i = 0; i < count; ++i) {
    for (uint32_t byte = 0; byte < std::max(bytes, kBankBytes); byte += kBankBytes) {
      const uint64_t word = (addresses[i] + byte) / kBankBytes;
      uint64_t* in_bank = words[word % kBanks];
      uint32_t& have = by_bank[word % kBanks];
      if (std::find(in_bank, in_bank + have, word) != in_bank + have) continue;
      in_bank[have++] = word;
      most = std::max(most, have);
    }
  }
  return most;
}

void count_shared(Traffic& total, const Request& request) {
  uint64_t addresses[kLanes];
  uint32_t lanes = 0;
  for (uint32_t rest = request.lanes; rest; rest &= rest - 1) {
    addresses[lanes++] = request.address[__builtin_ctz(rest)];
  }
  // 128 bytes are served together: all lanes, or halves or quarters of wider accesses
  const uint32_t group = kLanes * kBankBytes / std::max(request.bytes, kBankBytes);
  for (uint32_t begin = 0; begin < lanes; begin += group) {
    total.passes += bank_passes(addresses + begin, std::min(group, lanes - begin), request.bytes);
    ++total.ideal;
  }
}

// sorts the values
uint64_t count_distinct(uint64_t* values, uint32_t count) {
  if (!std::is_sorted(values, values + count)) std::sort(values, values + count);
  return uint64_t(std::unique(values, values + count) - values);
}

void count_global(Traffic& total, const Request& request) {
  uint64_t sectors[kLanes], addresses[kLanes];
  uint32_t lanes = 0;
  for (uint32_t rest = request.lanes; rest; rest &= rest - 1) {
    const uint64_t address = request.address[__builtin_ctz(rest)];
    addresses[lanes] = address;
    sectors[lanes++] = address / kSectorBytes;
  }
  total.passes += count_distinct(sectors, lanes);
  total.ideal +=
      (count_distinct(addresses, lanes) * request.bytes + kSectorBytes - 1) / kSectorBytes;
}

}  // namespace

void note_traffic(Thread& thread, uint32_t site, uint64_t address, uint32_t bytes, bool is_shared,
                  bool is_write) {
  totals[site].is_shared = is_shared;
  totals[site].is_write = is_write;
  Pending& at_site = pending[site];
  const uint32_t ahead = at_site.count[thread.lane];
  // the other lanes catch up, and once they have, all requests are counted
  if (ahead && ahead % kMostRequests == 0) yield(thread, site);
  if (at_site.requests.empty()) touched.push_back(site);
  const uint32_t number = at_site.count[thread.lane]++;
  if (number == at_site.requests.size()) at_site.requests.emplace_back();
  Request& request = at_site.requests[number];
  request.lanes |= 1u << thread.lane;
  request.bytes = bytes;
  request.address[thread.lane] = address;
}

void note_rows(uint32_t site, const uint64_t* rows, uint32_t count, bool is_write) {
  constexpr uint32_t kRowBytes = 16, kRowsTogether = 8;
  Traffic& total = totals[site];
  total.is_shared = true;
  total.is_write = is_write;
  ++total.requests;
  for (uint32_t begin = 0; begin < count; begin += kRowsTogether) {
    total.passes += bank_passes(rows + begin, kRowsTogether, kRowBytes);
    ++total.ideal;
  }
}

void flush_traffic() {
  for (uint32_t site : touched) {
    Pending& at_site = pending[site];
    Traffic& total = totals[site];
    for (const Request& request : at_site.requests) {
      ++total.requests;
      total.is_shared ? count_shared(total, request) : count_global(total, request);
    }
    at_site.requests.clear();
    std::fill(at_site.count, at_site.count + kLanes, 0);
  }
  touched.clear();
}

void reset_traffic(uint32_t sites) {
  totals.assign(sites, Traffic{});
  for (uint32_t i = 0; i < sites; ++i) totals[i].site = i;
  pending.clear();
  pending.resize(sites);
  touched.clear();
}

const std::vector<Traffic>& traffic() { return totals; }

}  // namespace emulation
