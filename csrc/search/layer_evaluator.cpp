// The evaluation of one configuration of a layer's structure.
#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "search/layer_structure.h"
#include "sharding/dim_set.h"
#include "sim/memory.h"
#include "sim/simulate.h"

namespace soap {
namespace {

constexpr size_t kMostCuts = 16;  // of one operator: each cuts in two at least

}  // namespace

struct LayerEvaluator::State {
  LayerStructure& s;
  const std::vector<Variant>& variants;
  int world;
  const CostModel& cost;
  Layouts& layouts;
  bool counts = std::any_of(s.members.begin(), s.members.end(), [](const auto& m) { return !m.tables.empty(); });  // parts are dims of some
  // Of the configuration at hand.
  std::vector<int> cuts = {}, degrees = {}, strides = {};  // strides: of a cut's part in the head's devices
  std::vector<std::vector<char>> kept = {};                // [member][cut]
  std::vector<std::vector<int>> order = {};                // [member]: cuts as its devices are listed, slowest first
  std::vector<int64_t> spent = {}, held = {};
  std::vector<std::vector<LayerTable::Read>> reads = {};  // per local tensor
  std::vector<int> tiles = {};                            // per local tensor: layout
  std::vector<std::vector<int64_t>> tile_sizes = {};      // per local tensor: [tile * dims + dim]
  // Of the member at hand.
  std::vector<int> own = {};        // kept cuts
  int count = 1, each = 1;          // tiles, devices of a tile
  std::vector<int> devices = {};    // [tile * each + replica]
  std::vector<int> parts = {};      // [tile * own.size() + kept cut]: part
  std::vector<int> made = {};       // [tile * dims + dim] of the operand or result at hand
  std::vector<int64_t> sizes = {};  // [tile * number of dims of all + dim]
  std::vector<char> here = {};      // [tile]
  std::vector<IndexSet> sets = {};  // per factor
  std::vector<int> taken = {};

  // The variant that cuts this factor of the head; -1 for none.
  int variant_of(int head_factor) const {
    for (int v : cuts) {
      if (variants[v].factor == head_factor) return v;
    }
    return -1;
  }

  // Gives dims that count parts the number that there are.
  void count_parts() {
    for (const LayerStructure::Member& m : s.members) {
      Rule& rule = s.program->rules[m.node];
      for (const LayerStructure::Table& t : m.tables) {
        const int v = variant_of(t.head);
        rule.factors[t.factor].size = v < 0 ? 1 : static_cast<int64_t>(variants[v].parts.size());
        DimExpr& dim = rule.operands[t.operand].dims[t.dim];
        dim = {};
        if (v >= 0) dim = {{t.factor}, IndexMap{.kind = IndexMap::Kind::kTable, .table = variants[v].parts}};
      }
      for (size_t i = 0; i < m.operands.size(); ++i) count_parts(m.operands[i], rule.operands[i].dims);
      for (size_t r = 0; r < m.results.size(); ++r) count_parts(m.results[r], rule.results[r].dims);
    }
  }

  void count_parts(const LayerStructure::Slot& slot, std::vector<DimExpr>& dims) {
    if (slot.counts.empty()) return;
    std::vector<int64_t>& shape = s.program->graph.tensors[s.tensors[slot.tensor]].shape;
    dims.clear();
    shape.clear();
    for (size_t d = 0; d < slot.counts.size(); ++d) {
      const int v = slot.counts[d] < 0 ? -1 : variant_of(slot.counts[d]);
      if (slot.counts[d] >= 0 && v < 0) continue;
      dims.push_back(slot.all_dims[d]);
      shape.push_back(v < 0 ? slot.all_sizes[d] : static_cast<int64_t>(variants[v].parts.size()));
    }
  }

  // Which cuts a member keeps; false where that depends on more than each cut by itself.
  bool keep(size_t index) {
    const LayerStructure::Member& m = s.members[index];
    const Rule& rule = s.program->rules[m.node];
    std::vector<char>& keeps = kept[index];
    keeps.assign(cuts.size(), 0);
    taken.clear();
    for (size_t i = 0; i < cuts.size(); ++i) {
      const int f = m.cuts[cuts[i]].factor;
      if (f < 0 || (m.from >= 0 && !kept[m.from][i])) continue;
      if (std::count(taken.begin(), taken.end(), f)) {
        if (m.from < 0) return false;
        const auto& dims = rule.operands[m.main].dims;
        if (std::any_of(dims.begin(), dims.end(),
                        [&](const DimExpr& d) { return d.factors.size() > 1 && std::count(d.factors.begin(), d.factors.end(), f); })) {
          return false;
        }
        continue;  // the first cut of a factor stays, others become replicas
      }
      taken.push_back(f);
      keeps[i] = 1;
    }
    for (const auto& group : rule.exclusive) {
      if (std::count_if(group.begin(), group.end(), [&](int f) { return std::count(taken.begin(), taken.end(), f) > 0; }) > 1) return false;
    }
    list_devices(m, keeps, order[index]);
    return true;
  }

  // Devices are listed by the cuts that are kept, then by those that it drops, then as its producer's replicas are (regrid in follow.cpp).
  void list_devices(const LayerStructure::Member& m, const std::vector<char>& keeps, std::vector<int>& axes) {
    axes.clear();
    if (m.from >= 0) {
      axes = order[m.from];
    } else if (!m.order.empty()) {
      for (int f : m.order) {
        for (size_t i = 0; i < cuts.size(); ++i) {
          if (variants[cuts[i]].factor == f) axes.push_back(static_cast<int>(i));
        }
      }
    } else {
      for (size_t i = 0; i < cuts.size(); ++i) axes.push_back(static_cast<int>(i));
    }
    // Stable, in place: there are few.
    size_t first = 0;
    for (size_t i = 0; i < axes.size(); ++i) {
      if (keeps[axes[i]]) {
        std::rotate(axes.begin() + static_cast<int64_t>(first), axes.begin() + static_cast<int64_t>(i), axes.begin() + static_cast<int64_t>(i) + 1);
        ++first;
      }
    }
  }

  void place(size_t index, int replicas) {
    const LayerStructure::Member& m = s.members[index];
    own.clear();
    count = 1;
    int grid = 1;
    for (int i : order[index]) {
      grid *= degrees[i];
      if (!kept[index][i]) continue;
      own.push_back(i);
      count *= degrees[i];
    }
    parts.assign(count * own.size(), 0);
    if (m.constant || cuts.empty()) {
      each = m.constant ? world : replicas;
      devices.resize(size_t(count) * each);
      std::iota(devices.begin(), devices.begin() + each, 0);
      return;
    }
    each = grid / count;
    devices.resize(grid);
    for (int slot = 0; slot < grid; ++slot) {
      int rest = slot, device = 0;
      int digits[kMostCuts] = {};
      for (size_t k = order[index].size(); k-- > 0;) {
        const int i = order[index][k];
        digits[k] = rest % degrees[i];
        device += digits[k] * strides[i];
        rest /= degrees[i];
      }
      devices[slot] = device;  // kept cuts are the slowest: slot / each is the tile
      std::copy(digits, digits + own.size(), parts.begin() + static_cast<int64_t>(slot / each * own.size()));
    }
  }

  void whole_sets(const Rule& rule) {
    sets.clear();
    for (const Factor& f : rule.factors) sets.push_back(IndexSet::all(f.size));
  }

  // Numbers of the index sets of the dim `there`, the slot's d-th, for each part of the one cut that it shows, the first of them where it shows
  // none; `counted`: the variant whose parts it counts.
  const std::vector<int>& dim_sets(const LayerStructure::Member& m, LayerStructure::Slot& slot, size_t d, size_t there, int variant, int counted) {
    std::vector<int>& out = slot.sets[d][(variant < 0 ? counted : variant) + 1];
    if (!out.empty()) return out;
    const Rule& rule = s.program->rules[m.node];
    whole_sets(rule);
    const auto number = [&] { return layouts.set(dim_set((*slot.dims)[there], rule, (*slot.shape)[there], sets)); };
    if (variant < 0) {
      out.push_back(number());
    } else {
      for (const IndexSet& part : m.cuts[variant].parts) {
        sets[m.cuts[variant].factor] = part;
        out.push_back(number());
      }
    }
    return out;
  }

  // Numbers of index sets of all tiles, and their sizes at `at` of the `width` sizes of each tile: 0 for a dim that isn't there.
  void boxes(const LayerStructure::Member& m, LayerStructure::Slot& slot, size_t at, size_t width) {
    const size_t dims = slot.dims->size();
    made.resize(count * dims);
    size_t there = 0;
    for (size_t d = 0; d < slot.sets.size(); ++d) {
      const bool counts_parts = !slot.counts.empty() && slot.counts[d] >= 0;
      const int counted = counts_parts ? variant_of(slot.counts[d]) : -1;
      if (counts_parts && counted < 0) {
        for (int t = 0; t < count; ++t) sizes[t * width + at + d] = 0;
        continue;
      }
      int shown[kMostCuts], num_shown = 0;
      const auto& factors = (*slot.dims)[there].factors;
      for (size_t k = 0; k < own.size(); ++k) {
        if (std::count(factors.begin(), factors.end(), m.cuts[cuts[own[k]]].factor)) shown[num_shown++] = static_cast<int>(k);
      }
      if (num_shown <= 1) {
        const std::vector<int>& numbers = dim_sets(m, slot, d, there, num_shown ? cuts[own[shown[0]]] : -1, counted);
        for (int t = 0; t < count; ++t) made[t * dims + there] = numbers[num_shown ? parts[t * own.size() + shown[0]] : 0];
      } else {
        const Rule& rule = s.program->rules[m.node];
        for (int t = 0; t < count; ++t) {
          whole_sets(rule);
          for (size_t k = 0; k < own.size(); ++k) sets[m.cuts[cuts[own[k]]].factor] = m.cuts[cuts[own[k]]].parts[parts[t * own.size() + k]];
          made[t * dims + there] = layouts.set(dim_set((*slot.dims)[there], rule, (*slot.shape)[there], sets));
        }
      }
      for (int t = 0; t < count; ++t) sizes[t * width + at + d] = layouts.size(made[t * dims + there]);
      ++there;
    }
  }

  void hold(int layout, int64_t bytes) {
    for (const Layout::Part& part : layouts[layout].parts) {
      for (int d : part.devices) held[d] += part.volume * bytes;
    }
  }

  OpTime time(LayerStructure::Member& m, size_t tile, size_t width) {
    const int64_t* mine = sizes.data() + tile * width;
    for (size_t i = 0; i < m.times.size(); ++i) {
      if (std::equal(mine, mine + width, m.known_sizes.begin() + static_cast<int64_t>(i * width))) return m.times[i];
    }
    // An operator whose only tile is this one.
    Tiling& tiling = s.program->tilings[m.node];
    tiling.cuts.resize(own.size(), {.parts = {{IndexSet()}}});
    for (size_t k = 0; k < own.size(); ++k) {
      const LayerStructure::NodeCut& cut = m.cuts[cuts[own[k]]];
      tiling.cuts[k].factor = cut.factor;
      tiling.cuts[k].parts[0][0] = cut.parts[parts[tile * own.size() + k]];
    }
    m.known_sizes.insert(m.known_sizes.end(), mine, mine + width);
    m.times.push_back(cost.time(*s.program, m.node, 0, 0));
    return m.times.back();
  }

  bool holds_first(const LayerStructure::Member& m, const Rule& rule, const std::vector<int>& anchors, int tile) const {
    return std::all_of(anchors.begin(), anchors.end(), [&](int f) {
      for (size_t k = 0; k < own.size(); ++k) {
        const LayerStructure::NodeCut& c = m.cuts[cuts[own[k]]];
        if (c.factor == f) return c.parts[parts[tile * own.size() + k]].contains(0);
      }
      return rule.factors[f].size > 0;
    });
  }

  Reduce partial_of(const LayerStructure::Member& m, const Result& result) const {
    for (int k : own) {
      const int f = m.cuts[cuts[k]].factor;
      const bool there =
          std::any_of(result.dims.begin(), result.dims.end(), [&](const DimExpr& d) { return std::count(d.factors.begin(), d.factors.end(), f) > 0; });
      if (!there) return result.reduce;
    }
    return Reduce::kNone;
  }

  void compute(size_t index) {
    LayerStructure::Member& m = s.members[index];
    const Program& p = *s.program;
    const Rule& rule = p.rules[m.node];
    size_t width = 0, at = 0;
    for (const auto* slots : {&m.operands, &m.results}) {
      for (const LayerStructure::Slot& slot : *slots) width += slot.sets.size();
    }
    sizes.resize(count * width);
    here.resize(count);
    // Where it passes on every cut of the member that it follows, it reads what that one has made, where it lies.
    const bool as_made = m.passes && kept[index] == kept[m.from];
    const int from = m.main < 0 ? -1 : m.operands[m.main].tensor;
    const auto known_sizes = [&](size_t dims) {
      for (int t = 0; t < count; ++t)
        std::copy_n(tile_sizes[from].begin() + static_cast<int64_t>(t * dims), dims, sizes.begin() + static_cast<int64_t>(t * width + at));
    };
    for (size_t i = 0; i < m.operands.size(); ++i) {
      LayerStructure::Slot& slot = m.operands[i];
      const bool known = as_made && static_cast<int>(i) == m.main;
      if (known) {
        known_sizes(slot.dims->size());
      } else {
        boxes(m, slot, at, width);
        for (int t = 0; t < count; ++t) here[t] = static_cast<char>(holds_first(m, rule, rule.operands[i].anchors, t));
      }
      at += slot.sets.size();
      const Tensor& tensor = p.graph.tensors[s.tensors[slot.tensor]];
      const bool gradient = tensor.requires_grad && rule.operands[i].differentiable && p.differentiable[m.node];
      const int copies = known ? tiles[from] : layouts.add(Reduce::kNone, tiles_at_hand(slot, here.data()));
      auto& list = reads[slot.tensor];
      const auto same = std::find_if(list.begin(), list.end(), [&](const LayerTable::Read& r) { return r.copies == copies; });
      if (same == list.end())
        list.push_back({copies, gradient});
      else
        same->gradient = same->gradient || gradient;
    }
    for (size_t r = 0; r < m.results.size(); ++r) {
      LayerStructure::Slot& slot = m.results[r];
      if (as_made) {
        known_sizes(slot.dims->size());
        tiles[slot.tensor] = tiles[from];
        tile_sizes[slot.tensor] = tile_sizes[from];
      } else {
        boxes(m, slot, at, width);
        tiles[slot.tensor] = layouts.add(partial_of(m, rule.results[r]), tiles_at_hand(slot, nullptr));
        tile_sizes[slot.tensor].resize(made.size());
        for (size_t k = 0; k < made.size(); ++k) tile_sizes[slot.tensor][k] = layouts.size(made[k]);
      }
      at += slot.sets.size();
      const Tensor& tensor = p.graph.tensors[s.tensors[slot.tensor]];
      if (rule.results[r].saved && !rule.view && p.differentiable[m.node]) hold(tiles[slot.tensor], tensor.element_bytes + rule.results[r].saved_bytes_more);
    }
    for (int t = 0; t < count; ++t) {
      const OpTime ns = time(m, t, width);
      for (int k = 0; k < each; ++k) spent[devices[t * each + k]] += ns.forward_ns + ns.backward_ns;
    }
  }

  Layouts::Tiles tiles_at_hand(const LayerStructure::Slot& slot, const char* where) const {
    return {.count = static_cast<size_t>(count),
            .dims = slot.dims->size(),
            .replicas = static_cast<size_t>(each),
            .sets = made.data(),
            .devices = devices.data(),
            .here = where};
  }

  int64_t move() {
    const Program& p = *s.program;
    int64_t ns = 0;
    for (size_t i = 0; i < s.tensors.size(); ++i) {
      const Tensor& t = p.graph.tensors[s.tensors[i]];
      if (reads[i].empty()) continue;
      if (p.graph.nodes[t.producer].kind == NodeKind::kParam) {
        tiles[i] = layouts.storage(reads[i].front().copies, t.shape, world);
        hold(tiles[i], t.element_bytes * (t.requires_grad ? 2 + kOptimizerCopies : 1));
        for (const Layout::Part& part : layouts[tiles[i]].parts) {
          for (int d : part.devices) spent[d] += t.requires_grad ? update_ns(cost.machine(), d, part.volume * t.element_bytes) : 0;
        }
      }
      if (tiles[i] < 0) continue;  // whole on every device, or another layer's
      for (const LayerTable::Read& r : reads[i]) ns += layouts.reshard_ns(tiles[i], r.copies, t, r.gradient);
    }
    return ns;
  }

  std::optional<LayerEntry> evaluate(int replicas) {
    SOAP_CHECK(cuts.size() <= kMostCuts, "[search] {} cuts of one operator", cuts.size());
    degrees.clear();
    for (int v : cuts) degrees.push_back(static_cast<int>(variants[v].parts.size()));
    strides.assign(cuts.size(), 1);
    for (size_t i = cuts.size(); i-- > 1;) strides[i - 1] = strides[i] * degrees[i];
    spent.assign(world, 0);
    held.assign(world, 0);
    for (auto& list : reads) list.clear();
    std::fill(tiles.begin(), tiles.end(), -1);
    if (counts) count_parts();
    for (size_t m = 0; m < s.members.size(); ++m) {
      if (!keep(m)) return std::nullopt;
      place(m, replicas);
      compute(m);
    }
    LayerEntry out;
    const int64_t moved = move();
    out.ns = *std::max_element(spent.begin(), spent.end()) + moved;
    out.memory_bytes = *std::max_element(held.begin(), held.end());
    for (int i : s.inputs) out.reads.push_back(reads[i]);
    for (int o : s.outputs) out.makes.push_back(tiles[o]);
    return out;
  }
};

LayerEvaluator::LayerEvaluator(LayerStructure& structure, const std::vector<Variant>& variants, int world_size, const CostModel& cost, Layouts& layouts)
    : state_(new State{.s = structure, .variants = variants, .world = world_size, .cost = cost, .layouts = layouts}) {
  state_->kept.resize(structure.members.size());
  state_->order.resize(structure.members.size());
  state_->reads.resize(structure.tensors.size());
  state_->tiles.resize(structure.tensors.size());
  state_->tile_sizes.resize(structure.tensors.size());
  for (const LayerStructure::Member& m : structure.members) structure.program->tilings[m.node] = {.devices = {0}};
}

LayerEvaluator::~LayerEvaluator() = default;

std::optional<LayerEntry> LayerEvaluator::evaluate(const std::vector<int>& cuts, int replicas) {
  state_->cuts = cuts;
  return state_->evaluate(replicas);
}

}  // namespace soap
