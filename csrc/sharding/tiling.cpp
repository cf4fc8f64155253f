#include "sharding/tiling.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "base/error.h"
#include "fmt/ranges.h"
#include "sharding/dim_set.h"

namespace soap {

int OpConfig::num_tiles() const {
  int n = 1;
  for (const FactorCut& c : cuts) n *= c.cut.tiles;
  return n;
}

int OpConfig::num_chunks() const {
  int n = 1;
  for (const FactorCut& c : cuts) n *= c.cut.chunks;
  return n;
}

int Tiling::tiles() const {
  int n = 1;
  for (const FactorParts& c : cuts) n *= c.tiles();
  return n;
}

int Tiling::chunks() const {
  int n = 1;
  for (const FactorParts& c : cuts) n *= c.chunks();
  return n;
}

const IndexSet* Tiling::part(int factor, int tile, int chunk) const {
  for (auto c = cuts.rbegin(); c != cuts.rend(); ++c) {
    if (c->factor == factor) return &c->parts[tile % c->tiles()][chunk % c->chunks()];
    tile /= c->tiles();
    chunk /= c->chunks();
  }
  return nullptr;
}

std::vector<IndexSet> factor_sets(const Rule& rule, const Tiling& tiling, int tile, int chunk) {
  std::vector<IndexSet> sets;
  sets.reserve(rule.factors.size());
  for (size_t f = 0; f < rule.factors.size(); ++f) {
    const IndexSet* part = tiling.part(static_cast<int>(f), tile, chunk);
    sets.push_back(part ? *part : IndexSet::all(rule.factors[f].size));
  }
  return sets;
}

std::vector<std::vector<IndexSet>> all_factor_sets(const Rule& rule, const Tiling& tiling) {
  std::vector<IndexSet> whole;
  for (const Factor& f : rule.factors) whole.push_back(IndexSet::all(f.size));
  const int tiles = tiling.tiles(), chunks = tiling.chunks();
  std::vector<std::vector<IndexSet>> out(size_t(tiles) * chunks, whole);
  for (int tile = 0; tile < tiles; ++tile) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      int t = tile, k = chunk;
      for (auto c = tiling.cuts.rbegin(); c != tiling.cuts.rend(); ++c) {
        out[size_t(tile) * chunks + chunk][c->factor] = c->parts[t % c->tiles()][k % c->chunks()];
        t /= c->tiles();
        k /= c->chunks();
      }
    }
  }
  return out;
}

IndexSet dim_set(const DimExpr& dim, const Rule& rule, int64_t size, const std::vector<IndexSet>& sets) {
  if (dim.factors.empty()) return IndexSet::all(size);
  if (dim.map) return apply(*dim.map, sets[dim.factors[0]], size);
  IndexSet set = sets[dim.factors[0]];
  for (size_t i = 1; i < dim.factors.size(); ++i) set = product(set, sets[dim.factors[i]], rule.factors[dim.factors[i]].size);
  return set;
}

int64_t dim_size(const DimExpr& dim, int64_t size, const std::vector<IndexSet>& sets) {
  if (dim.factors.empty()) return size;
  if (dim.map) return apply(*dim.map, sets[dim.factors[0]], size).size();
  int64_t n = 1;
  for (int f : dim.factors) n *= sets[f].size();
  return n;
}

Box box_of(const std::vector<DimExpr>& dims, const Rule& rule, const std::vector<int64_t>& shape, const std::vector<IndexSet>& sets) {
  Box box;
  box.reserve(dims.size());
  for (size_t d = 0; d < dims.size(); ++d) box.push_back(dim_set(dims[d], rule, shape[d], sets));
  return box;
}

namespace {

// Boxes of one operand or result in parts of an operator: dims that no cut reaches are made once.
class Boxes {
 public:
  Boxes(const std::vector<DimExpr>& dims, const Rule& rule, const Tiling& tiling, const std::vector<int64_t>& shape) : dims_(dims), rule_(rule), shape_(shape) {
    for (size_t d = 0; d < dims.size(); ++d) {
      const bool cut = std::any_of(tiling.cuts.begin(), tiling.cuts.end(), [&](const FactorParts& c) {
        return std::find(dims[d].factors.begin(), dims[d].factors.end(), c.factor) != dims[d].factors.end();
      });
      if (cut) cut_.push_back(d);
    }
  }

  Box of(const std::vector<IndexSet>& sets) {
    if (!known_) first_ = box_of(dims_, rule_, shape_, sets);
    known_ = true;
    Box box = first_;
    for (size_t d : cut_) box[d] = dim_set(dims_[d], rule_, shape_[d], sets);
    return box;
  }

 private:
  const std::vector<DimExpr>& dims_;
  const Rule& rule_;
  const std::vector<int64_t>& shape_;
  std::vector<size_t> cut_;
  bool known_ = false;
  Box first_;
};

}  // namespace

Sharding result_sharding(const Rule& rule, const Tiling& tiling, int result, const std::vector<int64_t>& shape) {
  return result_sharding(rule, tiling, result, shape, all_factor_sets(rule, tiling));
}

Sharding result_sharding(const Rule& rule, const Tiling& tiling, int result, const std::vector<int64_t>& shape,
                         const std::vector<std::vector<IndexSet>>& sets) {
  const Result& r = rule.results[result];
  Sharding out{.partial = r.reduce};
  Boxes boxes(r.dims, rule, tiling, shape);
  const int chunks = tiling.chunks();
  out.coords.reserve(sets.size());
  for (size_t i = 0; i < sets.size(); ++i) {
    const auto devices = tiling.devices_of(static_cast<int>(i) / chunks);
    out.coords.push_back({.box = boxes.of(sets[i]), .chunk = static_cast<int>(i) % chunks, .devices = {devices.begin(), devices.end()}});
  }
  // A result that no cut makes partial is complete whatever its rule could sum.
  const bool cut_missing = std::any_of(tiling.cuts.begin(), tiling.cuts.end(), [&](const FactorParts& c) {
    if (c.tiles() * c.chunks() == 1) return false;
    return std::none_of(r.dims.begin(), r.dims.end(), [&](const DimExpr& d) { return std::count(d.factors.begin(), d.factors.end(), c.factor) > 0; });
  });
  if (!cut_missing) out.partial = Reduce::kNone;
  return out;
}

OperandCopies operand_copies(const Rule& rule, const Tiling& tiling, int operand, const std::vector<int64_t>& shape) {
  return operand_copies(rule, tiling, operand, shape, all_factor_sets(rule, tiling));
}

OperandCopies operand_copies(const Rule& rule, const Tiling& tiling, int operand, const std::vector<int64_t>& shape,
                             const std::vector<std::vector<IndexSet>>& all) {
  const Operand& o = rule.operands[operand];
  OperandCopies out;
  Boxes boxes(o.dims, rule, tiling, shape);
  std::map<std::pair<Box, std::vector<int>>, int> seen;  // of several chunks
  const int chunks = tiling.chunks(), tiles = tiling.tiles();
  // Of one chunk: mostly each device reads one copy, so those that may be equal are few.
  std::vector<std::vector<int>> of_first_device;
  out.coord_of.resize(size_t(tiles) * chunks, -1);
  for (int chunk = 0; chunk < chunks; ++chunk) {  // chunk-major, so that a shared copy is tagged with the first chunk that needs it
    for (int tile = 0; tile < tiles; ++tile) {
      const std::vector<IndexSet>& sets = all[size_t(tile) * chunks + chunk];
      const bool here = std::all_of(o.anchors.begin(), o.anchors.end(), [&](int f) { return sets[f].contains(0); });
      if (!here) continue;
      const auto devices = tiling.devices_of(tile);
      if (chunks == 1) {
        Coord copy{.box = boxes.of(sets), .devices = {devices.begin(), devices.end()}};
        of_first_device.resize(std::max<size_t>(of_first_device.size(), devices[0] + 1));
        std::vector<int>& near = of_first_device[devices[0]];
        const auto same = std::find_if(near.begin(), near.end(), [&](int c) { return out.sharding.coords[c] == copy; });
        out.coord_of[tile] = same == near.end() ? static_cast<int>(out.sharding.coords.size()) : *same;
        if (same != near.end()) continue;
        near.push_back(out.coord_of[tile]);
        out.sharding.coords.push_back(std::move(copy));
        continue;
      }
      std::pair<Box, std::vector<int>> key{boxes.of(sets), {devices.begin(), devices.end()}};
      const auto [it, fresh] = seen.emplace(key, static_cast<int>(out.sharding.coords.size()));
      if (fresh) out.sharding.coords.push_back({.box = key.first, .chunk = chunk, .devices = key.second});
      out.coord_of[size_t(tile) * chunks + chunk] = it->second;
    }
  }
  return out;
}

namespace {

std::string legal_factors(const Rule& rule) {
  std::vector<std::string> names;
  for (const Factor& f : rule.factors) {
    if (f.cut != Cuttable::kWhole)
      names.push_back(fmt::format("{} ({}, size {}{})", f.name, to_string(f.kind), f.size, f.unit > 1 ? fmt::format(", in multiples of {}", f.unit) : ""));
  }
  return names.empty() ? "none: it can only be placed or replicated" : fmt::format("{}", fmt::join(names, ", "));
}

// Cut points of `tiles` parts of [0, size), on multiples of unit.
std::vector<int64_t> cut_points(const Node& node, const Factor& factor, const Cut& cut, int64_t size, int64_t unit) {
  std::vector<int64_t> points;
  if (cut.bounds.empty()) {
    const int64_t units = size / unit;
    for (int t = 0; t <= cut.tiles; ++t) points.push_back(units * t / cut.tiles * unit);
    points.back() = size;
    return points;
  }
  const int64_t reference = cut.bounds.back();
  if (static_cast<int>(cut.bounds.size()) != cut.tiles + 1 || cut.bounds.front() != 0 || !std::is_sorted(cut.bounds.begin(), cut.bounds.end()) ||
      reference <= 0) {
    user_error("[plan] {}: {}=[{}] must rise from 0 to the factor's size {}", node.name, factor.name, fmt::join(cut.bounds, ","), size);
  }
  for (int64_t b : cut.bounds) {
    const int64_t point = reference == size ? b : (b * size + reference / 2) / reference / unit * unit;
    if (point % unit != 0) {
      user_error("[plan] {}: {}=[{}] must cut at multiples of {}", node.name, factor.name, fmt::join(cut.bounds, ","), unit);
    }
    points.push_back(point);
  }
  points.back() = size;
  return points;
}

constexpr int64_t kMaxChunks = 1024;  // each is an operator of its own; a typing error shouldn't take minutes

FactorParts make_parts(const Node& node, const Rule& rule, const FactorCut& fc, const std::optional<FedFactor>& fed) {
  const int f = rule.factor(fc.factor) < 0 && fc.factor == "n" && fed ? fed->factor : rule.factor(fc.factor);
  const Cut& cut = fc.cut;
  if (f < 0 && !(cut.fed && fed)) {
    user_error("[plan] {} ({}): no factor \"{}\"; it has {}", node.name, node.target, fc.factor, legal_factors(rule));
  }
  if (cut.tiles < 1 || cut.chunks < 1) user_error("[plan] {}: {}={}x{}t must be positive", node.name, fc.factor, cut.tiles, cut.chunks);
  if (cut.chunks > kMaxChunks) user_error("[plan] {}: {}={}x{}t has more than {} chunks", node.name, fc.factor, cut.tiles, cut.chunks, kMaxChunks);
  FactorParts out{.factor = cut.fed && fed ? fed->factor : f};
  std::vector<IndexSet> tiles;
  if (cut.fed && fed) {
    tiles = fed->parts;
  } else {
    const Factor& factor = rule.factors[f];
    if (cut.fed) user_error("[plan] {}: {}=fed, but the rows that processes feed don't reach this factor", node.name, fc.factor);
    if (factor.cut == Cuttable::kWhole && cut.tiles * cut.chunks > 1) {
      user_error("[plan] {} ({}): {} can't be cut; it has {}", node.name, node.target, factor.name, legal_factors(rule));
    }
    int64_t outer = 1, middle = factor.size, inner = 1;
    if (!cut.radix.empty()) {
      if (cut.radix.size() != 3 || cut.radix[0] * cut.radix[1] * cut.radix[2] != factor.size) {
        user_error("[plan] {}: {} has size {}, not {}", node.name, factor.name, factor.size, fmt::join(cut.radix, "*"));
      }
      outer = cut.radix[0], middle = cut.radix[1], inner = cut.radix[2];
    }
    const int64_t unit = cut.radix.empty() ? factor.unit : std::max<int64_t>(1, factor.unit / inner);
    if (cut.zigzag) {
      Cut halves = cut;
      halves.tiles = 2 * cut.tiles;
      const auto p = cut_points(node, factor, halves, middle, unit);
      for (int t = 0; t < cut.tiles; ++t) {
        const int u = 2 * cut.tiles - 1 - t;
        tiles.push_back(unite(IndexSet::interval(p[t], p[t + 1]), IndexSet::interval(p[u], p[u + 1])));
      }
    } else {
      const auto p = cut_points(node, factor, cut, middle, unit);
      for (int t = 0; t < cut.tiles; ++t) tiles.push_back(IndexSet::interval(p[t], p[t + 1]));
    }
    for (IndexSet& t : tiles) t = product(product(IndexSet::all(outer), t, middle), IndexSet::all(inner), inner);
    const bool intervals = std::all_of(tiles.begin(), tiles.end(), [](const IndexSet& t) { return t.is_interval(); });
    if (factor.cut == Cuttable::kInterval && !intervals) {
      user_error("[plan] {}: {} can only be cut into contiguous parts", node.name, factor.name);
    }
  }
  const int64_t unit = rule.factors[out.factor].unit;
  for (const IndexSet& tile : tiles) {
    const int64_t units = tile.size() / unit;
    std::vector<IndexSet> chunks;
    for (int c = 0; c < cut.chunks; ++c) {
      const int64_t begin = units * c / cut.chunks * unit;
      const int64_t end = c + 1 == cut.chunks ? tile.size() : units * (c + 1) / cut.chunks * unit;
      chunks.push_back(slice(tile, begin, end));
    }
    out.parts.push_back(std::move(chunks));
  }
  return out;
}

}  // namespace

Tiling make_tiling(const Node& node, const Rule& rule, const OpConfig& config, const std::optional<FedFactor>& fed, int world_size) {
  Tiling out;
  out.replicas = config.replicas;
  bool sampleless = false;
  for (const FactorCut& fc : config.cuts) {
    // A cut of the sample where no sample can be seen (of a weight, a constant) means the same on each of its devices.
    if ((fc.cut.fed || (fc.factor == "n" && rule.factor("n") < 0)) && !fed) {
      out.replicas *= fc.cut.tiles;
      sampleless = true;
      continue;
    }
    FactorParts parts = make_parts(node, rule, fc, fed);
    for (const FactorParts& other : out.cuts) {
      if (other.factor == parts.factor) user_error("[plan] {}: factor {} is cut twice", node.name, fc.factor);
    }
    out.cuts.push_back(std::move(parts));
  }
  for (const auto& group : rule.exclusive) {
    std::vector<std::string> cut;
    for (const FactorParts& c : out.cuts) {
      if (c.tiles() * c.chunks() > 1 && std::count(group.begin(), group.end(), c.factor)) cut.push_back(rule.factors[c.factor].name);
    }
    if (cut.size() > 1) user_error("[plan] {}: {} can't be cut together", node.name, fmt::join(cut, " and "));
  }
  for (const Result& r : rule.results) {
    for (const FactorParts& c : out.cuts) {
      const bool there =
          std::any_of(r.dims.begin(), r.dims.end(), [&](const DimExpr& d) { return std::count(d.factors.begin(), d.factors.end(), c.factor) > 0; });
      if (!there && r.reduce == Reduce::kNone && c.tiles() * c.chunks() > 1 && rule.factors[c.factor].cut != Cuttable::kExpand) {
        user_error("[plan] {}: {} can't be cut: a result lacks it and is no sum", node.name, rule.factors[c.factor].name);
      }
    }
  }
  const size_t grid = size_t(out.tiles()) * out.replicas;
  out.devices = config.devices;
  if (out.devices.empty()) {
    if (static_cast<int>(grid) > world_size) {
      user_error("[plan] {}: {} tiles x replicas on {} devices: name the devices (@ [...])", node.name, grid, world_size);
    }
    out.devices.resize(grid);
    std::iota(out.devices.begin(), out.devices.end(), 0);
  }
  if (out.devices.size() != grid) {
    user_error("[plan] {}: @ [{}] names {} devices, {} tiles x {} replicas need {}", node.name, fmt::join(out.devices, ","), out.devices.size(), out.tiles(),
               out.replicas, grid);
  }
  for (int d : out.devices) {
    if (d < 0 || d >= world_size) user_error("[plan] {}: there is no device {}; devices are 0..{}", node.name, d, world_size - 1);
  }
  if (sampleless && out.tiles() == 1) {
    std::sort(out.devices.begin(), out.devices.end());
    out.devices.erase(std::unique(out.devices.begin(), out.devices.end()), out.devices.end());
    out.replicas = static_cast<int>(out.devices.size());
  }
  for (int t = 0; t < out.tiles(); ++t) {
    std::vector<int> own(out.devices_of(t).begin(), out.devices_of(t).end());
    std::sort(own.begin(), own.end());
    if (std::adjacent_find(own.begin(), own.end()) != own.end()) {
      user_error("[plan] {}: a tile has two replicas on one device in @ [{}]", node.name, fmt::join(out.devices, ","));
    }
  }
  return out;
}

}  // namespace soap
