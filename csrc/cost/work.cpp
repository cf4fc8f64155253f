#include "cost/work.h"

#include <algorithm>
#include <map>
#include <utility>

#include "sharding/dim_set.h"

namespace soap {
namespace {

struct Local {
  const Program& p;
  const Node& n;
  const Rule& rule;
  std::vector<IndexSet> sets;

  Box operand(int i) const { return box_of(rule.operands[i].dims, rule, p.graph.input(n, i).shape, sets); }
  double elements(int i) const { return i < 0 ? 0.0 : static_cast<double>(product_of(rule.operands[i].dims, p.graph.input(n, i).shape)); }
  int64_t result_elements(int r) const { return product_of(rule.results[r].dims, p.graph.output(n, r).shape); }

  int64_t product_of(const std::vector<DimExpr>& dims, const std::vector<int64_t>& shape) const {
    int64_t out = 1;
    for (size_t d = 0; d < dims.size(); ++d) out *= dim_size(dims[d], shape[d], sets);
    return out;
  }
};

using Flops = double (*)(const Local&);

double products(const Local& t) {
  bool contraction = false;
  double volume_all = 1;
  for (size_t f = 0; f < t.sets.size(); ++f) {
    volume_all *= static_cast<double>(t.sets[f].size());
    contraction = contraction || t.rule.factors[f].kind == FactorKind::kReduction;
  }
  if (!contraction || t.n.inputs.size() < 2) return 0;
  const auto& dims = t.rule.operands[1].dims;
  for (size_t d = 0; d < dims.size(); ++d) {
    if (dims[d].factors.empty()) volume_all *= static_cast<double>(t.p.graph.input(t.n, 1).shape[d]);
  }
  return 2 * volume_all;
}

double transposed_convolution(const Local& t) {
  const Box w = t.operand(1);  // [in, out of a group, kernel..]
  return 2 * t.elements(0) * static_cast<double>(volume(w)) / static_cast<double>(std::max<int64_t>(w[0].size(), 1));
}

// Pairs (i, j) of i in [a.begin, a.end) and j in [b.begin, b.end) with j <= i.
double lower_pairs(const Run& a, const Run& b) {
  const int64_t first = std::max(a.begin, b.begin), full = std::max(first, std::min(a.end, b.end));
  const int64_t rising = full - first;  // i in [first, full) sees i + 1 - b.begin of them, i >= full all
  return static_cast<double>(rising) * static_cast<double>(first + full + 1 - 2 * b.begin) / 2 +
         static_cast<double>(std::max<int64_t>(a.end - full, 0)) * static_cast<double>(b.end - b.begin);
}

double attention(const Local& t) {
  const Box q = t.operand(0), k = t.operand(1), v = t.operand(2);
  if (q.size() < 2 || k.size() < 2) return 0;
  const IndexSet &queries = q[q.size() - 2], &keys = k[k.size() - 2];
  double pairs = static_cast<double>(queries.size()) * static_cast<double>(keys.size());
  if (t.n.attr<bool>("is_causal", false)) {
    pairs = 0;
    for (const Run& a : queries.runs()) {
      for (const Run& b : keys.runs()) pairs += lower_pairs(a, b);
    }
  }
  double heads = 1;
  for (size_t d = 0; d + 2 < q.size(); ++d) heads *= static_cast<double>(q[d].size());
  return 2 * heads * pairs * static_cast<double>(k.back().size() + v.back().size());
}

double recurrent(const Local& t) {
  const Box x = t.operand(t.n.operand("input"));
  double weights = 0;
  for (const char* name : {"w_ih", "w_hh", "w_hr"}) weights += t.elements(t.n.operand(name));
  return 2 * static_cast<double>(x[0].size() * x[1].size()) * weights;
}

double grouped(const Local& t) {
  return t.n.inputs.size() < 2 ? 0 : 2 * t.elements(0) * static_cast<double>(t.operand(1).back().size());
}

double distances(const Local& t) {
  return 2 * static_cast<double>(t.result_elements(0)) * static_cast<double>(t.operand(0).back().size());
}

// The smallest of rows, columns and contraction; factors that all three tensors have are a batch of products.
double smallest_of_product(const Local& t) {
  const auto has = [](const auto& dims, int f) {
    return std::any_of(dims.begin(), dims.end(), [&](const DimExpr& d) { return std::find(d.factors.begin(), d.factors.end(), f) != d.factors.end(); });
  };
  double rows = 1, columns = 1, contraction = 1;
  for (size_t f = 0; f < t.sets.size() && t.n.inputs.size() > 1; ++f) {
    const int factor = static_cast<int>(f);
    const bool first = has(t.rule.operands[0].dims, factor), second = has(t.rule.operands[1].dims, factor);
    const auto size = static_cast<double>(t.sets[f].size());
    if (t.rule.factors[f].kind == FactorKind::kReduction) {
      contraction *= size;
    } else if (first != second) {
      (first ? rows : columns) *= size;
    }
  }
  return std::min({rows, columns, contraction});
}

// Elements that are normalized together.
double row_of(const Local& t) {
  if (t.n.target == "layer_norm" || t.n.target == "rms_norm") {
    double row = 1;
    for (int64_t size : t.n.attr<std::vector<int64_t>>("normalized_shape", {})) row *= static_cast<double>(size);
    return row;
  }
  if (t.n.target != "softmax" && t.n.target != "log_softmax") return 0;
  const Box x = t.operand(0);
  const auto rank = static_cast<int64_t>(x.size());
  const int64_t dim = t.n.attr<int64_t>("dim", -1);
  return rank == 0 ? 0 : static_cast<double>(x[dim < 0 ? dim + rank : dim].size());
}

double none(const Local&) {
  return 0;
}

struct Entry {
  std::string_view family;
  Flops flops = products;
};

// Operators that aren't "pointwise" or "other", or are counted in a way of their own.
const std::map<std::string, Entry, std::less<>>& entries() {
  static const std::map<std::string, Entry, std::less<>> all = [] {
    std::map<std::string, Entry, std::less<>> e;
    const auto add = [&](std::initializer_list<const char*> targets, Entry entry) {
      for (const char* t : targets) e[t] = entry;
    };
    add({"conv1d", "conv2d", "conv3d"}, {"convolution"});
    add({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}, {"convolution", transposed_convolution});
    add({"linear", "matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "einsum"}, {"matmul"});
    add({"_grouped_mm", "transformers.grouped_mm_fallback"}, {"matmul", grouped});
    add({"cdist", "_cdist_forward"}, {"matmul", distances});
    add({"scaled_dot_product_attention", "attention_part"}, {"attention", attention});
    add({"attention_merge"}, {"attention", none});
    add({"batch_norm", "channel_moments", "merge_moments", "channel_normalize", "layer_norm", "rms_norm", "group_norm", "normalize", "softmax", "log_softmax"},
        {"normalization"});
    add({"embedding", "embedding_bag_fixed", "index_select"}, {"embedding", none});
    add({"lstm_layer", "gru_layer", "rnn_layer"}, {"recurrent", recurrent});
    return e;
  }();
  return all;
}

// Of the table that is looked up: no more than what is read of it.
double looked_up(const Local& t, int table, double elements) {
  if (t.n.target == "index_select") return std::min(elements, static_cast<double>(t.result_elements(0)));
  const int indices = t.n.operand("indices");
  return indices < 0 ? elements : std::min(elements, t.elements(indices) * static_cast<double>(t.operand(table).back().size()));
}

// Null for "pointwise" and "other".
const Entry* entry_of(const Node& node) {
  const auto it = entries().find(node.target);
  return it == entries().end() ? nullptr : &it->second;
}

std::string_view family(const Node& node, const Entry* entry) {
  return entry ? entry->family : node.family == "pointwise" ? "pointwise" : "other";
}

}  // namespace

std::string_view family_of(const Node& node) {
  return family(node, entry_of(node));
}

Work work_of(const Program& p, NodeId node, int tile, int chunk) {
  const Node& n = p.graph.nodes[node];
  const Local t{p, n, p.rules[node], factor_sets(p.rules[node], p.tilings[node], tile, chunk)};
  const Entry* entry = entry_of(n);
  Work out{.family = family(n, entry), .dtype = p.graph.output(n, 0).dtype};
  if (!n.inputs.empty() && is_float(p.graph.input(n, 0))) out.dtype = p.graph.input(n, 0).dtype;
  if (t.rule.view && n.target != "split") return out;
  const int table = out.family == "embedding" ? std::max(n.operand("weight"), 0) : -1;
  for (size_t i = 0; i < n.inputs.size(); ++i) {
    const auto operand = static_cast<int>(i);
    const double elements = t.elements(operand);
    out.bytes += (operand == table ? looked_up(t, operand, elements) : elements) * static_cast<double>(p.graph.input(n, operand).element_bytes);
  }
  // In training the statistics are made first.
  if (n.target == "batch_norm" && (n.outputs.size() > 1 || n.attr<bool>("training", false))) {
    out.bytes += t.elements(0) * static_cast<double>(p.graph.input(n, 0).element_bytes);
  }
  for (size_t r = 0; r < n.outputs.size(); ++r) {
    const auto result = static_cast<int>(r);
    out.bytes += static_cast<double>(t.result_elements(result) * p.graph.output(n, result).element_bytes);
  }
  // The gradient of a concatenation is parts of one tensor, which are views; that of parts is a concatenation.
  if (n.target == "cat") out.backward_bytes = 0;
  if (n.target == "split") out.backward_bytes = std::exchange(out.bytes, 0);
  out.flops = entry ? entry->flops(t) : products(t);
  if (out.family == "matmul" && out.flops > 0) out.size = smallest_of_product(t);
  if (out.family == "normalization") out.size = row_of(t);
  if (out.family == "pointwise") out.size = static_cast<double>(t.result_elements(0));
  if (out.family == "attention" && out.flops > 0) {
    const Box k = t.operand(1);
    out.size = static_cast<double>(k[k.size() - 2].size());
    out.width = static_cast<double>(k.back().size());
  }
  return out;
}

bool same_work(const Program& p, NodeId node, const std::vector<IndexSet>& a, const std::vector<IndexSet>& b) {
  const Node& n = p.graph.nodes[node];
  const Rule& rule = p.rules[node];
  if (family_of(n) == "attention") return false;
  for (size_t f = 0; f < rule.factors.size(); ++f) {
    if (a[f].size() != b[f].size()) return false;
  }
  const auto alike = [&](const std::vector<DimExpr>& dims, const std::vector<int64_t>& shape) {
    for (size_t d = 0; d < dims.size(); ++d) {
      const bool moved = dims[d].map && a[dims[d].factors[0]] != b[dims[d].factors[0]];
      if (moved && dim_size(dims[d], shape[d], a) != dim_size(dims[d], shape[d], b)) return false;
    }
    return true;
  };
  for (size_t i = 0; i < rule.operands.size(); ++i) {
    if (!alike(rule.operands[i].dims, p.graph.input(n, static_cast<int>(i)).shape)) return false;
  }
  for (size_t r = 0; r < rule.results.size(); ++r) {
    if (!alike(rule.results[r].dims, p.graph.output(n, static_cast<int>(r)).shape)) return false;
  }
  return true;
}

}  // namespace soap
