// Following: the tiling that keeps a tensor where its producer put it.
#include <algorithm>
#include <set>
#include <span>

#include "base/error.h"
#include "sharding/dim_set.h"
#include "sharding/tiling.h"

namespace soap {
namespace {

using Parts = std::vector<std::vector<IndexSet>>;

template <class F>
Parts transform(const Parts& parts, F f) {
  Parts out = parts;
  for (auto& tile : out) {
    for (IndexSet& set : tile) set = f(set);
  }
  return out;
}

// Keeps the cuts named by `kept` and turns the other tile axes into replicas.
struct Grid {
  std::vector<int> devices;
  int replicas = 1;
};
Grid regrid(const std::vector<int>& degrees, const std::vector<char>& kept, int replicas, const std::vector<int>& devices) {
  if (replicas == 1 && std::count(kept.begin(), kept.end(), 0) == 0) return {devices, 1};
  std::vector<std::vector<int>> rows;  // [kept tile] -> devices
  size_t kept_tiles = 1;
  for (size_t i = 0; i < degrees.size(); ++i) kept_tiles *= kept[i] ? degrees[i] : 1;
  rows.resize(kept_tiles);
  for (size_t slot = 0; slot < devices.size(); ++slot) {
    size_t rest = slot / replicas, row = 0, scale = 1;
    for (size_t i = degrees.size(); i-- > 0;) {
      if (kept[i]) {
        row += rest % degrees[i] * scale;
        scale *= degrees[i];
      }
      rest /= degrees[i];
    }
    auto& r = rows[row];
    if (std::find(r.begin(), r.end(), devices[slot]) == r.end()) r.push_back(devices[slot]);
  }
  // Tiles with fewer distinct devices than others drop to the smallest count: replicas are the same for all tiles.
  size_t count = rows[0].size();
  for (const auto& r : rows) count = std::min(count, r.size());
  Grid out{.replicas = static_cast<int>(count)};
  for (const auto& r : rows) out.devices.insert(out.devices.end(), r.begin(), r.begin() + count);
  return out;
}

// The index sets of factor `f` of a dim whose factors are `dim.factors` such that the dim's sets are as given; empty when there are none.
Parts factor_parts(const Rule& rule, const DimExpr& dim, int f, const Parts& sets, int64_t dim_size) {
  const int64_t size = rule.factors[f].size;
  if (dim.map) {
    // Windows and slices: the same proportions, for interval parts only.
    const auto scaled = [&](int64_t i) { return i * size / std::max<int64_t>(dim_size, 1); };
    for (const auto& tile : sets) {
      for (const IndexSet& s : tile) {
        if (!s.is_interval()) return {};
      }
    }
    return transform(sets, [&](const IndexSet& s) { return s.empty() ? s : IndexSet::interval(scaled(s.begin()), scaled(s.end())); });
  }
  if (dim.factors.size() == 1) return sets;
  int64_t inner = 1, outer = 1;
  bool before = true;
  for (int g : dim.factors) {
    if (g == f)
      before = false;
    else
      (before ? outer : inner) *= rule.factors[g].size;
  }
  Parts out = transform(sets, [&](const IndexSet& s) { return s.empty() ? s : digit(s, inner, size); });
  for (size_t t = 0; t < sets.size(); ++t) {
    for (size_t c = 0; c < sets[t].size(); ++c) {
      const IndexSet whole = product(product(IndexSet::all(outer), out[t][c], size), IndexSet::all(inner), inner);
      if (whole != sets[t][c]) return {};
    }
  }
  return out;
}

// Every index of [0, size) is in one of them: their runs, each set's in order, follow each other without a gap.
bool partition(const Parts& parts, int64_t size) {
  std::vector<std::span<const Run>> left;
  for (const auto& tile : parts) {
    for (const IndexSet& s : tile) {
      if (!s.empty()) left.push_back(s.runs());
    }
  }
  int64_t end = 0;
  for (size_t at = 0, refused = 0; refused < left.size();) {
    if (!left[at].empty() && left[at].front().begin == end) {
      end = left[at].front().end;
      left[at] = left[at].subspan(1);
      refused = 0;
    } else {
      ++refused;
    }
    at = (at + 1) % left.size();
  }
  return end == size && std::all_of(left.begin(), left.end(), [](std::span<const Run> runs) { return runs.empty(); });
}

bool may_cut(const Factor& factor, const Parts& parts) {
  if (factor.cut == Cuttable::kWhole) return false;
  if (factor.cut == Cuttable::kExpand && factor.kind == FactorKind::kReduction) return false;
  for (const auto& tile : parts) {
    for (const IndexSet& s : tile) {
      if (factor.cut != Cuttable::kAny && !s.is_interval()) return false;
      for (const Run& r : s.runs()) {
        if (r.begin % factor.unit || (r.end % factor.unit && r.end != factor.size)) return false;
      }
    }
  }
  return true;
}

}  // namespace

TensorTiling tensor_tiling(const Rule& rule, const Tiling& tiling, int result, const std::vector<int64_t>& shape) {
  const auto& dims = rule.results[result].dims;
  TensorTiling out;
  std::vector<int> degrees;
  std::vector<char> kept;
  for (const FactorParts& cut : tiling.cuts) {
    degrees.push_back(cut.tiles());
    kept.push_back(0);
    for (size_t d = 0; d < dims.size() && !kept.back(); ++d) {
      if (!std::count(dims[d].factors.begin(), dims[d].factors.end(), cut.factor)) continue;
      std::vector<IndexSet> sets;
      for (const Factor& f : rule.factors) sets.push_back(IndexSet::all(f.size));
      Parts parts = transform(cut.parts, [&](const IndexSet& s) {
        sets[cut.factor] = s;
        return dim_set(dims[d], rule, shape[d], sets);
      });
      kept.back() = 1;
      out.cuts.push_back({.dim = static_cast<int>(d), .parts = std::move(parts)});
    }
  }
  const Grid grid = regrid(degrees, kept, tiling.replicas, tiling.devices);
  out.devices = grid.devices;
  out.replicas = grid.replicas;
  return out;
}

Tiling follow(const Rule& rule, int operand, const TensorTiling& tensor, const std::vector<int64_t>& shape) {
  const auto& dims = rule.operands[operand].dims;
  Tiling out;
  std::vector<int> degrees;
  std::vector<char> kept;
  std::set<int> taken;
  for (const auto& cut : tensor.cuts) {
    degrees.push_back(static_cast<int>(cut.parts.size()));
    kept.push_back(0);
    for (int f : dims[cut.dim].factors) {
      if (taken.count(f)) continue;
      const Factor& factor = rule.factors[f];
      const Parts parts = factor_parts(rule, dims[cut.dim], f, cut.parts, shape[cut.dim]);
      if (parts.empty() || !partition(parts, factor.size) || !may_cut(factor, parts)) continue;
      const bool clash = std::any_of(rule.exclusive.begin(), rule.exclusive.end(), [&](const std::vector<int>& group) {
        return std::count(group.begin(), group.end(), f) && std::any_of(group.begin(), group.end(), [&](int g) { return taken.count(g) > 0; });
      });
      // A factor that some result lacks without being a sum can't be cut.
      const bool lost = factor.cut != Cuttable::kExpand && std::any_of(rule.results.begin(), rule.results.end(), [&](const Result& r) {
                          return r.reduce == Reduce::kNone && std::none_of(r.dims.begin(), r.dims.end(), [&](const DimExpr& d) {
                                   return std::count(d.factors.begin(), d.factors.end(), f) > 0;
                                 });
                        });
      if (clash || lost) continue;
      taken.insert(f);
      kept.back() = 1;
      out.cuts.push_back({.factor = f, .parts = parts});
      break;
    }
  }
  const Grid grid = regrid(degrees, kept, tensor.replicas, tensor.devices);
  out.devices = grid.devices;
  out.replicas = grid.replicas;
  return out;
}

}  // namespace soap
