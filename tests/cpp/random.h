// Seeded draws for tests. mt19937 gives the same numbers everywhere; the standard's distributions don't.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "base/index_set.h"

namespace soap::test {

struct Random {
  std::mt19937 engine;
  explicit Random(uint32_t seed) : engine(seed) {}
  // From [0, n).
  int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(int percent) { return below(100) < percent; }
  std::vector<char> bits(int64_t size) {
    const int percent = static_cast<int>(below(101));
    std::vector<char> out(size);
    for (char& b : out) b = chance(percent);
    return out;
  }
};

inline IndexSet set_of(const std::vector<char>& bits) {
  std::vector<Run> runs;
  for (size_t i = 0; i < bits.size(); ++i) {
    if (bits[i]) runs.push_back({static_cast<int64_t>(i), static_cast<int64_t>(i) + 1});
  }
  return IndexSet::from_runs(std::move(runs));
}

inline std::vector<char> bits_of(const IndexSet& set, int64_t size) {
  std::vector<char> out(size);
  for (const Run& r : set.runs()) {
    for (int64_t i = r.begin; i < r.end; ++i) out.at(i) = 1;
  }
  return out;
}

}  // namespace soap::test
