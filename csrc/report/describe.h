// A plan as data for people: what each node does on which devices, and how the devices' memory goes over the step.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "sim/memory.h"
#include "sim/simulate.h"

namespace soap {

struct NodeDescription {
  int samples = 1, attributes = 1, parameters = 1;  // degrees by SOAP letter
  int chunks = 1, replicas = 1;
  std::vector<int> devices;  // sorted, each once
  std::string cuts;          // "n=2x4t o=2"
  int64_t result_bytes = 0;  // of its results' tiles, on the device that holds most of them
};

NodeDescription describe(const Program& program, NodeId node);

struct MemoryPoint {
  int64_t time_ns = 0;  // from here to the next point
  std::array<int64_t, kHeldKinds> bytes{};
};

// Per device the memory over a step, in the order of time; each of `most_points` equal stretches of the step shows the fullest moment that begins in it, so
// the peak is there. `simulation` must have been recorded.
std::vector<std::vector<MemoryPoint>> memory_over_time(const Program& program, const Simulation& simulation, const Machine& machine, int most_points);

}  // namespace soap
