#include "search/fsdp.h"

#include <map>

#include "machine/collectives.h"

namespace soap {
namespace {

struct Unit {
  size_t first = 0, last = 0;                    // of the stage's operators
  int64_t gathered = 0, again = 0, reduced = 0;  // bytes of whole parameters and gradients
  int64_t gather_ns = 0, again_ns = 0, reduce_ns = 0;
};

struct Units {
  const FsdpStage& stage;
  const GroupCost& cost;
  const ManualOptions& o;
  const std::vector<int>& region_of;
  const Machine& machine;
  std::vector<Unit> all = {};

  void cut() {
    std::map<NodeId, size_t> unit_of;
    for (size_t i = 0; i < stage.nodes.size(); ++i) {
      const NodeId n = stage.nodes[i];
      if (i == 0 || region_of[n] != region_of[stage.nodes[i - 1]]) all.push_back({.first = i});
      all.back().last = i;
      unit_of[n] = all.size() - 1;
    }
    for (const GroupParameter& p : cost.parameters) {
      std::vector<size_t> readers;
      for (NodeId reader : p.readers) {
        if (unit_of.contains(reader)) readers.push_back(unit_of[reader]);
      }
      if (readers.empty() || !p.trained) continue;
      all[readers.front()].gathered += p.bytes;
      if (o.zero == 3) all[readers.back()].again += p.bytes;
      if (unit_of.contains(p.last)) all[unit_of[p.last]].reduced += p.bytes / p.element_bytes * p.reduced_element_bytes;
    }
  }

  std::vector<int> replicas(int count, int step) const {
    std::vector<int> out;
    for (int r = 0; r < count; ++r) out.push_back(stage.first_device + r * step * o.tp);
    return out;
  }
  // Groups of this stage that move at the same time at the first one's host.
  int at_once(const std::vector<int>& ranks) const {
    const auto here = [&](int d) { return machine.host_of[d] == machine.host_of[stage.first_device]; };
    int devices = 0;
    for (int d = stage.first_device; d < stage.first_device + o.dp * o.tp; ++d) devices += here(d) ? 1 : 0;
    return std::max(devices / static_cast<int>(std::count_if(ranks.begin(), ranks.end(), here)), 1);
  }

  void price() {
    const int group = o.zero_group > 0 ? o.zero_group : o.dp;
    const std::vector<int> sharing = replicas(group, 1), alike = replicas(o.dp / group, group);
    const int sharing_at_once = at_once(sharing), alike_at_once = at_once(alike);
    const auto rings = [&](int64_t bytes) {
      return bytes == 0 || group < 2 ? 0 : static_cast<int64_t>(soap::gather_ns(machine, sharing, static_cast<double>(bytes), sharing_at_once));
    };
    for (Unit& u : all) {
      u.gather_ns = rings(u.gathered);
      u.again_ns = rings(u.again);
      u.reduce_ns = rings(u.reduced);
      if (u.reduced > 0 && alike.size() > 1) u.reduce_ns += movement_ns(machine, "all_reduce", alike, u.reduced / group, alike_at_once);
    }
  }

  // How many of a unit's first operators are computed again: none after the last one that keeps something, which computes only where that is its result.
  size_t computed_again(const Unit& u) const {
    if (!o.recompute || region_of[stage.nodes[u.first]] < 0) return 0;
    for (size_t i = u.last + 1; i-- > u.first;) {
      const GroupNode& node = cost.nodes[stage.nodes[i]];
      if (node.keeps_result) return i + 1 - u.first;
      if (node.keeps_operand) return i - u.first;
    }
    return 0;
  }

  // The ranks of a tensor parallel group wait for what moves among them.
  static void within_group(Walk& w, int64_t ns) {
    w.moved += ns;
    w.movements += ns > 0 ? 1 : 0;
    w.await(w.now() + ns);
  }

  FsdpTimes times() const {
    FsdpTimes out;
    Walk forward{.cost = cost, .overlap = machine.overlap}, backward = forward;
    int64_t there = all.empty() ? 0 : forward.queue(all.front().gather_ns, 0);
    for (size_t u = 0; u < all.size(); ++u) {
      forward.await(there);
      if (u + 1 < all.size()) there = forward.queue(all[u + 1].gather_ns, forward.now());
      for (size_t i = all[u].first; i <= all[u].last; ++i) {
        const GroupNode& node = cost.nodes[stage.nodes[i]];
        within_group(forward, node.fill_ns);
        forward.spend(node.forward);
      }
    }
    there = all.empty() ? 0 : backward.queue(all.back().again_ns, 0);
    for (size_t u = all.size(); u-- > 0;) {
      backward.await(there);
      if (u > 0) there = backward.queue(all[u - 1].again_ns, backward.now());
      for (size_t i = all[u].first, end = i + computed_again(all[u]); i < end; ++i) {
        const GroupNode& node = cost.nodes[stage.nodes[i]];
        within_group(backward, node.fill_ns);
        backward.spend(node.forward);
      }
      for (size_t i = all[u].last + 1; i-- > all[u].first;) {
        const GroupNode& node = cost.nodes[stage.nodes[i]];
        backward.spend(node.backward);
        within_group(backward, node.gradient_ns);
      }
      backward.queue(all[u].reduce_ns, backward.now());
    }
    out.forward = forward.now();
    out.backward = backward.now();
    out.synchronised = std::max(backward.now(), backward.movement);
    out.moved = forward.moved + backward.moved;
    out.movements = forward.movements + backward.movements;
    return out;
  }
};

}  // namespace

FsdpTimes fsdp_times(const FsdpStage& stage, const GroupCost& cost, const ManualOptions& options, const std::vector<int>& region_of, const Machine& machine) {
  Units units{.stage = stage, .cost = cost, .o = options, .region_of = region_of, .machine = machine};
  units.cut();
  units.price();
  return units.times();
}

}  // namespace soap
