#include "search/layer_cost.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "base/error.h"
#include "fmt/ranges.h"
#include "search/layer_table.h"

namespace soap {
namespace {

// Every operator on one device, so that nothing is expanded: node ids stay.
Program on_one_device(const OpGraph& graph, const FedRows& rows) {
  Strategy s{.world_size = static_cast<int>(rows.size())};
  for (const Node& n : graph.nodes) {
    if (n.kind == NodeKind::kOp) s.nodes[n.name] = {.devices = {0}};
  }
  Resolved r = resolve(graph, s, rows);
  SOAP_CHECK(r.graph.nodes.size() == graph.nodes.size(), "[search] {} nodes became {}", graph.nodes.size(), r.graph.nodes.size());
  Program p{.graph = std::move(r.graph),
            .world_size = s.world_size,
            .rows = rows,
            .rules = std::move(r.rules),
            .tilings = std::move(r.tilings),
            .fed = std::move(r.fed)};
  p.differentiable = differentiable_nodes(p.graph, p.rules);
  return p;
}

struct LayerBuilder {
  Program& fixed;  // every operator on device 0: rules, where the rows are, feeds and returns
  const OpGraph& graph;
  const CostModel& cost;
  const LayerOptions& options;
  Layouts layouts;
  std::vector<char> constant;                // per tensor: no input reaches it
  std::vector<int> layer_of;                 // per node
  std::vector<std::vector<NodeId>> readers;  // per tensor
  std::vector<LayerTable> tables;
  std::map<std::string, int> known;  // table of a layer, by all that it depends on
  std::vector<int> table_of;         // per layer
  std::vector<LayerShape> shapes;
  LayerCosts out;

  // A follower's data comes from one operator, and each dim of it is of whole factors that nothing is summed over.
  bool follows(const Node& n, TensorId data) const {
    if (graph.nodes[graph.tensors[data].producer].kind != NodeKind::kOp) return false;
    const Rule& rule = fixed.rules[n.id];
    if (n.family == "pointwise" || rule.view) return true;
    const bool sums = std::any_of(rule.factors.begin(), rule.factors.end(), [](const Factor& f) { return f.kind == FactorKind::kReduction; });
    const auto i = static_cast<size_t>(std::find(n.inputs.begin(), n.inputs.end(), data) - n.inputs.begin());
    const auto& dims = rule.operands[i].dims;
    return !sums && !dims.empty() && std::all_of(dims.begin(), dims.end(), [](const DimExpr& d) { return !d.factors.empty() && !d.map; });
  }

  void make_layers() {
    constant.assign(graph.tensors.size(), 0);
    layer_of.assign(graph.nodes.size(), -1);
    readers.resize(graph.tensors.size());
    for (const Node& n : graph.nodes) {
      for (TensorId t : n.inputs) readers[t].push_back(n.id);
      std::vector<TensorId> data;
      for (TensorId t : n.inputs) {
        if (!constant[t] && !std::count(data.begin(), data.end(), t)) data.push_back(t);
      }
      for (TensorId t : n.outputs) constant[t] = is_store(n) || (n.kind == NodeKind::kOp && data.empty());
      if (n.kind != NodeKind::kOp || data.empty()) continue;
      if (data.size() == 1 && follows(n, data[0])) {
        layer_of[n.id] = layer_of[graph.tensors[data[0]].producer];
        continue;
      }
      layer_of[n.id] = static_cast<int>(out.layers.size());
      out.layers.push_back({.head = n.id});
    }
    // Constant operators, from the last on: with the first layer that reads them.
    bool rest = false;
    for (auto n = graph.nodes.rbegin(); n != graph.nodes.rend(); ++n) {
      if (n->kind != NodeKind::kOp || layer_of[n->id] >= 0) continue;
      for (TensorId t : n->outputs) {
        for (NodeId r : readers[t]) {
          if (layer_of[r] >= 0 && (layer_of[n->id] < 0 || layer_of[r] < layer_of[n->id])) layer_of[n->id] = layer_of[r];
        }
      }
      if (layer_of[n->id] >= 0) continue;
      layer_of[n->id] = static_cast<int>(out.layers.size());
      rest = true;
    }
    if (rest) out.layers.push_back({});
    for (const Node& n : graph.nodes) {
      if (layer_of[n.id] >= 0) out.layers[layer_of[n.id]].nodes.push_back(n.id);
    }
  }

  void make_tables() {
    for (Layer& layer : out.layers) {
      const int own = static_cast<int>(&layer - out.layers.data());
      LayerShape shape{.head = layer.head, .nodes = layer.nodes};
      for (NodeId id : layer.nodes) {
        const Node& n = graph.nodes[id];
        for (TensorId t : n.inputs) {
          const NodeId producer = graph.tensors[t].producer;
          if (layer_of[producer] == own || std::count(shape.inputs.begin(), shape.inputs.end(), t)) continue;
          if (!constant[t]) shape.inputs.push_back(t);
        }
        for (TensorId t : n.outputs) {
          const bool read = std::any_of(readers[t].begin(), readers[t].end(), [&](NodeId r) { return layer_of[r] != own; });
          if (read && !constant[t]) shape.outputs.push_back(t);
        }
      }
      const auto [it, fresh] = known.try_emplace(signature(fixed, shape), static_cast<int>(tables.size()));
      if (fresh) {
        tables.push_back(layer_table(fixed, shape, cost, options, layouts));
        out.resolved += tables.back().resolved;
      }
      const LayerTable& table = tables[it->second];
      if (table.configs.empty()) user_error("[search] no configuration of {} is legal on {} devices", graph.nodes[layer.nodes.front()].name, fixed.world_size);
      table_of.push_back(it->second);
      layer.configs = table.configs;
      out.choices.nodes.push_back(table.ns);
      out.memory_bytes.push_back(table.memory_bytes);
      shapes.push_back(std::move(shape));
    }
    out.distinct_layers = static_cast<int>(tables.size());
  }

  static int port(const std::vector<TensorId>& tensors, TensorId t) { return static_cast<int>(std::find(tensors.begin(), tensors.end(), t) - tensors.begin()); }

  int64_t reads_ns(int tiles, const std::vector<LayerTable::Read>& reads, const Tensor& t) {
    int64_t ns = 0;
    for (const LayerTable::Read& r : reads) ns += layouts.reshard_ns(tiles, r.copies, t, r.gradient);
    return ns;
  }

  void make_edges() {
    std::map<std::array<int, 4>, int> shared;  // (table, port) of both ends
    for (size_t layer = 0; layer < out.layers.size(); ++layer) {
      const LayerTable& to = tables[table_of[layer]];
      std::vector<int64_t>& ns = out.choices.nodes[layer];
      for (size_t in = 0; in < shapes[layer].inputs.size(); ++in) {
        const Tensor& t = graph.tensors[shapes[layer].inputs[in]];
        const Node& producer = graph.nodes[t.producer];
        if (producer.kind == NodeKind::kFeed) {
          const int tiles = layouts.add(result_sharding(fixed.rules[producer.id], fixed.tilings[producer.id], t.result, t.shape));
          for (size_t c = 0; c < ns.size(); ++c) ns[c] += reads_ns(tiles, to.reads[c][in], t);
          continue;
        }
        const int other = layer_of[t.producer];
        const int made = port(shapes[other].outputs, t.id);
        const auto [it, fresh] =
            shared.try_emplace({table_of[other], made, table_of[layer], static_cast<int>(in)}, static_cast<int>(out.choices.tables.size()));
        if (fresh) out.choices.tables.push_back(edge_table(tables[table_of[other]], made, to, in, t));
        out.choices.edges.push_back({.a = other, .b = static_cast<int>(layer), .table = it->second});
      }
    }
    for (const Node& n : graph.nodes) {
      if (n.kind != NodeKind::kReturn) continue;
      const Tensor& t = graph.input(n, 0);
      if (constant[t.id] || layer_of[t.producer] < 0) continue;
      const int layer = layer_of[t.producer];
      const int copies = layouts.add(operand_copies(fixed.rules[n.id], fixed.tilings[n.id], 0, t.shape).sharding);
      const int made = port(shapes[layer].outputs, t.id);
      std::vector<int64_t>& ns = out.choices.nodes[layer];
      for (size_t c = 0; c < ns.size(); ++c) {
        ns[c] += layouts.reshard_ns(tables[table_of[layer]].makes[c][made], copies, t, t.requires_grad && n.target != "buffer_write");
      }
    }
  }

  std::vector<int64_t> edge_table(const LayerTable& from, int made, const LayerTable& to, size_t in, const Tensor& t) {
    std::vector<int64_t> table;
    table.reserve(from.ns.size() * to.ns.size());
    for (const auto& makes : from.makes) {
      for (const auto& reads : to.reads) table.push_back(reads_ns(makes[made], reads[in], t));
    }
    return table;
  }
};

// Cuts that cut, devices only where they aren't the first ones.
OpConfig normalized(OpConfig c) {
  std::erase_if(c.cuts, [](const FactorCut& f) { return f.cut.tiles * f.cut.chunks == 1; });
  const auto grid = static_cast<size_t>(c.num_tiles() * c.replicas);
  bool first = c.devices.size() == grid;
  for (size_t i = 0; i < c.devices.size(); ++i) first = first && c.devices[i] == static_cast<int>(i);
  if (first) c.devices.clear();
  return c;
}

bool is_fed(const OpConfig& c) {
  return std::any_of(c.cuts.begin(), c.cuts.end(), [](const FactorCut& f) { return f.cut.fed; });
}

}  // namespace

LayerCosts layer_costs(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const LayerOptions& options) {
  const int world = static_cast<int>(rows.size());
  if (world < 1 || world > kLargestLayoutWorld) user_error("[search] layer-wise costs are for 1 to {} devices, not {}", kLargestLayoutWorld, world);
  if (world > cost.machine().num_devices())
    user_error("[search] the machine {} has {} devices, not {}", cost.machine().name, cost.machine().num_devices(), world);
  Program fixed = on_one_device(graph, rows);
  LayerBuilder b{.fixed = fixed,
                 .graph = fixed.graph,
                 .cost = cost,
                 .options = options,
                 .layouts = Layouts(cost.machine(), options.by_resolving),
                 .out = {.world_size = world}};
  b.make_layers();
  b.make_tables();
  b.make_edges();
  return std::move(b.out);
}

Strategy strategy_of(const OpGraph& graph, const LayerCosts& costs, const std::vector<int>& choice) {
  Strategy s{.world_size = costs.world_size};
  for (size_t l = 0; l < costs.layers.size(); ++l) {
    const Layer& layer = costs.layers[l];
    if (layer.head >= 0) s.nodes[graph.nodes[layer.head].name] = layer.configs.at(choice.at(l));
  }
  return s;
}

std::optional<std::vector<int>> choices_of(const OpGraph& graph, const LayerCosts& costs, const Strategy& strategy) {
  std::vector<int> out;
  for (const Layer& layer : costs.layers) {
    if (layer.head < 0) {
      out.push_back(0);
      continue;
    }
    const auto it = strategy.nodes.find(graph.nodes[layer.head].name);
    if (it == strategy.nodes.end()) return std::nullopt;
    OpConfig wanted = normalized(it->second);
    // The processes' rows where there are none mean the same on every device.
    if (is_fed(wanted) && std::none_of(layer.configs.begin(), layer.configs.end(), is_fed)) wanted = {.replicas = costs.world_size};
    const auto found = std::find_if(layer.configs.begin(), layer.configs.end(), [&](const OpConfig& c) { return normalized(c) == wanted; });
    if (found == layer.configs.end()) return std::nullopt;
    out.push_back(static_cast<int>(found - layer.configs.begin()));
  }
  return out;
}

}  // namespace soap
