// Order: from a DAG of tasks to the Program's one global order.
#pragma once

#include <vector>

#include "program/program.h"

namespace soap {

struct Task {
  Step step;
  std::vector<int> after;    // tasks that must come before
  std::vector<int> devices;  // that work on it
  double phase = 0;          // chunk / chunks: depth first by chunk
  int64_t rank = 0;          // position among tasks of one phase
  double work = 1;           // relative duration, for interleaving only; 0: a movement, which waits for no device
  bool backward = false;
};

// Kahn's algorithm; among ready tasks the smallest (phase, rank, id). Throws InternalError on a cycle.
std::vector<int> sort_by_priority(const std::vector<Task>& tasks);

// 1F1B: greedy list schedule on per-device clocks that prefers backward tasks. Shorter than `tasks` when the order is impossible, which means that some
// backward step needs more chunks' forward than may be in flight.
std::vector<int> sort_interleaved(const std::vector<Task>& tasks, int num_devices);

}  // namespace soap
