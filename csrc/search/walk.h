// A stage's operators on its clocks: one for the compute of each rank, one for movements. Movements take the ranks' compute time, or, where the
// machine overlaps, run beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "search/group_cost.h"

namespace soap {

struct WalkTimes {
  int64_t end = 0;           // of the compute of all ranks
  int64_t synchronised = 0;  // of movements too
  int64_t moved = 0, movements = 0;
};

struct Walk {
  const GroupCost& cost;
  bool overlap = false;
  std::vector<int64_t> compute = std::vector<int64_t>(cost.ranks);
  int64_t movement = 0, moved = 0;
  int movements = 0;  // that take time

  int64_t now() const { return *std::max_element(compute.begin(), compute.end()); }
  void spend(const std::vector<int64_t>& ns) {
    for (size_t d = 0; d < ns.size(); ++d) compute[d] += ns[d];
  }
  // Until then nothing computes.
  void await(int64_t end) {
    for (int64_t& c : compute) c = std::max(c, end);
  }
  // A movement that can begin at `ready`, behind those before it; when it ends.
  int64_t queue(int64_t ns, int64_t ready) {
    moved += ns;
    movements += ns > 0 ? 1 : 0;
    const int64_t begin = overlap ? std::max(movement, ready) : now();
    if (!overlap) await(begin + ns);
    return movement = begin + ns;
  }
  // `after`: what it sends is there only now. `awaited`: what follows needs it.
  void move(int64_t ns, bool after, bool awaited) {
    if (ns == 0) return;
    const int64_t end = queue(ns, after ? now() : 0);
    if (awaited) await(end);
  }
  WalkTimes times() const { return {.end = now(), .synchronised = std::max(now(), movement), .moved = moved, .movements = movements}; }
};

}  // namespace soap
