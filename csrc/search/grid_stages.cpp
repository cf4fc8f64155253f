#include "search/grid_stages.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <tuple>

#include "machine/machine.h"

namespace soap {
namespace {

constexpr int64_t kFeedsLookedAt = 128;  // micro-batches x devices; of more the first and the last stand for all

struct StagesBuilder {
  const OpGraph& graph;
  const GroupCost& cost;
  const ManualOptions& o;
  const std::vector<int>& stage_of;
  const std::vector<int>& region_of;
  const Machine& machine;
  GridStages out = {};
  std::vector<GridLinks> links = {};  // by stage

  bool again(NodeId n) const { return o.recompute && region_of[n] >= 0; }

  void add_nodes() {
    for (const Node& n : graph.nodes) {
      if (n.kind == NodeKind::kOp) out.stages[stage_of[n.id]].nodes.push_back(n.id);
    }
  }

  void add_parameters() {
    for (const GroupParameter& p : cost.parameters) {
      const int home = stage_of[p.readers.front()];
      std::set<int> elsewhere;
      StageParameter q{.p = &p, .first = p.readers.front(), .last = p.readers.front()};
      for (NodeId reader : p.readers) {
        if (stage_of[reader] == home)
          q.last = reader;
        else
          elsewhere.insert(stage_of[reader]);
      }
      for (int other : elsewhere) {
        out.stages[other].extra_bytes += 2 * p.bytes;
        out.shared.push_back({.home = home, .other = other, .parameter = out.parameters[home].size()});
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
    std::map<std::pair<int, int>, int64_t> pairs;  // (host, host) -> devices
    std::map<int, int64_t> leaving;
    int64_t within = 0, between_hosts = 0;
    for (int i = 0; i < size; ++i) {
      const int from = machine.host_of[t.from * size + i], to = machine.host_of[t.to * size + i];
      int64_t& count = from == to ? within : between_hosts;
      count = std::max(count, from == to ? ++pairs[{from, to}] : ++leaving[from]);
    }
    ExchangeLoad load{.within = within > 0 ? bytes : 0, .within_host = within * bytes};
    load.between = between_hosts > 0 ? bytes : 0;
    load.between_host = between_hosts * bytes;
    load.copied = within > 0 ? (bytes + 1) / 2 : 0;
    return links[t.from].exchange(load, t.to);
  }

  // Rows are shared evenly by the processes, whatever they do with them. A replica's micro-batch has those of some; in units of which a process has
  // `micro_batches` and a micro-batch tp x pp.
  void add_feeds() {
    const int world = o.dp * o.tp * o.pp, each = o.tp * o.pp, count = o.micro_batches;
    if (each == 1) return;
    const bool apart = o.pp > 1 || count > 1;
    std::set<std::tuple<TensorId, LayoutId, int>> made;
    const int sampled = int64_t{world} * count <= kFeedsLookedAt ? count : std::min(count, 2);  // micro-batches
    for (const GroupFeed& f : cost.feeds) {
      const int stage = stage_of[f.reader];
      const bool rows = graph.nodes[graph.tensors[f.tensor].producer].sample_dim >= 0;
      if (!apart || !rows || graph.nodes[f.reader].kind != NodeKind::kOp || !made.insert({f.tensor, f.copies, stage}).second) continue;
      for (int c = 0; c < sampled; ++c) {
        const int chunk = sampled == count ? c : c * (count - 1);
        Traffic traffic(machine);
        std::vector<char> takes_part(world);
        for (int r = 0; r < o.dp; ++r) {
          const int64_t begin = (int64_t{r} * count + chunk) * each, end = begin + each;
          for (int64_t p = begin / count; p * count < end; ++p) {
            const int64_t units = std::min(end, (p + 1) * count) - std::max(begin, p * count);
            for (int t = 0; t < o.tp; ++t) {
              const int reader = (stage * o.dp + r) * o.tp + t;
              if (reader == p) continue;
              traffic.add(static_cast<int>(p), reader, f.bytes * units / each);
              takes_part[p] = takes_part[reader] = 1;
            }
          }
        }
        std::vector<int> ranks;
        for (int d = 0; d < world; ++d) {
          if (takes_part[d]) ranks.push_back(d);
        }
        const int64_t ns = exchange_ns(machine, static_cast<int>(ranks.size()), machine.num_hosts(ranks), traffic.load(1));
        if (count == 1) {
          first_fill(f.reader, ns, false);
        } else if (ns > 0) {
          out.ahead_ns += ns * count / sampled;
          out.num_ahead += count / sampled;
        }
      }
    }
  }

  void first_fill(NodeId reader, int64_t ns, bool computed) {
    if (ns > 0) out.stages[stage_of[reader]].first_fills.push_back({.at = index_of(reader), .ns = ns, .computed = computed});
  }
  size_t index_of(NodeId node) const {
    const auto& nodes = out.stages[stage_of[node]].nodes;
    return std::lower_bound(nodes.begin(), nodes.end(), node) - nodes.begin();
  }

  void add_meetings() {
    for (const GroupMeeting& m : cost.meetings) {
      const int stage = stage_of[m.producer];
      if (m.spread) {
        GridStages::Stage& its = out.stages[stage_of[m.reader]];
        its.last_gradients.push_back({.at = index_of(m.reader), .ns = links[stage_of[m.reader]].all_reduce(m.bytes, false), .computed = true});
        continue;
      }
      if (graph.nodes[m.reader].kind == NodeKind::kOp) {
        first_fill(m.reader, links[stage].meet(m.bytes, o.micro_batches), true);
        continue;
      }
      const int world = o.dp * o.tp * o.pp;
      if (world == 1) continue;
      // Every process gets the sum and has a gradient of its own of it.
      const bool reduced = o.pp == 1 && o.micro_batches == 1;
      Traffic traffic(machine);
      for (int d = 0; d < world; ++d) traffic.add(stage * o.dp * o.tp, d, m.bytes);
      ExchangeLoad load = traffic.load(1);
      std::vector<int> all(world);
      std::iota(all.begin(), all.end(), 0);
      const int64_t alone = exchange_ns(machine, world, machine.num_hosts(all), load);
      out.return_ns += reduced ? links[stage].meet(m.bytes, 1) : alone;
      ++out.num_returns;
      if (!m.gradient) continue;
      out.return_gradient_ns += o.pp == 1 ? links[stage].all_reduce(m.bytes, true) : alone;
      ++out.num_return_gradients;
    }
  }

  // What a micro-batch takes that waits for no parameter and brings no gradient to the replicas.
  void walk(GridStages::Stage& s, const GridLinks& its) const {
    Walk forward{.cost = cost, .overlap = machine.overlap}, backward = forward;
    const bool fed = o.pp == 1 && o.micro_batches == 1;
    for (NodeId n : s.nodes) {
      const GroupNode& node = cost.nodes[n];
      s.fill_ns.push_back(its.fills(node.fills, !out.interleaved, fed));
      s.gradient_ns.push_back(its.gradients(node.gradients));
      forward.move(s.fill_ns.back(), true, true);
      forward.spend(node.forward);
      s.work += node.work;
      s.host += again(n) ? node.launch_again_ns : node.launch_ns;
      if (node.forward.empty()) continue;
      s.compute +=
          (again(n) ? 2 : 1) * *std::max_element(node.forward.begin(), node.forward.end()) + *std::max_element(node.backward.begin(), node.backward.end());
    }
    for (size_t i = s.nodes.size(); i-- > 0;) {
      const GroupNode& node = cost.nodes[s.nodes[i]];
      if (again(s.nodes[i])) backward.spend(node.forward);
      backward.spend(node.backward);
      backward.move(s.gradient_ns[i], true, true);
    }
    s.forward = forward.times();
    s.backward = backward.times();
  }
};

}  // namespace

GridStages grid_stages(const OpGraph& graph, const GroupCost& cost, const ManualOptions& options, const std::vector<int>& stage_of,
                       const std::vector<int>& region_of, const Machine& machine) {
  StagesBuilder b{.graph = graph, .cost = cost, .o = options, .stage_of = stage_of, .region_of = region_of, .machine = machine};
  b.out = {.cost = &cost, .dp = options.dp, .pp = options.pp, .recompute = options.recompute, .interleaved = is_interleaved(options)};
  for (int s = 0; s < options.pp; ++s) b.links.emplace_back(machine, options, s);
  b.out.stages.resize(options.pp);
  b.out.parameters.resize(options.pp);
  b.add_nodes();
  b.add_parameters();
  b.add_transfers();
  b.add_feeds();
  b.add_meetings();
  for (int s = 0; s < options.pp; ++s) {
    auto& first = b.out.stages[s].first_fills;
    auto& last = b.out.stages[s].last_gradients;
    std::stable_sort(first.begin(), first.end(), [](const auto& a, const auto& b) { return a.at < b.at; });
    std::stable_sort(last.begin(), last.end(), [](const auto& a, const auto& b) { return a.at > b.at; });
    b.walk(b.out.stages[s], b.links[s]);
  }
  return std::move(b.out);
}

}  // namespace soap
