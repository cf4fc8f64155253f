#include "search/grid_stages.h"

#include <algorithm>
#include <map>
#include <set>

#include "machine/machine.h"

namespace soap {
namespace {

struct StagesBuilder {
  const OpGraph& graph;
  const GroupCost& cost;
  const ManualOptions& o;
  const std::vector<int>& stage_of;
  const std::vector<int>& region_of;
  const Machine& machine;
  GridStages out = {};

  bool again(NodeId n) const { return o.recompute && region_of[n] >= 0; }

  void add_nodes() {
    for (const Node& n : graph.nodes) {
      if (n.kind == NodeKind::kOp) out.stages[stage_of[n.id]].nodes.push_back(n.id);
    }
  }

  void add_parameters() {
    for (const GroupParameter& p : cost.parameters) {
      const int home = stage_of[p.readers.front()];
      std::set<int> elsewhere;  // its copy comes at the beginning, its gradient goes at the end
      StageParameter q{.p = &p, .first = p.readers.front(), .last = p.readers.front()};
      for (NodeId reader : p.readers) {
        if (stage_of[reader] == home)
          q.last = reader;
        else
          elsewhere.insert(stage_of[reader]);
      }
      for (int other : elsewhere) {
        out.stages[other].extra += 2 * movement_ns(machine, "exchange", {home * o.dp * o.tp, other * o.dp * o.tp}, p.bytes);
        out.stages[other].extra_bytes += 2 * p.bytes;
      }
      out.parameters[home].push_back(q);
    }
    for (int s = 0; s < o.pp; ++s) {
      const std::vector<StageParameter>& of_stage = out.parameters[s];
      GridStages::Stage& stage = out.stages[s];
      for (int k = 0; k < static_cast<int>(of_stage.size()); ++k) {
        stage.refills.push_back(k);
        if (of_stage[k].p->trained && of_stage[k].p->last >= 0) stage.ends.push_back(k);
      }
      std::stable_sort(stage.refills.begin(), stage.refills.end(), [&](int a, int b) { return of_stage[a].last > of_stage[b].last; });
      std::stable_sort(stage.ends.begin(), stage.ends.end(), [&](int a, int b) { return of_stage[a].p->last > of_stage[b].p->last; });
    }
  }

  void add_transfers() {
    if (o.pp == 1) return;
    std::map<std::pair<TensorId, int>, std::pair<int64_t, bool>> sent;
    for (const GroupEdge& e : cost.edges) {
      if (graph.nodes[e.consumer].kind != NodeKind::kOp || stage_of[e.producer] == stage_of[e.consumer]) continue;
      auto& [bytes, gradient] = sent[{e.tensor, stage_of[e.consumer]}];
      bytes = std::max(bytes, e.bytes);
      gradient = gradient || e.gradient;
    }
    std::map<std::pair<int, int>, StageTransfer> by_stages;
    for (const auto& [key, what] : sent) {
      const int from = stage_of[graph.tensors[key.first].producer];
      StageTransfer& t = by_stages[{from, key.second}];
      t.from = from;
      t.to = key.second;
      t.forward_bytes += what.first;
      if (what.second) t.backward_bytes += what.first;
    }
    for (auto& [key, t] : by_stages) {
      t.forward_ns = between(t, t.forward_bytes);
      t.backward_ns = between(t, t.backward_bytes);
      out.transfers.push_back(t);
    }
  }

  // Each device of a stage sends to its counterpart in the other.
  int64_t between(const StageTransfer& t, int64_t bytes) const {
    if (bytes == 0) return 0;
    const int size = o.dp * o.tp;
    if (!machine.tables.empty()) return movement_ns(machine, "exchange", {t.from * size, t.to * size}, bytes);
    std::map<std::pair<int, int>, int64_t> pairs;  // (host, host) -> devices
    std::map<int, int64_t> leaving;
    int64_t within = 0, between_hosts = 0;
    for (int i = 0; i < size; ++i) {
      const int from = machine.host_of[t.from * size + i], to = machine.host_of[t.to * size + i];
      int64_t& count = from == to ? within : between_hosts;
      count = std::max(count, from == to ? ++pairs[{from, to}] : ++leaving[from]);
    }
    const auto ns = [&](const Link& link, int64_t senders) {
      if (senders == 0) return 0.0;
      const double share = link.per_host == 0 ? 1.0 : std::max(1.0, static_cast<double>(senders) / link.per_host);
      return link.latency_ns + static_cast<double>(bytes) * share / link.bytes_per_s * 1e9;
    };
    return static_cast<int64_t>(std::max(ns(machine.intra, within), ns(machine.inter, between_hosts)));
  }

  // What a micro-batch takes that waits for no parameter and brings no gradient to the replicas.
  void walk(GridStages::Stage& s) const {
    Walk forward{.cost = cost, .overlap = machine.overlap}, backward = forward;
    for (NodeId n : s.nodes) {
      const GroupNode& node = cost.nodes[n];
      forward.move(node.fill_ns, true, true);
      forward.spend(node.forward);
      s.host += again(n) ? node.launch_again_ns : node.launch_ns;
      if (node.forward.empty()) continue;
      s.compute +=
          (again(n) ? 2 : 1) * *std::max_element(node.forward.begin(), node.forward.end()) + *std::max_element(node.backward.begin(), node.backward.end());
    }
    for (auto n = s.nodes.rbegin(); n != s.nodes.rend(); ++n) {
      const GroupNode& node = cost.nodes[*n];
      if (again(*n)) backward.spend(node.forward);
      backward.spend(node.backward);
      backward.move(node.gradient_ns, true, true);
    }
    s.forward = forward.times();
    s.backward = backward.times();
  }
};

}  // namespace

GridStages grid_stages(const OpGraph& graph, const GroupCost& cost, const ManualOptions& options, const std::vector<int>& stage_of,
                       const std::vector<int>& region_of, const Machine& machine) {
  StagesBuilder b{.graph = graph, .cost = cost, .o = options, .stage_of = stage_of, .region_of = region_of, .machine = machine};
  b.out = {.cost = &cost, .dp = options.dp, .pp = options.pp, .recompute = options.recompute};
  b.out.stages.resize(options.pp);
  b.out.parameters.resize(options.pp);
  b.add_nodes();
  b.add_parameters();
  b.add_transfers();
  for (GridStages::Stage& s : b.out.stages) b.walk(s);
  return std::move(b.out);
}

}  // namespace soap
