// Pointwise operators: one factor per dim of the result; operands are aligned from the right, a broadcast dim lacks the factor.
#include <set>

#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

// What backward reads, by name of the schema's operand or "result"; a product reads its operands, and so does what isn't listed.
std::vector<std::string> saved(const Node& node) {
  static const std::set<std::string_view> nothing{"add",        "sub", "rsub",     "neg",    "clone", "alias",
                                                  "contiguous", "to",  "_to_copy", "detach", "scale", "lift_fresh_copy"};
  static const std::set<std::string_view> own{"relu", "tanh", "sigmoid", "exp", "exp_shifted", "sqrt", "rsqrt", "reciprocal", "expm1"};
  if (nothing.count(node.target) || ((node.target == "mul" || node.target == "div") && node.inputs.size() == 1)) return {};
  if (own.count(node.target)) return {"result"};
  return node.operand_names;
}

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
  return r.saves(saved(node)).build();
}

}  // namespace

void register_pointwise(RuleRegistry& rules) {
  rules.add({"pointwise"}, pointwise);
}

}  // namespace soap
