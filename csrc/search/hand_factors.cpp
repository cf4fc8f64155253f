#include "search/hand_factors.h"

#include <algorithm>

namespace soap {
namespace {

bool has(const std::vector<DimExpr>& dims, int factor) {
  return std::any_of(dims.begin(), dims.end(), [&](const DimExpr& d) { return std::count(d.factors.begin(), d.factors.end(), factor) > 0; });
}

}  // namespace

int first_parameter(const OpGraph& graph, const Node& node) {
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    if (graph.nodes[graph.tensors[node.inputs[i]].producer].kind == NodeKind::kParam) return static_cast<int>(i);
  }
  return -1;
}

namespace {

// A factor of the first parameter by what it is: output channels, input channels.
std::string parameter_factor(const OpGraph& graph, const Node& node, const Rule& rule, FactorKind kind) {
  const int at = first_parameter(graph, node);
  if (at < 0) return "";
  for (const DimExpr& d : rule.operands[at].dims) {
    for (int f : d.factors) {
      if (rule.factors[f].kind == kind) return rule.factors[f].name;
    }
  }
  return "";
}

// A parameter factor that every operand has (heads): its parts never meet.
std::string parallel_factor(const Rule& rule) {
  for (size_t f = 0; f < rule.factors.size() && !rule.operands.empty(); ++f) {
    if (rule.factors[f].kind != FactorKind::kParameter) continue;
    const bool everywhere = std::all_of(rule.operands.begin(), rule.operands.end(), [&](const Operand& o) { return has(o.dims, static_cast<int>(f)); });
    if (everywhere) return rule.factors[f].name;
  }
  return "";
}

}  // namespace

HandFactors hand_factors(const OpGraph& graph, const Node& node, const Rule& rule) {
  HandFactors out{.first_parameter = first_parameter(graph, node), .parallel = parallel_factor(rule)};
  out.outputs = parameter_factor(graph, node, rule, FactorKind::kParameter);
  out.inputs = parameter_factor(graph, node, rule, FactorKind::kReduction);
  return out;
}

}  // namespace soap
