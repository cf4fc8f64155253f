// Normalisations. Cut along what they normalise over, they expand, so that statistics are those of the whole batch. Batch norms merge each part's:
//   (mean, M2) of a part,  mean and var of all by their counts,  y = (x - mean) / sqrt(var + eps) * w + b      (docs/decisions/0015)
// layer and RMS norms into sums:
//   mean = sum(x) / N,  xc = x - mean,  var = sum(xc^2) / N,  y = xc / sqrt(var + eps) * w + b           (two passes, exact)
#include <algorithm>

#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

// In training it may give the batch's mean and unbiased variance too, [c] and [c], for running averages.
Rule batch_norm(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  const bool statistics = node.outputs.size() > 1, training = statistics || node.attr<bool>("training", false);
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
  r.result(names);
  if (statistics) r.result({"c"}).constant().result({"c"}).constant();
  return r.saves({"0", "weight"}).build();
}

// What a batch norm becomes where it is cut in more than channels. The parts of its cut dims are dims of the moments, `cut` of them before
// [mean or M2, channel]; each has its indices in the attribute "parts<dim>": of every part the number of its runs, then their ends.
std::string parts_name(size_t dim) {
  return fmt::format("parts{}", dim);
}

std::vector<int64_t> as_list(const std::vector<IndexSet>& parts) {
  std::vector<int64_t> out;
  for (const IndexSet& part : parts) {
    out.push_back(static_cast<int64_t>(part.runs().size()));
    for (const Run& r : part.runs()) out.insert(out.end(), {r.begin, r.end});
  }
  return out;
}

std::vector<IndexSet> as_parts(const std::vector<int64_t>& list) {
  std::vector<IndexSet> out;
  for (size_t at = 0; at < list.size();) {
    std::vector<Run> runs(static_cast<size_t>(list[at++]));
    for (Run& r : runs) r = {list[at], list[at + 1]}, at += 2;
    out.push_back(IndexSet::from_runs(std::move(runs)));
  }
  return out;
}

Rule channel_moments(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  std::vector<std::string> read(x.size(), "*"), made;
  read[1] = "c";
  r.factor("c", x[1], FactorKind::kParameter).operand(0, read);
  for (size_t d = 0; d < x.size(); ++d) {
    IndexMap map{.kind = IndexMap::Kind::kTable, .table = as_parts(node.attr<std::vector<int64_t>>(parts_name(d), {}))};
    if (map.table.empty()) continue;
    made.push_back(fmt::format("p{}", d));
    r.factor(made.back(), static_cast<int64_t>(map.table.size()), d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
    r.map(static_cast<int>(d), made.back(), std::move(map));
  }
  made.insert(made.end(), {"*", "c"});
  return r.result(made).saves({"0"}).build();
}

// Moments of all parts to [mean or variance, channel]; and, with running averages, the mean and the unbiased variance.
Rule merge_moments(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  std::vector<std::string> read(graph.input(node, 0).shape.size(), "*");
  read.back() = "c";
  r.factor("c", graph.input(node, 0).shape.back(), FactorKind::kParameter).operand(0, read).result({"*", "c"});
  if (node.outputs.size() > 1) r.result({"c"}).constant().result({"c"}).constant();
  return r.saves({"0"}).build();
}

Rule channel_normalize(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  std::vector<std::string> names;
  for (size_t d = 0; d < x.size(); ++d) {
    names.push_back(fmt::format("d{}", d));
    r.factor(names.back(), x[d], d == 0 ? FactorKind::kSample : d == 1 ? FactorKind::kParameter : FactorKind::kAttribute);
  }
  r.operand(0, names).operand(1, {"*", "d1"}).operand("weight", {"d1"}).operand("bias", {"d1"});
  return r.result(names).saves({"0", "1", "weight"}).build();
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

// `dims` are summed over.
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
  std::vector<int64_t> dims;
  const size_t normalized = node.attr<std::vector<int64_t>>("normalized_shape", {}).size();
  for (size_t d = shape.size() - normalized; d < shape.size(); ++d) dims.push_back(static_cast<int64_t>(d));
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
                   .attrs = {{"eps", node.attr<double>("eps", fallback)}, {"count", s.count}, {"weight_dims", dims}},
                   .inherit = inherit},
                  shape));
}

void expand_batch_norm(Expander& e, const Node& node, const Rule& rule, const Tiling&) {
  const TensorId x = e.wide(0);
  const auto shape = e.shape(x);
  const auto inherit = by_dim(rule);
  const std::string channel = rule.factors[rule.operands[0].dims[1].factors[0]].name;
  AttrMap attrs;
  std::vector<std::pair<std::string, std::string>> parts;
  std::vector<int64_t> moments, counts{1};  // parts of each cut dim; of each part of all, in the order of the moments, the elements of a channel
  for (size_t d = 0; d < shape.size(); ++d) {
    if (d == 1) continue;
    const std::string& factor = inherit[d].second;
    const std::vector<IndexSet> sets = e.part_sets(factor);
    if (sets.size() > 1) {
      attrs[parts_name(d)] = as_list(sets);
      parts.emplace_back(fmt::format("p{}", d), factor);
      moments.push_back(static_cast<int64_t>(sets.size()));
    }
    std::vector<int64_t> more;
    for (int64_t count : counts) {
      for (const IndexSet& set : sets) more.push_back(count * set.size());
    }
    counts = std::move(more);
  }
  moments.insert(moments.end(), {2, shape[1]});
  const TensorId own =
      e.add({.name = "moments", .target = "channel_moments", .inputs = {x}, .attrs = attrs, .inherit = {{"c", channel}}, .parts = parts}, moments);
  std::vector<std::vector<int64_t>> made{{2, shape[1]}};
  if (node.outputs.size() > 1) made.insert(made.end(), 2, {shape[1]});
  const auto merged =
      e.add_many({.name = "merge", .target = "merge_moments", .inputs = {own}, .attrs = {{"counts", counts}}, .inherit = {{"c", channel}}}, made);
  std::vector<TensorId> inputs{x, merged[0]};
  std::vector<std::string> names{"input", "statistics"};
  for (const char* name : {"weight", "bias"}) {
    if (e.operand(name) < 0) continue;
    inputs.push_back(e.operand(name));
    names.push_back(name);
  }
  e.bind(0, e.add({.name = "normalize",
                   .target = "channel_normalize",
                   .inputs = inputs,
                   .operand_names = names,
                   .attrs = {{"eps", node.attr<double>("eps", 1e-5)}},
                   .inherit = inherit},
                  shape));
  for (size_t r = 1; r < merged.size(); ++r) e.bind(static_cast<int>(r), merged[r]);
}

}  // namespace

void register_norm(RuleRegistry& rules, ExpansionRegistry& expansions) {
  rules.add({"batch_norm"}, batch_norm);
  rules.add({"channel_moments"}, channel_moments);
  rules.add({"merge_moments"}, merge_moments);
  rules.add({"channel_normalize"}, channel_normalize);
  rules.add({"layer_norm", "rms_norm"}, layer_norm);
  rules.add({"group_norm"}, group_norm);
  rules.add({"normalize"}, normalize);
  expansions.add({"batch_norm"}, expand_batch_norm);
  expansions.add({"layer_norm", "rms_norm"}, expand_norm);
}

}  // namespace soap
