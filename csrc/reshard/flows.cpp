#include "reshard/flows.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "base/error.h"

namespace soap {
namespace {

// The index sets of one dim over all coords, each once.
struct DimSets {
  std::vector<const IndexSet*> sets;
  std::vector<int> of;  // per coord

  DimSets(const std::vector<Coord>& coords, size_t dim) {
    for (const Coord& c : coords) {
      int id = of.empty() ? -1 : of.back();
      if (id < 0 || *sets[id] != c.box[dim]) {
        const auto same = std::find_if(sets.begin(), sets.end(), [&](const IndexSet* s) { return *s == c.box[dim]; });
        id = static_cast<int>(same - sets.begin());
        if (same == sets.end()) sets.push_back(&c.box[dim]);
      }
      of.push_back(id);
    }
  }
};

int64_t common(const IndexSet& a, const IndexSet& b) {
  int64_t out = 0;
  auto x = a.runs().begin(), y = b.runs().begin();
  while (x != a.runs().end() && y != b.runs().end()) {
    out += std::max<int64_t>(std::min(x->end, y->end) - std::max(x->begin, y->begin), 0);
    x->end < y->end ? ++x : ++y;
  }
  return out;
}

// elements[dst][src], by dims: the product of what each pair of index sets has in common.
std::vector<int64_t> overlaps(const std::vector<Coord>& sources, const std::vector<Coord>& destinations) {
  struct Dim {
    DimSets from, to;
    std::vector<int64_t> shared;  // [set of `to`][set of `from`]
  };
  std::vector<Dim> differing;
  int64_t alike = 1;  // of dims in which no coord differs on either side
  const size_t dims = sources.empty() || destinations.empty() ? 0 : destinations.front().box.size();
  for (size_t d = 0; d < dims; ++d) {
    Dim dim{.from = DimSets(sources, d), .to = DimSets(destinations, d)};
    for (const IndexSet* j : dim.to.sets) {
      for (const IndexSet* k : dim.from.sets) dim.shared.push_back(common(*k, *j));
    }
    if (dim.shared.size() == 1)
      alike *= dim.shared[0];
    else
      differing.push_back(std::move(dim));
  }
  std::vector<int64_t> out(sources.size() * destinations.size(), alike);
  if (alike == 0) return out;
  for (const Dim& dim : differing) {
    for (size_t j = 0; j < destinations.size(); ++j) {
      const int64_t* row = &dim.shared[dim.to.of[j] * dim.from.sets.size()];
      int64_t* elements = &out[j * sources.size()];
      for (size_t k = 0; k < sources.size(); ++k) elements[k] *= row[dim.from.of[k]];
    }
  }
  return out;
}

// As in reshard.cpp: what `recognise` says of all-reduces in groups. Boxes that overlap in the volume of both are equal.
class ReduceGroups {
 public:
  ReduceGroups(const std::vector<Coord>& sources, const std::vector<Coord>& destinations, size_t devices)
      : sources_(sources), pieces_(devices), parent_(devices, -1), addend_(devices, -1), copy_(devices, -1) {
    for (const Coord& c : sources) source_volume_.push_back(volume(c.box));
    for (const Coord& c : destinations) destination_volume_.push_back(volume(c.box));
  }

  void add(std::span<const Flow> flows) {
    for (const Flow& f : flows) {
      if (!groups_) return;
      groups_ = source_volume_[f.src] == f.elements && destination_volume_[f.dst] == f.elements && holds(addend_, f.from, f.src) && holds(copy_, f.to, f.dst);
      const int a = root(f.from), b = root(f.to);
      parent_[std::max(a, b)] = std::min(a, b);
      ++pieces_[f.from];
    }
  }

  // Empty where they are none.
  std::vector<ReduceGroup> found() {
    if (!groups_) return {};
    const size_t devices = parent_.size();
    std::vector<size_t> pieces(devices);
    for (size_t d = 0; d < devices; ++d) {
      if (parent_[d] >= 0) pieces[root(static_cast<int>(d))] += pieces_[d];
    }
    std::vector<ReduceGroup> out;
    std::map<Box, std::vector<int>> order;  // of the addends of a sum, by rank
    for (size_t first = 0; first < devices; ++first) {
      if (parent_[first] != static_cast<int>(first)) continue;
      std::vector<int> coords;
      ReduceGroup group;
      for (size_t d = first; d < devices; ++d) {
        if (parent_[d] < 0 || root(static_cast<int>(d)) != static_cast<int>(first)) continue;
        if (addend_[d] < 0 || copy_[d] < 0) return {};
        coords.push_back(addend_[d]);
        group.ranks.push_back(static_cast<int>(d));
      }
      const size_t n = coords.size();
      group.elements = source_volume_[coords.front()];
      if (std::set<int>(coords.begin(), coords.end()).size() != n || pieces[first] != n * n) return {};
      if (order.emplace(sources_[coords.front()].box, coords).first->second != coords) return {};
      if (n > 1) out.push_back(std::move(group));
    }
    return out;
  }

 private:
  bool holds(std::vector<int>& coords, int device, int coord) {
    if (coords[device] < 0) coords[device] = coord;
    if (parent_[device] < 0) parent_[device] = device;
    return coords[device] == coord;
  }
  int root(int device) const {
    if (parent_[device] < 0) return device;
    while (parent_[device] != device) device = parent_[device];
    return device;
  }

  const std::vector<Coord>& sources_;
  std::vector<int64_t> source_volume_, destination_volume_;
  std::vector<size_t> pieces_;  // by the device that they are from
  std::vector<int> parent_, addend_, copy_;
  bool groups_ = true;
};

Movement walk(const std::vector<Coord>& sources, const std::vector<Coord>& destinations, int chunk, Reduce reduce, bool covers, const VisitFlows& visit) {
  Movement out;
  int last_device = 0;
  for (const auto* coords : {&sources, &destinations}) {
    for (const Coord& c : *coords) {
      for (int d : c.devices) last_device = std::max(last_device, d);
    }
  }
  const size_t devices = last_device + 1;
  // The replica that serves a device: its own, else that of the index of what it holds, else of the reader's own index.
  std::vector<char> holds(sources.size() * devices);
  std::vector<int> held(devices, -1);
  for (size_t k = 0; k < sources.size(); ++k) {
    for (size_t r = 0; r < sources[k].devices.size(); ++r) {
      const int d = sources[k].devices[r];
      holds[k * devices + d] = 1;
      if (held[d] < 0) held[d] = static_cast<int>(r);
    }
  }
  const std::vector<int64_t> elements = overlaps(sources, destinations);
  std::vector<std::pair<int, int64_t>> serving;
  std::vector<Flow> flows;
  std::vector<char> takes_part(devices);
  std::optional<ReduceGroups> groups;
  if (reduce != Reduce::kNone) groups.emplace(sources, destinations, devices);
  for (size_t j = 0; j < destinations.size(); ++j) {
    const Coord& dst = destinations[j];
    const int64_t needed = volume(dst.box);
    if (dst.chunk != chunk || needed == 0) continue;
    serving.clear();
    int64_t covered = 0;
    for (size_t k = 0; k < sources.size(); ++k) {
      const int64_t n = elements[j * sources.size() + k];
      if (n == 0) continue;
      serving.emplace_back(static_cast<int>(k), n);
      covered += n;
    }
    SOAP_CHECK(!covers || covered == needed, "[reshard] copy {} {} is covered {} of {} times", j, to_string(dst.box), covered, needed);
    for (int r = 0; r < static_cast<int>(dst.devices.size()); ++r) {
      const int to = dst.devices[r];
      flows.clear();
      for (const auto& [k, n] : serving) {
        const auto& replicas = sources[k].devices;
        const bool own = replicas.size() > 1 && holds[k * devices + to];
        const int from = replicas.size() == 1 ? replicas[0] : own ? to : replicas[(held[to] < 0 ? r : held[to]) % replicas.size()];
        flows.push_back({.src = k, .from = from, .dst = static_cast<int>(j), .to = to, .elements = n});
        if (from == to) continue;
        takes_part[from] = takes_part[to] = 1;
        out.elements += n;
      }
      if (groups) groups->add(flows);
      visit(flows);
    }
  }
  for (size_t d = 0; d < devices; ++d) {
    if (takes_part[d]) out.ranks.push_back(static_cast<int>(d));
  }
  if (out.ranks.empty()) return out;
  out.pattern = Pattern::kExchange;
  if (!groups) return out;
  out.groups = groups->found();
  if (out.groups.empty()) return out;
  out.pattern = Pattern::kAllReduce;
  out.elements = 0;
  for (const ReduceGroup& g : out.groups) out.elements += g.elements;
  return out;
}

}  // namespace

Movement visit_fill_flows(const Sharding& tiles, const Sharding& copies, int chunk, const VisitFlows& visit, bool collectives) {
  return walk(tiles.coords, copies.coords, chunk, collectives ? tiles.partial : Reduce::kNone, tiles.partial == Reduce::kNone, visit);
}

Movement visit_grad_flows(const Sharding& tiles, const Sharding& copies, int chunk, const VisitFlows& visit, bool collectives) {
  return walk(copies.coords, tiles.coords, chunk, collectives ? Reduce::kSum : Reduce::kNone, false, visit);
}

Flows fill_flows(const Sharding& tiles, const Sharding& copies, int chunk, bool collectives) {
  Flows out;
  out.movement =
      visit_fill_flows(tiles, copies, chunk, [&](std::span<const Flow> flows) { out.list.insert(out.list.end(), flows.begin(), flows.end()); }, collectives);
  return out;
}

Flows grad_flows(const Sharding& tiles, const Sharding& copies, int chunk, bool collectives) {
  Flows out;
  out.movement =
      visit_grad_flows(tiles, copies, chunk, [&](std::span<const Flow> flows) { out.list.insert(out.list.end(), flows.begin(), flows.end()); }, collectives);
  return out;
}

}  // namespace soap
