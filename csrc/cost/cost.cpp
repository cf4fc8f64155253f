#include "cost/cost.h"

#include <algorithm>

#include "base/error.h"
#include "cost/work.h"
#include "fmt/ranges.h"
#include "program/project.h"

namespace soap {
namespace {

Box local_box(const Program& p, const Node& n, size_t operand, const std::vector<IndexSet>& sets) {
  return box_of(p.rules[n.id].operands[operand].dims, p.rules[n.id], p.graph.input(n, static_cast<int>(operand)).shape, sets);
}

// What doesn't change the time of a computation is left out: sizes that its operands show, and which indices a part has.
std::string digest(const AttrMap& attrs) {
  std::string out;
  for (const auto& [name, value] : attrs) {
    if (name == "size" || name == "start" || name == "begins" || name == "counts" || name.starts_with("parts")) continue;
    out += std::visit(
        [&](const auto& v) -> std::string {
          using T = std::decay_t<decltype(v)>;
          if constexpr (std::is_same_v<T, std::monostate>)
            return "";
          else if constexpr (std::is_same_v<T, std::vector<int64_t>> || std::is_same_v<T, std::vector<double>>)
            return fmt::format("{}={} ", name, fmt::join(v, ","));
          else
            return fmt::format("{}={} ", name, v);
        },
        value);
  }
  return out;
}

// By what Machine::launch has it.
std::string launch_key(const Machine& machine, const Program& p, NodeId node) {
  const Node& n = p.graph.nodes[node];
  const bool view = p.rules[node].view && n.target != "split";
  return machine.launch.contains(n.target) ? n.target : view ? "view" : std::string(family_of(n));
}

// Of a later chunk: its gradients of what all chunks read (parameters) are added to theirs, in place: two reads and a write.
int64_t sums_ns(const Machine& machine, const Program& p, NodeId node, int tile, int chunk) {
  if (chunk == 0 || !p.differentiable[node]) return 0;
  const Rule& rule = p.rules[node];
  std::vector<char> chunked(rule.factors.size());
  for (const FactorParts& cut : p.tilings[node].cuts) chunked[cut.factor] = cut.chunks() > 1;
  std::vector<IndexSet> sets;
  double bytes = 0;
  for (size_t i = 0; i < rule.operands.size(); ++i) {
    const Tensor& t = p.graph.input(p.graph.nodes[node], static_cast<int>(i));
    const auto& dims = rule.operands[i].dims;
    const auto varies = [&](const DimExpr& d) { return std::any_of(d.factors.begin(), d.factors.end(), [&](int f) { return chunked[f]; }); };
    if (!t.requires_grad || !rule.operands[i].differentiable || std::any_of(dims.begin(), dims.end(), varies)) continue;
    if (sets.empty()) sets = factor_sets(rule, p.tilings[node], tile, chunk);
    bytes += static_cast<double>(volume(local_box(p, p.graph.nodes[node], i, sets)) * t.element_bytes);
  }
  return static_cast<int64_t>(3 * bytes / machine.memory_bytes_per_s * 1e9);
}

}  // namespace

std::string CostModel::key(const Program& p, NodeId node, int tile, int chunk) {
  const Node& n = p.graph.nodes[node];
  const auto sets = factor_sets(p.rules[node], p.tilings[node], tile, chunk);
  std::string out = n.target + "(";
  for (size_t i = 0; i < n.inputs.size(); ++i) {
    const Tensor& t = p.graph.input(n, static_cast<int>(i));
    out += fmt::format("{}[{}]{} ", t.dtype, fmt::join(shape(local_box(p, n, i, sets)), ","), t.requires_grad ? "'" : "");
  }
  for (size_t r = 0; r < n.outputs.size(); ++r) {
    const Tensor& t = p.graph.output(n, static_cast<int>(r));
    out += fmt::format(">[{}]", fmt::join(shape(box_of(p.rules[node].results[r].dims, p.rules[node], t.shape, sets)), ","));
  }
  return out + ") " + digest(n.attrs);
}

OpTime CostModel::roofline(const Program& p, NodeId node, int tile, int chunk) const {
  const Work work = work_of(p, node, tile, chunk);
  const double bound = std::max(work.flops / machine_.flops_of(work.family, work.dtype), work.bytes / machine_.memory_bytes_per_s);
  const auto [forward_part, backward_part] = machine_.parts_of(work.family, work.dtype, work.size, work.width);
  if (!machine_.launch.empty() && bound == 0 && work.backward_bytes.value_or(0) == 0) return {};  // a view: nothing is launched
  const auto queued = machine_.launch.empty() ? machine_.launch.end() : machine_.launch.find(launch_key(machine_, p, node));
  const bool within = queued != machine_.launch.end() && queued->second == std::array{0.0, 0.0};  // another operator's call
  const double overhead = within ? 0 : machine_.op_overhead_ns;
  const double ns = overhead + bound / forward_part * 1e9;
  const double backward =
      work.backward_bytes ? overhead + *work.backward_bytes / machine_.memory_bytes_per_s / backward_part * 1e9 : 2 * (overhead + bound / backward_part * 1e9);
  return {.forward_ns = static_cast<int64_t>(ns), .backward_ns = p.differentiable[node] ? static_cast<int64_t>(backward) : 0};
}

OpTime CostModel::launch(const Program& p, NodeId node) const {
  if (machine_.launch.empty()) return {};
  const std::string key = launch_key(machine_, p, node);
  return {.forward_ns = machine_.launch_ns(key), .backward_ns = p.differentiable[node] ? machine_.launch_ns(key, true) : 0};
}

OpTime CostModel::time(const Program& p, NodeId node, int tile, int chunk) const {
  const int64_t sums = sums_ns(machine_, p, node, tile, chunk);
  const auto it = measured_.empty() ? measured_.end() : measured_.find(key(p, node, tile, chunk));
  if (it != measured_.end()) return {it->second.forward_ns, p.differentiable[node] ? it->second.backward_ns + sums : 0};
  OpTime t = roofline(p, node, tile, chunk);
  const auto ratio = ratios_.find(p.graph.nodes[node].target);
  if (ratio != ratios_.end()) {
    t.forward_ns = static_cast<int64_t>(static_cast<double>(t.forward_ns) * ratio->second.forward / ratio->second.count);
    t.backward_ns = static_cast<int64_t>(static_cast<double>(t.backward_ns) * ratio->second.backward / ratio->second.count);
  }
  t.backward_ns += sums;
  return t;
}

void CostModel::measure(const Program& p, const OpSample& sample, OpTime time) {
  measured_[sample.key] = time;
  const OpTime model = roofline(p, sample.node, sample.tile, sample.chunk);
  Ratio& r = ratios_[p.graph.nodes[sample.node].target];
  r.forward += static_cast<double>(time.forward_ns) / static_cast<double>(std::max<int64_t>(model.forward_ns, 1));
  r.backward += model.backward_ns > 0 ? static_cast<double>(time.backward_ns) / static_cast<double>(model.backward_ns) : 0.0;
  ++r.count;
}

std::vector<OpSample> CostModel::missing(const Program& p) const {
  std::map<std::string, OpSample> out;
  for (const Node& n : p.graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    for (int tile = 0; tile < p.tilings[n.id].tiles(); ++tile) {
      for (int chunk = 0; chunk < p.tilings[n.id].chunks(); ++chunk) {
        std::string k = key(p, n.id, tile, chunk);
        if (!measured_.count(k)) out.emplace(k, OpSample{k, n.id, tile, chunk});
      }
    }
  }
  std::vector<OpSample> list;
  for (auto& [k, sample] : out) list.push_back(std::move(sample));
  return list;
}

std::vector<OpSample> CostModel::turns(const Program& p, const std::set<std::string>& keys) {
  std::vector<OpSample> out;
  std::set<std::string> seen;
  for (int rank = 0; rank < p.world_size && seen.size() < keys.size(); ++rank) {
    std::set<std::string> of_rank;
    for (const Segment& segment : project(p, rank).segments) {
      for (const ComputeItem& item : segment.items) {
        std::string k = key(p, item.node, item.tile, item.chunk);
        if (item.empty || !keys.count(k) || seen.count(k)) continue;
        of_rank.insert(k);
        out.push_back({std::move(k), item.node, item.tile, item.chunk});
      }
    }
    seen.merge(of_rank);
  }
  return out;
}

}  // namespace soap
