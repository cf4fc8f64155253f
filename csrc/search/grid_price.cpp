#include "search/grid_price.h"

#include <algorithm>

#include "base/error.h"
#include "search/fsdp.h"
#include "search/replica_graph.h"
#include "sharding/region.h"
#include "sim/simulate.h"

namespace soap {
namespace {

// What moves between the replicas of a stage, by the size of their groups. All groups of a stage do alike at once.
class ReplicaLinks {
 public:
  ReplicaLinks(const Machine& machine, const ManualOptions& o, int stage) : machine_(machine), o_(o), first_(stage * o.dp * o.tp) {}

  // The sum over all replicas, each with `bytes`; `alike`: over all ranks of the stage.
  int64_t all_reduce(int64_t bytes, bool alike) { return price(alike ? 0 : 1, alike ? o_.dp * o_.tp : o_.dp, alike ? 1 : o_.tp, bytes); }
  // Every one of `group` neighbouring replicas sends its part of `bytes` to the others.
  int64_t gather(int64_t bytes, int group) { return price(2, group, o_.tp, bytes / group * (group - 1)); }
  // Every replica sends to every other the part that it stores.
  int64_t scatter(int64_t bytes, int group) { return price(3, o_.dp, o_.tp, bytes / group * (o_.dp - 1)); }

 private:
  int64_t price(int kind, int ranks, int stride, int64_t bytes) {
    if (ranks < 2 || bytes == 0) return 0;
    const auto [it, fresh] = prices_.emplace(std::tuple(kind, ranks, bytes), 0);
    if (fresh) {
      std::vector<int> list;
      for (int r = 0; r < ranks; ++r) list.push_back(first_ + r * stride);
      // Ranks of the stage on the first one's host, over those of this group there.
      const auto here = [&](int r) { return machine_.host_of[r] == machine_.host_of[first_]; };
      int all = 0;
      for (int r = first_; r < first_ + o_.dp * o_.tp && here(r); ++r) ++all;
      const auto mine = static_cast<int>(std::count_if(list.begin(), list.end(), here));
      const bool leaves = mine < ranks;
      it->second = movement_ns(machine_, kind < 2 ? "all_reduce" : "exchange", list, bytes, leaves || kind >= 2 ? std::max(all / mine, 1) : 1);
    }
    return it->second;
  }

  const Machine& machine_;
  const ManualOptions& o_;
  int first_ = 0;
  std::map<std::tuple<int, int, int64_t>, int64_t> prices_;
};

struct Stage {
  int64_t forward = 0, backward = 0, first_forward = 0, last_backward = 0,
          synchronised = 0;         // the last: when gradients are there, after the begin of that backward
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
  const std::vector<StageTransfer>& transfers = grid.transfers;

  int in_flight(int s) const {
    const bool early = early_backward && o.order == Order::kInterleaved && o.micro_batches > 1;
    return early ? std::min(o.micro_batches, o.pp - s) : o.micro_batches;
  }

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
  }

  void time(int index) {
    Stage& s = stages[index];
    if (o.fsdp) {
      const FsdpTimes t = fsdp_times({.nodes = grid.stages[index].nodes, .first_device = index * o.dp * o.tp}, cost, o, region_of, machine);
      s.first_forward = s.forward = t.forward;
      s.last_backward = s.backward = t.backward;
      s.synchronised = t.synchronised;
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
    for (const StageTransfer& t : transfers) {
      if (t.from == index || t.to == index) s.movements += int64_t{o.micro_batches} * ((t.forward_ns > 0 ? 1 : 0) + (t.backward_ns > 0 ? 1 : 0));
    }
    s.host += s.movements * machine.launch_ns("collective");
  }

  // As this runtime moves what is stored in parts: each parameter by an exchange. The first forward waits for them, the last backward brings gradients; all
  // between is the plain micro-batch.
  void time_exchanges(Stage& s, int index) const {
    ReplicaLinks links(machine, o, index);
    const GridStages::Stage& plain = grid.stages[index];
    const WalkTimes first = first_forward(index, links), last = last_backward(index, links);
    s.forward = plain.forward.end;
    s.first_forward = first.end;
    s.backward = plain.backward.end;
    s.last_backward = last.end;
    s.synchronised = last.synchronised;
    s.moved += first.moved + last.moved + (o.micro_batches - 1) * (plain.forward.moved + plain.backward.moved);
    s.movements += first.movements + last.movements + (o.micro_batches - 1) * (plain.forward.movements + plain.backward.movements);
  }

  WalkTimes first_forward(int index, ReplicaLinks& links) const {
    const GridStages::Stage& stage = grid.stages[index];
    const std::vector<StageParameter>& parameters = grid.parameters[index];
    if (std::none_of(parameters.begin(), parameters.end(), [](const StageParameter& q) { return q.group > 1; })) return stage.forward;
    Walk w{.cost = cost, .overlap = machine.overlap};
    auto q = parameters.begin();
    for (NodeId n : stage.nodes) {
      for (; q != parameters.end() && q->first <= n; ++q) {
        if (q->group > 1) w.move(links.gather(q->p->bytes, q->group), false, true);
      }
      w.move(cost.nodes[n].fill_ns, true, true);
      w.spend(cost.nodes[n].forward);
    }
    return w.times();
  }

  WalkTimes last_backward(int index, ReplicaLinks& links) const {
    const GridStages::Stage& stage = grid.stages[index];
    const std::vector<StageParameter>& parameters = grid.parameters[index];
    if (o.dp * o.tp == 1) return stage.backward;
    Walk w{.cost = cost, .overlap = machine.overlap};
    int64_t bucket = 0, scattered = 0, reduced = 0, reduced_alike = 0;
    const auto flush = [&] {
      w.move(scattered, true, false);
      w.move(links.all_reduce(reduced, false), true, false);
      w.move(links.all_reduce(reduced_alike, true), true, false);
      bucket = scattered = reduced = reduced_alike = 0;
    };
    auto refill = stage.refills.begin(), end = stage.ends.begin();
    for (auto n = stage.nodes.rbegin(); n != stage.nodes.rend(); ++n) {
      const GroupNode& node = cost.nodes[*n];
      for (; refill != stage.refills.end() && parameters[*refill].last >= *n; ++refill) {
        const StageParameter& q = parameters[*refill];
        if (q.group > 1 && o.zero == 3 && q.p->trained) w.move(links.gather(q.p->bytes, q.group), false, true);
      }
      if (again(*n)) w.spend(node.forward);
      w.spend(node.backward);
      w.move(node.gradient_ns, true, true);
      for (; end != stage.ends.end() && parameters[*end].p->last >= *n; ++end) {
        const StageParameter& q = parameters[*end];
        if (q.p->last > *n) continue;  // another stage's backward completes it
        if (q.group > 1) {
          scattered += links.scatter(q.p->bytes, q.group);
        } else if (q.p->alike || o.dp > 1) {
          (q.p->alike ? reduced_alike : reduced) += q.p->bytes / q.p->element_bytes * q.p->reduced_element_bytes;
        } else {
          continue;  // nobody else has it
        }
        bucket += q.p->whole_bytes;
        if (bucket >= bucket_bytes) flush();
      }
    }
    flush();
    return w.times();
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

  // Micro-batches through the stages, each stage in its own order; a transfer takes both ends' time, or, where the machine overlaps, their links'.
  int64_t schedule() {
    const int count = o.micro_batches, depth = o.pp;
    struct Task {
      bool backward = false;
      int chunk = 0;
    };
    std::vector<std::vector<Task>> order(depth);
    for (int s = 0; s < depth; ++s) {
      const int ahead = in_flight(s);
      const bool early = early_backward && o.order == Order::kInterleaved;
      for (int i = 0; i < ahead; ++i) order[s].push_back({false, i});
      for (int i = 0; i < count; ++i) {
        order[s].push_back({true, early ? i : count - 1 - i});
        if (ahead + i < count) order[s].push_back({false, ahead + i});
      }
    }
    const int final_chunk = order[0].back().chunk;
    std::vector<std::vector<int>> incoming(depth), outgoing(depth);
    for (size_t t = 0; t < transfers.size(); ++t) {
      incoming[transfers[t].to].push_back(static_cast<int>(t));
      outgoing[transfers[t].from].push_back(static_cast<int>(t));
    }
    const int64_t never = -1;
    std::vector<std::vector<int64_t>> done_forward(depth, std::vector<int64_t>(count, never)), done_backward = done_forward;
    std::vector<int64_t> compute(depth), movement(depth), ends(depth);
    std::vector<size_t> next(depth);
    const auto arrive = [&](int at, int from, int64_t ready, int64_t ns) {
      if (ns == 0) return std::max(compute[at], ready);
      auto& clock = machine.overlap ? movement : compute;
      const int64_t begin = std::max({clock[at], ready, clock[from]});
      clock[at] = clock[from] = begin + ns;
      return std::max(compute[at], begin + ns);
    };
    size_t left = 0;
    for (const auto& tasks : order) left += tasks.size();
    // When a stage's next task can begin, as far as is known; `never` when what it waits for isn't done.
    const auto start = [&](int s) {
      if (next[s] == order[s].size()) return never;
      const Task task = order[s][next[s]];
      int64_t begin = compute[s];
      for (int t : task.backward ? outgoing[s] : incoming[s]) {
        if (task.backward && transfers[t].backward_bytes == 0) continue;
        const int64_t done = task.backward ? done_backward[transfers[t].to][task.chunk] : done_forward[transfers[t].from][task.chunk];
        if (done == never) return never;
        begin = std::max(begin, done);
      }
      return begin;
    };
    std::vector<int64_t> starts(depth);
    for (int s = 0; s < depth; ++s) starts[s] = start(s);
    for (; left > 0; --left) {
      int s = -1;
      for (int k = 0; k < depth; ++k) {
        if (starts[k] != never && (s < 0 || starts[k] < starts[s])) s = k;
      }
      SOAP_CHECK(s >= 0, "[grid] the schedule of {} stages and {} micro-batches stands still", depth, count);
      const Task task = order[s][next[s]];
      int64_t begin = compute[s];
      for (int t : task.backward ? outgoing[s] : incoming[s]) {
        const int other = task.backward ? transfers[t].to : transfers[t].from;
        const int64_t ready = (task.backward ? done_backward : done_forward)[other][task.chunk];
        begin = std::max(begin, arrive(s, other, ready, task.backward ? transfers[t].backward_ns : transfers[t].forward_ns));
      }
      const Stage& stage = stages[s];
      const bool last = task.backward && task.chunk == final_chunk;
      const int64_t ns = task.backward ? (last ? stage.last_backward : stage.backward) : (task.chunk == 0 ? stage.first_forward : stage.forward);
      compute[s] = begin + ns;
      (task.backward ? done_backward : done_forward)[s][task.chunk] = compute[s];
      if (last) ends[s] = std::max({compute[s], movement[s], begin + stage.synchronised});
      ++next[s];
      starts[s] = start(s);
      for (int t : outgoing[s]) starts[transfers[t].to] = start(transfers[t].to);
      for (int t : incoming[s]) starts[transfers[t].from] = start(transfers[t].from);
    }
    int64_t step = 0;
    for (int s = 0; s < depth; ++s) step = std::max(step, ends[s] + stages[s].update + grid.stages[s].extra);
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
  const auto made_for = [&](const GridStages& g) { return g.cost == cost.get() && g.dp == o.dp && g.pp == o.pp && g.recompute == o.recompute; };
  GridStages of_configs;
  GridStages& grid = configs.empty() ? last_ : of_configs;
  if (!made_for(grid)) grid = grid_stages(*mine.graph, *cost, o, stage_of, regions_, cost_.machine());
  if (memory && grid.activations.empty()) grid.activations = stage_activations(*cost, stage_of, regions_, o.recompute, grid.parameters);
  Pricing p{
      .graph = *mine.graph, .o = o, .grid = grid, .cost = *cost, .region_of = regions_, .machine = cost_.machine(), .early_backward = planner_.loss_is_sum()};
  p.share_parameters();
  GridPrice out;
  for (int s = 0; s < o.pp; ++s) {
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
