#include "reshard/reshard.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"

namespace soap {
namespace {

// The replica that a reader on `device` uses: its own device's, else the one its replica index picks.
int pick(const std::vector<int>& devices, int device, int replica) {
  if (std::count(devices.begin(), devices.end(), device)) return device;
  return devices[replica % devices.size()];
}

std::vector<Piece> pieces(const std::vector<Coord>& sources, const std::vector<Coord>& destinations, int chunk, Reduce partial, bool check) {
  std::vector<Piece> out;
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
      for (const auto& [k, box] : overlaps) {
        out.push_back({.src = k, .from = pick(sources[k].devices, dst.devices[r], r), .dst = j, .to = dst.devices[r], .box = box});
      }
    }
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
  // All-reduce: one whole addend and one whole copy on each participant, all of one box.
  if (reduce == Reduce::kNone || ranks.size() < 2) return out;
  const Box& box = pieces.front().box;
  std::map<int, std::set<int>> addends, copies;  // coord -> devices
  for (const Piece& p : pieces) {
    if (p.box != box || src.coords[p.src].box != box || dst.coords[p.dst].box != box) return out;
    addends[p.src].insert(p.from);
    copies[p.dst].insert(p.to);
  }
  std::set<int> from, to;
  for (const auto& [coord, devices] : addends) {
    if (devices.size() != 1 || !from.insert(*devices.begin()).second) return out;
  }
  size_t num_copies = 0;
  for (const auto& [coord, devices] : copies) {
    num_copies += devices.size();
    to.insert(devices.begin(), devices.end());
  }
  if (from != ranks || to != ranks || num_copies != ranks.size() || addends.size() != ranks.size()) return out;
  if (pieces.size() != ranks.size() * ranks.size()) return out;
  out.pattern = Pattern::kAllReduce;
  out.elements = volume(box);
  return out;
}

}  // namespace soap
