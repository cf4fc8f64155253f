// Moves within dims: narrow, slice, split, cat, expand, flip, pad, repeat_interleave; and creation.
#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

// Factors d0.. of the result; equal dims of operand 0 share them, the dims in `special` are left to the caller.
std::vector<std::string> result_factors(RuleSpec& r, const std::vector<int64_t>& shape, Cuttable cut = Cuttable::kAny) {
  std::vector<std::string> names;
  for (size_t d = 0; d < shape.size(); ++d) {
    names.push_back(fmt::format("d{}", d));
    r.factor(names.back(), shape[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute, cut);
  }
  return names;
}

int64_t wrap(int64_t dim, size_t n) {
  return dim < 0 ? dim + static_cast<int64_t>(n) : dim;
}

Rule narrow(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& y = graph.output(node, 0).shape;
  const int64_t dim = wrap(node.attr<int64_t>("dim", 0), y.size());
  const auto names = result_factors(r, y);
  const IndexMap map{.kind = IndexMap::Kind::kStride, .stride = node.attr<int64_t>("step", 1), .offset = node.attr<int64_t>("start", 0)};
  return r.operand(0, names).map(static_cast<int>(dim), names[dim], map).result(names).view().build();
}

// All parts of a dim at once, sizes as its results have them. Made by substitutions only: capture writes each part as a narrow.
Rule split(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  const int64_t dim = wrap(node.attr<int64_t>("dim", 0), x.size());
  const auto names = result_factors(r, x);
  r.operand(0, names);
  int64_t before = 0;
  for (size_t i = 0; i < node.outputs.size(); ++i) {
    r.result(names).map(static_cast<int>(dim), names[dim], {.kind = IndexMap::Kind::kShift, .offset = -before});
    before += graph.output(node, static_cast<int>(i)).shape[dim];
  }
  return r.saves({}).view().build();
}

Rule cat(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& y = graph.output(node, 0).shape;
  const int64_t dim = wrap(node.attr<int64_t>("dim", 0), y.size());
  const auto names = result_factors(r, y);
  int64_t before = 0;
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    r.operand(static_cast<int>(i), names).map(static_cast<int>(dim), names[dim], {.kind = IndexMap::Kind::kShift, .offset = -before});
    before += graph.input(node, static_cast<int>(i)).shape[dim];
  }
  return r.result(names).saves({}).build();
}

Rule expand(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &x = graph.input(node, 0).shape, &y = graph.output(node, 0).shape;
  const auto names = result_factors(r, y);
  std::vector<std::string> in;
  const size_t lead = y.size() - x.size();
  for (size_t d = 0; d < x.size(); ++d) in.push_back(x[d] == y[d + lead] ? names[d + lead] : "*");
  return r.operand(0, in).result(names).view().build();
}

Rule flip(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& y = graph.output(node, 0).shape;
  const auto names = result_factors(r, y);
  r.operand(0, names);
  for (int64_t d : node.attr<std::vector<int64_t>>("dims", {}))
    r.map(static_cast<int>(wrap(d, y.size())), names[wrap(d, y.size())], {.kind = IndexMap::Kind::kFlip});
  return r.result(names).saves({}).build();
}

// Constant pad: the tile reads what lies inside; the local computation adds the border.
Rule pad(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& y = graph.output(node, 0).shape;
  const auto amounts = node.attr<std::vector<int64_t>>("pad", {});
  const std::string mode = node.attr<std::string>("mode", "constant");
  std::vector<std::string> names;
  for (size_t d = 0; d < y.size(); ++d) {
    const size_t i = 2 * (y.size() - 1 - d);
    const bool padded = i + 1 < amounts.size() && (amounts[i] != 0 || amounts[i + 1] != 0);
    names.push_back(fmt::format("d{}", d));
    r.factor(names.back(), y[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute,
             !padded              ? Cuttable::kAny
             : mode == "constant" ? Cuttable::kInterval
                                  : Cuttable::kWhole);
  }
  r.operand(0, names);
  for (size_t d = 0; d < y.size(); ++d) {
    const size_t i = 2 * (y.size() - 1 - d);
    if (i + 1 >= amounts.size() || (amounts[i] == 0 && amounts[i + 1] == 0)) continue;
    // A mode other than constant reads the dim whole; its factor can't be cut.
    r.map(static_cast<int>(d), names[d],
          mode == "constant" ? IndexMap{.kind = IndexMap::Kind::kShift, .offset = -amounts[i]}
                             : IndexMap{.kind = IndexMap::Kind::kReflect, .offset = amounts[i]});
  }
  return r.result(names).saves({}).build();
}

// Each tile makes its own part.
Rule created(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  return r.result(result_factors(r, graph.output(node, 0).shape)).build();
}

}  // namespace

void register_move(RuleRegistry& rules) {
  rules.add({"narrow", "slice"}, narrow);
  rules.add({"cat"}, cat);
  rules.add({"split"}, split);
  rules.add({"expand"}, expand);
  rules.add({"flip"}, flip);
  rules.add({"pad", "constant_pad_nd"}, pad);
  rules.add({"full", "arange", "eye", "linspace"}, created);
}

}  // namespace soap
