// Matrix products: linear, matmul, bmm, addmm, mm.
//   linear   x[s.. i]  w[o i]  b[o]  ->  y[s.. o], summed over i; the bias is read by the tile that holds i = 0.
#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

// Names of leading dims: n, s, s2, s3, ...
std::string leading(size_t d) {
  return d == 0 ? "n" : d == 1 ? "s" : fmt::format("s{}", d);
}

Rule linear(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, node.operand("input")).shape;
  const auto& w = graph.input(node, node.operand("weight")).shape;
  std::vector<std::string> in, out;
  for (size_t d = 0; d + 1 < x.size(); ++d) {
    in.push_back(leading(d));
    r.factor(in.back(), x[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
  }
  out = in;
  r.factor("i", x.back(), FactorKind::kReduction);
  in.push_back("i");
  std::vector<std::string> weight{"i"};
  if (w.size() == 2) {
    r.factor("o", w[0], FactorKind::kParameter);
    out.push_back("o");
    weight = {"o", "i"};
  }
  r.operand("input", in).operand("weight", weight);
  if (w.size() == 2) r.operand("bias", {"o"}).anchor("i");
  return r.result(out, Reduce::kSum).saves({"input", "weight"}).build();
}

// matmul, bmm, mm with broadcast batch dims, also vectors.
Rule matmul(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &a = graph.input(node, 0).shape, &b = graph.input(node, 1).shape, &y = graph.output(node, 0).shape;
  const bool row = a.size() > 1, column = b.size() > 1;
  const size_t batch = y.size() - row - column;
  std::vector<std::string> out, left, right;
  for (size_t d = 0; d < batch; ++d) {
    out.push_back(fmt::format("b{}", d));
    r.factor(out.back(), y[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
  }
  const auto batch_dims = [&](const std::vector<int64_t>& shape, std::vector<std::string>& dims) {
    const size_t own = shape.size() >= 2 ? shape.size() - 2 : 0;
    for (size_t d = 0; d < own; ++d) dims.push_back(shape[d] == y[batch - own + d] ? out[batch - own + d] : "*");
  };
  batch_dims(a, left);
  batch_dims(b, right);
  r.factor("i", a.back(), FactorKind::kReduction);
  if (row) {
    r.factor("m", a[a.size() - 2], batch == 0 ? FactorKind::kSample : FactorKind::kAttribute);
    left.push_back("m");
    out.push_back("m");
  }
  left.push_back("i");
  right.push_back("i");
  if (column) {
    r.factor("o", b.back(), FactorKind::kParameter);
    right.push_back("o");
    out.push_back("o");
  }
  return r.operand(0, left).operand(1, right).result(out, Reduce::kSum).saves({"0", "1"}).build();
}

// addmm, baddbmm: beta * bias + alpha * (a @ b); the bias broadcasts.
Rule addmm(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &bias = graph.input(node, 0).shape, &a = graph.input(node, 1).shape, &y = graph.output(node, 0).shape;
  std::vector<std::string> out;
  if (y.size() == 3) {
    r.factor("b", y[0], FactorKind::kSample);
    out.push_back("b");
  }
  r.factor("m", y[y.size() - 2], y.size() == 3 ? FactorKind::kAttribute : FactorKind::kSample);
  r.factor("o", y.back(), FactorKind::kParameter).factor("i", a.back(), FactorKind::kReduction);
  std::vector<std::string> left = out, right = out;
  left.insert(left.end(), {"m", "i"});
  right.insert(right.end(), {"i", "o"});
  out.insert(out.end(), {"m", "o"});
  std::vector<std::string> b;
  for (size_t d = 0; d < bias.size(); ++d) {
    const size_t to = y.size() - bias.size() + d;
    b.push_back(bias[d] == y[to] ? out[to] : "*");
  }
  return r.operand(0, b).anchor("i").operand(1, left).operand(2, right).result(out, Reduce::kSum).saves({"1", "2"}).build();
}

// einsum with an explicit output in which each letter stands once in an operand (capture sees to that): a letter is a factor, and those
// that the result lacks are summed over.
Rule einsum(const OpGraph& graph, const Node& node) {
  const std::string equation = node.attr<std::string>("equation", "");
  const size_t arrow = equation.find("->");
  SOAP_CHECK(arrow != std::string::npos, "{}: einsum \"{}\" without an output", node.name, equation);
  const std::string left = equation.substr(0, arrow), result = equation.substr(arrow + 2);
  std::vector<std::vector<std::string>> terms(1);
  for (char c : left) {
    if (c == ',')
      terms.emplace_back();
    else
      terms.back().emplace_back(1, c);
  }
  RuleSpec r(graph, node);
  std::string known;
  for (size_t i = 0; i < terms.size(); ++i) {
    for (size_t d = 0; d < terms[i].size(); ++d) {
      const std::string& name = terms[i][d];
      if (known.find(name) != std::string::npos) continue;
      known += name;
      const size_t at = result.find(name);
      const FactorKind kind = at == std::string::npos ? FactorKind::kReduction
                              : at == 0               ? FactorKind::kSample
                              : i == 0                ? FactorKind::kAttribute
                                                      : FactorKind::kParameter;
      r.factor(name, graph.input(node, static_cast<int>(i)).shape[d], kind);
    }
  }
  for (size_t i = 0; i < terms.size(); ++i) r.operand(static_cast<int>(i), terms[i]);
  std::vector<std::string> out;
  for (char c : result) out.emplace_back(1, c);
  return r.result(out, Reduce::kSum).saves(node.operand_names).build();
}

// Distances between all rows of a[b.. m d] and b[b.. n d].
Rule cdist(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &a = graph.input(node, 0).shape, &b = graph.input(node, 1).shape, &y = graph.output(node, 0).shape;
  std::vector<std::string> out;
  for (size_t d = 0; d + 2 < y.size(); ++d) {
    out.push_back(fmt::format("b{}", d));
    r.factor(out.back(), y[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
  }
  const auto rows = [&](const std::vector<int64_t>& shape, const char* name) {
    std::vector<std::string> dims;
    for (size_t d = 0; d + 2 < shape.size(); ++d) {
      const size_t at = y.size() - shape.size() + d;
      dims.push_back(shape[d] == y[at] ? out[at] : "*");
    }
    dims.insert(dims.end(), {name, "*"});
    return dims;
  };
  r.factor("m", a[a.size() - 2], FactorKind::kAttribute).factor("o", b[b.size() - 2], FactorKind::kAttribute);
  const auto left = rows(a, "m"), right = rows(b, "o");
  out.insert(out.end(), {"m", "o"});
  return r.operand(0, left).operand(1, right).result(out).build();
}

// One matrix for each group of rows: x[t i] w[g i o], the rows' groups given by offsets -> y[t o]. Rows stay together: offsets count them.
Rule grouped(const OpGraph& graph, const Node& node) {
  const auto &x = graph.input(node, 0).shape, &w = graph.input(node, 1).shape;
  if (x.size() != 2 || w.size() != 3 || node.inputs.size() != 3) return whole_rule(graph, node);
  RuleSpec r(graph, node);
  r.factor("i", x[1], FactorKind::kReduction).factor("o", w[2], FactorKind::kParameter);
  return r.operand(0, {"*", "i"}).operand(1, {"*", "i", "o"}).result({"*", "o"}, Reduce::kSum).build();
}

}  // namespace

void register_matmul(RuleRegistry& rules) {
  rules.add({"linear"}, linear);
  rules.add({"matmul", "mm", "bmm", "mv", "dot"}, matmul);
  rules.add({"addmm", "baddbmm"}, addmm);
  rules.add({"einsum"}, einsum);
  rules.add({"cdist", "_cdist_forward"}, cdist);
  rules.add({"_grouped_mm", "transformers.grouped_mm_fallback"}, grouped);
}

}  // namespace soap
