// Reading and writing at given places: index_take, index_write, gather, scatter, topk, index_add, histc, bucketize, unfold.
// The dim that places are counted in is read whole, so a place means the same on every tile.
#include <algorithm>

#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

FactorKind kind_at(size_t d) {
  return d == 0 ? FactorKind::kSample : FactorKind::kAttribute;
}

// Index tensors (operands first..) broadcast against each other to `shape`; returns its size in dims.
std::vector<int64_t> broadcast_shape(const OpGraph& graph, const Node& node, int first) {
  std::vector<int64_t> shape;
  for (int i = first; i < static_cast<int>(node.inputs.size()); ++i) {
    const auto& own = graph.input(node, i).shape;
    if (own.size() > shape.size()) shape.insert(shape.begin(), own.size() - shape.size(), 1);
    for (size_t d = 0; d < own.size(); ++d) {
      int64_t& size = shape[shape.size() - own.size() + d];
      if (own[d] != 1) size = own[d];
    }
  }
  return shape;
}

// x[:, i, j, :] with k index tensors side by side from `dim`: y[p.. | q.. | r..], q the dims of the indices; x's indexed dims are whole.
Rule index_take(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &x = graph.input(node, 0).shape, &y = graph.output(node, 0).shape;
  const auto dim = static_cast<size_t>(node.attr<int64_t>("dim", 0));
  const size_t indexed = node.inputs.size() - 1, places = broadcast_shape(graph, node, 1).size();
  std::vector<std::string> out;
  for (size_t d = 0; d < y.size(); ++d) {
    out.push_back(fmt::format("d{}", d));
    r.factor(out.back(), y[d], kind_at(d));
  }
  std::vector<std::string> in(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(dim));
  in.insert(in.end(), indexed, "*");
  in.insert(in.end(), out.begin() + static_cast<std::ptrdiff_t>(dim + places), out.end());
  SOAP_CHECK(in.size() == x.size(), "{}: {} dims for an operand of {}", node.name, in.size(), x.size());
  r.operand(0, in);
  for (size_t i = 1; i <= indexed; ++i) {
    const auto& own = graph.input(node, static_cast<int>(i)).shape;
    std::vector<std::string> names;
    for (size_t d = 0; d < own.size(); ++d) {
      const size_t at = dim + places - own.size() + d;
      names.push_back(own[d] == y[at] ? out[at] : "*");
    }
    r.operand(static_cast<int>(i), names).constant();
  }
  return r.result(out).build();
}

// A copy of x with values at x[:, i, j, :]: what isn't indexed is free; places and the values' dims that run along them are whole.
Rule index_write(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &x = graph.input(node, 0).shape, &values = graph.input(node, 1).shape;
  const auto dim = static_cast<size_t>(node.attr<int64_t>("dim", 0));
  const size_t indexed = node.inputs.size() - 2, places = broadcast_shape(graph, node, 2).size();
  std::vector<std::string> names;
  for (size_t d = 0; d < x.size(); ++d) {
    if (d >= dim && d < dim + indexed) {
      names.push_back("*");
      continue;
    }
    names.push_back(fmt::format("d{}", d));
    r.factor(names.back(), x[d], kind_at(d));
  }
  r.operand(0, names);
  // The values broadcast to x[:, i, j, :], whose dims are x's before, the places, x's after.
  const size_t rank = x.size() - indexed + places;
  std::vector<std::string> own;
  for (size_t d = 0; d < values.size(); ++d) {
    const size_t at = rank - values.size() + d;
    const size_t of = at < dim ? at : at < dim + places ? x.size() : at - places + indexed;
    own.push_back(of < x.size() && values[d] == x[of] ? names[of] : "*");
  }
  return r.operand(1, own).result(names).build();
}

// Operators along `dim` whose operands may differ there (gather, scatter, topk, sort): a dim on which all of them agree is free.
Rule along(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& y = graph.output(node, 0).shape;
  int64_t dim = node.attr<int64_t>("dim", -1);
  if (dim < 0) dim += static_cast<int64_t>(y.size());
  std::vector<std::string> names;
  for (size_t d = 0; d < y.size(); ++d) {
    bool agreed = static_cast<int64_t>(d) != dim;
    for (int i = 0; i < static_cast<int>(node.inputs.size()); ++i) {
      const auto& own = graph.input(node, i).shape;
      agreed = agreed && own.size() == y.size() && own[d] == y[d];
    }
    names.push_back(agreed ? fmt::format("d{}", d) : "*");
    if (agreed) r.factor(names.back(), y[d], kind_at(d));
  }
  for (int i = 0; i < static_cast<int>(node.inputs.size()); ++i) {
    if (graph.input(node, i).shape.size() == y.size()) r.operand(i, names);
  }
  for (size_t i = 0; i < node.outputs.size(); ++i) r.result(names);
  return r.build();
}

// Rows of `source` added or copied into rows of x at the places of a (whole) list along `dim`: the other dims are free.
Rule index_into(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& y = graph.output(node, 0).shape;
  int64_t dim = node.attr<int64_t>("dim", 0);
  if (dim < 0) dim += static_cast<int64_t>(y.size());
  std::vector<std::string> names;
  for (size_t d = 0; d < y.size(); ++d) {
    const bool here = static_cast<int64_t>(d) == dim;
    names.push_back(here ? "*" : fmt::format("d{}", d));
    if (!here) r.factor(names.back(), y[d], kind_at(d));
  }
  return r.operand("self", names).operand("source", names).result(names).build();
}

// Counts in fixed bins are sums over elements; bins from the data's own range need all of it.
Rule histc(const OpGraph& graph, const Node& node) {
  const auto bound = [&](const char* name) {
    const auto found = node.attrs.find(name);
    if (found == node.attrs.end()) return 0.0;
    if (const auto* whole = std::get_if<int64_t>(&found->second)) return static_cast<double>(*whole);
    const auto* real = std::get_if<double>(&found->second);
    return real ? *real : 0.0;
  };
  if (bound("min") == bound("max")) return whole_rule(graph, node);
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  std::vector<std::string> in;
  for (size_t d = 0; d < x.size(); ++d) {
    in.push_back(fmt::format("d{}", d));
    r.factor(in.back(), x[d], FactorKind::kReduction);
  }
  return r.operand(0, in).constant().result({"*"}, Reduce::kSum).build();
}

// Each value's bin among the (whole) boundaries.
Rule bucketize(const OpGraph& graph, const Node& node) {
  const int values = node.operand(node.target == "bucketize" ? "input" : "self");
  const int boundaries = node.operand(node.target == "bucketize" ? "boundaries" : "sorted_sequence");
  if (boundaries < 0 || graph.input(node, boundaries).shape.size() != 1) return whole_rule(graph, node);
  RuleSpec r(graph, node);
  const int index = values >= 0 ? values : 0;
  const auto& x = graph.input(node, index).shape;
  std::vector<std::string> names;
  for (size_t d = 0; d < x.size(); ++d) {
    names.push_back(fmt::format("d{}", d));
    r.factor(names.back(), x[d], kind_at(d));
  }
  return r.operand(index, names).result(names).build();
}

// Windows of `size` every `step` along one dim, as a last dim of the result.
Rule unfold(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& y = graph.output(node, 0).shape;
  int64_t dim = node.attr<int64_t>("dimension", 0);
  if (dim < 0) dim += static_cast<int64_t>(y.size()) - 1;
  std::vector<std::string> names;
  for (size_t d = 0; d + 1 < y.size(); ++d) {
    const bool here = static_cast<int64_t>(d) == dim;
    names.push_back(here ? "l" : fmt::format("d{}", d));
    r.factor(names.back(), y[d], kind_at(d), here ? Cuttable::kInterval : Cuttable::kAny);
  }
  r.operand(0, names).map(static_cast<int>(dim), "l",
                          {.kind = IndexMap::Kind::kWindow, .stride = node.attr<int64_t>("step", 1), .kernel = node.attr<int64_t>("size", 1)});
  names.push_back("*");
  return r.result(names).build();
}

// The sum of windows of [n, c kh kw, places] into an image: rows and channels are free.
Rule col2im(const OpGraph& graph, const Node& node) {
  const auto &x = graph.input(node, 0).shape, &y = graph.output(node, 0).shape;
  if (y.size() != 4) return whole_rule(graph, node);
  RuleSpec r(graph, node);
  r.factor("n", y[0], FactorKind::kSample).factor("c", y[1], FactorKind::kAttribute);
  r.factor("k", y[1] > 0 ? x[1] / y[1] : 0, FactorKind::kAttribute, Cuttable::kWhole);
  return r.operand(0, {"n", "c k", "*"}).result({"n", "c", "*", "*"}).build();
}

}  // namespace

void register_indexing(RuleRegistry& rules) {
  rules.add({"index_take"}, index_take);
  rules.add({"index_write"}, index_write);
  rules.add({"cumsum", "cumprod", "sort", "argsort", "logcumsumexp", "gather", "topk", "scatter", "scatter_add", "scatter_reduce", "cummax", "cummin"}, along);
  rules.add({"index_add", "index_copy", "index_fill"}, index_into);
  rules.add({"histc"}, histc);
  rules.add({"bucketize", "searchsorted"}, bucketize);
  rules.add({"unfold"}, unfold);
  rules.add({"col2im"}, col2im);
}

}  // namespace soap
