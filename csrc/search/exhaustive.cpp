#include "search/exhaustive.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <set>

#include "base/error.h"
#include "search/layer_cost.h"
#include "search/partial_plan.h"
#include "sim/simulate.h"

namespace soap {
namespace {

constexpr int kEveryLayerConfiguration = 1 << 20;
constexpr int kSeveral = -2;
constexpr int64_t kBoundsPerLook = 1024;  // at the observer

bool reads_all(const OpGraph& graph, const Node& n, const Rule& rule, size_t operand) {
  std::vector<IndexSet> whole;
  for (const Factor& f : rule.factors) whole.push_back(IndexSet::all(f.size));
  const std::vector<int64_t>& shape = graph.input(n, static_cast<int>(operand)).shape;
  return rule.operands[operand].anchors.empty() && box_of(rule.operands[operand].dims, rule, shape, whole) == whole_box(shape);
}

struct BranchAndBound {
  const OpGraph& graph;
  const CostModel& cost;
  const ExhaustiveSpace& space;
  const ExhaustiveOptions& options;
  ProgressWatch& watch;
  PartialPlan partial;
  DeltaSimulator delta;
  Remainder remainder;
  ExhaustiveResult out;
  Strategy best;
  bool ended = false;

  BranchAndBound(const OpGraph& graph, const CostModel& cost, const ExhaustiveSpace& space, const ExhaustiveOptions& options, ProgressWatch& watch,
                 LayoutCache& cache, const Strategy& start, const FedRows& rows)
      : graph(graph),
        cost(cost),
        space(space),
        options(options),
        watch(watch),
        partial(cache, start.world_size, options.bucket_bytes),
        delta(cache, start, rows) {
    std::vector<Rule> rules;
    for (const Node& n : graph.nodes) rules.push_back(make_rule(graph, n, start.world_size));
    find_remainder(rules);
  }

  NodeId end_of(size_t layer) const { return layer + 1 < space.heads.size() ? space.heads[layer + 1] : static_cast<NodeId>(graph.nodes.size()); }

  // Per node: the layer whose choice alone says how it is cut; -1: none does; kSeveral: more than one.
  std::vector<int> decided_by() const {
    std::vector<int> of(graph.nodes.size(), -1);
    for (const Node& n : graph.nodes) {
      const auto head = std::find(space.heads.begin(), space.heads.end(), n.id);
      if (head != space.heads.end()) {
        of[n.id] = static_cast<int>(head - space.heads.begin());
        continue;
      }
      for (TensorId t : n.inputs) {
        const int other = of[graph.tensors[t].producer];
        if (other != -1) of[n.id] = of[n.id] == -1 || of[n.id] == other ? other : kSeveral;
      }
    }
    return of;
  }

  void find_remainder(const std::vector<Rule>& rules) {
    std::vector<int64_t> least(graph.nodes.size(), 0), work(graph.nodes.size(), 0);
    const std::vector<int> decided = decided_by();
    partial.extend(space.heads.front());
    for (size_t l = 0; l < space.heads.size(); ++l) {
      bool any = false;
      for (const OpConfig& config : space.configs[l]) {
        partial.strategy().nodes[graph.nodes[space.heads[l]].name] = config;
        try {
          partial.extend(end_of(l));
          for (NodeId n = space.heads[l]; n < end_of(l); ++n) {
            if (decided[n] != static_cast<int>(l)) continue;
            least[n] = any ? std::min(least[n], partial.least_ns(n)) : partial.least_ns(n);
            work[n] = any ? std::min(work[n], partial.work_ns(n)) : partial.work_ns(n);
          }
          any = true;
        } catch (const std::invalid_argument&) {  // not legal: none of the space's plans
        }
        partial.retreat();
      }
      for (const OpConfig& config : space.configs[l]) {  // any, to go on from
        partial.strategy().nodes[graph.nodes[space.heads[l]].name] = config;
        try {
          partial.extend(end_of(l));
          break;
        } catch (const std::invalid_argument&) {
          partial.retreat();
        }
      }
      if (!any) user_error("[search] no configuration of {} is legal", graph.nodes[space.heads[l]].name);
    }
    for (size_t l = 0; l <= space.heads.size(); ++l) partial.retreat();
    partial.strategy().nodes.clear();
    std::vector<int64_t>& paths = remainder.paths;
    paths.assign(graph.nodes.size(), 0);
    remainder.work.assign(graph.nodes.size() + 1, 0);
    for (size_t i = graph.nodes.size(); i-- > 0;) remainder.work[i] = remainder.work[i + 1] + work[i];
    std::vector<int64_t> after(graph.tensors.size(), 0);  // per tensor: the longest path of its readers
    for (size_t i = graph.nodes.size(); i-- > 0;) {
      const Node& n = graph.nodes[i];
      if (n.kind != NodeKind::kOp) continue;
      int64_t rest = 0;
      for (TensorId t : n.outputs) rest = std::max(rest, after[t]);
      for (size_t k = 0; k < n.inputs.size(); ++k) {
        const bool back = graph.tensors[n.inputs[k]].requires_grad && rules[i].operands[k].differentiable && reads_all(graph, n, rules[i], k);
        if (back) paths[i] = least[i] + rest;
      }
      for (TensorId t : n.inputs) after[t] = std::max(after[t], paths[i]);
    }
    find_updates();
  }

  // Each element is stored somewhere. By a measured table parts may take less than the whole.
  void find_updates() {
    const Machine& machine = cost.machine();
    remainder.update.assign(graph.tensors.size(), 0);
    for (const Node& n : graph.nodes) {
      if (n.kind != NodeKind::kParam || !graph.output(n, 0).requires_grad || !machine.update.empty()) continue;
      int64_t least = std::numeric_limits<int64_t>::max();
      const int world = partial.strategy().world_size;
      for (int d = 0; d < world; ++d) least = std::min(least, update_ns(machine, d, numel(graph.output(n, 0).shape) * graph.output(n, 0).element_bytes));
      remainder.update[n.outputs[0]] = std::max<int64_t>(least - world, 0);  // parts are rounded down, each
    }
  }

  void price(const Strategy& plan) {
    ++out.simulated;
    int64_t time = 0;
    try {
      time = delta.change(delta.difference(plan));
    } catch (const std::invalid_argument&) {
      ++out.illegal;
      return;
    }
    watch.simulated();
    if (time >= out.step_ns) return;
    out.step_ns = time;
    out.last_better = out.bounds;
    best = plan;
    watch.priced(time);
  }

  void look(size_t layer) {
    if (layer == space.heads.size()) {
      price(partial.strategy());
      return;
    }
    std::vector<std::pair<int64_t, int>> order;
    const std::string& name = graph.nodes[space.heads[layer]].name;
    for (size_t c = 0; c < space.configs[layer].size(); ++c) {
      partial.strategy().nodes[name] = space.configs[layer][c];
      try {
        partial.extend(end_of(layer));
        order.emplace_back(static_cast<int64_t>(static_cast<double>(partial.bound(remainder, out.step_ns)) * options.bound_scale), static_cast<int>(c));
      } catch (const std::invalid_argument&) {  // not legal here
        ++out.illegal;
      }
      partial.retreat();
      if (++out.bounds % kBoundsPerLook == 0) watch.simulated();
    }
    ended = ended || watch.stopped() || out.bounds >= options.most_bounds;
    std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (size_t i = 0; i < order.size(); ++i) {
      if (ended) return;
      if (order[i].first >= out.step_ns) {
        out.pruned += static_cast<int64_t>(order.size() - i);
        break;
      }
      partial.strategy().nodes[name] = space.configs[layer][order[i].second];
      partial.extend(end_of(layer));
      look(layer + 1);
      partial.retreat();
    }
  }
};

OpConfig on_block(OpConfig c, int first) {
  c.devices.resize(static_cast<size_t>(c.num_tiles()) * c.replicas);
  std::iota(c.devices.begin(), c.devices.end(), first);
  return c;
}

}  // namespace

ExhaustiveSpace exhaustive_space(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const ExhaustiveOptions& options) {
  const int world = static_cast<int>(rows.size());
  LayerCosts costs = layer_costs(graph, rows, cost, {.reductions = options.reductions, .max_configurations = kEveryLayerConfiguration});
  std::set<std::string> named(options.operators.begin(), options.operators.end());
  std::erase_if(costs.layers, [&](const Layer& l) { return l.head < 0 || (!options.operators.empty() && named.erase(graph.nodes[l.head].name) == 0); });
  if (!named.empty()) user_error("[search] {} is not an operator that is configured: it follows another, or there is none of this name", *named.begin());
  std::sort(costs.layers.begin(), costs.layers.end(), [](const Layer& a, const Layer& b) { return a.head < b.head; });
  ExhaustiveSpace out;
  for (const Layer& layer : costs.layers) {
    out.heads.push_back(layer.head);
    auto& configs = out.configs.emplace_back();
    for (const OpConfig& c : layer.configs) {
      const int tiles = c.num_tiles();
      const int taken = c.devices.empty() ? tiles * c.replicas : static_cast<int>(c.devices.size());
      if (taken == world) {
        configs.push_back(c);
        continue;
      }
      for (int first = 0; first < world; first += taken) configs.push_back(on_block(c, first));
      if (tiles > 1) {
        configs.push_back(c);
        configs.back().replicas = world / tiles;
      }
    }
  }
  return out;
}

namespace {

Strategy all_on_one(const OpGraph& graph, const ExhaustiveSpace& space, int world, const ExhaustiveOptions& options) {
  if (space.heads.empty() || space.heads.size() != space.configs.size()) {
    user_error("[search] a space of {} layers with {} lists of configurations", space.heads.size(), space.configs.size());
  }
  Strategy out{.world_size = world, .bucket_bytes = options.bucket_bytes};
  for (NodeId head : space.heads) out.nodes[graph.nodes.at(head).name] = {.devices = {0}};
  return out;
}

}  // namespace

ExhaustiveResult exhaustive_search(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const ExhaustiveSpace& space,
                                   const ExhaustiveOptions& options, Observer observer) {
  const int world = static_cast<int>(rows.size());
  ProgressWatch watch(std::move(observer));
  watch.enter("exhaustive");
  LayoutCache cache(graph, rows, cost);
  const Strategy start = all_on_one(graph, space, world, options);
  BranchAndBound search(graph, cost, space, options, watch, cache, start, rows);
  const int64_t on_one_ns = search.delta.step_ns();
  search.out.step_ns = std::numeric_limits<int64_t>::max();
  search.out.plans = 1;
  for (const auto& list : space.configs) {
    search.out.configurations.push_back(static_cast<int>(list.size()));
    search.out.plans *= static_cast<double>(list.size());
  }
  for (const Strategy& s : options.starts) search.price(s);
  search.partial.extend(space.heads.front());
  search.look(0);
  if (search.out.step_ns == std::numeric_limits<int64_t>::max()) {
    if (!search.ended) user_error("[search] none of the {} plans is legal", search.out.plans);
    search.out.step_ns = on_one_ns;
    search.best = start;
  }
  search.out.strategy = std::move(search.best);
  search.out.proven = !search.ended;
  return std::move(search.out);
}

std::vector<int64_t> partial_bounds(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const ExhaustiveSpace& space,
                                    const std::vector<int>& choice, const ExhaustiveOptions& options) {
  ProgressWatch watch({});
  LayoutCache cache(graph, rows, cost);
  BranchAndBound search(graph, cost, space, options, watch, cache, all_on_one(graph, space, static_cast<int>(rows.size()), options), rows);
  std::vector<int64_t> out;
  search.partial.extend(space.heads.front());
  for (size_t l = 0; l < space.heads.size(); ++l) {
    search.partial.strategy().nodes[graph.nodes[space.heads[l]].name] = space.configs[l].at(choice.at(l));
    search.partial.extend(search.end_of(l));
    out.push_back(search.partial.bound(search.remainder, std::numeric_limits<int64_t>::max()));
  }
  return out;
}

}  // namespace soap
