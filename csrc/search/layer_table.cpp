#include "search/layer_table.h"

#include <algorithm>
#include <map>

#include "base/error.h"
#include "fmt/ranges.h"
#include "search/layer_structure.h"
#include "sim/memory.h"
#include "sim/simulate.h"

namespace soap {
namespace {

// A configuration.
struct Proposal {
  OpConfig config;
  std::optional<OpConfig> local = {};              // without a reference to the processes' rows, which a layer by itself doesn't know
  std::vector<std::pair<int, int>> products = {};  // (factor, degree) of each cut; degree 0: at the processes' rows, which aren't even
  std::vector<int> cuts = {};                      // variants, one for each cut

  const OpConfig& alone() const { return local ? *local : config; }
};

bool may_cut(const Node& head, const Rule& rule, int factor, const LayerOptions& options) {
  const Factor& f = rule.factors[factor];
  if (f.cut == Cuttable::kWhole || (f.kind == FactorKind::kReduction && f.cut != Cuttable::kExpand && !options.reductions)) return false;
  if (f.cut == Cuttable::kExpand) return expansion_registry().expansions.count(head.target) > 0;
  return std::all_of(rule.results.begin(), rule.results.end(), [&](const Result& r) {
    return r.reduce != Reduce::kNone ||
           std::any_of(r.dims.begin(), r.dims.end(), [&](const DimExpr& d) { return std::count(d.factors.begin(), d.factors.end(), factor) > 0; });
  });
}

// Even cuts of different factors, and the number of tiles that they make.
struct Product {
  std::vector<std::pair<int, int>> cuts;  // (factor, degree)
  int tiles = 1;
};

// Every product of even cuts of the factors from `factor` on, with degrees whose product divides `left`.
void add_products(const Rule& rule, const std::vector<char>& cuttable, size_t factor, int left, Product& so_far, std::vector<Product>& out) {
  if (factor == cuttable.size()) {
    if (!so_far.cuts.empty()) out.push_back(so_far);
    return;
  }
  add_products(rule, cuttable, factor + 1, left, so_far, out);
  if (!cuttable[factor]) return;
  const Factor& f = rule.factors[factor];
  const auto own = static_cast<int>(factor);
  const bool clash = std::any_of(rule.exclusive.begin(), rule.exclusive.end(), [&](const std::vector<int>& group) {
    return std::count(group.begin(), group.end(), own) &&
           std::any_of(so_far.cuts.begin(), so_far.cuts.end(), [&](const auto& c) { return std::count(group.begin(), group.end(), c.first) > 0; });
  });
  if (clash) return;
  for (int degree = 2; degree <= left && degree <= f.size / f.unit; ++degree) {
    if (left % degree != 0) continue;
    so_far.cuts.emplace_back(own, degree);
    so_far.tiles *= degree;
    add_products(rule, cuttable, factor + 1, left / degree, so_far, out);
    so_far.tiles /= degree;
    so_far.cuts.pop_back();
  }
}

// The cut at the processes' rows by its bounds; nullopt where the rows aren't intervals one after another.
std::optional<Proposal> fed_proposal(const Node& head, const Rule& rule, const FedFactor& fed) {
  if (fed.factor < 0 || !may_cut(head, rule, fed.factor, {})) return std::nullopt;
  const int world = static_cast<int>(fed.parts.size());
  std::vector<int64_t> bounds{0};
  for (const IndexSet& part : fed.parts) {
    if (!part.is_interval() || (!part.empty() && part.begin() != bounds.back())) return std::nullopt;
    bounds.push_back(bounds.back() + part.size());
  }
  Cut cut{.tiles = world, .bounds = bounds};
  const Factor& f = rule.factors[fed.factor];
  bool even = f.size / f.unit >= world;
  for (int t = 0; t <= world; ++t) even = even && bounds[t] == (t == world ? f.size : f.size / f.unit * t / world * f.unit);
  if (even) cut.bounds.clear();
  return Proposal{{.cuts = {{"n", {.tiles = world, .fed = true}}}}, OpConfig{.cuts = {{f.name, cut}}}, {{fed.factor, even ? world : 0}}};
}

std::vector<Proposal> proposals(const Node& head, const Rule& rule, const FedFactor& fed, int world, const LayerOptions& options) {
  std::vector<Product> products;
  std::vector<char> cuttable;
  for (size_t f = 0; f < rule.factors.size(); ++f) cuttable.push_back(static_cast<char>(may_cut(head, rule, static_cast<int>(f), options)));
  Product empty;
  add_products(rule, cuttable, 0, world, empty, products);
  std::stable_sort(products.begin(), products.end(), [](const Product& a, const Product& b) {
    if (a.cuts.size() != b.cuts.size()) return a.cuts.size() < b.cuts.size();
    return a.tiles > b.tiles;
  });
  const size_t most = std::max(options.max_configurations, 3);
  std::vector<Proposal> out;
  out.reserve(std::min(most, products.size() + 3));
  const auto rows = fed_proposal(head, rule, fed);
  if (rows && world > 1) out.push_back(*rows);
  if (world > 1) out.push_back({{.replicas = world}});
  out.push_back({{.devices = {0}}});
  for (const Product& p : products) {
    if (out.size() == most) break;
    if (rows && world > 1 && p.cuts == rows->products) continue;
    Proposal proposal{.products = p.cuts};
    for (const auto& [factor, degree] : p.cuts) proposal.config.cuts.push_back({rule.factors[factor].name, {.tiles = degree}});
    out.push_back(std::move(proposal));
  }
  return out;
}

std::string text(const AttrMap& attrs) {
  std::string out;
  for (const auto& [name, value] : attrs) {
    out += name + "=";
    std::visit(
        [&](const auto& v) {
          using T = std::decay_t<decltype(v)>;
          if constexpr (std::is_same_v<T, std::vector<int64_t>> || std::is_same_v<T, std::vector<double>>)
            out += fmt::format("{}", fmt::join(v, ","));
          else if constexpr (!std::is_same_v<T, std::monostate>)
            out += fmt::format("{}", v);
        },
        value);
    out += ";";
  }
  return out;
}

// The cuts that proposals are products of.
std::vector<Variant> variants_of(const Node& head, const Rule& rule, std::vector<Proposal>& proposals, int world) {
  std::vector<Variant> out;
  std::vector<std::pair<int, int>> known;
  for (Proposal& p : proposals) {
    for (size_t c = 0; c < p.products.size(); ++c) {
      const auto it = std::find(known.begin(), known.end(), p.products[c]);
      p.cuts.push_back(static_cast<int>(it - known.begin()));
      if (it != known.end()) continue;
      known.push_back(p.products[c]);
      Variant v{.factor = p.products[c].first};
      Tiling tiling = make_tiling(head, rule, {.cuts = {p.alone().cuts[c]}}, std::nullopt, world);
      SOAP_CHECK(!tiling.cuts.empty(), "[optcnn] {}: {} cuts nothing", head.name, p.alone().cuts[c].factor);
      for (auto& tile : tiling.cuts[0].parts) v.parts.push_back(std::move(tile[0]));
      out.push_back(std::move(v));
    }
  }
  return out;
}

// A configuration resolved as lowering does.
struct Evaluation {
  const CostModel& cost;
  Layouts& layouts;
  Program p;                         // graph, rules, tilings, differentiable: what the cost of an operator depends on
  std::vector<int64_t> spent, held;  // per device
  int64_t moved_ns = 0;
  std::vector<std::vector<LayerTable::Read>> reads;  // per tensor
  std::vector<int> tiles;                            // per tensor: layout

  void compute() {
    p.differentiable = differentiable_nodes(p.graph, p.rules);
    for (const Node& n : p.graph.nodes) {
      if (n.kind != NodeKind::kOp) continue;
      const Rule& rule = p.rules[n.id];
      const Tiling& tiling = p.tilings[n.id];
      for (int tile = 0; tile < tiling.tiles(); ++tile) {
        const OpTime t = cost.time(p, n.id, tile, 0);
        for (int d : tiling.devices_of(tile)) spent[d] += t.forward_ns + t.backward_ns;
      }
      for (size_t i = 0; i < n.inputs.size(); ++i) {
        const Tensor& t = p.graph.input(n, static_cast<int>(i));
        const int copies = layouts.add(operand_copies(rule, tiling, static_cast<int>(i), t.shape).sharding);
        const bool gradient = t.requires_grad && rule.operands[i].differentiable && p.differentiable[n.id];
        auto& list = reads[t.id];
        const auto same = std::find_if(list.begin(), list.end(), [&](const LayerTable::Read& r) { return r.copies == copies; });
        if (same == list.end())
          list.push_back({copies, gradient});
        else
          same->gradient = same->gradient || gradient;
      }
      for (size_t r = 0; r < n.outputs.size(); ++r) {
        const Tensor& t = p.graph.output(n, static_cast<int>(r));
        tiles[t.id] = layouts.add(result_sharding(rule, tiling, static_cast<int>(r), t.shape));
        if (rule.results[r].saved && !rule.view && p.differentiable[n.id]) hold(tiles[t.id], t.element_bytes + rule.results[r].saved_bytes_more);
      }
    }
  }

  void hold(int layout, int64_t bytes) {
    for (const Layout::Part& part : layouts[layout].parts) {
      for (int d : part.devices) held[d] += part.volume * bytes;
    }
  }

  void move() {
    for (const Tensor& t : p.graph.tensors) {
      if (t.producer < 0 || reads[t.id].empty()) continue;
      const Node& producer = p.graph.nodes[t.producer];
      if (producer.kind == NodeKind::kParam) {
        tiles[t.id] = layouts.storage(reads[t.id].front().copies, t.shape, p.world_size);
        if (t.requires_grad) update(tiles[t.id], t);
        hold(tiles[t.id], t.element_bytes * (t.requires_grad ? 2 + kOptimizerCopies : 1));
      }
      if (producer.kind != NodeKind::kParam && producer.kind != NodeKind::kOp) continue;  // whole on every device, or another layer's
      for (const LayerTable::Read& r : reads[t.id]) moved_ns += layouts.reshard_ns(tiles[t.id], r.copies, t, r.gradient);
    }
  }

  void update(int storage, const Tensor& t) {
    for (const Layout::Part& part : layouts[storage].parts) {
      for (int d : part.devices) spent[d] += update_ns(cost.machine(), d, part.volume * t.element_bytes);
    }
  }
};

std::optional<LayerEntry> resolved(const LayerAlone& alone, const OpConfig& config, const CostModel& cost, Layouts& layouts, int world) {
  Strategy s{.world_size = world};
  if (!alone.head.empty()) s.nodes[alone.head] = config;
  Resolved r;
  try {
    r = resolve(alone.graph, s, FedRows(world, 1));
  } catch (const std::invalid_argument&) {  // not legal here
    return std::nullopt;
  }
  Evaluation e{.cost = cost, .layouts = layouts};
  e.p.graph = std::move(r.graph);
  e.p.rules = std::move(r.rules);
  e.p.tilings = std::move(r.tilings);
  e.p.world_size = world;
  e.spent.resize(world);
  e.held.resize(world);
  e.reads.resize(e.p.graph.tensors.size());
  e.tiles.resize(e.p.graph.tensors.size(), -1);
  e.compute();
  e.move();
  LayerEntry out{.ns = *std::max_element(e.spent.begin(), e.spent.end()) + e.moved_ns, .memory_bytes = *std::max_element(e.held.begin(), e.held.end())};
  for (const std::string& name : alone.inputs) out.reads.push_back(e.reads[e.p.graph.nodes[*e.p.graph.find(name)].outputs[0]]);
  for (const std::string& name : alone.outputs) out.makes.push_back(e.tiles[e.p.graph.nodes[*e.p.graph.find(name)].inputs[0]]);
  return out;
}

}  // namespace

LayerAlone layer_alone(const OpGraph& graph, const LayerShape& layer) {
  LayerAlone out;
  std::map<TensorId, TensorId> now;
  std::set<TensorId> constant;
  const auto bring = [&](TensorId t) {
    if (now.count(t)) return;
    const Tensor& from = graph.tensors[t];
    const Node& producer = graph.nodes[from.producer];
    now[t] = add_tensor(out.graph, from.shape, from.dtype, from.element_bytes, from.requires_grad);
    if (is_store(producer))
      add_node(out.graph, {.kind = producer.kind, .name = producer.name, .outputs = {now[t]}});
    else
      add_node(out.graph, {.kind = NodeKind::kBuffer, .name = fmt::format("{}[{}]", producer.name, from.result), .outputs = {now[t]}});
    if (!std::count(layer.inputs.begin(), layer.inputs.end(), t)) constant.insert(t);
  };
  for (NodeId id : layer.nodes) {
    Node n = graph.nodes[id];
    for (TensorId t : n.inputs) bring(t);
    if (std::all_of(n.inputs.begin(), n.inputs.end(), [&](TensorId t) { return constant.count(t) > 0; })) {
      out.constants.insert(n.name);
      constant.insert(n.outputs.begin(), n.outputs.end());
    }
    for (TensorId& t : n.inputs) t = now[t];
    for (TensorId& t : n.outputs) {
      const Tensor& from = graph.tensors[t];
      now[t] = add_tensor(out.graph, from.shape, from.dtype, from.element_bytes, from.requires_grad);
      t = now[t];
    }
    add_node(out.graph, std::move(n));
  }
  for (TensorId t : layer.inputs) out.inputs.push_back(out.graph.nodes[out.graph.tensors[now.at(t)].producer].name);
  for (TensorId t : layer.outputs) {
    out.outputs.push_back(fmt::format("[return {}]", out.outputs.size()));
    add_node(out.graph, {.kind = NodeKind::kReturn, .name = out.outputs.back(), .inputs = {now.at(t)}, .operand_names = {"value"}});
  }
  if (layer.head >= 0) out.head = graph.nodes[layer.head].name;
  return out;
}

std::string signature(const Program& fixed, const LayerShape& layer) {
  const OpGraph& graph = fixed.graph;
  std::map<TensorId, size_t> number;
  std::string out;
  const auto name = [&](TensorId t) {
    const auto [it, fresh] = number.try_emplace(t, number.size());
    out += fmt::format("{}", it->second);
    if (!fresh) return;
    const Tensor& x = graph.tensors[t];
    out += fmt::format(":{}[{}]{}{}", x.dtype, fmt::join(x.shape, ","), x.requires_grad ? "'" : "", static_cast<int>(graph.nodes[x.producer].kind));
  };
  for (NodeId id : layer.nodes) {
    const Node& n = graph.nodes[id];
    out += fmt::format("{}{}{}{}(", id == layer.head ? "*" : "", n.target, n.no_grad ? "!" : "", n.family);
    for (size_t i = 0; i < n.inputs.size(); ++i) {
      out += n.operand_names.empty() ? "" : n.operand_names[i];
      out += "=";
      name(n.inputs[i]);
      out += " ";
    }
    out += text(n.attrs) + ")>";
    for (TensorId t : n.outputs) {
      name(t);
      out += " ";
    }
  }
  out += "|";
  for (const auto* ports : {&layer.inputs, &layer.outputs}) {
    for (TensorId t : *ports) out += fmt::format("{} ", number.at(t));
    out += "|";
  }
  if (layer.head >= 0) {
    const FedFactor& fed = fixed.fed[layer.head];
    out += fmt::format("{}", fed.factor);
    for (const IndexSet& s : fed.parts) out += to_string(s);
  }
  return out;
}

LayerTable layer_table(Program& fixed, const LayerShape& layer, const CostModel& cost, const LayerOptions& options, Layouts& layouts) {
  const int world = fixed.world_size;
  std::vector<Proposal> list{{}};
  std::vector<Variant> variants;
  if (layer.head >= 0) {
    const Node& head = fixed.graph.nodes[layer.head];
    const Rule& rule = fixed.rules[layer.head];
    list = proposals(head, rule, fixed.fed[layer.head], world, options);
    variants = variants_of(head, rule, list, world);
  }
  LayerStructure followed = followed_structure(fixed, layer, variants);
  const std::vector<char> expanding = followed.expanding();
  std::optional<LayerStructure> expanded;
  Program own;
  if (std::count(expanding.begin(), expanding.end(), 1) > 0 && !options.by_resolving) expanded = expanded_structure(own, fixed, layer, variants);
  LayerEvaluator by_following(followed, variants, world, cost, layouts);
  std::optional<LayerEvaluator> by_expanding;
  if (expanded) by_expanding.emplace(*expanded, variants, world, cost, layouts);
  std::optional<LayerAlone> alone;
  LayerTable out;
  for (Proposal& p : list) {
    const bool expands = std::any_of(p.cuts.begin(), p.cuts.end(), [&](int v) { return expanding[v] != 0; });
    std::optional<LayerEntry> entry;
    if (!options.by_resolving && (!expands || expanded)) {
      entry = (expands ? *by_expanding : by_following).evaluate(p.cuts, p.config.replicas);
    }
    if (!entry) {
      if (!alone) alone = layer_alone(fixed.graph, layer);
      ++out.resolved;
      entry = resolved(*alone, p.alone(), cost, layouts, world);
    }
    if (!entry) continue;
    out.configs.push_back(std::move(p.config));
    out.ns.push_back(entry->ns);
    out.memory_bytes.push_back(entry->memory_bytes);
    out.reads.push_back(std::move(entry->reads));
    out.makes.push_back(std::move(entry->makes));
  }
  return out;
}

}  // namespace soap
