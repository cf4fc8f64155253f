#include "reshard/flows.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

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
  std::vector<int64_t> out(sources.size() * destinations.size(), 1);
  const size_t dims = sources.empty() || destinations.empty() ? 0 : destinations.front().box.size();
  for (size_t d = 0; d < dims; ++d) {
    const DimSets from(sources, d), to(destinations, d);
    std::vector<int64_t> shared(from.sets.size() * to.sets.size());
    for (size_t j = 0; j < to.sets.size(); ++j) {
      for (size_t k = 0; k < from.sets.size(); ++k) shared[j * from.sets.size() + k] = common(*from.sets[k], *to.sets[j]);
    }
    for (size_t j = 0; j < destinations.size(); ++j) {
      const int64_t* row = &shared[to.of[j] * from.sets.size()];
      for (size_t k = 0; k < sources.size(); ++k) out[j * sources.size() + k] *= row[from.of[k]];
    }
  }
  return out;
}

// As in reshard.cpp: what `recognise` says of all-reduces in groups. Boxes that overlap in the volume of both are equal.
std::vector<ReduceGroup> reduce_groups(const std::vector<Flow>& flows, const std::vector<Coord>& sources, const std::vector<Coord>& destinations,
                                       size_t devices) {
  std::vector<int64_t> source_volume, destination_volume;
  for (const Coord& c : sources) source_volume.push_back(volume(c.box));
  for (const Coord& c : destinations) destination_volume.push_back(volume(c.box));
  std::vector<int> parent(devices, -1), addend(devices, -1), copy(devices, -1);
  const auto root = [&](int device) {
    while (parent[device] != device) device = parent[device];
    return device;
  };
  for (const Flow& f : flows) {
    if (source_volume[f.src] != f.elements || destination_volume[f.dst] != f.elements) return {};
    for (const auto& [coords, device, coord] : {std::tuple(&addend, f.from, f.src), std::tuple(&copy, f.to, f.dst)}) {
      if ((*coords)[device] < 0) (*coords)[device] = coord;
      if ((*coords)[device] != coord) return {};
      if (parent[device] < 0) parent[device] = device;
    }
    const int a = root(f.from), b = root(f.to);
    parent[std::max(a, b)] = std::min(a, b);
  }
  std::vector<size_t> pieces(devices);
  for (const Flow& f : flows) ++pieces[root(f.from)];
  std::vector<ReduceGroup> out;
  std::map<Box, std::vector<int>> order;  // of the addends of a sum, by rank
  for (size_t first = 0; first < devices; ++first) {
    if (parent[first] != static_cast<int>(first)) continue;
    std::vector<int> coords;
    ReduceGroup group;
    for (size_t d = first; d < devices; ++d) {
      if (parent[d] < 0 || root(static_cast<int>(d)) != static_cast<int>(first)) continue;
      if (addend[d] < 0 || copy[d] < 0) return {};
      coords.push_back(addend[d]);
      group.ranks.push_back(static_cast<int>(d));
    }
    const size_t n = coords.size();
    group.elements = source_volume[coords.front()];
    if (std::set<int>(coords.begin(), coords.end()).size() != n || pieces[first] != n * n) return {};
    if (order.emplace(sources[coords.front()].box, coords).first->second != coords) return {};
    if (n > 1) out.push_back(std::move(group));
  }
  return out;
}

Flows flows(const std::vector<Coord>& sources, const std::vector<Coord>& destinations, int chunk, Reduce reduce, bool covers) {
  Flows out;
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
  std::vector<char> takes_part(devices);
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
      for (const auto& [k, n] : serving) {
        const auto& replicas = sources[k].devices;
        const int from = holds[k * devices + to] ? to : replicas[(held[to] < 0 ? r : held[to]) % replicas.size()];
        out.list.push_back({.src = k, .from = from, .dst = static_cast<int>(j), .to = to, .elements = n});
        if (from == to) continue;
        takes_part[from] = takes_part[to] = 1;
        out.movement.elements += n;
      }
    }
  }
  for (size_t d = 0; d < devices; ++d) {
    if (takes_part[d]) out.movement.ranks.push_back(static_cast<int>(d));
  }
  if (out.movement.ranks.empty()) return out;
  out.movement.pattern = Pattern::kExchange;
  if (reduce == Reduce::kNone) return out;
  out.movement.groups = reduce_groups(out.list, sources, destinations, devices);
  if (out.movement.groups.empty()) return out;
  out.movement.pattern = Pattern::kAllReduce;
  out.movement.elements = 0;
  for (const ReduceGroup& g : out.movement.groups) out.movement.elements += g.elements;
  return out;
}

}  // namespace

Flows fill_flows(const Sharding& tiles, const Sharding& copies, int chunk, bool collectives) {
  return flows(tiles.coords, copies.coords, chunk, collectives ? tiles.partial : Reduce::kNone, tiles.partial == Reduce::kNone);
}

Flows grad_flows(const Sharding& tiles, const Sharding& copies, int chunk, bool collectives) {
  return flows(copies.coords, tiles.coords, chunk, collectives ? Reduce::kSum : Reduce::kNone, false);
}

}  // namespace soap
