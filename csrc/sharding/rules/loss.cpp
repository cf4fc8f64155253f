// Losses. The capture writes a mean loss as rows, a count and a sum of rows / count; what is left is the loss of each row.
//   ce_rows   x[n v d..]  t[n d..]  weight[v]  ->  y[n d..]
// Cut along the classes it expands into max, exp, sum, and the pick of the target's logit by the tile that holds it.
#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

// Dims of the logits: n v d2.. or, for one row, v.
std::vector<std::string> logit_dims(RuleSpec& r, const std::vector<int64_t>& x, Cuttable classes) {
  std::vector<std::string> names;
  for (size_t d = 0; d < x.size(); ++d) {
    const bool v = d == (x.size() == 1 ? 0u : 1u);
    names.push_back(v ? "v" : d == 0 ? "n" : fmt::format("d{}", d));
    r.factor(names.back(), x[d], v ? FactorKind::kReduction : d == 0 ? FactorKind::kSample : FactorKind::kAttribute, v ? classes : Cuttable::kAny);
  }
  return names;
}

std::vector<std::string> without_classes(const std::vector<std::string>& names) {
  std::vector<std::string> out;
  for (const std::string& n : names) {
    if (n != "v") out.push_back(n);
  }
  return out;
}

Rule ce_rows(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &x = graph.input(node, 0).shape, &t = graph.input(node, 1).shape;
  const bool probabilities = t.size() == x.size();
  const bool plain = !probabilities && node.attr<double>("label_smoothing", 0.0) == 0.0 && node.operand("weight") < 0 && node.target == "ce_rows";
  const auto names = logit_dims(r, x, plain ? Cuttable::kExpand : Cuttable::kWhole);
  const auto rows = without_classes(names);
  r.operand(0, names).operand(1, probabilities ? names : rows);
  r.operand("weight", {"v"});
  Rule rule = r.result(rows).saves({"1", "weight"}).build();
  const int64_t bytes = graph.input(node, 0).element_bytes;
  rule.results[0].saved_bytes_more = bytes * x[x.size() == 1 ? 0 : 1];  // the log softmax of each row
  rule.operands[0].backward_bytes_more = bytes;                         // and its gradient
  return rule;
}

// Number (or summed weight) of the rows that count.
Rule ce_count(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& t = graph.input(node, 0).shape;
  std::vector<std::string> names;
  for (size_t d = 0; d < t.size(); ++d) {
    names.push_back(fmt::format("d{}", d));
    r.factor(names.back(), t[d], FactorKind::kReduction);
  }
  return r.operand(0, names).result({}, Reduce::kSum).constant().build();
}

// The target's shifted logit: zero on tiles that don't hold the target's class.
Rule ce_pick(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto names = logit_dims(r, graph.input(node, 0).shape, Cuttable::kInterval);
  return r.operand(0, names).operand(1, without_classes(names)).constant().result(without_classes(names), Reduce::kSum).build();
}

void expand_ce(Expander& e, const Node& node, const Rule& rule, const Tiling&) {
  const TensorId x = e.wide(0), t = e.operand(1);
  const auto shape = e.shape(x);
  const int64_t dim = shape.size() == 1 ? 0 : 1;
  std::vector<int64_t> keep = shape;
  keep[dim] = 1;
  std::vector<std::pair<std::string, std::string>> by_dim, by_row;
  const auto& dims = rule.operands[0].dims;
  for (size_t d = 0; d < dims.size(); ++d) {
    const std::string& name = rule.factors[dims[d].factors[0]].name;
    by_dim.emplace_back(fmt::format("d{}", d), name);
    if (static_cast<int64_t>(d) != dim) by_row.emplace_back(fmt::format("d{}", by_row.size()), name);
  }
  const AttrMap attrs{{"dim", std::vector<int64_t>{dim}}, {"keepdim", true}};
  const TensorId top = e.add({.name = "max", .target = "max_shift", .inputs = {x}, .attrs = attrs, .inherit = by_dim}, keep, "", false);
  const TensorId shifted = e.add({.name = "shift", .target = "sub", .inputs = {x, top}, .family = "pointwise", .inherit = by_dim}, shape);
  const TensorId exp = e.add({.name = "exp", .target = "exp", .inputs = {shifted}, .family = "pointwise", .inherit = by_dim}, shape);
  const AttrMap drop{{"dim", std::vector<int64_t>{dim}}, {"keepdim", false}};
  const auto rows = e.shape(t);
  const TensorId total = e.add({.name = "sum", .target = "sum", .inputs = {exp}, .attrs = drop, .inherit = by_dim}, rows);
  const TensorId picked = e.add({.name = "pick", .target = "ce_pick", .inputs = {shifted, t}, .operand_names = {"input", "target"}, .attrs = node.attrs}, rows);
  e.bind(0, e.add({.name = "rows",
                   .target = "ce_join",
                   .inputs = {total, picked, t},
                   .operand_names = {"sum", "picked", "target"},
                   .attrs = node.attrs,
                   .family = "pointwise",
                   .inherit = by_row},
                  rows));
}

}  // namespace

void register_loss(RuleRegistry& rules, ExpansionRegistry& expansions) {
  rules.add({"ce_rows", "nll_rows"}, ce_rows);
  rules.add({"ce_count"}, ce_count);
  rules.add({"ce_pick"}, ce_pick);
  expansions.add({"ce_rows"}, expand_ce);
}

}  // namespace soap
