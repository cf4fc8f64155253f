// Simulate: one step (forward, backward, update) of a Program on a machine. Discrete: every device has a compute clock C and, where the
// machine overlaps, a communication clock M. Steps are taken in the Program's order, which is the order in which the runtime issues them:
//
//                                without overlap              with overlap
//   compute on d          C[d] = C[d] + cost                  max(C[d], arrival of what it reads at d) + cost
//   movement among R      begin = max over R of C[r]          max over R of M[r] and of when r computed what it sends
//                         C[r] = begin + price                M[r] = begin + price
//   update on d           C[d] + cost                         max(C[d], M[d]) + cost: all gradients are there
//
// Parameters and inputs are there from the start; a parameter is gathered again (Keep::kUse) when forward has given its copy back. Times are
// integer nanoseconds. Memory: sim/memory.h.
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
  std::vector<int64_t> memory_bytes;                  // per device, peak: parameters, gradients, optimizer state (2x, AdamW), activations, copies
  std::vector<int64_t> node_ns;                       // per node: forward and backward, slowest device
  std::vector<int64_t> moved_bytes;                   // per node: what its results' movements send in all, both ways
  std::vector<Event> events;                          // only when recorded
};

// The optimizer's time for a part of a parameter: it reads parameter, gradient and state and writes parameter and state.
int64_t update_ns(const Machine& machine, int64_t bytes);
Simulation simulate(const Program& program, const CostModel& cost, bool record = false);
// "features.0#1", "features.0 -> fill": for timelines.
std::string step_name(const Program& program, int step);

}  // namespace soap
