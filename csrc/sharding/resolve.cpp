// resolve: configurations -> tilings, in topological order, expanding operators on the way.
#include <algorithm>
#include <numeric>
#include <unordered_set>
#include <utility>

#include "base/error.h"
#include "sharding/expand.h"

namespace soap {

bool needs_expansion(const Rule& rule, const Tiling& tiling) {
  return std::any_of(tiling.cuts.begin(), tiling.cuts.end(),
                     [&](const FactorParts& c) { return rule.factors[c.factor].cut == Cuttable::kExpand && c.tiles() * c.chunks() > 1; });
}

void ExpansionRegistry::add(std::initializer_list<const char*> targets, Expansion expansion) {
  for (const char* target : targets) {
    SOAP_CHECK(expansions.emplace(target, expansion).second, "[expand] {} is registered twice", target);
  }
}

struct ExpandPass {
  const OpGraph& source;
  const Strategy& strategy;
  const FedRows& rows;
  Resolved out;
  std::vector<TensorId> now;        // source tensor -> tensor in out.graph
  std::vector<KnownTiling> shadow;  // per out tensor: where the processes' rows are
  std::vector<KnownTiling> placed;  // per out tensor: its producer's tiling

  int world() const { return strategy.world_size; }

  const OpConfig* config(const std::string& name) const {
    const auto it = strategy.nodes.find(name);
    return it == strategy.nodes.end() ? nullptr : &it->second;
  }

  // The factor that carries the processes' rows, by following them through the first operand that shows them.
  FedFactor fed_factor(const Node& node, const Rule& rule) const {
    if (node.kind == NodeKind::kFeed) return fed_rows(rule);
    if (node.kind == NodeKind::kReturn && node.sample_dim >= 0) {
      FedFactor fed = fed_rows(rule);  // each process gets its own rows back, wherever they have been
      if (fed.factor >= 0) return fed;
    }
    for (size_t i = 0; i < node.inputs.size(); ++i) {
      const auto& s = shadow[node.inputs[i]];
      if (!s) continue;
      Tiling t = follow(rule, static_cast<int>(i), *s, out.graph.tensors[node.inputs[i]].shape);
      if (t.cuts.empty()) continue;
      FedFactor fed{.factor = t.cuts[0].factor};
      for (auto& tile : t.cuts[0].parts) fed.parts.push_back(tile[0]);
      return fed;
    }
    return {};
  }

  // Rows of the factor n in proportion to what each process feeds.
  FedFactor fed_rows(const Rule& rule) const {
    const int n = rule.factor("n");
    if (n < 0) return {};
    const int64_t total = std::accumulate(rows.begin(), rows.end(), int64_t{0}), size = rule.factors[n].size;
    SOAP_CHECK(static_cast<int>(rows.size()) == world(), "[resolve] {} processes feed, world size is {}", rows.size(), world());
    if (total == 0 || size % total != 0) return {};
    FedFactor fed{.factor = n};
    int64_t before = 0;
    for (int64_t r : rows) {
      fed.parts.push_back(IndexSet::interval(before * (size / total), (before + r) * (size / total)));
      before += r;
    }
    return fed;
  }

  Tiling everywhere(int factor = -1) const {
    Tiling t;
    t.devices.resize(world());
    std::iota(t.devices.begin(), t.devices.end(), 0);
    if (factor < 0) {
      t.replicas = world();
    } else {
      FactorParts parts{.factor = factor};
      for (int p = 0; p < world(); ++p) parts.parts.push_back({IndexSet::interval(p, p + 1)});
      t.cuts.push_back(std::move(parts));
    }
    return t;
  }

  Tiling fed_tiling(const FedFactor& fed) const {
    Tiling t = everywhere();
    t.replicas = 1;
    FactorParts parts{.factor = fed.factor};
    for (const IndexSet& s : fed.parts) parts.parts.push_back({s});
    t.cuts.push_back(std::move(parts));
    return t;
  }

  Tiling default_tiling(const Node& node, const Rule& rule, const FedFactor& fed) const {
    switch (node.kind) {
      case NodeKind::kParam:
      case NodeKind::kBuffer:
      case NodeKind::kConst: return everywhere();
      case NodeKind::kFeed: return fed.factor >= 0 ? fed_tiling(fed) : everywhere();
      case NodeKind::kReturn: return fed.factor >= 0 && node.sample_dim >= 0 ? fed_tiling(fed) : everywhere(rule.factor("process"));
      case NodeKind::kOp: break;
    }
    int main = -1;
    int64_t largest = -1;
    for (size_t i = 0; i < node.inputs.size(); ++i) {
      const Tensor& t = out.graph.tensors[node.inputs[i]];
      if (is_store(out.graph.nodes[t.producer]) || !placed[t.id]) continue;
      if (numel(t.shape) > largest) {
        largest = numel(t.shape);
        main = static_cast<int>(i);
      }
    }
    if (main < 0) return everywhere();
    return follow(rule, main, *placed[node.inputs[main]], out.graph.tensors[node.inputs[main]].shape);
  }

  // Appends a node with its tiling; `inherited` is used when the strategy has no entry for it. `made`: its rule, where that is known.
  void place(Node node, const Tiling* inherited, std::optional<Rule> made = std::nullopt) {
    const NodeId id = add_node(out.graph, std::move(node));
    const Node& n = out.graph.nodes[id];
    shadow.resize(out.graph.tensors.size());
    placed.resize(out.graph.tensors.size());
    Rule rule = made ? std::move(*made) : make_rule(out.graph, n, world());
    FedFactor fed = fed_factor(n, rule);
    const OpConfig* c = config(n.name);
    std::optional<FedFactor> known;
    if (fed.factor >= 0) known = fed;
    const bool fixed = n.kind == NodeKind::kFeed || n.kind == NodeKind::kReturn;
    if (fixed && c) user_error("[plan] {}: feeds and returns stay with the processes; configure the operators", n.name);
    Tiling tiling = c ? make_tiling(n, rule, *c, known, world()) : inherited ? *inherited : default_tiling(n, rule, fed);
    if (n.kind == NodeKind::kOp && needs_expansion(rule, tiling)) {
      expand(id, rule, tiling);
      return;
    }
    for (size_t r = 0; r < n.outputs.size(); ++r) {
      const TensorId t = n.outputs[r];
      const auto& shape = out.graph.tensors[t].shape;
      placed[t] = std::make_shared<TensorTiling>(tensor_tiling(rule, tiling, static_cast<int>(r), shape));
      if (fed.factor >= 0) {
        TensorTiling s = tensor_tiling(rule, fed_tiling(fed), static_cast<int>(r), shape);
        if (!s.cuts.empty()) shadow[t] = std::make_shared<TensorTiling>(std::move(s));
      }
    }
    out.rules.push_back(std::move(rule));
    out.tilings.push_back(std::move(tiling));
    out.fed.push_back(std::move(fed));
  }

  // Takes back the node just appended and lets its expansion write sub-operators instead.
  void expand(NodeId id, const Rule& rule, const Tiling& tiling) {
    const Node node = out.graph.nodes[id];
    out.graph.nodes.pop_back();
    const auto& expansions = expansion_registry().expansions;
    const auto it = expansions.find(node.target);
    SOAP_CHECK(it != expansions.end(), "[expand] {} ({}) has factors to expand but no expansion", node.name, node.target);
    for (TensorId t : node.outputs) out.graph.tensors[t].producer = -1;
    bound.assign(node.outputs.size(), -1);
    Expander e(*this, node, rule, tiling);
    it->second(e, node, rule, tiling);
    for (size_t r = 0; r < node.outputs.size(); ++r) {
      const TensorId t = bound[r];
      SOAP_CHECK(t >= 0, "[expand] {} ({}): result {} was not bound", node.name, node.target, r);
      SOAP_CHECK(out.graph.tensors[t].shape == out.graph.tensors[node.outputs[r]].shape, "[expand] {} ({}): result {} has another shape", node.name,
                 node.target, r);
      replaced[node.outputs[r]] = t;
    }
  }

  std::vector<TensorId> bound;
  std::map<TensorId, TensorId> replaced;  // result of an expanded node -> the sub-operator's

  void run() {
    out.graph.tensors.reserve(source.tensors.size());
    now.assign(source.tensors.size(), -1);
    for (const Node& original : source.nodes) {
      Node node = original;
      for (TensorId& t : node.inputs) t = now[t];
      for (TensorId& t : node.outputs) {
        const Tensor& s = source.tensors[t];
        t = add_tensor(out.graph, s.shape, s.dtype, s.element_bytes, s.requires_grad);
      }
      const std::vector<TensorId> made = node.outputs;
      place(std::move(node), nullptr);
      for (size_t r = 0; r < made.size(); ++r) {
        const auto it = replaced.find(made[r]);
        now[original.outputs[r]] = it == replaced.end() ? made[r] : it->second;
      }
    }
    // Results of expanded nodes have no producer: they must not be read, and keep the list of tensors aligned with the others.
  }
};

TensorId Expander::operand(int i) const {
  return node_.inputs.at(i);
}
TensorId Expander::operand(std::string_view name) const {
  const int i = node_.operand(name);
  return i < 0 ? -1 : node_.inputs[i];
}
const std::vector<int64_t>& Expander::shape(TensorId t) const {
  return pass_.out.graph.tensors.at(t).shape;
}
const std::string& Expander::dtype(TensorId t) const {
  return pass_.out.graph.tensors.at(t).dtype;
}

namespace {

bool is_low(std::string_view dtype) {
  return dtype == "bfloat16" || dtype == "float16";
}

// d0, d1, ... of an elementwise operator on a tensor of these dims, and the original's factors that they are.
std::vector<std::pair<std::string, std::string>> factors_of(const std::vector<DimExpr>& dims, const Rule& rule) {
  std::vector<std::pair<std::string, std::string>> out{{"", ""}};
  for (size_t d = 0; d < dims.size(); ++d) {
    if (dims[d].factors.size() == 1 && !dims[d].map) out.emplace_back(fmt::format("d{}", d), rule.factors[dims[d].factors[0]].name);
  }
  return out;
}

}  // namespace

TensorId Expander::wide(int i) {
  const TensorId t = operand(i);
  if (!is_low(dtype(t))) return t;
  return add({.name = fmt::format("wide{}", i), .target = "to", .inputs = {t}, .family = "pointwise", .inherit = factors_of(rule_.operands[i].dims, rule_)},
             shape(t), "float32");
}

TensorId Expander::add(Sub sub, std::vector<int64_t> shape, std::string dtype, bool differentiable) {
  return add_many(std::move(sub), {std::move(shape)}, std::move(dtype), differentiable)[0];
}

std::vector<TensorId> Expander::add_many(Sub sub, std::vector<std::vector<int64_t>> shapes, std::string dtype, bool differentiable) {
  OpGraph& g = pass_.out.graph;
  Node n{.name = node_.name + "/" + sub.name,
         .target = sub.target,
         .family = sub.family,
         .inputs = sub.inputs,
         .operand_names = sub.operand_names,
         .attrs = sub.attrs,
         .source = node_.source,
         .no_grad = node_.no_grad};
  bool grad = false;
  int64_t bytes = is_low(dtype) ? 2 : 4;
  if (!sub.inputs.empty()) {
    if (dtype.empty()) dtype = g.tensors[sub.inputs[0]].dtype;
    for (TensorId t : sub.inputs) {
      grad = grad || g.tensors[t].requires_grad;
      if (g.tensors[t].dtype == dtype) bytes = g.tensors[t].element_bytes;
    }
  }
  for (auto& shape : shapes) n.outputs.push_back(add_tensor(g, std::move(shape), dtype, bytes, grad && differentiable && !node_.no_grad));
  const std::vector<TensorId> made = n.outputs;
  // The sub-operator's tiling: the original's index sets for the factors that it shares, other tile axes become replicas.
  if (n.operand_names.empty()) {
    for (size_t i = 0; i < n.inputs.size(); ++i) n.operand_names.push_back(fmt::format("{}", i));
  }
  Rule rule = make_rule(g, n, pass_.world());
  for (size_t r = 0; r < n.outputs.size(); ++r) {
    Tensor& t = g.tensors[n.outputs[r]];
    t.requires_grad = t.requires_grad && rule.results[r].differentiable;
  }
  Tiling tiling;
  std::vector<std::pair<int, const FactorParts*>> kept;  // sub factor, cut
  std::vector<int> degrees;
  std::vector<char> keep;
  for (const FactorParts& c : tiling_.cuts) {
    degrees.push_back(c.tiles());
    const std::string& own = rule_.factors[c.factor].name;
    std::string wanted = own;
    bool found = sub.inherit.empty();
    for (const auto& [to, from] : sub.inherit) {
      if (from == own) {
        wanted = to;
        found = true;
      }
    }
    const int f = found ? rule.factor(wanted) : -1;
    const bool same = f >= 0 && rule.factors[f].size == rule_.factors[c.factor].size && rule.factors[f].cut != Cuttable::kWhole;
    const auto counted = std::find_if(sub.parts.begin(), sub.parts.end(), [&](const auto& p) { return p.second == own; });
    keep.push_back(same || counted != sub.parts.end());
    if (counted != sub.parts.end()) {
      FactorParts places{.factor = rule.factor(counted->first)};
      SOAP_CHECK(places.factor >= 0, "[expand] {} ({}): no factor {}", n.name, n.target, counted->first);
      int64_t place = 0;
      for (const auto& tile : c.parts) {
        auto& own_places = places.parts.emplace_back();
        for (size_t chunk = 0; chunk < tile.size(); ++chunk, ++place) own_places.push_back(IndexSet::interval(place, place + 1));
      }
      tiling.cuts.push_back(std::move(places));
    } else if (same) {
      tiling.cuts.push_back({.factor = f, .parts = c.parts});
    }
  }
  // Devices: kept tile axes in order, everything else replicates.
  const size_t replicas = tiling_.replicas;
  std::vector<std::vector<int>> cells(tiling.tiles());
  for (size_t slot = 0; slot < tiling_.devices.size(); ++slot) {
    size_t rest = slot / replicas, row = 0, scale = 1;
    bool elsewhere = false;
    for (size_t i = degrees.size(); i-- > 0;) {
      for (const auto& [factor, part] : sub.at) {
        const FactorParts& c = tiling_.cuts[i];
        elsewhere = elsewhere || (rule_.factors[c.factor].name == factor && static_cast<int>(rest % degrees[i]) != part / c.chunks());
      }
      if (keep[i]) {
        row += rest % degrees[i] * scale;
        scale *= degrees[i];
      }
      rest /= degrees[i];
    }
    if (elsewhere) continue;
    auto& cell = cells[row];
    if (std::find(cell.begin(), cell.end(), tiling_.devices[slot]) == cell.end()) cell.push_back(tiling_.devices[slot]);
  }
  size_t count = cells[0].size();
  for (const auto& cell : cells) count = std::min(count, cell.size());
  for (const auto& cell : cells) tiling.devices.insert(tiling.devices.end(), cell.begin(), cell.begin() + count);
  tiling.replicas = static_cast<int>(count);
  pass_.place(std::move(n), &tiling, std::move(rule));
  return made;
}

void Expander::bind(int result, TensorId t) {
  const std::string wanted = pass_.out.graph.tensors.at(node_.outputs[result]).dtype;
  if (dtype(t) != wanted) {
    t = add(
        {.name = fmt::format("as{}", result), .target = "to", .inputs = {t}, .family = "pointwise", .inherit = factors_of(rule_.results[result].dims, rule_)},
        shape(t), wanted);
  }
  pass_.bound.at(result) = t;
}

int Expander::parts(std::string_view factor) const {
  const int f = rule_.factor(factor);
  for (const FactorParts& c : tiling_.cuts) {
    if (c.factor == f) return c.tiles() * c.chunks();
  }
  return 1;
}

std::vector<IndexSet> Expander::part_sets(std::string_view factor) const {
  const int f = rule_.factor(factor);
  for (const FactorParts& c : tiling_.cuts) {
    if (c.factor != f) continue;
    std::vector<IndexSet> out;
    for (const auto& tile : c.parts) out.insert(out.end(), tile.begin(), tile.end());
    return out;
  }
  SOAP_CHECK(f >= 0, "[expand] {} has no factor {}", node_.name, factor);
  return {IndexSet::all(rule_.factors[f].size)};
}

ResolvedNode resolve_node(const OpGraph& graph, const Node& node, const Strategy& strategy, const FedRows& rows, const std::vector<KnownTiling>& placed,
                          const std::vector<KnownTiling>& shadow) {
  ExpandPass pass{.source = graph, .strategy = strategy, .rows = rows};
  std::map<TensorId, TensorId> seen;
  Node own = node;
  for (size_t i = 0; i < own.inputs.size(); ++i) {
    TensorId& t = own.inputs[i];
    const auto [it, fresh] = seen.emplace(t, -1);
    if (fresh) {
      const Tensor& s = graph.tensors[t];
      it->second = add_tensor(pass.out.graph, s.shape, s.dtype, s.element_bytes, s.requires_grad);
      add_node(pass.out.graph, {.kind = graph.nodes[s.producer].kind, .name = fmt::format("operand:{}", i), .outputs = {it->second}});
      pass.out.rules.emplace_back();
      pass.out.tilings.emplace_back();
      pass.out.fed.emplace_back();
      pass.placed.push_back(placed[i]);
      pass.shadow.push_back(shadow[i]);
    }
    t = it->second;
  }
  ResolvedNode out{.first = static_cast<NodeId>(pass.out.graph.nodes.size()), .operands = own.inputs};
  for (TensorId& t : own.outputs) {
    const Tensor& s = graph.tensors[t];
    t = add_tensor(pass.out.graph, s.shape, s.dtype, s.element_bytes, s.requires_grad);
  }
  out.results = own.outputs;
  pass.place(std::move(own), nullptr);
  for (TensorId& t : out.results) {
    const auto it = pass.replaced.find(t);
    if (it != pass.replaced.end()) t = it->second;
    SOAP_CHECK(pass.out.graph.tensors[t].producer >= out.first, "[resolve] {} ({}): a result is one of its operands", node.name, node.target);
    out.placed.push_back(pass.placed[t]);
    out.shadow.push_back(pass.shadow[t]);
  }
  out.inner = std::move(pass.out);
  return out;
}

Resolved resolve(const OpGraph& graph, const Strategy& strategy, const FedRows& rows) {
  ExpandPass pass{.source = graph, .strategy = strategy, .rows = rows};
  pass.run();
  std::unordered_set<std::string_view> names;
  for (const auto* nodes : {&graph.nodes, &std::as_const(pass.out.graph.nodes)}) {
    for (const Node& n : *nodes) names.insert(n.name);
  }
  for (const auto& [name, config] : strategy.nodes) {
    if (!names.count(name)) user_error("[plan] there is no operator {}", name);
  }
  return std::move(pass.out);
}

}  // namespace soap
