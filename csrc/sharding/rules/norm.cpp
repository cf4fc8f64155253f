// Normalisations. Cut along what they normalise over, they expand into sums, so that statistics are those of the whole batch:
//   mean = sum(x) / N,  xc = x - mean,  var = sum(xc^2) / N,  y = xc / sqrt(var + eps) * w + b           (two passes, exact)
#include <algorithm>

#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

Rule batch_norm(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  const bool training = node.attr<bool>("training", false);
  static const char* spatial[] = {"d", "h", "w"};
  std::vector<std::string> names;
  for (size_t d = 0; d < x.size(); ++d) {
    const bool channel = d == 1;
    names.push_back(d == 0 ? "n" : channel ? "c" : x.size() == 3 ? "l" : spatial[d + 3 - x.size()]);
    r.factor(names.back(), x[d],
             d == 0    ? FactorKind::kSample
             : channel ? FactorKind::kParameter
                       : FactorKind::kAttribute,
             training && !channel ? Cuttable::kExpand : Cuttable::kAny);
  }
  r.operand(0, names);
  for (const char* name : {"weight", "bias", "running_mean", "running_var"}) r.operand(name, {"c"});
  return r.result(names).saves({"0", "weight"}).build();
}

// Statistics of a batch, [c] and [c]; only read by running averages.
Rule batch_norm_stats(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  std::vector<std::string> names;
  for (size_t d = 0; d < x.size(); ++d) {
    names.push_back(d == 1 ? "c" : d == 0 ? "n" : fmt::format("d{}", d));
    r.factor(names.back(), x[d],
             d == 1   ? FactorKind::kParameter
             : d == 0 ? FactorKind::kSample
                      : FactorKind::kAttribute,
             d == 1 ? Cuttable::kAny : Cuttable::kExpand);
  }
  return r.operand(0, names).result({"c"}).result({"c"}).build();
}

Rule layer_norm(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  const size_t normalized = node.attr<std::vector<int64_t>>("normalized_shape", {}).size();
  SOAP_CHECK(normalized > 0 && normalized <= x.size(), "[rule] {}: normalized_shape has {} dims, the input {}", node.name, normalized, x.size());
  std::vector<std::string> names;
  for (size_t d = 0; d < x.size(); ++d) {
    const bool inner = d >= x.size() - normalized;
    names.push_back(inner ? (normalized == 1 ? "d" : fmt::format("d{}", d)) : d == 0 ? "n" : d == 1 ? "s" : fmt::format("s{}", d));
    r.factor(names.back(), x[d],
             inner    ? FactorKind::kReduction
             : d == 0 ? FactorKind::kSample
                      : FactorKind::kAttribute,
             inner ? Cuttable::kExpand : Cuttable::kAny);
  }
  const std::vector<std::string> inner(names.end() - static_cast<int64_t>(normalized), names.end());
  return r.operand(0, names).operand("weight", inner).operand("bias", inner).result(names).saves({"0", "weight"}).build();
}

// Channels in groups: a cut falls between groups.
Rule group_norm(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  const int64_t groups = node.attr<int64_t>("num_groups", 1);
  r.factor("n", x[0], FactorKind::kSample).factor("g", groups, FactorKind::kParameter).factor("c", x[1] / groups, FactorKind::kAttribute, Cuttable::kWhole);
  std::vector<std::string> names{"n", "g c"};
  for (size_t d = 2; d < x.size(); ++d) names.push_back("*");
  return r.operand(0, names).operand("weight", {"g c"}).operand("bias", {"g c"}).result(names).saves({"0", "weight"}).build();
}

// xc * rsqrt(sum of squares / count + eps) * weight + bias: x's dims are factors; the statistics have size 1 where they are summed,
// weights have the dims named in `weight_dims`.
Rule normalize(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &x = graph.input(node, 0).shape, &s = graph.input(node, 1).shape;
  std::vector<std::string> names, stats, weights;
  for (size_t d = 0; d < x.size(); ++d) {
    names.push_back(fmt::format("d{}", d));
    r.factor(names.back(), x[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
    stats.push_back(s[d] == x[d] ? names.back() : "*");
  }
  for (int64_t d : node.attr<std::vector<int64_t>>("weight_dims", {})) weights.push_back(names[d]);
  Rule rule = r.operand(0, names).operand(1, stats).operand("weight", weights).operand("bias", weights).result(names).saves({"0", "1", "weight"}).build();
  if (node.operand("weight") >= 0) rule.results[0].saved_bytes_more = graph.output(node, 0).element_bytes;  // what is multiplied by it
  return rule;
}

// Expansion of all of them; `dims` are summed over.
struct Statistics {
  TensorId centred = -1, squares = -1;
  int64_t count = 1;
};

Statistics statistics(Expander& e, TensorId x, const std::vector<int64_t>& dims, const std::vector<std::pair<std::string, std::string>>& inherit, bool centre) {
  Statistics out;
  const std::vector<int64_t> shape = e.shape(x);
  std::vector<int64_t> keep = shape;
  for (int64_t d : dims) {
    out.count *= shape[d];
    keep[d] = 1;
  }
  const AttrMap attrs{{"dim", dims}, {"keepdim", true}};
  out.centred = x;
  if (centre) {
    const TensorId mean = e.add({.name = "mean", .target = "mean", .inputs = {x}, .attrs = attrs, .inherit = inherit}, keep);
    out.centred = e.add({.name = "centre", .target = "sub", .inputs = {x, mean}, .family = "pointwise", .inherit = inherit}, shape);
  }
  const TensorId square = e.add({.name = "square", .target = "square", .inputs = {out.centred}, .family = "pointwise", .inherit = inherit}, shape);
  out.squares = e.add({.name = "sum", .target = "sum", .inputs = {square}, .attrs = attrs, .inherit = inherit}, keep);
  return out;
}

// Factor names of the sub-operators (d0, d1, ...) for those of the original's operand 0.
std::vector<std::pair<std::string, std::string>> by_dim(const Rule& rule) {
  std::vector<std::pair<std::string, std::string>> out;
  const auto& dims = rule.operands[0].dims;
  for (size_t d = 0; d < dims.size(); ++d) out.emplace_back(fmt::format("d{}", d), rule.factors[dims[d].factors[0]].name);
  return out;
}

void expand_norm(Expander& e, const Node& node, const Rule& rule, const Tiling&) {
  const TensorId x = e.wide(0);
  const auto shape = e.shape(x);
  const auto inherit = by_dim(rule);
  std::vector<int64_t> dims, weight_dims;
  if (node.target == "batch_norm" || node.target == "batch_norm_stats") {
    for (size_t d = 0; d < shape.size(); ++d) (d == 1 ? weight_dims : dims).push_back(static_cast<int64_t>(d));
  } else {
    const size_t normalized = node.attr<std::vector<int64_t>>("normalized_shape", {}).size();
    for (size_t d = shape.size() - normalized; d < shape.size(); ++d) dims.push_back(static_cast<int64_t>(d));
    weight_dims = dims;
  }
  const Statistics s = statistics(e, x, dims, inherit, node.target != "rms_norm");
  std::vector<TensorId> inputs{s.centred, s.squares};
  std::vector<std::string> names{"input", "squares"};
  for (const char* name : {"weight", "bias"}) {
    if (e.operand(name) < 0) continue;
    inputs.push_back(e.operand(name));
    names.push_back(name);
  }
  const double fallback = e.dtype(x) == "float64" ? 2.220446049250313e-16 : 1.1920928955078125e-07;  // rms_norm's eps=None
  e.bind(0, e.add({.name = "normalize",
                   .target = "normalize",
                   .inputs = inputs,
                   .operand_names = names,
                   .attrs = {{"eps", node.attr<double>("eps", fallback)}, {"count", s.count}, {"weight_dims", weight_dims}},
                   .inherit = inherit},
                  shape));
}

void expand_stats(Expander& e, const Node&, const Rule& rule, const Tiling&) {
  const TensorId x = e.wide(0);
  const auto shape = e.shape(x);
  std::vector<int64_t> dims;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (d != 1) dims.push_back(static_cast<int64_t>(d));
  }
  const auto inherit = by_dim(rule);
  const Statistics s = statistics(e, x, dims, inherit, true);
  const std::vector<std::pair<std::string, std::string>> channel{{"d0", rule.factors[rule.operands[0].dims[1].factors[0]].name}};
  const TensorId mean =
      e.add({.name = "mean_c", .target = "mean", .inputs = {x}, .attrs = {{"dim", dims}, {"keepdim", false}}, .inherit = inherit}, {shape[1]});
  const TensorId flat = e.add({.name = "sum_c", .target = "view", .inputs = {s.squares}}, {shape[1]});
  const TensorId var = e.add({.name = "var",
                              .target = "scale",
                              .inputs = {flat},
                              .attrs = {{"by", 1.0 / static_cast<double>(std::max<int64_t>(s.count - 1, 1))}},
                              .family = "pointwise",
                              .inherit = channel},
                             {shape[1]});
  e.bind(0, mean);
  e.bind(1, var);
}

}  // namespace

void register_norm(RuleRegistry& rules, ExpansionRegistry& expansions) {
  rules.add({"batch_norm"}, batch_norm);
  rules.add({"batch_norm_stats"}, batch_norm_stats);
  rules.add({"layer_norm", "rms_norm"}, layer_norm);
  rules.add({"group_norm"}, group_norm);
  rules.add({"normalize"}, normalize);
  expansions.add({"batch_norm", "layer_norm", "rms_norm"}, expand_norm);
  expansions.add({"batch_norm_stats"}, expand_stats);
}

}  // namespace soap
