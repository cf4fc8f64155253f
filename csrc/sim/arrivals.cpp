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

// What is summed, of messages that are held as they come: not where each rank sends a part of each sum, all on one host, as they are added on their way.
void hold_messages(const Program& p, const Machine& machine, const Step& step, const std::vector<MovedItem>& moved, std::map<int, Arrived>& arrivals) {
  struct Message {
    int64_t bytes = 0;
    bool summed = false;
  };
  std::map<int, std::map<int, Message>> received;  // device -> peer
  std::map<int, bool> on_the_way;                  // by device
  for (size_t i = 0; i < moved.size(); ++i) {
    if (moved[i].movement.pattern != Pattern::kExchange) continue;
    const CopyGroup& g = p.groups[step.items[i].id];
    const Tensor& t = p.graph.tensors[g.tensor];
    std::map<std::pair<int, int>, std::pair<int64_t, std::set<int>>> arriving;  // (coord, device) -> elements and senders
    for (const Flow& x : moved[i].pieces) {
      auto& [elements, senders] = arriving[{x.dst, x.to}];
      elements += x.elements;
      senders.insert(x.from);
    }
    for (const Flow& x : moved[i].pieces) {
      const auto& [elements, senders] = arriving.at({x.dst, x.to});
      const int64_t whole = volume(p.tiles[t.id].coords[x.dst].box);
      const bool summed = elements > whole;
      const bool from_all = senders.size() == moved[i].movement.ranks.size() && elements == whole * static_cast<int64_t>(senders.size());
      const auto [it, fresh] = on_the_way.emplace(x.to, machine.num_hosts(moved[i].movement.ranks) == 1);
      it->second = it->second && summed && from_all;
      if (x.from == x.to) continue;
      Message& message = received[x.to][x.from];
      message.bytes += x.elements * t.element_bytes;
      message.summed = message.summed || summed;
    }
  }
  for (const auto& [device, peers] : received) {
    if (on_the_way.at(device)) continue;
    for (const auto& [peer, message] : peers) arrivals[device].bytes += message.summed ? message.bytes : 0;
  }
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
    if (!machine.packs) {
      if (p.steps[s].kind == StepKind::kGradFill) hold_messages(p, machine, p.steps[s], pieces[s], arrivals[s]);
      continue;
    }
    std::map<int, std::map<int, std::vector<Part>>> received;                  // device -> peer -> in order
    std::map<int, std::map<int, std::vector<std::pair<int64_t, bool>>>> sent;  // device -> peer -> (bytes, a stretch of its source)
    for (size_t i = 0; i < pieces[s].size(); ++i) {
      if (pieces[s][i].movement.pattern != Pattern::kExchange) continue;
      const StepItem& item = p.steps[s].items[i];
      const CopyGroup& g = p.groups[item.id];
      const Tensor& t = p.graph.tensors[g.tensor];
      const bool back = p.steps[s].kind == StepKind::kGradFill;
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
        received[x.to][x.from].push_back({item.id, x.dst, bytes, arriving[{x.dst, x.to}] == 1 && x.elements == volume(target)});
        sent[x.from][x.to].emplace_back(bytes, is_stretch(intersect(source, target), source));
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
