#include "report/explain.h"

#include <algorithm>

#include "base/error.h"
#include "fmt/ranges.h"
#include "report/describe.h"
#include "sharding/region.h"

namespace soap {
namespace {

constexpr size_t kRegionsExplained = 8;

}  // namespace

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
  const int64_t host = *std::max_element(sim.host_ns.begin(), sim.host_ns.end());
  if (sim.device_step_ns < sim.step_ns) {
    out += fmt::format("the host queues kernels for {:.2f} ms of a {:.2f} ms step; the devices alone would take {:.2f} ms\n", static_cast<double>(host) / 1e6,
                       static_cast<double>(sim.step_ns) / 1e6, static_cast<double>(sim.device_step_ns) / 1e6);
  }
  for (size_t d = 0; d < sim.memory_bytes.size(); ++d) {
    out += fmt::format("device {}: compute {:.2f} ms, communication {:.2f} ms, memory {:.1f} MiB\n", d, static_cast<double>(sim.compute_ns[d]) / 1e6,
                       static_cast<double>(sim.communication_ns[d]) / 1e6, static_cast<double>(sim.memory_bytes[d]) / (1 << 20));
  }
  return out;
}

std::string explain_recompute(const OpGraph& graph, const Strategy& strategy, const FedRows& rows, const CostModel& cost, int64_t memory_limit_bytes) {
  if (strategy.recompute.empty()) return "";
  const auto largest = [](const Simulation& s) { return *std::max_element(s.memory_bytes.begin(), s.memory_bytes.end()); };
  const auto mib = [](int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  const auto ms = [](int64_t ns) { return static_cast<double>(ns) / 1e6; };
  const Program program = lower(graph, strategy, rows);
  const Simulation with = simulate(program, cost);
  Strategy other = strategy;
  other.recompute.clear();
  const Simulation without = simulate(lower(graph, other, rows), cost);
  std::set<std::string> opaque;
  const std::vector<int> named = named_regions(program.graph, strategy.recompute);
  for (const Node& n : program.graph.nodes) {
    if (named[n.id] >= 0 && !may_compute_again(n)) opaque.insert(n.name);
  }
  const auto count = std::count_if(program.regions.begin(), program.regions.end(), [](int r) { return r >= 0; });
  std::string out = fmt::format("computed again in backward: {} operators of {} regions: the fullest device holds {:.1f} MiB instead of {:.1f} MiB, ", count,
                                strategy.recompute.size(), mib(largest(with)), mib(largest(without)));
  out += fmt::format("the step takes {:.2f} ms instead of {:.2f} ms", ms(with.step_ns), ms(without.step_ns));
  if (largest(without) > memory_limit_bytes) out += fmt::format("; without it the plan doesn't fit in {:.1f} MiB", mib(memory_limit_bytes));
  out += "\n";
  for (size_t r = 0; r < std::min(strategy.recompute.size(), kRegionsExplained); ++r) {
    other.recompute = strategy.recompute;
    other.recompute.erase(other.recompute.begin() + static_cast<int64_t>(r));
    const Simulation s = simulate(lower(graph, other, rows), cost);
    out += fmt::format("  {}: saves {:.1f} MiB, takes {:.2f} ms\n", to_string(strategy.recompute[r]), mib(largest(s) - largest(with)),
                       ms(with.step_ns - s.step_ns));
  }
  if (strategy.recompute.size() > kRegionsExplained) out += fmt::format("  and {} more\n", strategy.recompute.size() - kRegionsExplained);
  if (!opaque.empty()) out += fmt::format("  kept, because opaque code may have effects: {}\n", fmt::join(opaque, ", "));
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
