// Lookups.
//   embedding   t[s..]  e[v d]  ->  y[s.. d], summed over v: a tile looks up the rows that it holds, the others give zero.
#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

Rule embedding(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &w = graph.input(node, node.operand("weight")).shape, &t = graph.input(node, node.operand("indices")).shape;
  const bool by_frequency = node.attr<bool>("scale_grad_by_freq", false);  // counts over the whole batch
  const Cuttable cut = by_frequency ? Cuttable::kWhole : Cuttable::kAny;
  std::vector<std::string> in;
  for (size_t d = 0; d < t.size(); ++d) {
    in.push_back(d == 0 ? "n" : d == 1 ? "s" : fmt::format("s{}", d));
    r.factor(in.back(), t[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute, cut);
  }
  r.factor("v", w[0], FactorKind::kReduction, by_frequency ? Cuttable::kWhole : Cuttable::kInterval).factor("d", w[1], FactorKind::kParameter);
  std::vector<std::string> out = in;
  out.push_back("d");
  return r.operand("weight", {"v", "d"}).operand("indices", in).constant().result(out, Reduce::kSum).saves({"indices"}).build();
}

// max_norm: the rows that anyone looks up are scaled down, each by itself.
Rule embedding_renorm(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  r.factor("v", graph.input(node, 0).shape[0], FactorKind::kParameter, Cuttable::kInterval);
  return r.operand(0, {"v", "*"}).operand(1, std::vector<std::string>(graph.input(node, 1).shape.size(), "*")).constant().result({"v", "*"}).build();
}

// Bags of equal length: t[n b]; sums and means cut like an embedding, maxima by width and rows only.
Rule embedding_bag(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &w = graph.input(node, node.operand("weight")).shape, &t = graph.input(node, node.operand("indices")).shape;
  const bool maximum = node.attr<int64_t>("mode", 0) == 2;
  r.factor("n", t[0], FactorKind::kSample)
      .factor("v", w[0], FactorKind::kReduction, maximum ? Cuttable::kWhole : Cuttable::kInterval)
      .factor("d", w[1], FactorKind::kParameter);
  r.operand("weight", {"v", "d"})
      .operand("indices", {"n", "*"})
      .constant()
      .operand("per_sample_weights", {"n", "*"})
      .result({"n", "d"}, maximum ? Reduce::kNone : Reduce::kSum);
  if (node.operand("per_sample_weights") < 0) r.saves({"indices"});  // the table only for the gradient of these
  return r.build();
}

// index_select(x, dim, index): rows of x by an index of their own.
Rule index_select(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &x = graph.input(node, 0).shape, &y = graph.output(node, 0).shape;
  int64_t dim = node.attr<int64_t>("dim", 0);
  if (dim < 0) dim += static_cast<int64_t>(x.size());
  std::vector<std::string> in, out;
  for (size_t d = 0; d < y.size(); ++d) {
    out.push_back(fmt::format("d{}", d));
    r.factor(out.back(), y[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
    in.push_back(static_cast<int64_t>(d) == dim ? "*" : out.back());
  }
  return r.operand(0, in).operand("index", {out[dim]}).constant().result(out).build();
}

}  // namespace

void register_embedding(RuleRegistry& rules) {
  rules.add({"embedding"}, embedding);
  rules.add({"embedding_renorm"}, embedding_renorm);
  rules.add({"embedding_bag_fixed"}, embedding_bag);
  rules.add({"index_select"}, index_select);
}

}  // namespace soap
