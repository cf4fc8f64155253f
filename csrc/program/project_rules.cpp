#include "program/project_rules.h"

#include <algorithm>
#include <set>

namespace soap {

bool holds(const Coord& c, int rank) {
  return std::count(c.devices.begin(), c.devices.end(), rank) > 0;
}

namespace {

// Copy coord -> tile coord when every copy here is one whole tile here and no tile here gets gradients from elsewhere.
std::optional<std::map<int, int>> aliases(const Program& p, const CopyGroup& group, int device) {
  const Sharding& tiles = p.tiles[group.tensor];
  std::map<int, int> alias;
  std::set<int> used;
  for (size_t j = 0; j < group.copies.coords.size(); ++j) {
    const Coord& c = group.copies.coords[j];
    if (!holds(c, device)) continue;
    if (volume(c.box) == 0) return std::nullopt;  // nothing orders it after the tile that looks like it
    int found = -1, overlaps = 0;
    for (size_t k = 0; k < tiles.coords.size(); ++k) {
      if (volume(intersect(tiles.coords[k].box, c.box)) == 0) continue;
      ++overlaps;
      if (tiles.coords[k].box == c.box && holds(tiles.coords[k], device)) found = static_cast<int>(k);
    }
    if (found < 0 || overlaps != 1 || !used.insert(found).second) return std::nullopt;
    alias[static_cast<int>(j)] = found;
  }
  if (!group.grad) return alias;
  std::set<int> chunks;
  for (const Coord& c : tiles.coords) chunks.insert(c.chunk);
  for (int chunk : chunks) {
    std::map<int, int> arrivals;
    for (const Piece& x : grad_pieces(tiles, group.copies, chunk)) {
      if (x.to == device) {
        ++arrivals[x.dst];
        if (x.from != device) return std::nullopt;
      }
    }
    for (const auto& [tile, n] : arrivals) {
      if (n > 1 || !used.count(tile)) return std::nullopt;
    }
  }
  // A parameter's gradient is the Parameter's own: it is brought there by a grad fill, transparent or not.
  return alias;
}

}  // namespace

std::optional<std::map<int, int>> agreed_aliases(const Program& p, const CopyGroup& group, int rank) {
  auto own = aliases(p, group, rank);
  if (!own) return own;
  std::set<int> together;
  const auto add = [&](const Sharding& s) {
    for (const Coord& c : s.coords) {
      if (c.devices.size() > 1) together.insert(c.devices.begin(), c.devices.end());
    }
  };
  add(group.copies);
  if (group.grad) add(p.tiles[group.tensor]);
  if (!together.count(rank)) return own;
  for (int d : together) {
    if (d != rank && !aliases(p, group, d)) return std::nullopt;
  }
  return own;
}

std::vector<char> only_written(const Program& p) {
  std::vector<char> only(p.graph.nodes.size(), 1);
  for (auto n = p.graph.nodes.rbegin(); n != p.graph.nodes.rend(); ++n) {
    if (n->kind == NodeKind::kReturn) {
      only[n->id] = n->target == "buffer_write";
      continue;
    }
    only[n->id] = n->kind == NodeKind::kOp && !p.differentiable[n->id] && p.regions[n->id] < 0;
    for (TensorId t : n->outputs) {
      for (int g : p.groups_of[t]) {
        for (const Use& u : p.groups[g].uses) only[n->id] = only[n->id] && only[u.node];
      }
    }
  }
  return only;
}

}  // namespace soap
