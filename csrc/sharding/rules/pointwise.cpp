// Pointwise operators: one factor per dim of the result; operands are aligned from the right, a broadcast dim lacks the factor.
#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

Rule pointwise(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& shape = graph.output(node, 0).shape;
  std::vector<std::string> names;
  for (size_t d = 0; d < shape.size(); ++d) {
    names.push_back(fmt::format("d{}", d));
    r.factor(names.back(), shape[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
  }
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    const auto& in = graph.input(node, static_cast<int>(i)).shape;
    SOAP_CHECK(in.size() <= shape.size(), "[rule] {}: operand {} has {} dims, the result {}", node.name, i, in.size(), shape.size());
    const size_t skip = shape.size() - in.size();
    std::vector<std::string> dims;
    for (size_t d = 0; d < in.size(); ++d) dims.push_back(in[d] == shape[d + skip] ? names[d + skip] : "*");
    r.operand(static_cast<int>(i), dims);
  }
  for (size_t i = 0; i < node.outputs.size(); ++i) r.result(names);
  return r.build();
}

}  // namespace

void register_pointwise(RuleRegistry& rules) {
  rules.add({"pointwise"}, pointwise);
}

}  // namespace soap
