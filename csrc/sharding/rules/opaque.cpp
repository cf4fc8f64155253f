// Code that capture couldn't look into: whole, unless whole and split runs agreed on the first batch (capture says so).
#include "sharding/rules/families.h"

namespace soap {
namespace {

// `sample_in`, `sample_out`: of each operand and result the dim that holds the rows, -1 for none.
Rule opaque(const OpGraph& graph, const Node& node) {
  const auto in = node.attr<std::vector<int64_t>>("sample_in", {}), out = node.attr<std::vector<int64_t>>("sample_out", {});
  if (in.size() != node.inputs.size() || out.size() != node.outputs.size()) return whole_rule(graph, node);
  RuleSpec r(graph, node);
  const auto dims = [](size_t rank, int64_t sample) {
    std::vector<std::string> names(rank, "*");
    if (sample >= 0) names[sample] = "n";
    return names;
  };
  for (size_t i = 0; i < in.size(); ++i) {
    if (in[i] < 0) continue;
    r.factor("n", graph.input(node, static_cast<int>(i)).shape[in[i]], FactorKind::kSample);
    break;
  }
  for (size_t i = 0; i < in.size(); ++i) r.operand(static_cast<int>(i), dims(graph.input(node, static_cast<int>(i)).shape.size(), in[i]));
  for (size_t i = 0; i < out.size(); ++i) r.result(dims(graph.output(node, static_cast<int>(i)).shape.size(), out[i]));
  return r.build();
}

}  // namespace

void register_opaque(RuleRegistry& rules) {
  rules.add({"opaque"}, opaque);
}

}  // namespace soap
