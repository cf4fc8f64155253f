// Simulate: one step (forward, backward, update) of a Program on a machine. Discrete: every device has a compute clock, and a communication clock
// where the machine overlaps. Steps are taken in the Program's order, which is the order in which the runtime takes them:
//
//   compute(node, chunk) on d:  clock[d] = max(clock[d], arrival of what it reads) + cost
//   movement among ranks R:     begin = max over R of the clock that moves; end = begin + price; both ends wait
//
// Times are integer nanoseconds. The gradient of a parameter is waited for only by the end of the step.
#pragma once

#include <string>
#include <vector>

#include "cost/cost.h"

namespace soap {

struct Event {
  int step = -1;
  int device = 0;
  bool communication = false;
  int64_t begin_ns = 0, end_ns = 0;
};

struct Simulation {
  int64_t step_ns = 0;
  std::vector<int64_t> compute_ns, communication_ns;  // per device
  std::vector<int64_t> memory_bytes;                  // per device, peak: parameters, gradients, optimizer state (2x, AdamW), activations
  std::vector<int64_t> node_ns;                       // per node: forward and backward, slowest device
  std::vector<int64_t> moved_bytes;                   // per node: what its results' movements send in all, both ways
  std::vector<Event> events;                          // only when recorded
};

Simulation simulate(const Program& program, const CostModel& cost, bool record = false);
// "features.0#1", "features.0 -> fill": for timelines.
std::string step_name(const Program& program, int step);

}  // namespace soap
