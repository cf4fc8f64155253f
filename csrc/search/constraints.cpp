#include "search/constraints.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "sharding/expand.h"

namespace soap {
namespace {

// "n" is also the factor in which the processes' rows lie, whatever its name.
bool forbids(const std::set<std::string>& names, const std::string& factor, bool carries_rows) {
  return names.count(factor) > 0 || (carries_rows && names.count("n") > 0);
}

bool in_order(const std::vector<int>& devices) {
  for (size_t i = 0; i < devices.size(); ++i) {
    if (devices[i] != static_cast<int>(i)) return false;
  }
  return true;
}

bool keeps(const std::set<std::string>& names, const OpConfig& c) {
  if (names.count("devices") && !in_order(c.devices)) return false;
  return std::none_of(c.cuts.begin(), c.cuts.end(), [&](const FactorCut& f) {
    return (f.cut.tiles * f.cut.chunks > 1 && forbids(names, f.factor, f.cut.fed)) || (f.cut.chunks > 1 && names.count("chunks"));
  });
}

bool keeps(const std::set<std::string>& names, const Rule& rule, const Tiling& tiling, int rows_factor) {
  return std::none_of(tiling.cuts.begin(), tiling.cuts.end(), [&](const FactorParts& f) {
    return (f.tiles() * f.chunks() > 1 && forbids(names, rule.factors[f.factor].name, f.factor == rows_factor)) || (f.chunks() > 1 && names.count("chunks"));
  });
}

// Takes forbidden cuts out of a configuration; the tiles along them become replicas on the same devices.
OpConfig without(const std::set<std::string>& names, OpConfig c) {
  if (names.count("chunks")) {
    for (FactorCut& f : c.cuts) f.cut.chunks = 1;
  }
  OpConfig out{.keep = c.keep};
  std::vector<int> all = c.devices;
  if (all.empty()) {
    all.resize(size_t(c.num_tiles()) * c.replicas);
    std::iota(all.begin(), all.end(), 0);
  }
  for (const FactorCut& f : c.cuts) {
    if (!forbids(names, f.factor, f.cut.fed)) out.cuts.push_back(f);
  }
  std::vector<std::vector<int>> rows(out.num_tiles());  // [kept tile] -> devices
  for (size_t slot = 0; slot < all.size(); ++slot) {
    size_t rest = slot / c.replicas, row = 0, scale = 1;
    for (auto f = c.cuts.rbegin(); f != c.cuts.rend(); ++f) {
      if (!forbids(names, f->factor, f->cut.fed)) {
        row += rest % f->cut.tiles * scale;
        scale *= f->cut.tiles;
      }
      rest /= f->cut.tiles;
    }
    if (!std::count(rows[row].begin(), rows[row].end(), all[slot])) rows[row].push_back(all[slot]);
  }
  const auto fewest = std::min_element(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.size() < b.size(); });
  out.replicas = static_cast<int>(fewest->size());
  for (const auto& row : rows) out.devices.insert(out.devices.end(), row.begin(), row.begin() + out.replicas);
  if (in_order(out.devices) || names.count("devices")) out.devices.clear();
  return out;
}

// The first node whose tiling has a forbidden cut; nothing where the strategy can't be resolved: pricing it says so.
std::optional<std::string> first_breach(const OpGraph& graph, const Strategy& s, const FedRows& rows, const Constraints& constraints,
                                        const std::set<std::string>& except) {
  if (constraints.forbid.empty()) return std::nullopt;
  try {
    const Resolved r = resolve(graph, s, rows);
    for (const Node& n : r.graph.nodes) {
      const auto it = constraints.forbid.find(n.name);
      if (it == constraints.forbid.end() || constraints.pinned(n.name) || except.count(n.name)) continue;
      if (!keeps(it->second, r.rules[n.id], r.tilings[n.id], r.fed[n.id].factor)) return n.name;
    }
  } catch (const std::invalid_argument&) {
    return std::nullopt;
  }
  return std::nullopt;
}

}  // namespace

Strategy adapted(const OpGraph& graph, Strategy s, const FedRows& rows, const Constraints& constraints) {
  for (const auto& [name, config] : constraints.pin) {
    if (config)
      s.nodes[name] = *config;
    else
      s.nodes.erase(name);
  }
  for (const auto& [name, names] : constraints.forbid) {
    const auto it = s.nodes.find(name);
    if (!constraints.pinned(name) && it != s.nodes.end() && !keeps(names, it->second)) it->second = without(names, it->second);
  }
  // What nodes come by: the first that has a forbidden cut gets a configuration of its own, which those behind it may then follow.
  std::set<std::string> settled;
  while (const auto name = first_breach(graph, s, rows, constraints, settled)) {
    settled.insert(*name);
    const int world = s.world_size;
    s.nodes[*name] = constraints.forbid.at(*name).count("n") ? OpConfig{.replicas = world} : OpConfig{.cuts = {{"n", {.tiles = world, .fed = true}}}};
  }
  return s;
}

bool allowed(const OpGraph& graph, const Strategy& s, const FedRows& rows, const Constraints& constraints) {
  if (constraints.empty()) return true;
  for (const auto& [name, config] : constraints.pin) {
    const auto it = s.nodes.find(name);
    if (config ? it == s.nodes.end() || it->second != *config : it != s.nodes.end()) return false;
  }
  for (const auto& [name, names] : constraints.forbid) {
    const auto own = s.nodes.find(name);
    if (!constraints.pinned(name) && own != s.nodes.end() && !keeps(names, own->second)) return false;
  }
  return !first_breach(graph, s, rows, constraints, {});
}

}  // namespace soap
