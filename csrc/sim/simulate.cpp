#include "sim/simulate.h"

#include <algorithm>
#include <functional>
#include <map>
#include <set>

#include "base/error.h"

namespace soap {
namespace {

constexpr int64_t kOptimizerCopies = 2;  // AdamW's two moments
constexpr int64_t kUpdatePasses = 5;     // over a parameter's bytes: read parameter, gradient, state; write parameter, state

struct Clocks {
  std::vector<int64_t> compute, communication;
  std::map<std::pair<int, int>, int64_t> arrival;  // (group, tag) -> ns
};

int64_t bytes_of(const Box& box, const Tensor& t) {
  return volume(box) * t.element_bytes;
}

}  // namespace

Simulation simulate(const Program& p, const CostModel& cost, bool record) {
  const Machine& machine = cost.machine();
  SOAP_CHECK(machine.num_devices() >= p.world_size, "[simulate] the machine {} has {} devices, the program needs {}", machine.name, machine.num_devices(),
             p.world_size);
  const size_t devices = p.world_size;
  Simulation out{.compute_ns = std::vector<int64_t>(devices),
                 .communication_ns = std::vector<int64_t>(devices),
                 .memory_bytes = std::vector<int64_t>(devices),
                 .node_ns = std::vector<int64_t>(p.graph.nodes.size()),
                 .moved_bytes = std::vector<int64_t>(p.graph.nodes.size())};
  Clocks clocks{.compute = std::vector<int64_t>(devices), .communication = std::vector<int64_t>(devices)};
  std::vector<int64_t> live(devices);
  const auto hold = [&](int device, int64_t bytes) {
    live[device] += bytes;
    out.memory_bytes[device] = std::max(out.memory_bytes[device], live[device]);
  };
  for (const Node& n : p.graph.nodes) {
    if (n.kind != NodeKind::kParam && n.kind != NodeKind::kBuffer) continue;
    const Tensor& t = p.graph.output(n, 0);
    for (const Coord& c : p.tiles[t.id].coords) {
      for (int d : c.devices) hold(d, bytes_of(c.box, t) * (t.requires_grad ? 2 + kOptimizerCopies : 1));
    }
  }
  // What each (node, chunk) reads: groups and tags, for arrivals.
  std::map<std::pair<int, int>, std::set<std::pair<int, int>>> reads;
  for (size_t g = 0; g < p.groups.size(); ++g) {
    for (const Use& u : p.groups[g].uses) {
      const int chunks = p.tilings[u.node].chunks();
      for (size_t i = 0; i < u.coord_of.size(); ++i) {
        if (u.coord_of[i] >= 0) reads[{u.node, static_cast<int>(i) % chunks}].insert({static_cast<int>(g), p.groups[g].copies.coords[u.coord_of[i]].chunk});
      }
    }
  }
  // Bytes that a (node, chunk) keeps per device until its backward.
  const auto tile_bytes = [&](const Node& n, int chunk, const std::function<void(int, int64_t)>& f) {
    for (TensorId id : n.outputs) {
      const Tensor& t = p.graph.tensors[id];
      for (const Coord& c : p.tiles[id].coords) {
        if (c.chunk != chunk) continue;
        for (int d : c.devices) f(d, bytes_of(c.box, t));
      }
    }
  };
  for (size_t s = 0; s < p.steps.size(); ++s) {
    const Step& step = p.steps[s];
    if (step.kind == StepKind::kCompute || step.kind == StepKind::kComputeBackward) {
      const auto [node, chunk] = step.items[0];
      const Node& n = p.graph.nodes[node];
      const Tiling& tiling = p.tilings[node];
      std::vector<int64_t> spent(devices);
      for (int tile = 0; tile < tiling.tiles(); ++tile) {
        const OpTime time = cost.time(p, node, tile, chunk);
        for (int d : tiling.devices_of(tile)) spent[d] += step.kind == StepKind::kCompute ? time.forward_ns : time.backward_ns;
      }
      int64_t slowest = 0;
      for (size_t d = 0; d < devices; ++d) {
        if (spent[d] == 0) continue;
        int64_t begin = clocks.compute[d];
        if (machine.overlap && step.kind == StepKind::kCompute) {
          for (const auto& key : reads[{node, chunk}]) {
            const auto it = clocks.arrival.find(key);
            if (it != clocks.arrival.end()) begin = std::max(begin, it->second);
          }
        }
        clocks.compute[d] = begin + spent[d];
        out.compute_ns[d] += spent[d];
        slowest = std::max(slowest, spent[d]);
        if (record) out.events.push_back({static_cast<int>(s), static_cast<int>(d), false, begin, clocks.compute[d]});
      }
      out.node_ns[node] += slowest;
      if (step.kind == StepKind::kCompute) {
        tile_bytes(n, chunk, [&](int d, int64_t b) { hold(d, b); });
      } else {
        tile_bytes(n, chunk, [&](int d, int64_t b) { live[d] -= b; });
      }
      continue;
    }
    // A movement: exchanges of the step travel together, all-reduces among the same ranks too.
    std::map<std::vector<int>, int64_t> reduced, sent;  // ranks -> bytes
    std::set<int> exchanging;
    std::vector<int64_t> sends(devices);
    bool param = step.kind == StepKind::kGradFill;
    for (const StepItem& item : step.items) {
      const Tensor& t = p.graph.tensors[p.groups[item.id].tensor];
      const auto pieces = item_pieces(p, step.kind, item);
      const Movement m = item_movement(p, step.kind, item, pieces);
      param = param && p.graph.nodes[t.producer].kind == NodeKind::kParam;
      out.moved_bytes[t.producer] += m.elements * t.element_bytes;
      if (m.pattern == Pattern::kAllReduce) reduced[m.ranks] += m.elements * t.element_bytes;
      if (m.pattern == Pattern::kExchange) {
        exchanging.insert(m.ranks.begin(), m.ranks.end());
        for (const Piece& x : pieces) {
          if (x.from != x.to) sends[x.from] += volume(x.box) * t.element_bytes;
        }
      }
    }
    if (!exchanging.empty()) sent[{exchanging.begin(), exchanging.end()}] = *std::max_element(sends.begin(), sends.end());
    const auto move = [&](const char* kind, const std::vector<int>& ranks, int64_t bytes) {
      const int64_t price = movement_ns(machine, kind, ranks, bytes);
      auto& stream = machine.overlap ? clocks.communication : clocks.compute;
      int64_t begin = 0;
      for (int r : ranks) begin = std::max({begin, stream[r], clocks.compute[r]});
      for (int r : ranks) {
        stream[r] = begin + price;
        out.communication_ns[r] += price;
        if (record) out.events.push_back({static_cast<int>(s), r, true, begin, begin + price});
        if (machine.overlap && step.kind == StepKind::kGradFill && !param) clocks.compute[r] = std::max(clocks.compute[r], begin + price);
      }
      for (const StepItem& item : step.items) clocks.arrival[{item.id, item.chunk}] = begin + price;
    };
    for (const auto& [ranks, bytes] : sent) move("exchange", ranks, bytes);
    for (const auto& [ranks, bytes] : reduced) move("all_reduce", ranks, bytes);
  }
  // The optimizer reads and writes parameter, gradient and its own state once.
  for (const Node& n : p.graph.nodes) {
    if (n.kind != NodeKind::kParam || !p.graph.output(n, 0).requires_grad) continue;
    for (const Coord& c : p.tiles[n.outputs[0]].coords) {
      const double bytes = static_cast<double>(bytes_of(c.box, p.graph.output(n, 0)) * kUpdatePasses);
      for (int d : c.devices) clocks.compute[d] += static_cast<int64_t>(bytes / machine.memory_bytes_per_s * 1e9 + machine.op_overhead_ns);
    }
  }
  for (size_t d = 0; d < devices; ++d) out.step_ns = std::max({out.step_ns, clocks.compute[d], clocks.communication[d]});
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
