#include <algorithm>
#include <numeric>

#include "search/search.h"

namespace soap {
namespace {

OpConfig fed(int world) {
  return {.cuts = {{"n", {.tiles = world, .fed = true}}}};
}

OpConfig cut(const std::string& factor, int world) {
  return {.cuts = {{factor, {.tiles = world}}}};
}

bool can_cut(const Rule& rule, const std::string& factor, int world) {
  const int f = rule.factor(factor);
  return f >= 0 && rule.factors[f].cut != Cuttable::kWhole && rule.factors[f].size / rule.factors[f].unit >= world;
}

int64_t parameter_bytes(const OpGraph& graph, const Node& node) {
  int64_t bytes = 0;
  for (TensorId t : node.inputs) {
    if (graph.nodes[graph.tensors[t].producer].kind == NodeKind::kParam) bytes += numel(graph.tensors[t].shape) * graph.tensors[t].element_bytes;
  }
  return bytes;
}

// A factor by what it is: the parameter factor (output channels) or the reduction factor (input channels) of the first parameter.
std::string parameter_factor(const OpGraph& graph, const Node& node, const Rule& rule, FactorKind kind) {
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    if (graph.nodes[graph.tensors[node.inputs[i]].producer].kind != NodeKind::kParam) continue;
    for (const DimExpr& d : rule.operands[i].dims) {
      for (int f : d.factors) {
        if (rule.factors[f].kind == kind) return rule.factors[f].name;
      }
    }
    return "";
  }
  return "";
}

Strategy everywhere_fed(const OpGraph& graph, int world) {
  Strategy s{.world_size = world};
  for (const Node& n : graph.nodes) {
    if (n.kind == NodeKind::kOp) s.nodes[n.name] = fed(world);
  }
  return s;
}

}  // namespace

std::vector<std::pair<std::string, Strategy>> seeds(const OpGraph& graph, int world) {
  std::vector<std::pair<std::string, Strategy>> out;
  out.emplace_back("ddp", everywhere_fed(graph, world));
  Strategy one{.world_size = world};
  for (const Node& n : graph.nodes) {
    if (n.kind == NodeKind::kOp) one.nodes[n.name] = {.devices = {0}};
  }
  out.emplace_back("one device", std::move(one));
  if (world == 1) return out;

  Strategy zero = everywhere_fed(graph, world);
  for (const Node& n : graph.nodes) {
    const bool large = n.kind == NodeKind::kParam && !graph.output(n, 0).shape.empty() && graph.output(n, 0).shape[0] >= world;
    if (large) zero.nodes[n.name] = {.cuts = {{"d0", {.tiles = world}}}, .keep = Keep::kUse};
  }
  out.emplace_back("zero-3", std::move(zero));

  // Operators with parameters alternate between their output and input channels; attention by heads; what lies between follows.
  const auto alternate = [&](auto&& chosen) {
    Strategy s{.world_size = world};
    bool by_output = true;
    for (const Node& n : graph.nodes) {
      if (n.kind != NodeKind::kOp) continue;
      const Rule rule = make_rule(graph, n, world);
      if (!chosen(n)) {
        s.nodes[n.name] = fed(world);
        continue;
      }
      const bool weighted = parameter_bytes(graph, n) > 0;
      if (!weighted) {
        if (n.target == "scaled_dot_product_attention" && can_cut(rule, "h", world)) s.nodes[n.name] = cut("h", world);
        continue;  // follows
      }
      const std::string o = parameter_factor(graph, n, rule, FactorKind::kParameter), i = parameter_factor(graph, n, rule, FactorKind::kReduction);
      const std::string& first = by_output ? o : i;
      const std::string& second = by_output ? i : o;
      if (!first.empty() && can_cut(rule, first, world))
        s.nodes[n.name] = cut(first, world);
      else if (!second.empty() && can_cut(rule, second, world))
        s.nodes[n.name] = cut(second, world);
      by_output = !by_output;
    }
    return s;
  };
  out.emplace_back("megatron", alternate([](const Node&) { return true; }));
  // OWT: from the first linear with large weights on, by channel; before it, data parallel.
  const auto large_linear = [&](const Node& n) { return n.target == "linear" && parameter_bytes(graph, n) >= (4 << 20); };
  const auto first = std::find_if(graph.nodes.begin(), graph.nodes.end(), large_linear);
  if (first != graph.nodes.end()) out.emplace_back("owt", alternate([&](const Node& n) { return n.id >= first->id; }));
  return out;
}

}  // namespace soap
