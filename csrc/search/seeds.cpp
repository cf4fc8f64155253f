#include <algorithm>
#include <optional>

#include "base/error.h"
#include "search/grid_search.h"
#include "search/search.h"

namespace soap {
namespace {

constexpr size_t kMaxGrids = 48;  // of samples, channels and stages: a world of 1,024 has 66

int64_t activation_bytes(const OpGraph& graph, const Node& node) {
  int64_t bytes = 0;
  for (const auto* tensors : {&node.inputs, &node.outputs}) {
    for (TensorId t : *tensors) {
      const Node& producer = graph.nodes[graph.tensors[t].producer];
      if (producer.kind != NodeKind::kParam) bytes += numel(graph.tensors[t].shape) * graph.tensors[t].element_bytes;
    }
  }
  return bytes;
}

// A factor that an operand reads through windows (rows of an image).
std::string window_factor(const Rule& rule, int world) {
  for (const Operand& o : rule.operands) {
    for (const DimExpr& d : o.dims) {
      if (d.map && d.map->kind == IndexMap::Kind::kWindow && can_cut(rule, rule.factors[d.factors[0]].name, world)) return rule.factors[d.factors[0]].name;
    }
  }
  return "";
}

// Images cut by rows up to the last operator with windows, with halos; data parallel from there on.
std::optional<Strategy> spatial(const OpGraph& graph, const ManualPlanner& planner, int world) {
  Strategy s = everywhere_fed(graph, world);
  NodeId last = -1;
  std::vector<NodeId> between;
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    const std::string factor = window_factor(planner.rule(n), world);
    if (factor.empty()) {
      between.push_back(n.id);
      continue;
    }
    last = n.id;
    s.nodes[n.name] = {.cuts = {{factor, {.tiles = world}}}};
    for (NodeId b : between) s.nodes.erase(graph.nodes[b].name);  // follow
    between.clear();
  }
  if (last < 0) return std::nullopt;
  return s;
}

// Every way to write the world as dp x tp x pp, stages outermost.
std::vector<ManualOptions> grids(int world, bool pipelines) {
  std::vector<ManualOptions> out;
  for (int pp = 1; pp <= (pipelines ? world : 1); ++pp) {
    if (world % pp) continue;
    for (int dp = 1; dp <= world / pp; ++dp) {
      if (world / pp % dp == 0) out.push_back({.dp = dp, .tp = world / pp / dp, .pp = pp});
    }
  }
  return out;
}

}  // namespace

std::vector<std::pair<std::string, Strategy>> seeds(const OpGraph& graph, int world) {
  std::vector<std::pair<std::string, Strategy>> out;
  out.emplace_back("ddp", everywhere_fed(graph, world));
  Strategy one{.world_size = world};
  for (const Node& n : graph.nodes) {
    if (n.kind == NodeKind::kOp) one.nodes[n.name] = {.devices = {0}};
  }
  out.emplace_back("one device", std::move(one));
  if (world == 1) return out;

  const ManualPlanner planner(graph, world);
  const auto add = [&](const std::string& name, const ManualOptions& options) {
    try {
      out.emplace_back(name, planner.make(options));
    } catch (const std::invalid_argument&) {  // fewer rows or layers than this grid needs: nobody would write it
      return;
    }
  };
  // Twice as many as stages, as far as the rows go.
  const auto micro_batches = [&](const ManualOptions& o) { return static_cast<int>(std::clamp<int64_t>(planner.rows() / o.dp, 1, 2 * o.pp)); };
  for (const int zero : {1, 2, 3}) add(fmt::format("zero-{}", zero), {.dp = world, .zero = zero});
  for (int group = 2; group < world; ++group) {
    if (world % group == 0) add(fmt::format("hsdp {}", group), {.dp = world, .zero = 3, .zero_group = group});
  }
  add("megatron", {.tp = world});
  // OWT: by channel from the first operator on whose weights outweigh what it computes on; data parallel before it.
  const auto heavy = [&](const Node& n) {
    return n.kind == NodeKind::kOp && parameter_bytes(graph, n) >= (4 << 20) && parameter_bytes(graph, n) > activation_bytes(graph, n);
  };
  const auto first = std::find_if(graph.nodes.begin(), graph.nodes.end(), heavy);
  if (first != graph.nodes.end()) add("owt", {.tp = world, .tensor_from = first->id});
  const auto all = grids(world, planner.has_loss());
  for (size_t i = 0, added = 0; i < all.size() && added < kMaxGrids; ++i) {
    ManualOptions o = all[i];
    if (std::max({o.dp, o.tp, o.pp}) == world) continue;  // have names of their own
    const std::string name = grid_name(o);
    if (o.pp > 1) {
      o.micro_batches = micro_batches(o);
      o.order = Order::kInterleaved;
    }
    add(name, o);
    ++added;
  }
  if (auto s = spatial(graph, planner, world)) out.emplace_back("spatial", std::move(*s));
  if (planner.has_loss()) {
    const int chunks = micro_batches({.pp = world});
    add("gpipe", {.pp = world, .micro_batches = chunks});
    add("1f1b", {.pp = world, .micro_batches = chunks, .order = Order::kInterleaved});
  }
  return out;
}

}  // namespace soap
