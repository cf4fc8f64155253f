// OpGraph: what a module computes. Nodes (operators, parameters, feeds, returns) in topological order over tensors of known global
// shape. Imported from a captured torch.fx graph at one batch size; `expand` (sharding/expand.h) may replace an operator by several.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace soap {

using NodeId = int;
using TensorId = int;

enum class NodeKind { kOp, kParam, kBuffer, kConst, kFeed, kReturn };

// An argument of an operator that is not a tensor. monostate is Python's None.
using Attr = std::variant<std::monostate, bool, int64_t, double, std::string, std::vector<int64_t>, std::vector<double>>;
using AttrMap = std::map<std::string, Attr>;

struct Tensor {
  TensorId id = -1;
  std::vector<int64_t> shape;
  std::string dtype;  // torch's name without the module: "float32"
  int64_t element_bytes = 4;
  bool requires_grad = false;
  NodeId producer = -1;
  int result = 0;  // index among the producer's results
};

struct Node {
  NodeId id = -1;
  NodeKind kind = NodeKind::kOp;
  std::string name;    // unique; the key of plans: "features.0", "param:features.0.weight", "in:0", "out:0"
  std::string target;  // canonical operator: "conv2d", "add"; "" for params and feeds
  std::string family;  // "pointwise" or ""
  std::vector<TensorId> inputs;
  std::vector<std::string> operand_names;  // schema argument of each input: "weight", "tensors[1]"
  AttrMap attrs;                           // the other arguments by schema name, defaults filled in
  std::vector<TensorId> outputs;
  std::string source;    // the user's line
  int sample_dim = -1;   // feeds and returns: the dim that moves with the batch, -1 when none
  int origin = -1;       // index of the captured node that this one computes, -1 when made by an expansion
  bool no_grad = false;  // inside a no_grad region

  // Index of the operand that is the schema argument `name`, or -1.
  int operand(std::string_view name) const;
  // The attribute as T; `fallback` when it is absent or None.
  template <class T>
  T attr(std::string_view name, T fallback) const {
    const auto it = attrs.find(std::string(name));
    if (it == attrs.end()) return fallback;
    if constexpr (std::is_same_v<T, double>) {
      if (const auto* i = std::get_if<int64_t>(&it->second)) return static_cast<double>(*i);
    }
    const auto* value = std::get_if<T>(&it->second);
    return value ? *value : fallback;
  }
  // A list attribute of length n; a single integer or a list of one is repeated.
  std::vector<int64_t> ints(std::string_view name, size_t n, int64_t fallback) const;
};

struct OpGraph {
  std::vector<Node> nodes;
  std::vector<Tensor> tensors;

  const Tensor& input(const Node& node, int i) const { return tensors[node.inputs[i]]; }
  const Tensor& output(const Node& node, int i) const { return tensors[node.outputs[i]]; }
  std::optional<NodeId> find(std::string_view name) const;
};

// Appends a tensor and returns its id.
TensorId add_tensor(OpGraph& graph, std::vector<int64_t> shape, const std::string& dtype, int64_t element_bytes, bool requires_grad);
// Appends a node whose inputs and outputs exist; sets id and the producers. Throws on a repeated name or a use before definition.
NodeId add_node(OpGraph& graph, Node node);
bool is_float(const Tensor& tensor);
// A param, buffer or const: what devices hold before a step begins.
bool is_store(const Node& node);
int64_t numel(const std::vector<int64_t>& shape);
std::string_view to_string(NodeKind kind);
// One line per node: `features.0 = conv2d(in:0, param:features.0.weight) -> f32[8,64,55,55]`.
std::string to_string(const OpGraph& graph);

}  // namespace soap
