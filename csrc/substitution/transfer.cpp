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

Strategy transferred(const OpGraph& before, const Strategy& strategy, const std::vector<Rewrite>& rewrites, const OpGraph& after) {
  Strategy out = strategy;
  out.rewrites.insert(out.rewrites.end(), rewrites.begin(), rewrites.end());
  std::map<std::string_view, const Node*> old, now;
  for (const Node& n : before.nodes) old[n.name] = &n;
  for (const Node& n : after.nodes) now[n.name] = &n;
  const auto parent = [](std::string_view name) { return name.substr(0, std::min(name.rfind('/'), name.size())); };
  std::erase_if(out.nodes, [&](const auto& entry) { return !now.count(entry.first) && !now.count(parent(entry.first)); });
  std::erase_if(out.edges, [&](const auto& entry) { return !now.count(entry.first.first) || !now.count(entry.first.second); });
  std::map<std::string_view, const Rewrite*> by_anchor;
  for (const Rewrite& r : rewrites) by_anchor[r.anchors[0]] = &r;
  std::map<TensorId, std::pair<const Node*, size_t>> reader;  // the first, and which of its operands
  for (const Node& n : after.nodes) {
    for (size_t i = 0; n.kind == NodeKind::kOp && i < n.inputs.size(); ++i) reader.emplace(n.inputs[i], std::pair{&n, i});
  }
  const auto made_by = [&](const Node& n) -> const Rewrite* {
    const auto it = by_anchor.find(parent(n.name));
    return n.kind != NodeKind::kOp || old.count(n.name) || it == by_anchor.end() ? nullptr : it->second;
  };
  for (const Node& n : after.nodes) {  // made like an anchor
    const Rewrite* rewrite = made_by(n);
    const Node* first = rewrite && old.count(rewrite->anchors[0]) ? old.at(rewrite->anchors[0]) : nullptr;
    const auto known = first ? strategy.nodes.find(first->name) : strategy.nodes.end();
    if (known == strategy.nodes.end() || n.target != first->target) continue;
    const auto config = joined_config(known->second, make_rule(before, *first, out.world_size), make_rule(after, n, out.world_size),
                                      static_cast<int64_t>(rewrite->anchors.size()));
    if (config) out.nodes[n.name] = *config;
  }
  for (const Node& n : after.nodes) {  // made of stores only: where and as its reader needs it
    const auto read = reader.find(n.outputs.empty() ? -1 : n.outputs[0]);
    if (!made_by(n) || !reads_stores_only(after, n) || read == reader.end()) continue;
    const auto& [node, operand] = read->second;
    const auto config = out.nodes.find(node->name);
    if (config != out.nodes.end()) out.nodes[n.name] = read_config(config->second, make_rule(after, *node, out.world_size), operand);
  }
  return out;
}

}  // namespace soap
