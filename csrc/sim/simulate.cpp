#include "sim/simulate.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "base/error.h"
#include "machine/collectives.h"
#include "sim/local_work.h"
#include "sim/memory.h"
#include "sim/shared_timeline.h"

namespace soap {
namespace {

constexpr int64_t kUpdatePasses = 5;  // over a parameter's bytes

int64_t bytes_of(const Box& box, const Tensor& t) {
  return volume(box) * t.element_bytes;
}

using Item = std::pair<int, int>;  // (node, chunk) or (group, chunk tag)

struct Simulator {
  const Program& p;
  const CostModel& cost;
  const Machine& machine;
  const StepPieces& pieces;
  bool record;
  bool shared;  // devices slow each other down: `timeline` runs at the end
  bool paced;   // devices begin after their launches
  SharedTimeline timeline;
  Simulation out;
  std::vector<int64_t> compute, communication, host;                   // clocks
  std::map<Item, std::vector<int64_t>> forward_end, backward_end;      // of compute items, per device
  std::map<Item, std::vector<int64_t>> filled, refilled, grad_filled;  // arrivals, per device
  std::map<NodeId, std::vector<std::pair<int, const Use*>>> reads;
  std::vector<std::vector<std::vector<Item>>> readers;  // [group][copy] -> (node, chunk)

  size_t devices() const { return compute.size(); }

  static void wait(std::vector<int64_t>& clock, const std::map<Item, std::vector<int64_t>>& ends, const Item& item) {
    const auto it = ends.find(item);
    if (it == ends.end()) return;
    for (size_t d = 0; d < clock.size(); ++d) clock[d] = std::max(clock[d], it->second[d]);
  }

  void index_reads() {
    readers.resize(p.groups.size());
    for (size_t g = 0; g < p.groups.size(); ++g) {
      readers[g].resize(p.groups[g].copies.coords.size());
      for (const Use& u : p.groups[g].uses) {
        reads[u.node].emplace_back(static_cast<int>(g), &u);
        const int chunks = p.tilings[u.node].chunks();
        for (size_t i = 0; i < u.coord_of.size(); ++i) {
          if (u.coord_of[i] >= 0) readers[g][u.coord_of[i]].push_back({u.node, static_cast<int>(i) % chunks});
        }
      }
    }
  }

  // When each device may begin an item: what it reads has arrived. Only movements can be late; its own work comes in order.
  std::vector<int64_t> ready(bool backward, NodeId node, int chunk) const {
    std::vector<int64_t> begin = compute;
    if (!machine.overlap) return begin;
    const auto mine = reads.find(node);
    if (mine != reads.end()) {
      for (const auto& [g, use] : mine->second) {
        const int chunks = p.tilings[node].chunks();
        for (size_t i = chunk; i < use->coord_of.size(); i += chunks) {
          if (use->coord_of[i] >= 0) wait(begin, backward ? refilled : filled, {g, p.groups[g].copies.coords[use->coord_of[i]].chunk});
        }
      }
    }
    if (backward) {
      for (TensorId t : p.graph.nodes[node].outputs) {
        for (int g : p.groups_of[t]) wait(begin, grad_filled, {g, chunk});
      }
    }
    return begin;
  }

  void launch(int step, int device, int64_t ns) {
    if (ns == 0) return;
    if (record) out.events.push_back({step, device, false, host[device], host[device] + ns, true});
    host[device] += ns;
  }

  void run_compute(int s) {
    const Step& step = p.steps[s];
    const bool backward = step.kind == StepKind::kComputeBackward;
    const auto [node, chunk] = step.items[0];
    const bool again = p.regions[node] >= 0;  // backward computes its forward again
    const Tiling& tiling = p.tilings[node];
    std::vector<int64_t> spent(devices()), launches(devices());
    const OpTime queued = cost.launch(p, node);
    for (int tile = 0; tile < tiling.tiles(); ++tile) {
      const OpTime time = cost.time(p, node, tile, chunk);
      for (int d : tiling.devices_of(tile)) {
        if (backward) spent[d] += machine.at_speed(d, time.backward_ns);
        if (!backward || again) spent[d] += machine.at_speed(d, time.forward_ns);
        launches[d] += (backward ? queued.backward_ns : 0) + (!backward || again ? queued.forward_ns : 0);
      }
    }
    out.node_ns[node] += *std::max_element(spent.begin(), spent.end());
    if (shared) {
      for (size_t d = 0; d < devices(); ++d) timeline.compute(static_cast<int>(d), spent[d], s, p.differentiable[node] != 0);
      return;
    }
    std::vector<int64_t> begin = ready(backward, node, chunk);
    for (size_t d = 0; d < devices(); ++d) {
      launch(s, static_cast<int>(d), launches[d]);
      if (spent[d] == 0) continue;
      if (paced) begin[d] = std::max(begin[d], host[d]);
      compute[d] = begin[d] + spent[d];
      out.compute_ns[d] += spent[d];
      if (record) out.events.push_back({s, static_cast<int>(d), false, begin[d], compute[d]});
    }
    if (machine.overlap) (backward ? backward_end : forward_end)[{node, chunk}] = compute;
  }

  // When the sources of an item are there, on the devices that send them.
  void sources(StepKind kind, const StepItem& item, const std::vector<Flow>& list, std::vector<int64_t>& begin) const {
    const CopyGroup& g = p.groups[item.id];
    const NodeId producer = p.graph.tensors[g.tensor].producer;
    const auto wait_for = [&](const std::map<Item, std::vector<int64_t>>& ends, const Item& of, int device) {
      const auto it = ends.find(of);
      if (it != ends.end()) begin[device] = std::max(begin[device], it->second[device]);
    };
    for (const Flow& x : list) {
      switch (kind) {
        case StepKind::kFill: wait_for(forward_end, {producer, p.tiles[g.tensor].coords[x.src].chunk}, x.from); break;
        case StepKind::kGradFill:
          for (const Item& reader : readers[item.id][x.src]) wait_for(backward_end, reader, x.from);
          break;
        default:  // a refill: once forward has given the copy back
          for (const Item& reader : readers[item.id][x.dst]) wait_for(forward_end, reader, x.to);
      }
    }
  }

  void run_movement(int s) {
    const Step& step = p.steps[s];
    std::map<std::vector<int>, int64_t> reduced;  // ranks -> bytes
    std::set<int> exchanging;
    Traffic traffic(machine);
    std::vector<int64_t> begin = machine.overlap ? communication : compute;
    std::vector<int64_t> local(devices());
    for (size_t i = 0; i < step.items.size(); ++i) {
      const StepItem& item = step.items[i];
      const CopyGroup& group = p.groups[item.id];
      const Tensor& t = p.graph.tensors[group.tensor];
      const auto& [list, m] = pieces[s][i];
      const Sharding &tiles = p.tiles[t.id], &from = step.kind == StepKind::kGradFill ? group.copies : tiles;
      add_to(local, local_work_ns(machine, list, m.pattern, from, &from == &tiles ? group.copies : tiles, t.element_bytes));
      const int64_t element_bytes = m.pattern == Pattern::kAllReduce
                                        ? reduced_element_bytes(t, step.kind == StepKind::kGradFill ? Reduce::kSum : p.tiles[t.id].partial)
                                        : t.element_bytes;
      out.moved_bytes[t.producer] += m.elements * element_bytes;
      if (machine.overlap && m.pattern != Pattern::kLocal) sources(step.kind, item, list, begin);
      for (const ReduceGroup& g : m.groups) reduced[g.ranks] += g.elements * element_bytes;
      if (m.pattern == Pattern::kExchange) {
        exchanging.insert(m.ranks.begin(), m.ranks.end());
        for (const Flow& x : list) {
          if (x.from != x.to) traffic.add(x.from, x.to, x.elements * t.element_bytes);
        }
      }
    }
    for (size_t d = 0; d < devices(); ++d) timeline.local_work(static_cast<int>(d), local[d], s);
    if (exchanging.empty() && reduced.empty()) return;
    std::vector<int64_t>& clock = machine.overlap ? communication : compute;
    std::vector<int64_t> arrival(devices());
    const auto move = [&](const std::vector<int>& ranks, int64_t price) {
      if (shared) {
        timeline.move(ranks, price, s);
        return;
      }
      int64_t from = 0;
      for (int r : ranks) {
        launch(s, r, machine.launch_ns("collective"));
        from = std::max({from, clock[r], begin[r], paced ? host[r] : 0});
      }
      for (int r : ranks) {
        clock[r] = arrival[r] = from + price;
        out.communication_ns[r] += price;
        if (record) out.events.push_back({s, r, true, from, from + price});
      }
    };
    if (!exchanging.empty()) {
      const std::vector<int> ranks(exchanging.begin(), exchanging.end());
      const int64_t price = exchange_ns(machine, ranks, traffic);
      const auto way = shared ? one_way(machine, ranks, traffic) : std::nullopt;
      way ? timeline.send(*way, price, s) : move(ranks, price);
    }
    std::vector<std::vector<int>> groups;
    for (const auto& [ranks, bytes] : reduced) groups.push_back(ranks);
    const int at_once = groups_at_once(machine, groups);
    for (const auto& [ranks, bytes] : reduced) move(ranks, movement_ns(machine, "all_reduce", ranks, bytes, at_once));
    if (!machine.overlap) return;
    auto& arrivals = step.kind == StepKind::kFill ? filled : step.kind == StepKind::kRefill ? refilled : grad_filled;
    for (const StepItem& item : step.items) arrivals[{item.id, item.chunk}] = arrival;
  }

  // The optimizer reads and writes parameter, gradient and its own state once, when all gradients are there.
  void update() {
    for (size_t d = 0; d < devices(); ++d) compute[d] = std::max(compute[d], communication[d]);
    std::vector<int64_t> launches(devices(), machine.launch_ns("update"));
    for (const Node& n : p.graph.nodes) {
      if (n.kind != NodeKind::kParam || !p.graph.output(n, 0).requires_grad) continue;
      for (const Coord& c : p.tiles[n.outputs[0]].coords) {
        for (int d : c.devices) {
          compute[d] += update_ns(machine, d, bytes_of(c.box, p.graph.output(n, 0)));
          launches[d] += update_launch_ns(machine);
        }
      }
    }
    for (size_t d = 0; d < devices(); ++d) launch(-1, static_cast<int>(d), launches[d]);
    if (shared) run_shared();
    const auto overhead = static_cast<int64_t>(machine.step_overhead_ns);
    out.device_step_ns = *std::max_element(compute.begin(), compute.end()) + overhead;
    out.step_ns = std::max(out.device_step_ns, *std::max_element(host.begin(), host.end()) + overhead);
    out.host_ns = host;
  }

  // Clocks hold the update alone so far.
  void run_shared() {
    // Ranks agree on a backward (runtime/backward.py). That of an interleaved program comes when all its instructions have run: nobody updates before.
    if (p.interleaved) {
      std::vector<int> everyone(devices());
      std::iota(everyone.begin(), everyone.end(), 0);
      timeline.move(everyone, 0);
    }
    for (size_t d = 0; d < devices(); ++d) timeline.update(static_cast<int>(d), compute[d]);
    std::vector<SharedTimeline::Span> spans;
    compute = timeline.run(&spans);
    compute.resize(devices());
    for (const auto& span : spans) {
      if (span.tag < 0) continue;
      (span.communication ? out.communication_ns : out.compute_ns)[span.device] += span.end_ns - span.begin_ns;
      if (record) out.events.push_back({span.tag, span.device, span.communication, span.begin_ns, span.end_ns});
    }
  }
};

}  // namespace

int64_t update_ns(const Machine& machine, int device, int64_t bytes) {
  if (!machine.update.empty() && bytes > 0) return machine.at_speed(device, interpolate(machine.update, bytes));
  const double ns = static_cast<double>(bytes * kUpdatePasses) / machine.memory_bytes_per_s * 1e9 + machine.op_overhead_ns;
  return machine.at_speed(device, static_cast<int64_t>(ns));
}

int64_t reduced_element_bytes(const Tensor& t, Reduce reduce) {
  return reduce != Reduce::kMax && is_float(t) ? std::max<int64_t>(t.element_bytes, 4) : t.element_bytes;
}

namespace {

Simulation simulate(const Program& p, const CostModel& cost, bool record, bool paced, const StepPieces& pieces) {
  const Machine& machine = cost.machine();
  SOAP_CHECK(machine.num_devices() >= p.world_size, "[simulate] the machine {} has {} devices, the program needs {}", machine.name, machine.num_devices(),
             p.world_size);
  const size_t devices = p.world_size;
  Simulator s{.p = p,
              .cost = cost,
              .machine = machine,
              .pieces = pieces,
              .record = record,
              .shared = !machine.busy_speed.empty(),
              .paced = paced,
              .timeline = SharedTimeline(machine)};
  s.compute.resize(devices);
  s.host.resize(devices);
  s.communication.resize(devices);
  s.out.compute_ns.resize(devices);
  s.out.communication_ns.resize(devices);
  s.out.node_ns.resize(p.graph.nodes.size());
  s.out.moved_bytes.resize(p.graph.nodes.size());
  if (machine.overlap) s.index_reads();
  for (size_t i = 0; i < p.steps.size(); ++i) {
    const bool computes = p.steps[i].kind == StepKind::kCompute || p.steps[i].kind == StepKind::kComputeBackward;
    computes ? s.run_compute(static_cast<int>(i)) : s.run_movement(static_cast<int>(i));
  }
  s.update();
  return std::move(s.out);
}

}  // namespace

Simulation simulate(const Program& p, const CostModel& cost, bool record) {
  const StepPieces pieces = step_pieces(p);
  Simulation out = simulate(p, cost, record, false, pieces);
  if (record && out.device_step_ns < out.step_ns) out.events = simulate(p, cost, true, true, pieces).events;
  out.memory_bytes = peak_memory(p, pieces, cost.machine());
  return out;
}

std::string step_name(const Program& p, int step) {
  const Step& s = p.steps.at(step);
  std::string out(to_string(s.kind));
  for (size_t i = 0; i < std::min<size_t>(s.items.size(), 3); ++i) {
    const bool compute = s.kind == StepKind::kCompute || s.kind == StepKind::kComputeBackward;
    const int node = compute ? s.items[i].id : p.graph.tensors[p.groups[s.items[i].id].tensor].producer;
    out += " " + p.graph.nodes[node].name;
    if (compute && p.tilings[node].chunks() > 1) out += fmt::format("#{}", s.items[i].chunk);
  }
  return s.items.size() > 3 ? out + " ..." : out;
}

}  // namespace soap
