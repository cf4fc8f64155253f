// What one step of one rank has at one time: values, gradients, and the autograd graphs of its segments.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <optional>
#include <vector>

namespace soap::engine {

// Tensors by the number of a local value; undefined: there is none.
struct Slots {
  std::vector<at::Tensor> tensors;

  explicit Slots(int count) : tensors(count) {}
  bool has(int value) const { return tensors[value].defined(); }
  at::Tensor take(int value) { return std::exchange(tensors[value], at::Tensor()); }
};

// Where a value enters a segment's graph.
struct Leaf {
  int value = -1;
  at::Tensor tensor;  // undefined: it enters by an edge
  torch::autograd::Edge edge;
};

// Where a value leaves it.
struct Output {
  int value = -1;
  torch::autograd::Edge edge;
  at::ScalarType dtype = at::kFloat;
};

struct Graph {
  std::vector<Leaf> leaves;
  std::vector<Output> outputs;
};

struct State {
  Slots values, grads;
  Slots copies;                              // gathered parameters whose storage is given back until backward
  std::vector<char> sums;                    // values whose gradient is a sum made here, to which more is added in place
  std::vector<std::optional<Graph>> graphs;  // by segment
  bool retain_graph = false;
  bool deferred = false;  // the gradient fills of parameters are left out

  State(int num_values, int num_segments) : values(num_values), grads(num_values), copies(num_values), sums(num_values), graphs(num_segments) {}
};

// Adds to a value's gradient. Low precision is added up in float32 (docs/decisions/0009).
void accumulate(State& state, int value, const at::Tensor& grad);

}  // namespace soap::engine
