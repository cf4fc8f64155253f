#include "search/layer_structure.h"

#include <algorithm>
#include <bit>
#include <map>
#include <numeric>
#include <set>

#include "base/error.h"

namespace soap {
namespace {

std::vector<int> first_devices(int n) {
  std::vector<int> out(n);
  std::iota(out.begin(), out.end(), 0);
  return out;
}

std::vector<std::vector<IndexSet>> without_chunks(const std::vector<IndexSet>& parts) {
  std::vector<std::vector<IndexSet>> out;
  for (const IndexSet& p : parts) out.push_back({p});
  return out;
}

// Slots of all members, and the tensors by local number.
void number_tensors(LayerStructure& s) {
  std::map<TensorId, int> local;
  const OpGraph& g = s.program->graph;
  const auto number = [&](TensorId t) {
    const auto [it, fresh] = local.try_emplace(t, static_cast<int>(s.tensors.size()));
    if (fresh) s.tensors.push_back(t);
    return it->second;
  };
  for (LayerStructure::Member& m : s.members) {
    const Node& n = g.nodes[m.node];
    const Rule& rule = s.program->rules[m.node];
    const auto slot = [&](const std::vector<DimExpr>& dims, TensorId t) {
      return LayerStructure::Slot{.dims = &dims, .shape = &g.tensors[t].shape, .tensor = number(t)};
    };
    m.operands.reserve(n.inputs.size());
    m.results.reserve(n.outputs.size());
    for (size_t i = 0; i < n.inputs.size(); ++i) m.operands.push_back(slot(rule.operands[i].dims, n.inputs[i]));
    for (size_t r = 0; r < n.outputs.size(); ++r) m.results.push_back(slot(rule.results[r].dims, n.outputs[r]));
    for (auto* slots : {&m.operands, &m.results}) {
      for (LayerStructure::Slot& slot : *slots) slot.sets.resize(slot.dims->size(), std::vector<std::vector<int>>(m.cuts.size() + 1));
    }
  }
}

int local_number(const LayerStructure& s, TensorId t) {
  const auto it = std::find(s.tensors.begin(), s.tensors.end(), t);
  SOAP_CHECK(it != s.tensors.end(), "[search] tensor {} is none of the layer's", t);
  return static_cast<int>(it - s.tensors.begin());
}

// Dims of an operand that a factor looks up in a table of exactly these parts.
std::vector<LayerStructure::Table> tables_of(const Rule& rule, int factor, const FactorParts& parts, int head) {
  const auto lists_parts = [&](const std::vector<IndexSet>& table) {
    size_t i = 0;
    for (const auto& tile : parts.parts) {
      for (const IndexSet& set : tile) {
        if (i == table.size() || table[i++] != set) return false;
      }
    }
    return i == table.size();
  };
  std::vector<LayerStructure::Table> out;
  for (size_t i = 0; i < rule.operands.size(); ++i) {
    const auto& dims = rule.operands[i].dims;
    for (size_t d = 0; d < dims.size(); ++d) {
      const auto& map = dims[d].map;
      if (!map || map->kind != IndexMap::Kind::kTable || dims[d].factors != std::vector{factor} || !lists_parts(map->table)) continue;
      out.push_back({factor, static_cast<int>(i), static_cast<int>(d), head});
    }
  }
  return out;
}

std::vector<IndexSet> one_each(size_t count) {
  std::vector<IndexSet> out;
  for (size_t i = 0; i < count; ++i) out.push_back(IndexSet::interval(static_cast<int64_t>(i), static_cast<int64_t>(i) + 1));
  return out;
}

// Finds the dims of all slots that count parts: of results by factor, of operands by who makes them. False where a reader cuts one.
bool find_counts(LayerStructure& s) {
  if (std::all_of(s.members.begin(), s.members.end(), [](const LayerStructure::Member& m) { return m.tables.empty(); })) return true;
  std::vector<std::vector<int>> counts(s.tensors.size());  // per local tensor
  const auto mark = [&](LayerStructure::Slot& slot) {
    slot.counts = counts[slot.tensor];
    slot.all_dims = *slot.dims;
    slot.all_sizes = *slot.shape;
  };
  for (LayerStructure::Member& m : s.members) {
    for (LayerStructure::Slot& slot : m.operands) {
      if (counts[slot.tensor].empty()) continue;
      mark(slot);
      for (size_t d = 0; d < slot.counts.size(); ++d) {
        if (slot.counts[d] >= 0 && !slot.all_dims[d].factors.empty()) return false;
      }
    }
    for (LayerStructure::Slot& slot : m.results) {
      if (m.tables.empty()) break;
      std::vector<int> own(slot.dims->size(), -1);
      for (size_t d = 0; d < own.size(); ++d) {
        for (const LayerStructure::Table& t : m.tables) {
          const auto& factors = (*slot.dims)[d].factors;
          if (!std::count(factors.begin(), factors.end(), t.factor)) continue;
          if (factors.size() > 1) return false;
          own[d] = t.head;
        }
      }
      counts[slot.tensor] = std::move(own);
      mark(slot);
    }
  }
  return std::none_of(s.outputs.begin(), s.outputs.end(), [&](int t) { return !counts[t].empty(); });
}

bool passes(const Rule& rule, int operand) {
  const auto& dims = rule.operands[operand].dims;
  return rule.operands[operand].anchors.empty() && std::all_of(dims.begin(), dims.end(), [](const DimExpr& d) { return d.factors.size() == 1 && !d.map; }) &&
         std::all_of(rule.results.begin(), rule.results.end(), [&](const Result& r) { return r.dims == dims; });
}

// The operand whose place an operator takes by default; see default_tiling in sharding/resolve.cpp.
int main_operand(const OpGraph& g, const Node& n) {
  int main = -1;
  int64_t largest = -1;
  for (size_t i = 0; i < n.inputs.size(); ++i) {
    const Tensor& t = g.tensors[n.inputs[i]];
    if (is_store(g.nodes[t.producer]) || numel(t.shape) <= largest) continue;
    largest = numel(t.shape);
    main = static_cast<int>(i);
  }
  return main;
}

}  // namespace

std::vector<char> LayerStructure::expanding() const {
  std::vector<char> out;
  for (const Member& m : members) {
    out.resize(m.cuts.size());
    for (size_t v = 0; v < m.cuts.size(); ++v) {
      const int f = m.cuts[v].factor;
      if (f >= 0 && program->rules[m.node].factors[f].cut == Cuttable::kExpand) out[v] = 1;
    }
  }
  return out;
}

LayerStructure followed_structure(Program& program, const LayerShape& layer, const std::vector<Variant>& variants) {
  LayerStructure s{.program = &program};
  const OpGraph& g = program.graph;
  std::map<NodeId, int> member;
  for (NodeId id : layer.nodes) {
    const Node& n = g.nodes[id];
    LayerStructure::Member m{.node = id};
    m.cuts.resize(variants.size());
    const int main = m.main = id == layer.head ? -1 : main_operand(g, n);
    const auto producer = main < 0 ? member.end() : member.find(g.tensors[n.inputs[main]].producer);
    if (id == layer.head) {
      for (size_t v = 0; v < variants.size(); ++v) m.cuts[v] = {variants[v].factor, variants[v].parts};
    } else if (producer == member.end() || s.members[producer->second].constant) {
      m.constant = true;
    } else {
      m.from = producer->second;
      m.passes = passes(program.rules[id], main);
      const LayerStructure::Member& from = s.members[m.from];
      const Tensor& t = g.tensors[n.inputs[main]];
      for (size_t v = 0; v < variants.size(); ++v) {
        if (from.cuts[v].factor < 0) continue;
        Tiling tiling{.devices = first_devices(static_cast<int>(from.cuts[v].parts.size()))};
        tiling.cuts.push_back({from.cuts[v].factor, without_chunks(from.cuts[v].parts)});
        const Tiling kept = follow(program.rules[id], main, tensor_tiling(program.rules[from.node], tiling, t.result, t.shape), t.shape);
        if (kept.cuts.empty()) continue;
        m.cuts[v].factor = kept.cuts[0].factor;
        for (const auto& tile : kept.cuts[0].parts) m.cuts[v].parts.push_back(tile[0]);
      }
    }
    member[id] = static_cast<int>(s.members.size());
    s.members.push_back(std::move(m));
  }
  number_tensors(s);
  for (TensorId t : layer.inputs) s.inputs.push_back(local_number(s, t));
  for (TensorId t : layer.outputs) s.outputs.push_back(local_number(s, t));
  return s;
}

std::optional<LayerStructure> expanded_structure(Program& own, const Program& fixed, const LayerShape& layer, const std::vector<Variant>& variants) {
  std::vector<int> factors;
  for (const Variant& v : variants) {
    if (!std::count(factors.begin(), factors.end(), v.factor)) factors.push_back(v.factor);
  }
  const int count = static_cast<int>(factors.size());
  if (count > 6) return std::nullopt;
  const Rule& rule = fixed.rules[layer.head];
  const LayerAlone alone = layer_alone(fixed.graph, layer);
  Strategy strategy{.world_size = 1 << count};
  for (int f : factors) strategy.nodes[alone.head].cuts.push_back({rule.factors[f].name, {.tiles = 2}});
  Tiling head;
  try {
    head = make_tiling(fixed.graph.nodes[layer.head], rule, strategy.nodes[alone.head], std::nullopt, strategy.world_size);
    Resolved r = resolve(alone.graph, strategy, FedRows(strategy.world_size, 1));
    own.graph = std::move(r.graph);
    own.rules = std::move(r.rules);
    own.tilings = std::move(r.tilings);
  } catch (const std::invalid_argument&) {  // not all of them at once
    return std::nullopt;
  }
  own.differentiable = differentiable_nodes(own.graph, own.rules);
  LayerStructure s{.program = &own};
  std::set<std::string, std::less<>> tabled, counting;  // nodes whose expansion says by tables what counts parts; whose makes dims of two
  for (const Node& n : own.graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    const Tiling& tiling = own.tilings[n.id];
    LayerStructure::Member m{.node = n.id, .constant = alone.constants.count(n.name) > 0};
    m.cuts.resize(variants.size());
    const std::string expanded = alone.graph.find(n.name) ? "" : n.name.substr(0, n.name.rfind('/'));
    for (TensorId t : n.outputs) {
      const auto& shape = own.graph.tensors[t].shape;
      if (!expanded.empty() && std::count(shape.begin(), shape.end(), 2)) counting.insert(expanded);
    }
    if (!m.constant && (tiling.devices[0] != 0 || tiling.devices.size() != size_t{1} << count)) return std::nullopt;
    std::vector<int> axes;  // of the head: by how far apart the two devices are
    for (size_t stride = tiling.devices.size() / 2; stride > 0 && !m.constant; stride /= 2) {
      const auto apart = static_cast<unsigned>(tiling.devices[stride]);
      if (!std::has_single_bit(apart)) return std::nullopt;
      axes.push_back(count - 1 - std::countr_zero(apart));
      m.order.push_back(factors[axes.back()]);
    }
    for (size_t c = 0; c < tiling.cuts.size(); ++c) {
      const FactorParts& cut = tiling.cuts[c];
      if (m.constant || cut.tiles() != 2) return std::nullopt;
      const int axis = axes[c];
      const auto tables = tables_of(own.rules[n.id], cut.factor, head.cuts[axis], factors[axis]);
      if (!tables.empty()) {
        m.tables.insert(m.tables.end(), tables.begin(), tables.end());
        tabled.insert(expanded);
        for (size_t v = 0; v < variants.size(); ++v) {
          if (variants[v].factor == factors[axis]) m.cuts[v] = {cut.factor, one_each(variants[v].parts.size())};
        }
        continue;
      }
      if (cut.parts != head.cuts[axis].parts || own.rules[n.id].factors[cut.factor].size != rule.factors[factors[axis]].size) return std::nullopt;
      for (size_t v = 0; v < variants.size(); ++v) {
        if (variants[v].factor == factors[axis]) m.cuts[v] = {cut.factor, variants[v].parts};
      }
    }
    s.members.push_back(std::move(m));
  }
  // Parts that are a dim without a table (partial softmaxes) hold for their number only.
  if (!std::includes(tabled.begin(), tabled.end(), counting.begin(), counting.end())) return std::nullopt;
  number_tensors(s);
  for (const std::string& name : alone.inputs) s.inputs.push_back(local_number(s, own.graph.nodes[*own.graph.find(name)].outputs[0]));
  for (const std::string& name : alone.outputs) s.outputs.push_back(local_number(s, own.graph.nodes[*own.graph.find(name)].inputs[0]));
  if (!find_counts(s)) return std::nullopt;
  return s;
}

}  // namespace soap
