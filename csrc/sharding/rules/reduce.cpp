// Reductions, and operators that work along one dim.
#include <algorithm>
#include <set>

#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

std::set<int64_t> reduced_dims(const Node& node, size_t n) {
  std::set<int64_t> out;
  if (const auto* one = node.attrs.count("dim") ? std::get_if<int64_t>(&node.attrs.at("dim")) : nullptr) {
    out.insert(*one < 0 ? *one + static_cast<int64_t>(n) : *one);
  } else {
    for (int64_t d : node.attr<std::vector<int64_t>>("dim", {})) out.insert(d < 0 ? d + static_cast<int64_t>(n) : d);
  }
  if (out.empty()) {
    for (size_t d = 0; d < n; ++d) out.insert(static_cast<int64_t>(d));
  }
  return out;
}

Rule reduction(const OpGraph& graph, const Node& node, Reduce reduce, Cuttable cut) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  const auto dims = reduced_dims(node, x.size());
  const bool keep = graph.output(node, 0).shape.size() == x.size() && !x.empty();
  std::vector<std::string> in, out;
  for (size_t d = 0; d < x.size(); ++d) {
    const bool gone = dims.count(static_cast<int64_t>(d)) > 0;
    in.push_back(fmt::format("d{}", d));
    r.factor(in.back(), x[d], gone ? FactorKind::kReduction : d == 0 ? FactorKind::kSample : FactorKind::kAttribute, gone ? cut : Cuttable::kAny);
    if (!gone)
      out.push_back(in.back());
    else if (keep)
      out.push_back("*");
  }
  r.operand(0, in);
  for (size_t i = 0; i < node.outputs.size(); ++i) r.result(out, cut == Cuttable::kAny ? reduce : Reduce::kNone);
  if (cut == Cuttable::kAny) r.saves({});
  return r.build();
}

// Sums and means: a tile gives its share of the sum, a mean divided by the global count.
Rule sum(const OpGraph& graph, const Node& node) {
  return reduction(graph, node, Reduce::kSum, Cuttable::kAny);
}
// A maximum whose gradient stops (softmax' shift).
Rule max_shift(const OpGraph& graph, const Node& node) {
  Rule r = reduction(graph, node, Reduce::kMax, Cuttable::kAny);
  for (Result& x : r.results) x.differentiable = false;
  return r;
}
// Reductions that are no sums, or whose gradient depends on ties: whole along the reduced dims.
Rule whole_reduction(const OpGraph& graph, const Node& node) {
  return reduction(graph, node, Reduce::kNone, Cuttable::kWhole);
}

// Fourier transforms: whole along the dims that they transform, whose sizes may change.
Rule fourier(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& y = graph.output(node, 0).shape;
  const auto dims = reduced_dims(node, y.size());
  std::vector<std::string> names;
  for (size_t d = 0; d < y.size(); ++d) {
    const bool here = dims.count(static_cast<int64_t>(d)) > 0;
    names.push_back(here ? "*" : fmt::format("d{}", d));
    if (!here) r.factor(names.back(), y[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
  }
  return r.operand(0, names).result(names).build();
}

Rule softmax(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  int64_t dim = node.attr<int64_t>("dim", -1);
  if (dim < 0) dim += static_cast<int64_t>(x.size());
  std::vector<std::string> names;
  for (size_t d = 0; d < x.size(); ++d) {
    const bool here = static_cast<int64_t>(d) == dim;
    names.push_back(fmt::format("d{}", d));
    r.factor(names.back(), x[d],
             here     ? FactorKind::kReduction
             : d == 0 ? FactorKind::kSample
                      : FactorKind::kAttribute,
             here ? Cuttable::kExpand : Cuttable::kAny);
  }
  return r.operand(0, names).result(names).saves({"result"}).build();
}

// softmax = e / sum(e), e = exp(x - max); log_softmax = x - max - log(sum(e)).
void expand_softmax(Expander& e, const Node& node, const Rule&, const Tiling&) {
  const TensorId x = e.wide(0);
  std::vector<int64_t> keep = e.shape(x);
  int64_t dim = node.attr<int64_t>("dim", -1);
  if (dim < 0) dim += static_cast<int64_t>(keep.size());
  const std::vector<int64_t> shape = keep;
  keep[dim] = 1;
  const AttrMap attrs{{"dim", std::vector<int64_t>{dim}}, {"keepdim", true}};
  const TensorId top = e.add({.name = "max", .target = "max_shift", .inputs = {x}, .attrs = attrs}, keep, "", false);
  const TensorId exp = e.add({.name = "exp", .target = "exp_shifted", .inputs = {x, top}, .family = "pointwise"}, shape);
  const TensorId total = e.add({.name = "sum", .target = "sum", .inputs = {exp}, .attrs = attrs}, keep);
  if (node.target == "softmax") {
    e.bind(0, e.add({.name = "div", .target = "div", .inputs = {exp, total}, .family = "pointwise"}, shape));
  } else {
    e.bind(0, e.add({.name = "log", .target = "log_shifted", .inputs = {x, top, total}, .family = "pointwise"}, shape));
  }
}

}  // namespace

void register_reduce(RuleRegistry& rules, ExpansionRegistry& expansions) {
  rules.add({"sum", "mean"}, sum);
  rules.add({"max_shift"}, max_shift);
  rules.add({"amax", "amin",   "var",     "std",     "var_mean", "std_mean", "logsumexp", "prod", "argmax", "argmin", "any", "all", "linalg_vector_norm",
             "norm", "median", "max_dim", "min_dim", "mode",     "kthvalue", "nanmedian"},
            whole_reduction);
  rules.add(
      {"fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn"},
      fourier);
  rules.add({"softmax", "log_softmax"}, softmax);
  expansions.add({"softmax", "log_softmax"}, expand_softmax);
}

}  // namespace soap
