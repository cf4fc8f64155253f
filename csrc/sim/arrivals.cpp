#include "sim/arrivals.h"

#include <algorithm>

namespace soap {
namespace {

constexpr int64_t kAlignment = 64;  // bytes, of torch's CPU allocator

struct Part {
  int group = -1, coord = -1;
  int64_t bytes = 0;
  bool whole = false;  // all of its destination
};

Reduce combined_by(const Program& p, const Step& step, const StepItem& item) {
  return step.kind == StepKind::kGradFill ? Reduce::kSum : p.tiles[p.groups[item.id].tensor].partial;
}

// Devices on which everything that a step brings is a sum of whole pieces of all ranks that exchange, all on one host: addends are added on their way
// (Assembly::sums_all in csrc/movement/movement.h).
std::set<int> summing(const Program& p, const Machine& machine, const Step& step, const std::vector<MovedItem>& moved) {
  std::set<int> ranks, out, others;
  for (const MovedItem& m : moved) {
    if (m.movement.pattern == Pattern::kExchange) ranks.insert(m.movement.ranks.begin(), m.movement.ranks.end());
  }
  if (ranks.empty() || machine.num_hosts({ranks.begin(), ranks.end()}) > 1) return {};
  for (size_t i = 0; i < moved.size(); ++i) {
    if (moved[i].movement.pattern == Pattern::kAllReduce) continue;
    const CopyGroup& g = p.groups[step.items[i].id];
    const Tensor& t = p.graph.tensors[g.tensor];
    const Sharding& to = step.kind == StepKind::kGradFill ? p.tiles[t.id] : g.copies;
    const bool adds = combined_by(p, step, step.items[i]) == Reduce::kSum && is_float(t);
    std::map<std::pair<int, int>, std::set<int>> senders;  // of whole pieces, by (coord, device)
    for (const Flow& x : moved[i].pieces) {
      auto& list = senders[{x.dst, x.to}];
      if (x.elements == volume(to.coords[x.dst].box)) list.insert(x.from);
    }
    for (const auto& [where, list] : senders) (adds && list == ranks ? out : others).insert(where.second);
  }
  for (const int device : others) out.erase(device);
  return out;
}

}  // namespace

bool is_stretch(const Box& part, const Box& box) {
  size_t d = 0;
  while (d < box.size() && part[d].size() == 1) ++d;
  if (d < box.size()) {
    const IndexSet at = positions(part[d], box[d]);
    if (!at.is_interval()) return false;
    ++d;
  }
  for (; d < box.size(); ++d) {
    if (part[d] != box[d]) return false;
  }
  return true;
}

std::vector<std::map<int, Arrived>> find_arrivals(const Program& p, const StepPieces& pieces, const Machine& machine) {
  std::vector<std::map<int, Arrived>> arrivals(p.steps.size());
  for (size_t s = 0; s < p.steps.size(); ++s) {
    const std::set<int> on_the_way = machine.packs ? std::set<int>{} : summing(p, machine, p.steps[s], pieces[s]);
    std::map<int, std::map<int, std::vector<Part>>> received;                  // device -> peer -> in order
    std::map<int, std::map<int, std::vector<std::pair<int64_t, bool>>>> sent;  // device -> peer -> (bytes, a stretch of its source)
    for (size_t i = 0; i < pieces[s].size(); ++i) {
      if (pieces[s][i].movement.pattern != Pattern::kExchange) continue;
      const StepItem& item = p.steps[s].items[i];
      const CopyGroup& g = p.groups[item.id];
      const Tensor& t = p.graph.tensors[g.tensor];
      const bool back = p.steps[s].kind == StepKind::kGradFill;
      const bool lands = !machine.packs && combined_by(p, p.steps[s], item) == Reduce::kNone;  // where it stays
      const Sharding &from = back ? g.copies : p.tiles[t.id], &to = back ? p.tiles[t.id] : g.copies;
      std::map<std::pair<int, int>, int> arriving;
      for (const Flow& x : pieces[s][i].pieces) ++arriving[{x.dst, x.to}];
      for (const auto& [where, count] : arriving) {
        const Box& box = to.coords[where.first].box;
        if (count > 1) arrivals[s][where.second].made += volume(box) * t.element_bytes;
      }
      for (const Flow& x : pieces[s][i].pieces) {
        if (x.from == x.to) continue;
        const Box &source = from.coords[x.src].box, &target = to.coords[x.dst].box;
        const int64_t bytes = x.elements * t.element_bytes;
        if (!lands && !on_the_way.count(x.to))
          received[x.to][x.from].push_back({item.id, x.dst, bytes, arriving[{x.dst, x.to}] == 1 && x.elements == volume(target)});
        if (machine.packs) sent[x.from][x.to].emplace_back(bytes, is_stretch(intersect(source, target), source));
      }
    }
    for (const auto& [device, peers] : received) {
      Arrived& a = arrivals[s][device];
      for (const auto& [peer, parts] : peers) {
        for (const Part& part : parts) {
          if (part.whole && a.bytes % kAlignment == 0)
            a.views.insert({part.group, part.coord});
          else if (part.whole)
            a.made += part.bytes;
          a.bytes += part.bytes;
        }
      }
    }
    for (const auto& [device, peers] : sent) {
      Arrived& a = arrivals[s][device];
      bool views = peers.size() == 1;
      for (const auto& [peer, parts] : peers) {
        views = views && parts.size() == 1 && parts[0].second;
        for (const auto& [bytes, stretch] : parts) a.sent += bytes;
      }
      if (views) a.sent = 0;
    }
  }
  return arrivals;
}

}  // namespace soap
