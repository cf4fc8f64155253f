// Random operators. Every element's number is a function of its global index, so any cut is exact.
#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

Rule elementwise(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& y = graph.output(node, 0).shape;
  std::vector<std::string> names;
  for (size_t d = 0; d < y.size(); ++d) {
    names.push_back(fmt::format("d{}", d));
    r.factor(names.back(), y[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
  }
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    if (graph.input(node, static_cast<int>(i)).shape == y) r.operand(static_cast<int>(i), names);
  }
  Rule rule = r.result(names).saves({}).build();
  rule.results[0].saved_bytes_more = graph.output(node, 0).element_bytes;  // the mask, scaled
  return rule;
}

}  // namespace

void register_random(RuleRegistry& rules) {
  rules.add({"dropout", "bernoulli", "rand", "randn", "rand_like", "randn_like", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "layer_dropout",
             "randint", "randint_like", "uniform", "normal"},
            elementwise);
}

}  // namespace soap
