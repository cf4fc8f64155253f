// Scaled dot product attention.
//   q[b.. (h r) s *]  k[b.. h t *]  v[b.. h t e]  mask[.. s t]  ->  y[b.. (h r) s e]        r: query heads per key head (GQA)
// Cut along the keys it expands: each part of t gives (max, sum, accumulator) with the part as a real dim, and a merge joins them
// (rule 9 of the algebra).
#include <algorithm>

#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

struct Shapes {
  size_t batch = 0;  // leading dims before heads; 0 with three dims (heads are then the first)
  int64_t heads = 1, repeat = 1, queries = 0, keys = 0, width = 0;
};

Shapes shapes(const OpGraph& graph, const Node& node) {
  const auto &q = graph.input(node, 0).shape, &k = graph.input(node, 1).shape, &v = graph.input(node, 2).shape;
  Shapes s{.batch = q.size() - 3, .heads = k[k.size() - 3], .queries = q[q.size() - 2], .keys = k[k.size() - 2], .width = v.back()};
  s.repeat = q[q.size() - 3] / s.heads;
  return s;
}

std::string batch_name(size_t d) {
  return d == 0 ? "n" : fmt::format("n{}", d);
}

// Dims of the mask by broadcasting against [b.. heads s t].
std::vector<std::string> mask_dims(const OpGraph& graph, const Node& node, const std::vector<std::string>& full, const std::vector<int64_t>& sizes) {
  const auto& m = graph.input(node, node.operand("attn_mask")).shape;
  std::vector<std::string> out;
  for (size_t d = 0; d < m.size(); ++d) {
    const size_t to = full.size() - m.size() + d;
    out.push_back(m[d] == sizes[to] ? full[to] : "*");
  }
  return out;
}

Rule attention(const OpGraph& graph, const Node& node) {
  const auto& q = graph.input(node, 0).shape;
  const bool simple = q.size() >= 3 && graph.input(node, 1).shape.size() == q.size() && graph.input(node, 2).shape.size() == q.size();
  if (!simple) return whole_rule(graph, node);
  RuleSpec r(graph, node);
  const Shapes s = shapes(graph, node);
  std::vector<std::string> lead;
  for (size_t d = 0; d < s.batch; ++d) {
    lead.push_back(batch_name(d));
    r.factor(lead.back(), q[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
  }
  const bool dropout = node.attr<double>("dropout_p", 0.0) > 0;
  r.factor("h", s.heads, FactorKind::kParameter);
  if (s.repeat > 1) r.factor("r", s.repeat, FactorKind::kParameter);
  r.factor("s", s.queries, FactorKind::kAttribute)
      .factor("t", s.keys, FactorKind::kReduction, dropout ? Cuttable::kWhole : Cuttable::kExpand)
      .factor("e", s.width, FactorKind::kParameter);
  const std::string heads = s.repeat > 1 ? "h r" : "h";
  const auto with = [&](std::initializer_list<std::string> tail) {
    std::vector<std::string> out = lead;
    out.insert(out.end(), tail);
    return out;
  };
  r.operand(0, with({heads, "s", "*"})).operand(1, with({"h", "t", "*"})).operand(2, with({"h", "t", "e"}));
  if (node.operand("attn_mask") >= 0) {
    std::vector<int64_t> sizes(q.begin(), q.end() - 1);
    sizes.push_back(s.keys);
    r.operand("attn_mask", mask_dims(graph, node, with({heads, "s", "t"}), sizes));
  }
  return r.result(with({heads, "s", "e"})).saves({"0", "1", "2", "attn_mask", "result"}).build();
}

// One part of the keys, per index of p: m[.. s p], l[.. s p], acc[.. s e p]. `begins` are the parts' cut points in t.
Rule part(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const Shapes s = shapes(graph, node);
  const auto& q = graph.input(node, 0).shape;
  const auto begins = node.attr<std::vector<int64_t>>("begins", {});
  std::vector<std::string> lead;
  for (size_t d = 0; d < s.batch; ++d) {
    lead.push_back(batch_name(d));
    r.factor(lead.back(), q[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
  }
  r.factor("h", s.heads, FactorKind::kParameter);
  if (s.repeat > 1) r.factor("r", s.repeat, FactorKind::kParameter);
  r.factor("s", s.queries, FactorKind::kAttribute).factor("e", s.width, FactorKind::kParameter, Cuttable::kWhole);
  const auto num_parts = static_cast<int64_t>(begins.size()) - 1;
  r.factor("p", num_parts, FactorKind::kAttribute);
  IndexMap keys{.kind = IndexMap::Kind::kTable};
  for (int64_t i = 0; i < num_parts; ++i) keys.table.push_back(IndexSet::interval(begins[i], begins[i + 1]));
  const std::string heads = s.repeat > 1 ? "h r" : "h";
  const auto with = [&](std::initializer_list<std::string> tail) {
    std::vector<std::string> out = lead;
    out.insert(out.end(), tail);
    return out;
  };
  const auto key_dim = static_cast<int>(s.batch + 1);
  r.operand(0, with({heads, "s", "*"})).operand(1, with({"h", "*", "*"})).map(key_dim, "p", keys).operand(2, with({"h", "*", "e"})).map(key_dim, "p", keys);
  if (node.operand("attn_mask") >= 0) {
    std::vector<int64_t> sizes(q.begin(), q.end() - 1);
    sizes.push_back(s.keys);
    auto dims = mask_dims(graph, node, with({heads, "s", "T"}), sizes);
    const bool keyed = dims.back() == "T";
    dims.back() = "*";
    r.operand("attn_mask", dims);
    if (keyed) r.map(static_cast<int>(dims.size()) - 1, "p", keys);
  }
  return r.result(with({heads, "s", "p"})).result(with({heads, "s", "p"})).result(with({heads, "s", "e", "p"})).build();
}

Rule merge(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& y = graph.output(node, 0).shape;
  std::vector<std::string> names;
  for (size_t d = 0; d + 1 < y.size(); ++d) {
    const size_t from_end = y.size() - 2 - d;
    names.push_back(from_end == 0 ? "s" : from_end == 1 ? "h" : batch_name(d));
    r.factor(names.back(), y[d], d == 0 ? FactorKind::kSample : FactorKind::kAttribute);
  }
  r.factor("e", y.back(), FactorKind::kParameter);
  std::vector<std::string> stat = names, acc = names, out = names;
  stat.push_back("*");
  acc.insert(acc.end(), {"e", "*"});
  out.push_back("e");
  return r.operand(0, stat).operand(1, stat).operand(2, acc).result(out).build();
}

void expand_attention(Expander& e, const Node& node, const Rule& rule, const Tiling&) {
  std::vector<int64_t> begins{0};
  for (const IndexSet& set : e.part_sets("t")) begins.push_back(begins.back() + set.size());
  std::vector<TensorId> inputs{e.operand(0), e.operand(1), e.operand(2)};
  std::vector<std::string> names{"query", "key", "value"};
  if (e.operand("attn_mask") >= 0) {
    inputs.push_back(e.operand("attn_mask"));
    names.push_back("attn_mask");
  }
  const auto parts = static_cast<int64_t>(begins.size()) - 1;
  std::vector<int64_t> stat = e.shape(inputs[0]), acc = e.shape(inputs[0]);
  const std::vector<int64_t> value = e.shape(inputs[2]);
  stat.back() = parts;
  acc.back() = value.back();
  std::vector<int64_t> out = acc;
  acc.push_back(parts);
  AttrMap attrs = node.attrs;
  attrs["begins"] = begins;
  const auto made = e.add_many({.name = "part", .target = "attention_part", .inputs = inputs, .operand_names = names, .attrs = attrs}, {stat, stat, acc},
                               e.dtype(inputs[0]) == "float64" ? "" : "float32");
  e.bind(0, e.add({.name = "merge", .target = "attention_merge", .inputs = {made[0], made[1], made[2]}, .operand_names = {"m", "l", "acc"}}, out));
  (void)rule;
}

}  // namespace

void register_attention(RuleRegistry& rules, ExpansionRegistry& expansions) {
  rules.add({"scaled_dot_product_attention"}, attention);
  rules.add({"attention_part"}, part);
  rules.add({"attention_merge"}, merge);
  expansions.add({"scaled_dot_product_attention"}, expand_attention);
}

}  // namespace soap
