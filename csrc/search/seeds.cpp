#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "search/search.h"

namespace soap {
namespace {

OpConfig fed(int world) {
  return {.cuts = {{"n", {.tiles = world, .fed = true}}}};
}

OpConfig cut(const std::string& factor, int world) {
  return {.cuts = {{factor, {.tiles = world}}}};
}

// Tiles in samples and, within them, in another factor: `n=a o=b`, groups of b neighbouring devices.
OpConfig grid(int samples, const std::string& factor, int world) {
  OpConfig out = cut(factor, world / samples);
  if (samples > 1) out.cuts.insert(out.cuts.begin(), {"n", {.tiles = samples}});
  return out;
}

bool can_cut(const Rule& rule, const std::string& factor, int world) {
  const int f = rule.factor(factor);
  return f >= 0 && rule.factors[f].cut != Cuttable::kWhole && rule.factors[f].size / rule.factors[f].unit >= world;
}

int64_t parameter_bytes(const OpGraph& graph, const Node& node) {
  int64_t bytes = 0;
  for (TensorId t : node.inputs) {
    if (graph.nodes[graph.tensors[t].producer].kind == NodeKind::kParam) bytes += numel(graph.tensors[t].shape) * graph.tensors[t].element_bytes;
  }
  return bytes;
}

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

// A factor by what it is: the parameter factor (output channels) or the reduction factor (input channels) of the first parameter.
std::string parameter_factor(const OpGraph& graph, const Node& node, const Rule& rule, FactorKind kind) {
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    if (graph.nodes[graph.tensors[node.inputs[i]].producer].kind != NodeKind::kParam) continue;
    for (const DimExpr& d : rule.operands[i].dims) {
      for (int f : d.factors) {
        if (rule.factors[f].kind == kind) return rule.factors[f].name;
      }
    }
    return "";
  }
  return "";
}

// A parameter factor that every operand has (heads): its parts never meet.
std::string parallel_factor(const Rule& rule) {
  for (size_t f = 0; f < rule.factors.size(); ++f) {
    const bool everywhere = std::all_of(rule.operands.begin(), rule.operands.end(), [&](const Operand& o) {
      return std::any_of(o.dims.begin(), o.dims.end(), [&](const DimExpr& d) { return std::count(d.factors.begin(), d.factors.end(), f) > 0; });
    });
    if (rule.factors[f].kind == FactorKind::kParameter && everywhere && !rule.operands.empty()) return rule.factors[f].name;
  }
  return "";
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

Strategy everywhere_fed(const OpGraph& graph, int world) {
  Strategy s{.world_size = world};
  for (const Node& n : graph.nodes) {
    if (n.kind == NodeKind::kOp) s.nodes[n.name] = fed(world);
  }
  return s;
}

// Operators with parameters alternate between their output and input channels within `samples` groups of devices; heads are cut alike; what
// lies between follows. Operators before `first` are data parallel.
Strategy alternate(const OpGraph& graph, int world, int samples, NodeId first) {
  Strategy s{.world_size = world};
  const int degree = world / samples;
  bool by_output = true;
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    if (n.id < first) {
      s.nodes[n.name] = fed(world);
      continue;
    }
    const Rule rule = make_rule(graph, n, world);
    if (parameter_bytes(graph, n) == 0) {
      const std::string heads = parallel_factor(rule);
      if (!heads.empty() && can_cut(rule, heads, degree)) s.nodes[n.name] = grid(samples, heads, world);
      continue;  // else it follows
    }
    std::string wanted = parameter_factor(graph, n, rule, FactorKind::kParameter), other = parameter_factor(graph, n, rule, FactorKind::kReduction);
    if (!by_output) std::swap(wanted, other);
    for (const std::string& factor : {wanted, other}) {
      if (factor.empty() || !can_cut(rule, factor, degree)) continue;
      s.nodes[n.name] = grid(samples, factor, world);
      break;
    }
    by_output = !by_output;
  }
  return s;
}

// Images cut by rows up to the last operator with windows, with halos; data parallel from there on.
std::optional<Strategy> spatial(const OpGraph& graph, int world) {
  Strategy s = everywhere_fed(graph, world);
  NodeId last = -1;
  std::vector<NodeId> between;
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    const std::string factor = window_factor(make_rule(graph, n, world), world);
    if (factor.empty()) {
      between.push_back(n.id);
      continue;
    }
    last = n.id;
    s.nodes[n.name] = cut(factor, world);
    for (NodeId b : between) s.nodes.erase(graph.nodes[b].name);  // follow
    between.clear();
  }
  if (last < 0) return std::nullopt;
  return s;
}

bool has_loss(const OpGraph& graph) {
  return std::any_of(graph.nodes.begin(), graph.nodes.end(), [&](const Node& n) {
    return n.kind == NodeKind::kReturn && n.target != "buffer_write" && graph.input(n, 0).requires_grad && numel(graph.input(n, 0).shape) == 1;
  });
}

// Stages of equal work, one after another on the devices; twice as many chunks of samples as stages (GPipe, Huang et al. 2019).
Strategy pipeline(const OpGraph& graph, int world, Order order) {
  Strategy s{.world_size = world, .order = order};
  std::vector<double> work;
  for (const Node& n : graph.nodes) {
    double product = n.kind == NodeKind::kOp ? 1 : 0;
    if (n.kind == NodeKind::kOp) {
      for (const Factor& f : make_rule(graph, n, world).factors) product *= static_cast<double>(std::max<int64_t>(f.size, 1));
    }
    work.push_back(product);
  }
  const double total = std::accumulate(work.begin(), work.end(), 0.0);
  double before = 0;
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    const int stage = std::min(static_cast<int>((before + work[n.id] / 2) / total * world), world - 1);
    before += work[n.id];
    s.nodes[n.name] = {.cuts = {{"n", {.chunks = 2 * world}}}, .devices = {stage}};
  }
  return s;
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

  Strategy zero = everywhere_fed(graph, world);
  for (const Node& n : graph.nodes) {
    const bool large = n.kind == NodeKind::kParam && !graph.output(n, 0).shape.empty() && graph.output(n, 0).shape[0] >= world;
    if (large) zero.nodes[n.name] = {.cuts = {{"d0", {.tiles = world}}}, .keep = Keep::kUse};
  }
  out.emplace_back("zero-3", std::move(zero));
  out.emplace_back("megatron", alternate(graph, world, 1, 0));
  // OWT: by channel from the first operator on whose weights outweigh what it computes on; data parallel before it.
  const auto heavy = [&](const Node& n) {
    return n.kind == NodeKind::kOp && parameter_bytes(graph, n) >= (4 << 20) && parameter_bytes(graph, n) > activation_bytes(graph, n);
  };
  const auto first = std::find_if(graph.nodes.begin(), graph.nodes.end(), heavy);
  if (first != graph.nodes.end()) out.emplace_back("owt", alternate(graph, world, 1, first->id));
  for (int samples = 2; samples < world; ++samples) {
    if (world % samples == 0) out.emplace_back(fmt::format("dp {} x tp {}", samples, world / samples), alternate(graph, world, samples, 0));
  }
  if (auto s = spatial(graph, world)) out.emplace_back("spatial", std::move(*s));
  if (has_loss(graph)) {
    out.emplace_back("gpipe", pipeline(graph, world, Order::kForwardThenBackward));
    out.emplace_back("1f1b", pipeline(graph, world, Order::kInterleaved));
  }
  return out;
}

}  // namespace soap
