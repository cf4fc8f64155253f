// A segment of a program, run with an autograd graph of its own, and the backward of that graph.
//
// Autograd's order differs between ranks as soon as their graphs differ, and collectives in a different order hang. So segments have graphs apart, and
// backward takes them in the Program's order.
#pragma once

#include <functional>
#include <vector>

#include "engine/state.h"

namespace soap::engine {

struct Segment {
  struct Input {
    int value = -1;
    bool wants_grad = false;
    bool is_store = false;  // stored, or gathered anew: it stays itself, with its version, so that who changes it between forward and backward hears of it
  };
  std::vector<Input> inputs;
  std::vector<int> outputs;
  std::vector<int> given_back;  // inputs whose storage is given back after forward
  bool differentiable = false;
  bool is_region = false;   // computed again in backward
  std::vector<char> again;  // of outputs: whether they become values then
};

// (segment, its arguments) -> its results, with autograd as it is set.
using Compute = std::function<std::vector<at::Tensor>(int segment, std::vector<at::Tensor> arguments)>;

// Computes a segment, with a graph if `record` says so; the second time (`again`) only some outputs become values. The first time a region's segment has its
// graph too, and drops it at the end: torch has other kernels where nothing records (LSTM's). Gradients are off around it.
void run_forward(State& state, const Segment& segment, int index, bool record, bool again, const Compute& compute);

// Takes the gradients of the segment's outputs out of the state, and adds those of what entered it. Without Python's lock.
void run_backward(State& state, int index);

}  // namespace soap::engine
