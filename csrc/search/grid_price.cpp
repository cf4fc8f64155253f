#include "search/grid_price.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "search/fsdp.h"
#include "search/grid_schedule.h"
#include "search/replica_graph.h"
#include "sharding/region.h"
#include "sim/simulate.h"

namespace soap {
namespace {

struct Stage {
  StageTimes times;
  int64_t compute = 0, moved = 0;   // of a whole step
  int64_t movements = 0, host = 0;  // likewise: how many, and of the host to launch all
  int64_t update = 0, memory = 0;
};

struct Pricing {
  const OpGraph& graph;
  const ManualOptions& o;
  GridStages& grid;
  const GroupCost& cost;
  const std::vector<int>& region_of;  // per node: the repeated block that it is in, -1 for none
  const Machine& machine;
  bool early_backward = true;
  int64_t bucket_bytes = Strategy{}.bucket_bytes;
  std::vector<Stage> stages = std::vector<Stage>(o.pp);
  int64_t carried = 0;  // bytes of gradients of later stages that wait in a bucket

  // Replicas that share each parameter's parts.
  void share_parameters() {
    const int group = o.zero == 0 ? 1 : o.zero_group > 0 ? o.zero_group : o.dp;
    for (auto& of_stage : grid.parameters) {
      for (StageParameter& q : of_stage) {
        const bool shared = group > 1 && graph.nodes[q.p->node].kind == NodeKind::kParam &&
                            std::any_of(q.p->shape.begin(), q.p->shape.end(), [&](int64_t size) { return size >= group; });
        q.group = shared ? group : 1;
      }
    }
    for (SharedParameter& p : grid.shared) {
      const StageParameter& q = grid.parameters[p.home][p.parameter];
      const GridLinks links(machine, o, p.home);
      p.fill_ns = links.exchange(links.share(q.p->bytes, q.group, q.p->alike, p.other), p.other);
      if (q.p->trained) p.gradient = links.share_gradient(q.p->bytes, q.group, q.p->alike, p.other);
    }
  }

  void time(int index) {
    Stage& s = stages[index];
    if (o.fsdp) {
      const FsdpTimes t = fsdp_times({.nodes = grid.stages[index].nodes, .first_device = index * o.dp * o.tp}, cost, o, region_of, machine);
      s.times = {.forward = t.forward, .first_forward = t.forward, .backward = t.backward, .first_backward = t.backward, .last_backward = t.backward};
      s.times.synchronised = t.synchronised;
      s.moved = t.moved * o.micro_batches;
      s.movements = int64_t{t.movements} * o.micro_batches;
    } else {
      time_exchanges(s, index);
    }
    s.compute = o.micro_batches * grid.stages[index].compute;
    for (const StageParameter& q : grid.parameters[index]) {
      if (!q.p->trained) continue;
      const int64_t element = o.fsdp ? q.p->reduced_element_bytes : q.p->element_bytes;
      s.update += update_ns(machine, 0, q.p->bytes / q.p->element_bytes * element / q.group);
      s.host += update_launch_ns(machine);
    }
    s.host += machine.launch_ns("update");
    s.host += o.micro_batches * grid.stages[index].host;
    for (const StageTransfer& t : grid.transfers) {
      if (t.from == index || t.to == index) s.movements += int64_t{o.micro_batches} * ((t.forward_ns > 0 ? 1 : 0) + (t.backward_ns > 0 ? 1 : 0));
    }
    for (const SharedParameter& p : grid.shared) s.movements += p.home == index || p.other == index ? 1 : 0;
    if (!o.fsdp) s.movements += grid.num_ahead + grid.num_returns + grid.num_return_gradients * o.micro_batches;
    s.host += s.movements * machine.launch_ns("collective");
  }

  // As this runtime moves what is stored in parts: each parameter by an exchange. The first forward waits for them, the first backward for those that are
  // gathered again, the last brings gradients; all between is the plain micro-batch.
  void time_exchanges(Stage& s, int index) {
    GridLinks links(machine, o, index);
    const GridStages::Stage& plain = grid.stages[index];
    const WalkTimes first = first_forward(index, links), last = backward(index, links, o.micro_batches == 1, true);
    const WalkTimes again = o.micro_batches > 1 ? backward(index, links, true, false) : WalkTimes{};
    s.times.forward = plain.forward.end;
    s.times.first_forward = first.end;
    s.times.gathers = first.moved - plain.forward.moved;
    s.times.backward = plain.backward.end;
    s.times.first_backward = again.end;
    s.times.last_backward = last.end;
    s.times.synchronised = last.synchronised;
    const int forwards = o.micro_batches - 1, backwards = std::max(o.micro_batches - 2, 0);
    s.moved += first.moved + again.moved + last.moved + forwards * plain.forward.moved + backwards * plain.backward.moved;
    s.movements += first.movements + again.movements + last.movements + forwards * plain.forward.movements + backwards * plain.backward.movements;
  }

  WalkTimes first_forward(int index, const GridLinks& links) const {
    const GridStages::Stage& stage = grid.stages[index];
    const std::vector<StageParameter>& parameters = grid.parameters[index];
    const bool plain = std::none_of(parameters.begin(), parameters.end(), [](const StageParameter& q) { return q.group > 1; });
    if (plain && stage.first_fills.empty()) return stage.forward;
    Walk w{.cost = cost, .overlap = machine.overlap};
    auto q = parameters.begin();
    auto first = stage.first_fills.begin();
    for (size_t i = 0; i < stage.nodes.size(); ++i) {
      const NodeId n = stage.nodes[i];
      for (; first != stage.first_fills.end() && first->at == i; ++first) w.move(first->ns, first->computed, true);
      ExchangeLoad together;  // neighbouring gathers travel together where micro-batches don't take turns
      for (; q != parameters.end() && q->first <= n; ++q) {
        if (q->group == 1 || grid.interleaved) w.move(links.exchange(std::exchange(together, {})), false, true);
        if (q->group > 1) together += links.gather(q->p->bytes, q->group);
      }
      w.move(links.exchange(together), false, true);
      w.move(stage.fill_ns[i], true, true);
      w.spend(cost.nodes[n].forward);
    }
    return w.times();
  }

  // A micro-batch's backward that gathers parameters again (ZeRO-3), that brings gradients to where they are stored, or both.
  WalkTimes backward(int index, GridLinks& links, bool gathers, bool brings) {
    const GridStages::Stage& stage = grid.stages[index];
    const std::vector<StageParameter>& parameters = grid.parameters[index];
    if (o.dp * o.tp == 1 && grid.shared.empty()) return stage.backward;
    Walk w{.cost = cost, .overlap = machine.overlap};
    int64_t bucket = carried, reduced = 0, reduced_alike = 0;
    ExchangeLoad scattered;
    for (const SharedParameter& p : grid.shared) {
      if (p.home == index && brings) scattered += p.gradient;
      if (p.other == index && gathers && o.zero == 3 && grid.parameters[p.home][p.parameter].group > 1) w.move(p.fill_ns, false, true);
    }
    int64_t first_bucket = 0;
    const auto flush = [&] {
      if (first_bucket == 0) first_bucket = std::max<int64_t>(w.now(), 1);
      w.move(links.exchange(scattered), true, false);
      const bool both = reduced > 0 && reduced_alike > 0;
      w.move(links.all_reduce(reduced, false, both), true, false);
      w.move(links.all_reduce(reduced_alike, true, both), true, false);
      bucket = reduced = reduced_alike = 0;
      scattered = {};
    };
    auto refill = gathers ? stage.refills.begin() : stage.refills.end();
    auto end = brings ? stage.ends.begin() : stage.ends.end();
    auto meets = brings ? stage.last_gradients.begin() : stage.last_gradients.end();
    for (size_t i = stage.nodes.size(); i-- > 0;) {
      const NodeId n = stage.nodes[i];
      const GroupNode& node = cost.nodes[n];
      for (; refill != stage.refills.end() && parameters[*refill].last >= n; ++refill) {
        const StageParameter& q = parameters[*refill];
        if (q.group > 1 && o.zero == 3) w.move(links.exchange(links.gather(q.p->bytes, q.group)), false, true);
      }
      if (again(n)) w.spend(node.forward);
      w.spend(node.backward);
      w.move(stage.gradient_ns[i], true, true);
      for (; meets != stage.last_gradients.end() && meets->at == i; ++meets) w.move(meets->ns, true, true);
      for (; end != stage.ends.end() && parameters[*end].p->last >= n; ++end) {
        const StageParameter& q = parameters[*end];
        if (q.p->last > n) continue;  // another stage's backward completes it
        if (q.group > 1) {
          scattered += links.scatter(q.p->bytes, q.group, q.p->alike);
        } else if (q.p->alike || o.dp > 1) {
          (q.p->alike ? reduced_alike : reduced) += q.p->bytes / q.p->element_bytes * q.p->reduced_element_bytes;
        } else {
          continue;  // nobody else has it
        }
        bucket += q.p->whole_bytes;
        if (bucket >= bucket_bytes) flush();
      }
    }
    const WalkTimes out = w.times();
    if (!brings) return out;
    // What fills no bucket comes behind everything (search/grid_schedule.h).
    StageTimes& t = stages[index].times;
    t.first_bucket = first_bucket;
    t.left = scattered;
    const int64_t left_exchange_ns = links.exchange(scattered);
    t.left_reduce_ns = links.all_reduce(reduced, false, reduced_alike > 0) + links.all_reduce(reduced_alike, true, reduced > 0);
    carried = bucket;
    stages[index].moved += left_exchange_ns + t.left_reduce_ns;
    stages[index].movements += (left_exchange_ns > 0 ? 1 : 0) + (reduced > 0 && o.dp > 1 ? 1 : 0) + (reduced_alike > 0 ? 1 : 0);
    return out;
  }

  void remember(int index) {
    stages[index].memory = grid.stages[index].extra_bytes + stage_memory({.cost = cost,
                                                                          .activations = grid.activations[index],
                                                                          .options = o,
                                                                          .index = index,
                                                                          .parameters = grid.parameters[index],
                                                                          .by_end = grid.stages[index].ends,
                                                                          .early_backward = early_backward,
                                                                          .bucket_bytes = bucket_bytes});
  }

  bool again(NodeId n) const { return o.recompute && region_of[n] >= 0; }

  int64_t schedule() const {
    std::vector<StageTimes> times;
    for (const Stage& s : stages) times.push_back(s.times);
    const std::vector<int64_t> ends = stage_ends(
        grid, times, {.machine = machine, .stage_devices = o.dp * o.tp, .micro_batches = o.micro_batches, .early_backward = early_backward, .meets = !o.fsdp});
    int64_t step = 0;
    for (int s = 0; s < o.pp; ++s) step = std::max(step, ends[s] + stages[s].update);
    return step;
  }
};

}  // namespace

GridPricer::GridPricer(const OpGraph& graph, const ManualPlanner& planner, const CostModel& cost)
    : graph_(graph), planner_(planner), cost_(cost), regions_(named_regions(graph, repeated_blocks(graph))) {}

GridPricer::Share& GridPricer::share(int ranks, int64_t parts) {
  auto& slot = shares_[{ranks, parts}];
  if (slot) return *slot;
  auto made = std::make_unique<Share>();
  Replica& replica = replicas_[parts];
  if (!replica.planner) {
    replica.graph = replica_graph(graph_, planner_, parts);
    replica.planner = std::make_unique<ManualPlanner>(replica.graph, 1, planner_);
  }
  made->graph = &replica.graph;
  made->planner = std::make_unique<ManualPlanner>(replica.graph, ranks, *replica.planner);
  FedRows rows(ranks);
  for (int r = 0; r < ranks; ++r) rows[r] = made->planner->rows() / ranks + (r < made->planner->rows() % ranks);
  made->cache = std::make_unique<LayoutCache>(*made->graph, rows, cost_);
  slot = std::move(made);
  return *slot;
}

GridPrice GridPricer::price(const ManualOptions& o, const GroupConfigs& configs, bool memory) {
  const int64_t parts = int64_t{o.dp} * o.micro_batches;
  if (o.fsdp && o.zero != 2 && o.zero != 3) user_error("[grid] fsdp needs zero=2 (kept until backward) or zero=3 (for each use), not zero={}", o.zero);
  if (planner_.rows() % parts != 0) user_error("[grid] {} rows can't be shared evenly by dp={} x micro_batches={}", planner_.rows(), o.dp, o.micro_batches);
  Share& mine = share(o.tp, parts);
  const ManualOptions inner{.tp = o.tp, .strict = o.strict, .sequence = o.sequence};
  std::unique_ptr<GroupCost> own;
  auto& cost = configs.empty() ? mine.manual[o.sequence ? 1 : 0] : own;
  if (!cost)
    cost = std::make_unique<GroupCost>(group_cost(*mine.cache, *mine.planner, mine.planner->make(inner, configs), memory || o.fsdp || configs.empty()));
  auto& stage_of = stages_[o.pp];
  if (stage_of.empty()) stage_of = planner_.stages(o.pp);
  const auto made_for = [&](const GridStages& g) {
    return g.cost == cost.get() && g.dp == o.dp && g.pp == o.pp && g.recompute == o.recompute && g.interleaved == is_interleaved(o);
  };
  GridStages of_configs;
  GridStages& grid = configs.empty() ? last_ : of_configs;
  if (!made_for(grid)) grid = grid_stages(*mine.graph, *cost, o, stage_of, regions_, cost_.machine());
  if (memory && grid.activations.empty()) grid.activations = stage_activations(*cost, stage_of, regions_, o.recompute, grid.parameters);
  Pricing p{
      .graph = *mine.graph, .o = o, .grid = grid, .cost = *cost, .region_of = regions_, .machine = cost_.machine(), .early_backward = planner_.loss_is_sum()};
  p.share_parameters();
  GridPrice out;
  for (int s = o.pp; s-- > 0;) {  // as gradients come
    p.time(s);
    if (memory) p.remember(s);
  }
  out.device_step_ns = p.schedule();
  for (const Stage& s : p.stages) {
    out.host_ns = std::max(out.host_ns, s.host);
    if (s.compute >= out.compute_ns) {
      out.compute_ns = s.compute;
      out.communication_ns = s.moved;
    }
    out.stage_memory.push_back(s.memory);
    out.memory_bytes = std::max(out.memory_bytes, s.memory);
  }
  out.step_ns = std::max(out.device_step_ns, out.host_ns);
  return out;
}

}  // namespace soap
