#include "substitution/transfer.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "fmt/format.h"
#include "sharding/rule.h"

namespace soap {
namespace {

// The configuration of one of `count` equal operators, for the one that does all their work: `longer` is its rule, `shorter` theirs.
std::optional<OpConfig> joined_config(const OpConfig& config, const Rule& shorter, const Rule& longer, int64_t count) {
  OpConfig out = config;
  for (FactorCut& c : out.cuts) {
    const int a = shorter.factor(c.factor), b = longer.factor(c.factor);
    if (a < 0 && b < 0) continue;  // n, where the rule has another name for the rows
    if (a < 0 || b < 0) return std::nullopt;
    const int64_t one = shorter.factors[a].size, all = longer.factors[b].size;
    if (one == all || c.cut.fed) continue;
    if (!c.cut.radix.empty() || !c.cut.bounds.empty() || c.cut.zigzag || all != one * count) return std::nullopt;
    c.cut.radix = {count, one, 1};
  }
  return out;
}

// The configuration with which a node makes exactly what the tiles of its reader read of its result.
OpConfig read_config(const OpConfig& reader, const Rule& rule, size_t operand) {
  OpConfig out;
  std::vector<char> kept;
  int grid = reader.replicas;
  for (const FactorCut& c : reader.cuts) {
    const int f = rule.factor(c.factor);
    grid *= c.cut.tiles;
    kept.push_back(0);
    const auto& dims = rule.operands[operand].dims;
    for (size_t d = 0; d < dims.size(); ++d) {
      if (f < 0 || c.cut.fed || dims[d].map || dims[d].factors != std::vector<int>{f}) continue;
      kept.back() = 1;
      Cut cut = c.cut;
      cut.chunks = 1;
      out.cuts.push_back({fmt::format("d{}", d), cut});
    }
  }
  // Devices of each kept tile; the others' are its replicas.
  std::vector<std::vector<int>> cells(static_cast<size_t>(out.num_tiles()));
  for (int slot = 0; slot < grid; ++slot) {
    int rest = slot / reader.replicas, cell = 0, scale = 1;
    for (size_t i = reader.cuts.size(); i-- > 0;) {
      if (kept[i]) {
        cell += rest % reader.cuts[i].cut.tiles * scale;
        scale *= reader.cuts[i].cut.tiles;
      }
      rest /= reader.cuts[i].cut.tiles;
    }
    const int device = reader.devices.empty() ? slot : reader.devices[slot];
    if (!std::count(cells[cell].begin(), cells[cell].end(), device)) cells[cell].push_back(device);
  }
  size_t count = cells[0].size();
  for (const auto& cell : cells) count = std::min(count, cell.size());
  for (const auto& cell : cells) out.devices.insert(out.devices.end(), cell.begin(), cell.begin() + static_cast<int64_t>(count));
  out.replicas = static_cast<int>(count);
  return out;
}

bool reads_stores_only(const OpGraph& graph, const Node& n) {
  return std::all_of(n.inputs.begin(), n.inputs.end(), [&](TensorId t) { return is_store(graph.nodes[graph.tensors[t].producer]); });
}

}  // namespace

Strategy transferred(const OpGraph& before, const Strategy& strategy, const Rewrite& rewrite, const OpGraph& after) {
  Strategy out = strategy;
  out.rewrites.push_back(rewrite);
  const auto there = [&](const std::string& name) {
    return after.find(name) || (name.find('/') != std::string::npos && after.find(name.substr(0, name.rfind('/'))));
  };
  std::erase_if(out.nodes, [&](const auto& entry) { return !there(entry.first); });
  std::erase_if(out.edges, [&](const auto& entry) { return !after.find(entry.first.first) || !after.find(entry.first.second); });
  const Node& first = before.nodes[*before.find(rewrite.anchors[0])];
  const auto known = strategy.nodes.find(first.name);
  for (const Node& n : after.nodes) {  // made like an anchor
    if (n.kind != NodeKind::kOp || before.find(n.name) || n.target != first.target || known == strategy.nodes.end()) continue;
    const auto config = joined_config(known->second, make_rule(before, first, out.world_size), make_rule(after, n, out.world_size),
                                      static_cast<int64_t>(rewrite.anchors.size()));
    if (config) out.nodes[n.name] = *config;
  }
  for (const Node& n : after.nodes) {
    if (n.kind != NodeKind::kOp || before.find(n.name) || !reads_stores_only(after, n)) continue;
    for (const Node& reader : after.nodes) {
      const auto at = std::find(reader.inputs.begin(), reader.inputs.end(), n.outputs[0]);
      const auto config = out.nodes.find(reader.name);
      if (reader.kind != NodeKind::kOp || at == reader.inputs.end() || config == out.nodes.end()) continue;
      out.nodes[n.name] = read_config(config->second, make_rule(after, reader, out.world_size), static_cast<size_t>(at - reader.inputs.begin()));
      break;
    }
  }
  return out;
}

}  // namespace soap
