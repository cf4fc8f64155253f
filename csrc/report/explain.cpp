#include "report/explain.h"

#include <algorithm>

#include "base/error.h"
#include "fmt/ranges.h"
#include "report/describe.h"

namespace soap {

std::string explain(const Program& p, const Simulation& sim) {
  size_t width = 8;
  for (const Node& n : p.graph.nodes) {
    if (n.kind == NodeKind::kOp) width = std::max(width, n.name.size());
  }
  width = std::min<size_t>(width, 44);
  std::string out = fmt::format("{:<{}} {:>3} {:>3} {:>3} {:>3} {:>6}  {:<14} {:>10} {:>12}  {}\n", "operator", width, "S", "O", "A", "P", "chunks", "devices",
                                "time us", "moved bytes", "cuts");
  for (const Node& n : p.graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    const NodeDescription at = describe(p, n.id);
    const Tiling& t = p.tilings[n.id];
    std::string list = fmt::format("{}", fmt::join(t.devices, ","));  // in the order of tiles
    if (list.size() > 14) list = fmt::format("{} devices", at.devices.size());
    out += fmt::format("{:<{}} {:>3} {:>3} {:>3} {:>3} {:>6}  {:<14} {:>10.1f} {:>12}  {}{}\n", n.name, width, at.samples, at.devices.size(), at.attributes,
                       at.parameters, at.chunks, list, static_cast<double>(sim.node_ns[n.id]) / 1e3, sim.moved_bytes[n.id], at.cuts,
                       at.replicas > 1 ? fmt::format("{}x{} alike", at.cuts.empty() ? "" : " ", at.replicas) : "");
  }
  int64_t gradients = 0;
  for (const Node& n : p.graph.nodes) {
    if (n.kind == NodeKind::kParam) gradients += sim.moved_bytes[n.id];
  }
  out += fmt::format("predicted step {:.2f} ms; parameters and their gradients move {} bytes\n", static_cast<double>(sim.step_ns) / 1e6, gradients);
  for (size_t d = 0; d < sim.memory_bytes.size(); ++d) {
    out += fmt::format("device {}: compute {:.2f} ms, communication {:.2f} ms, memory {:.1f} MiB\n", d, static_cast<double>(sim.compute_ns[d]) / 1e6,
                       static_cast<double>(sim.communication_ns[d]) / 1e6, static_cast<double>(sim.memory_bytes[d]) / (1 << 20));
  }
  return out;
}

std::string candidates_table(const std::vector<Candidate>& candidates) {
  std::string out;
  size_t width = 12;
  for (const Candidate& c : candidates) width = std::max(width, c.name.size());
  for (const Candidate& c : candidates) {
    out += c.step_ns < 0 ? fmt::format("  {:<{}} not legal for this model\n", c.name, width)
                         : fmt::format("  {:<{}} {:>10.2f} ms {:>9.1f} MiB{}\n", c.name, width, static_cast<double>(c.step_ns) / 1e6,
                                       static_cast<double>(c.memory_bytes) / (1 << 20), c.fits ? "" : "  does not fit");
  }
  return out;
}

}  // namespace soap
