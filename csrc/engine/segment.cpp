#include "engine/segment.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "base/error.h"

namespace soap::engine {
namespace {

using torch::autograd::Edge;

at::ScalarType sums_in(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 ? at::kFloat : dtype;
}

// The tensors as results of one node of autograd, whose edges take their gradients. A leaf would hold its memory as long as the graph is there; of these the
// graph holds what its operators save. The node itself is never run: gradients end there.
void enter(const std::vector<at::Tensor*>& tensors) {
  const at::AutoGradMode with_grad(true);
  std::vector<at::Tensor> inputs = {at::empty({0}).set_requires_grad(true)};
  for (const at::Tensor* tensor : tensors) inputs.push_back(*tensor);
  torch::autograd::DelayedError node("[engine] backward went beyond a segment", static_cast<int64_t>(inputs.size()));
  const std::vector<at::Tensor> entered = node.apply(std::move(inputs));
  for (size_t i = 0; i < tensors.size(); ++i) *tensors[i] = entered[i + 1];
}

const void* storage_of(const at::Tensor& tensor) {
  return tensor.storage().data();
}

// Taken off again, whatever happens.
struct Hooks {
  std::vector<std::pair<at::Tensor, unsigned>> all;

  Hooks() = default;
  ~Hooks() {
    for (const auto& [tensor, hook] : all) tensor.remove_hook(hook);
  }
  Hooks(const Hooks&) = delete;
  Hooks& operator=(const Hooks&) = delete;
};

// Zeros of its shape, without memory.
at::Tensor stand_in_for(const at::Tensor& grad) {
  return at::zeros({1}, grad.options().layout(at::kStrided)).expand(grad.sizes());
}

}  // namespace

void accumulate(State& state, int value, const at::Tensor& grad) {
  at::Tensor& known = state.grads.tensors[value];
  if (!known.defined()) {
    known = grad;
    state.sums[value] = false;
  } else if (state.sums[value] && c10::promoteTypes(known.scalar_type(), grad.scalar_type()) == known.scalar_type()) {
    known.add_(grad);
  } else {  // what autograd gave may be the gradient of several values
    known = known.to(sums_in(known.scalar_type())).add(grad);
    state.sums[value] = true;
  }
}

void run_forward(State& state, const Segment& segment, int index, bool record, bool again, const Compute& compute) {
  std::vector<at::Tensor> arguments;
  arguments.reserve(segment.inputs.size());
  Graph graph;
  std::vector<at::Tensor*> entering;
  for (const Segment::Input& input : segment.inputs) {
    at::Tensor& argument = arguments.emplace_back(state.values.tensors[input.value]);
    if (!argument.defined()) argument = state.copies.tensors[input.value];
    SOAP_CHECK(argument.defined(), "a segment without its input {}", input.value);
    if (!record || !input.wants_grad) continue;
    if (input.is_store) {
      argument = argument.detach().set_requires_grad(true);
      graph.leaves.push_back({.value = input.value, .tensor = argument, .edge = torch::autograd::impl::gradient_edge(argument)});
    } else {
      entering.push_back(&argument);
      graph.leaves.push_back({.value = input.value});
    }
  }
  if (!entering.empty()) {
    enter(entering);
    size_t next = 0;
    for (Leaf& leaf : graph.leaves) {
      if (!leaf.tensor.defined()) leaf.edge = torch::autograd::impl::gradient_edge(*entering[next++]);
    }
  }
  std::vector<at::Tensor> results;
  {
    const at::AutoGradMode recording(record);
    results = compute(index, std::move(arguments));
  }
  SOAP_CHECK(results.size() == segment.outputs.size(), "a segment of {} outputs gave {}", segment.outputs.size(), results.size());
  if (record && (!segment.is_region || again)) {
    // Not the tensors: what backward reads of them the graph has saved itself. A view of a leaf made under no_grad has no place in it.
    for (size_t i = 0; i < results.size(); ++i) {
      const bool is_leaf = std::any_of(graph.leaves.begin(), graph.leaves.end(), [&](const Leaf& leaf) { return leaf.tensor.is_same(results[i]); });
      if (results[i].grad_fn() == nullptr && !is_leaf) continue;
      graph.outputs.push_back({.value = segment.outputs[i], .edge = torch::autograd::impl::gradient_edge(results[i]), .dtype = results[i].scalar_type()});
    }
    state.graphs[index] = std::move(graph);
  }
  std::vector<const void*> gathered;
  for (const int value : segment.given_back) {
    if (state.values.has(value)) gathered.push_back(storage_of(state.values.tensors[value]));
  }
  for (size_t i = 0; i < results.size(); ++i) {
    if (again && !segment.again[i]) continue;
    // A view of a copy whose storage is given back needs memory of its own.
    const bool view = !gathered.empty() && std::find(gathered.begin(), gathered.end(), storage_of(results[i])) != gathered.end();
    state.values.tensors[segment.outputs[i]] = view ? results[i].detach().clone() : results[i].detach();
  }
}

void run_backward(State& state, int index) {
  SOAP_CHECK(state.graphs[index].has_value(), "segment {} has no graph", index);
  const Graph graph = *std::exchange(state.graphs[index], std::nullopt);
  torch::autograd::edge_list roots, ends;
  std::vector<at::Tensor> grads;
  for (const Output& output : graph.outputs) {
    if (!state.grads.has(output.value)) continue;
    roots.push_back(output.edge);
    grads.push_back(state.grads.take(output.value).to(output.dtype));
  }
  if (roots.empty() || graph.leaves.empty()) return;
  const auto add = [&state](int value, const at::Tensor& grad) { accumulate(state, value, grad.is_sparse() ? grad.to_dense() : grad); };
  // A gradient that is added to a known one is so as it comes: those of a whole segment are never there beside their sums.
  Hooks hooks;
  std::vector<char> hooked;
  for (const Leaf& leaf : graph.leaves) {
    ends.push_back(leaf.edge);
    hooked.push_back(leaf.tensor.defined() && state.grads.has(leaf.value));
    if (!hooked.back()) continue;
    hooks.all.emplace_back(leaf.tensor, leaf.tensor.register_hook([&add, value = leaf.value](const at::Tensor& grad) {
      add(value, grad);
      return stand_in_for(grad);
    }));
  }
  auto& engine = torch::autograd::Engine::get_default_engine();
  const std::vector<at::Tensor> results = engine.execute(roots, grads, state.retain_graph, false, false, ends);
  for (size_t i = 0; i < results.size(); ++i) {
    if (results[i].defined() && !hooked[i]) add(graph.leaves[i].value, results[i]);
  }
}

}  // namespace soap::engine
