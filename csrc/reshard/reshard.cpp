#include "reshard/reshard.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"

namespace soap {
namespace {

// Of each device that holds a source: which of its replicas that is, of the first that it holds.
std::map<int, int> replicas_of(const std::vector<Coord>& sources) {
  std::map<int, int> out;
  for (const Coord& c : sources) {
    for (size_t r = 0; r < c.devices.size(); ++r) out.emplace(c.devices[r], static_cast<int>(r));
  }
  return out;
}

// The replica that a reader on `device` uses: its own device's, else the one its replica index picks.
int pick(const std::vector<int>& devices, int device, int replica) {
  if (std::count(devices.begin(), devices.end(), device)) return device;
  return devices[replica % devices.size()];
}

std::vector<Piece> pieces(const std::vector<Coord>& sources, const std::vector<Coord>& destinations, int chunk, Reduce partial, bool check) {
  std::vector<Piece> out;
  // A reader that holds a replica itself reads the others where their replicas of the same index are: groups of replicas stay among themselves.
  const std::map<int, int> held = replicas_of(sources);
  for (int j = 0; j < static_cast<int>(destinations.size()); ++j) {
    const Coord& dst = destinations[j];
    if (dst.chunk != chunk || volume(dst.box) == 0) continue;
    std::vector<std::pair<int, Box>> overlaps;
    int64_t covered = 0;
    for (int k = 0; k < static_cast<int>(sources.size()); ++k) {
      Box box = intersect(sources[k].box, dst.box);
      const int64_t n = volume(box);
      if (n == 0) continue;
      covered += n;
      overlaps.emplace_back(k, std::move(box));
    }
    SOAP_CHECK(!check || partial != Reduce::kNone || covered == volume(dst.box), "[reshard] copy {} {} is covered {} of {} times", j, to_string(dst.box),
               covered, volume(dst.box));
    for (int r = 0; r < static_cast<int>(dst.devices.size()); ++r) {
      const auto own = held.find(dst.devices[r]);
      const int replica = own == held.end() ? r : own->second;
      for (const auto& [k, box] : overlaps) {
        out.push_back({.src = k, .from = pick(sources[k].devices, dst.devices[r], replica), .dst = j, .to = dst.devices[r], .box = box});
      }
    }
  }
  return out;
}

// All-reduces: devices between which pieces go form groups, and in each every device has one whole addend and one whole copy, all of one box.
// Groups that make the same sum must add in the same order, so that its replicas stay bitwise equal. Empty where that isn't so.
std::vector<ReduceGroup> reduce_groups(const std::vector<Piece>& pieces, const Sharding& src, const Sharding& dst) {
  std::map<int, int> parent;
  const auto root = [&](int device) {
    while (parent.at(device) != device) device = parent.at(device);
    return device;
  };
  for (const Piece& p : pieces) {
    if (src.coords[p.src].box != p.box || dst.coords[p.dst].box != p.box) return {};
    parent.emplace(p.from, p.from);
    parent.emplace(p.to, p.to);
    const int a = root(p.from), b = root(p.to);
    parent[std::max(a, b)] = std::min(a, b);
  }
  struct Group {
    std::map<int, int> addends, copies;  // device -> coord
    const Box* box = nullptr;
    size_t pieces = 0;
  };
  std::map<int, Group> groups;  // by first rank
  for (const Piece& p : pieces) {
    Group& g = groups[root(p.from)];
    if (g.box == nullptr) g.box = &p.box;
    if (*g.box != p.box || g.addends.emplace(p.from, p.src).first->second != p.src || g.copies.emplace(p.to, p.dst).first->second != p.dst) return {};
    ++g.pieces;
  }
  std::vector<ReduceGroup> out;
  std::map<Box, std::vector<int>> order;  // of the addends of a sum, by rank
  for (const auto& [first, g] : groups) {
    const size_t n = g.addends.size();
    std::vector<int> coords;
    ReduceGroup group{.elements = volume(*g.box)};
    for (const auto& [device, coord] : g.addends) {
      if (!g.copies.count(device)) return {};
      coords.push_back(coord);
      group.ranks.push_back(device);
    }
    if (std::set<int>(coords.begin(), coords.end()).size() != n || g.copies.size() != n || g.pieces != n * n) return {};
    if (order.emplace(*g.box, coords).first->second != coords) return {};
    if (n > 1) out.push_back(std::move(group));
  }
  return out;
}

}  // namespace

std::vector<Piece> fill_pieces(const Sharding& tiles, const Sharding& copies, int chunk) {
  return pieces(tiles.coords, copies.coords, chunk, tiles.partial, true);
}

std::vector<Piece> grad_pieces(const Sharding& tiles, const Sharding& copies, int chunk) {
  return pieces(copies.coords, tiles.coords, chunk, Reduce::kSum, false);
}

const ReduceGroup* Movement::group_of(int rank) const {
  for (const ReduceGroup& g : groups) {
    if (std::binary_search(g.ranks.begin(), g.ranks.end(), rank)) return &g;
  }
  return nullptr;
}

Movement recognise(const std::vector<Piece>& pieces, const Sharding& src, const Sharding& dst, Reduce reduce) {
  Movement out;
  std::set<int> ranks;
  for (const Piece& p : pieces) {
    if (p.from == p.to) continue;
    ranks.insert(p.from);
    ranks.insert(p.to);
    out.elements += volume(p.box);
  }
  if (ranks.empty()) return out;
  out.ranks.assign(ranks.begin(), ranks.end());
  out.pattern = Pattern::kExchange;
  if (reduce == Reduce::kNone) return out;
  out.groups = reduce_groups(pieces, src, dst);
  if (out.groups.empty()) return out;
  out.pattern = Pattern::kAllReduce;
  out.elements = 0;
  for (const ReduceGroup& g : out.groups) out.elements += g.elements;
  return out;
}

}  // namespace soap
