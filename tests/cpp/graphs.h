// Small graphs for planner tests.
#pragma once

#include <string>
#include <vector>

#include "graph/op_graph.h"

namespace soap::test {

inline TensorId source(OpGraph& g, NodeKind kind, const std::string& name, std::vector<int64_t> shape, bool grad, int sample_dim = -1) {
  const TensorId t = add_tensor(g, std::move(shape), "float64", 8, grad);
  add_node(g, {.kind = kind, .name = name, .outputs = {t}, .sample_dim = sample_dim});
  return t;
}

inline TensorId op(OpGraph& g, const std::string& name, const std::string& target, std::vector<TensorId> inputs, std::vector<std::string> names,
                   std::vector<int64_t> shape, const std::string& family = "", AttrMap attrs = {}) {
  const TensorId t = add_tensor(g, std::move(shape), "float64", 8, true);
  add_node(g, {.name = name,
               .target = target,
               .family = family,
               .inputs = std::move(inputs),
               .operand_names = std::move(names),
               .attrs = std::move(attrs),
               .outputs = {t}});
  return t;
}

inline TensorId linear(OpGraph& g, const std::string& name, TensorId x, int64_t out) {
  std::vector<int64_t> shape = g.tensors[x].shape;
  const int64_t in = shape.back();
  shape.back() = out;
  const TensorId w = source(g, NodeKind::kParam, "param:" + name + ".weight", {out, in}, true),
                 b = source(g, NodeKind::kParam, "param:" + name + ".bias", {out}, true);
  return op(g, name, "linear", {x, w, b}, {"input", "weight", "bias"}, shape);
}

// in:0 [rows, 4] -> up (8) -> act -> down (3) -> out:0
inline OpGraph mlp(int64_t rows) {
  OpGraph g;
  const TensorId x = source(g, NodeKind::kFeed, "in:0", {rows, 4}, false, 0);
  const TensorId h = linear(g, "up", x, 8);
  const TensorId a = op(g, "act", "relu", {h}, {"self"}, {rows, 8}, "pointwise");
  const TensorId y = linear(g, "down", a, 3);
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {y}, .operand_names = {"value"}, .sample_dim = 0});
  return g;
}

}  // namespace soap::test
