#include "reshard/flows.h"

#include <algorithm>

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

// As `recognise`: every participant holds one whole addend and needs the whole sum. Boxes that overlap in the volume of both are equal.
bool is_all_reduce(const std::vector<Flow>& flows, const std::vector<int>& ranks, const std::vector<Coord>& sources, const std::vector<Coord>& destinations,
                   size_t devices) {
  if (flows.size() != ranks.size() * ranks.size()) return false;
  const int64_t whole = flows.front().elements;
  std::vector<char> source_seen(sources.size()), destination_seen(destinations.size());
  std::vector<char> sends(devices), receives(devices);
  std::vector<int> source_device(sources.size(), -1);
  size_t addends = 0, copies = 0;
  for (const Flow& f : flows) {
    if (f.elements != whole) return false;
    if (!source_seen[f.src]) {
      if (volume(sources[f.src].box) != whole || sends[f.from]) return false;
      source_seen[f.src] = 1;
      sends[f.from] = 1;
      source_device[f.src] = f.from;
      ++addends;
    }
    if (source_device[f.src] != f.from) return false;
    if (!destination_seen[f.dst]) {
      if (volume(destinations[f.dst].box) != whole) return false;
      destination_seen[f.dst] = 1;
      copies += destinations[f.dst].devices.size();
    }
    receives[f.to] = 1;
  }
  if (addends != ranks.size() || copies != ranks.size()) return false;
  return std::all_of(ranks.begin(), ranks.end(), [&](int r) { return sends[r] && receives[r]; });
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
  // The replica that serves a device: its own, else by the reader's replica index.
  std::vector<char> holds(sources.size() * devices);
  for (size_t k = 0; k < sources.size(); ++k) {
    for (int d : sources[k].devices) holds[k * devices + d] = 1;
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
        const int from = holds[k * devices + to] ? to : replicas[r % replicas.size()];
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
  if (reduce == Reduce::kNone || !is_all_reduce(out.list, out.movement.ranks, sources, destinations, devices)) return out;
  out.movement.pattern = Pattern::kAllReduce;
  out.movement.elements = out.list.front().elements;
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
