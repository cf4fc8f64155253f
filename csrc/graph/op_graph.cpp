#include "graph/op_graph.h"

#include "base/error.h"
#include "fmt/ranges.h"

namespace soap {

int Node::operand(std::string_view name) const {
  for (size_t i = 0; i < operand_names.size(); ++i) {
    if (operand_names[i] == name) return static_cast<int>(i);
  }
  return -1;
}

std::vector<int64_t> Node::ints(std::string_view name, size_t n, int64_t fallback) const {
  const auto it = attrs.find(std::string(name));
  if (it == attrs.end()) return std::vector<int64_t>(n, fallback);
  if (const auto* one = std::get_if<int64_t>(&it->second)) return std::vector<int64_t>(n, *one);
  const auto* list = std::get_if<std::vector<int64_t>>(&it->second);
  if (!list || list->empty()) return std::vector<int64_t>(n, fallback);
  if (list->size() == 1) return std::vector<int64_t>(n, list->front());
  SOAP_CHECK(list->size() == n, "[graph] {}: {} has {} values, expected {}", this->name, name, list->size(), n);
  return *list;
}

std::optional<NodeId> OpGraph::find(std::string_view name) const {
  for (const Node& node : nodes) {
    if (node.name == name) return node.id;
  }
  return std::nullopt;
}

TensorId add_tensor(OpGraph& graph, std::vector<int64_t> shape, const std::string& dtype, int64_t element_bytes, bool requires_grad) {
  const auto id = static_cast<TensorId>(graph.tensors.size());
  graph.tensors.push_back({.id = id, .shape = std::move(shape), .dtype = dtype, .element_bytes = element_bytes, .requires_grad = requires_grad});
  return id;
}

NodeId add_node(OpGraph& graph, Node node) {
  node.id = static_cast<NodeId>(graph.nodes.size());
  for (TensorId t : node.inputs) {
    SOAP_CHECK(t >= 0 && t < static_cast<int>(graph.tensors.size()) && graph.tensors[t].producer >= 0, "[graph] {} reads tensor {} before it is made",
               node.name, t);
  }
  if (node.operand_names.empty()) {
    for (size_t i = 0; i < node.inputs.size(); ++i) node.operand_names.push_back(fmt::format("{}", i));
  }
  SOAP_CHECK(node.operand_names.size() == node.inputs.size(), "[graph] {}: {} names for {} operands", node.name, node.operand_names.size(), node.inputs.size());
  for (size_t i = 0; i < node.outputs.size(); ++i) {
    Tensor& t = graph.tensors.at(node.outputs[i]);
    SOAP_CHECK(t.producer < 0, "[graph] tensor {} is made by {} and {}", t.id, t.producer, node.id);
    t.producer = node.id;
    t.result = static_cast<int>(i);
  }
  graph.nodes.push_back(std::move(node));
  return graph.nodes.back().id;
}

bool is_store(const Node& node) {
  return node.kind == NodeKind::kParam || node.kind == NodeKind::kBuffer || node.kind == NodeKind::kConst;
}

bool is_float(const Tensor& tensor) {
  return tensor.dtype.find("float") != std::string::npos || tensor.dtype.find("complex") != std::string::npos;
}

int64_t numel(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t s : shape) n *= s;
  return n;
}

std::string_view to_string(NodeKind kind) {
  switch (kind) {
    case NodeKind::kOp: return "op";
    case NodeKind::kParam: return "param";
    case NodeKind::kBuffer: return "buffer";
    case NodeKind::kConst: return "const";
    case NodeKind::kFeed: return "feed";
    case NodeKind::kReturn: return "return";
  }
  return "?";
}

std::string to_string(const OpGraph& graph) {
  std::string out;
  for (const Node& node : graph.nodes) {
    out += fmt::format("{} = {}(", node.name, node.kind == NodeKind::kOp ? std::string_view(node.target) : to_string(node.kind));
    for (size_t i = 0; i < node.inputs.size(); ++i) {
      const Tensor& t = graph.tensors[node.inputs[i]];
      out += fmt::format("{}{}", i ? ", " : "", graph.nodes[t.producer].name);
      if (t.result > 0) out += fmt::format("#{}", t.result);
    }
    out += ")";
    for (size_t i = 0; i < node.outputs.size(); ++i) {
      const Tensor& t = graph.tensors[node.outputs[i]];
      out += fmt::format("{}{}[{}]{}", i ? ", " : " -> ", t.dtype, fmt::join(t.shape, ","), t.requires_grad ? "'" : "");
    }
    out += "\n";
  }
  return out;
}

}  // namespace soap
