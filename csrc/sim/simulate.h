// Simulate: one step (forward, backward, update) of a Program on a machine. Discrete: every device has a compute clock C and, where the
// machine overlaps, a communication clock M. Steps are taken in the Program's order, which is the order in which the runtime issues them:
//
//                                without overlap              with overlap
//   compute on d          C[d] = C[d] + cost                  max(C[d], arrival of what it reads at d) + cost
//   movement among R      begin = max over R of C[r]          max over R of M[r] and of when r computed what it sends
//                         C[r] = begin + price                M[r] = begin + price
//   update on d           C[d] + cost                         max(C[d], M[d]) + cost: all gradients are there
//
// The backward step of an operator that backward computes again (Program::regions) takes its forward's time too.
// Where a host launches what its devices do (Machine::launch), it has a clock H for each of them, which waits for nothing: an operator, a collective and the
// update take their launches on it, in the same order, and the device begins none before that. Steps follow each other, and a host that is done begins the
// next. So a step takes, from one to the next, once the faster of the two has got ahead,
//
//   max(the step above, max over d of H[d] at its end)
//
// tests/unit/test_launch.py simulates steps in a row. Recorded events of a step that the host bounds begin after their launches; else the host is ahead.
//
// Where devices of a host slow each other down (Machine::busy_speed), how long a computation takes depends on what the others do then:
// sim/shared_timeline.h. Machine::step_overhead_ns comes on top, once.
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
  bool host = false;  // the launches; step -1: of the update
};

struct Simulation {
  int64_t step_ns = 0;
  std::vector<int64_t> compute_ns, communication_ns;  // per device
  std::vector<int64_t> host_ns;                       // per device, of launches; all 0 where nothing is launched
  int64_t device_step_ns = 0;                         // of a host that takes no time; the host bounds the step where that is less than step_ns
  std::vector<int64_t> memory_bytes;                  // per device, peak: parameters, gradients, optimizer state (2x, AdamW), activations, copies
  std::vector<int64_t> node_ns;                       // per node: forward and backward, slowest device
  std::vector<int64_t> moved_bytes;                   // per node: what its results' movements send in all, both ways
  std::vector<Event> events;                          // only when recorded
};

Simulation simulate(const Program& program, const CostModel& cost, bool record = false);
// The optimizer's time on a device for a part of a parameter of so many bytes.
int64_t update_ns(const Machine& machine, int device, int64_t bytes);
// Of the host to launch the update of a device's part of one parameter; the step's own (launch_ns("update")) comes once on top.
inline int64_t update_launch_ns(const Machine& machine) {
  return machine.launch_ns("update", true);
}
// Bytes of an element in an all-reduce: sums of 16-bit floats travel in float32.
int64_t reduced_element_bytes(const Tensor& tensor, Reduce reduce);
// "features.0#1", "features.0 -> fill": for timelines.
std::string step_name(const Program& program, int step);

}  // namespace soap
