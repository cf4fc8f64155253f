#include "report/describe.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "base/error.h"

namespace soap {

NodeDescription describe(const Program& p, NodeId node) {
  const Tiling& t = p.tilings[node];
  NodeDescription out{.chunks = t.chunks(), .replicas = t.replicas};
  for (const FactorParts& c : t.cuts) {
    const Factor& f = p.rules[node].factors[c.factor];
    const bool sample = p.fed[node].factor == c.factor || f.kind == FactorKind::kSample;
    (sample ? out.samples : f.kind == FactorKind::kAttribute ? out.attributes : out.parameters) *= c.tiles();
    if (c.tiles() * c.chunks() == 1) continue;
    out.cuts += fmt::format("{}{}={}", out.cuts.empty() ? "" : " ", f.name, c.tiles());
    if (c.chunks() > 1) out.cuts += fmt::format("x{}t", c.chunks());
  }
  const std::set<int> devices(t.devices.begin(), t.devices.end());
  out.devices.assign(devices.begin(), devices.end());
  std::map<int, int64_t> held;
  for (TensorId id : p.graph.nodes[node].outputs) {
    for (const Coord& c : p.tiles[id].coords) {
      for (int d : c.devices) out.result_bytes = std::max(out.result_bytes, held[d] += volume(c.box) * p.graph.tensors[id].element_bytes);
    }
  }
  return out;
}

std::vector<std::vector<MemoryPoint>> memory_over_time(const Program& p, const Simulation& simulation, const Machine& machine, int most_points) {
  SOAP_CHECK(!simulation.events.empty(), "[report] the simulation of a program with {} steps was not recorded", p.steps.size());
  const std::vector<MemoryCurve> curves = memory_curves(p, step_pieces(p), machine);
  const size_t last = p.steps.size();
  // When each step begins on each device: where it does nothing there, when the step before it does.
  std::vector<std::vector<int64_t>> begins(curves.size(), std::vector<int64_t>(last + 1, -1));
  for (const Event& e : simulation.events) {
    int64_t& begin = begins[e.device][e.step];
    begin = begin < 0 ? e.begin_ns : std::min(begin, e.begin_ns);
    int64_t& update = begins[e.device][last];
    update = std::max(update, e.end_ns);
  }
  const auto total = [](const MemoryPoint& m) { return std::accumulate(m.bytes.begin(), m.bytes.end(), int64_t{0}); };
  const int64_t stretch = std::max<int64_t>(simulation.step_ns / most_points, 1);
  std::vector<std::vector<MemoryPoint>> out(curves.size());
  for (size_t d = 0; d < curves.size(); ++d) {
    int64_t now = 0;
    for (size_t s = 0; s <= last; ++s) {
      now = std::max(now, begins[d][s]);
      const MemoryPoint point{.time_ns = now, .bytes = curves[d][s]};
      if (out[d].empty() || out[d].back().time_ns / stretch != now / stretch)
        out[d].push_back(point);
      else if (total(point) > total(out[d].back()))
        out[d].back() = point;
    }
  }
  return out;
}

}  // namespace soap
