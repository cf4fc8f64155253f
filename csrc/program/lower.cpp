// lower: Strategy -> Program, on the graph that the strategy's rewrites leave.
// 1. resolve: configurations become tilings, operators that cut a coupling factor are expanded.
// 2. Layouts: tiles of each tensor, copies that each consumer needs; parameters are stored where they are used unless told.
// 3. Tasks: fill, compute and their duals, per chunk; a task waits for exactly the tasks whose values it reads.
// 4. One order of them all. Gradients of parameters wait for a bucket to fill.
#include <algorithm>
#include <numeric>
#include <set>

#include "base/error.h"
#include "fmt/ranges.h"
#include "program/item_flows.h"
#include "program/lower_rewritten.h"
#include "program/order.h"
#include "sharding/expand.h"
#include "sharding/region.h"

namespace soap {

Sharding derived_storage(const Tensor& t, const Sharding* copies, int world_size) {
  std::vector<int> all(world_size);
  std::iota(all.begin(), all.end(), 0);
  const Sharding whole{.coords = {{.box = whole_box(t.shape), .devices = all}}};
  if (!copies) return whole;
  Sharding out;
  std::set<int> used;
  int64_t covered = 0;
  for (const Coord& c : copies->coords) {
    auto same = std::find_if(out.coords.begin(), out.coords.end(), [&](const Coord& o) { return o.box == c.box; });
    if (same == out.coords.end()) {
      for (const Coord& o : out.coords) {
        if (volume(intersect(o.box, c.box)) > 0) return whole;
      }
      out.coords.push_back({.box = c.box});
      same = out.coords.end() - 1;
      covered += volume(c.box);
    }
    for (int d : c.devices) {
      if (std::count(same->devices.begin(), same->devices.end(), d)) continue;
      if (!used.insert(d).second) return whole;
      same->devices.push_back(d);
    }
  }
  if (covered != numel(t.shape)) return whole;
  for (Coord& c : out.coords) std::sort(c.devices.begin(), c.devices.end());
  std::erase_if(out.coords, [](const Coord& c) { return volume(c.box) == 0; });
  return out.coords.empty() ? whole : out;
}

Sharding configured_storage(const Node& node, const Rule& rule, const Tiling& tiling, const Tensor& t) {
  if (node.kind != NodeKind::kParam) user_error("[plan] {}: only parameters can be stored in parts", node.name);
  if (tiling.chunks() > 1) user_error("[plan] {}: storage isn't cut in time", node.name);
  Sharding out = result_sharding(rule, tiling, 0, t.shape);
  std::set<int> used;
  for (const Coord& c : out.coords) {
    for (int d : c.devices) {
      if (!used.insert(d).second) user_error("[plan] {}: device {} would store two parts of it; a device stores one", node.name, d);
    }
  }
  return out;
}

namespace {

void build_layouts(Program& p, const Strategy& strategy) {
  OpGraph& g = p.graph;
  p.tiles.resize(g.tensors.size());
  p.groups_of.resize(g.tensors.size());
  for (const Node& node : g.nodes) {
    const Tiling& tiling = p.tilings[node.id];
    const Rule& rule = p.rules[node.id];
    for (size_t i = 0; i < node.inputs.size(); ++i) {
      const TensorId t = node.inputs[i];
      OperandCopies copies = operand_copies(rule, tiling, static_cast<int>(i), g.tensors[t].shape);
      const auto known = std::find_if(p.groups_of[t].begin(), p.groups_of[t].end(), [&](int id) { return p.groups[id].copies == copies.sharding; });
      int id = known == p.groups_of[t].end() ? -1 : *known;
      if (id < 0) {
        id = static_cast<int>(p.groups.size());
        p.groups.push_back({.tensor = t, .copies = copies.sharding});
        p.groups_of[t].push_back(id);
      }
      const bool writes = node.kind == NodeKind::kReturn && node.target == "buffer_write";
      const bool grad =
          g.tensors[t].requires_grad && rule.operands[i].differentiable && !writes && (node.kind == NodeKind::kReturn || p.differentiable[node.id]);
      p.groups[id].grad = p.groups[id].grad || grad;
      const auto edge = strategy.edges.find({g.nodes[g.tensors[t].producer].name, node.name});
      if (edge != strategy.edges.end()) p.groups[id].via = edge->second;
      p.groups[id].uses.push_back({.node = node.id, .operand = static_cast<int>(i), .coord_of = std::move(copies.coord_of)});
    }
    if (is_store(node)) continue;
    for (size_t r = 0; r < node.outputs.size(); ++r) {
      p.tiles[node.outputs[r]] = result_sharding(rule, tiling, static_cast<int>(r), g.tensors[node.outputs[r]].shape);
    }
  }
  for (const Node& node : g.nodes) {
    if (!is_store(node)) continue;
    const Tensor& t = g.tensors[node.outputs[0]];
    const auto it = strategy.nodes.find(node.name);
    const auto known = strategy.stored.find(node.name);
    if (known != strategy.stored.end()) {
      for (const StoredPart& part : known->second) p.tiles[t.id].coords.push_back({.box = part.box, .devices = part.devices});
      if (it != strategy.nodes.end()) {
        for (int id : p.groups_of[t.id]) p.groups[id].keep = it->second.keep;
      }
    } else if (it == strategy.nodes.end()) {
      const bool used = node.kind == NodeKind::kParam && !p.groups_of[t.id].empty();
      p.tiles[t.id] = derived_storage(t, used ? &p.groups[p.groups_of[t.id].front()].copies : nullptr, p.world_size);
    } else {
      p.tiles[t.id] = configured_storage(node, p.rules[node.id], p.tilings[node.id], t);
      for (int id : p.groups_of[t.id]) p.groups[id].keep = it->second.keep;
    }
  }
}

void check_partials(const Program& p) {
  for (const Node& node : p.graph.nodes) {
    if (node.kind != NodeKind::kOp) continue;
    for (size_t r = 0; r < node.outputs.size(); ++r) {
      const Tensor& t = p.graph.tensors[node.outputs[r]];
      const Sharding& s = p.tiles[t.id];
      if (s.partial != Reduce::kNone) continue;
      int64_t total = 0;
      for (const Coord& c : s.coords) total += volume(c.box);
      SOAP_CHECK(total == numel(t.shape), "[lower] {} ({}): the tiles of result {} hold {} elements of {}", node.name, node.target, r, total, numel(t.shape));
    }
  }
}

bool crosses(const Program& p, StepKind kind, const StepItem& item) {
  return !item_flows(p, kind, item).movement.ranks.empty();
}

std::vector<int> devices_of(const Flows& flows) {
  std::set<int> out;
  for (const Flow& x : flows.list) out.insert({x.from, x.to});
  return {out.begin(), out.end()};
}

// Builds tasks; every id below is an index into `tasks`.
struct TaskBuilder {
  Program& p;
  std::vector<Task> forward, backward;
  std::map<std::pair<int, int>, int> compute, fill;            // (node, chunk), (group, tag) -> forward task
  std::map<std::pair<int, int>, int> compute_back, grad_fill;  // (node, chunk), (group, producer chunk) -> backward task

  double phase(const Node& n, int chunk) const { return static_cast<double>(chunk) / p.tilings[n.id].chunks(); }

  std::vector<int> node_devices(const Node& n) const {
    std::set<int> s(p.tilings[n.id].devices.begin(), p.tilings[n.id].devices.end());
    return {s.begin(), s.end()};
  }

  double work(const Node& n) const {
    double v = 1;
    for (const Factor& f : p.rules[n.id].factors) v *= static_cast<double>(std::max<int64_t>(f.size, 1));
    return v / (p.tilings[n.id].tiles() * p.tilings[n.id].chunks());
  }

  std::set<int> tags(const CopyGroup& g) const {
    std::set<int> out;
    for (const Coord& c : g.copies.coords) out.insert(c.chunk);
    return out;
  }

  // Chunks of the producer: 1 for params and feeds.
  std::set<int> source_chunks(const CopyGroup& g) const {
    std::set<int> out;
    for (const Coord& c : p.tiles[g.tensor].coords) out.insert(c.chunk);
    return out;
  }

  // Nothing has to be computed for its gradient: that of all micro-batches comes at once, or stages would wait for each other.
  bool only_returned(const CopyGroup& g) const {
    return std::all_of(g.uses.begin(), g.uses.end(), [&](const Use& u) { return p.graph.nodes[u.node].kind == NodeKind::kReturn; });
  }

  bool is_op(TensorId t) const { return p.graph.nodes[p.graph.tensors[t].producer].kind == NodeKind::kOp; }

  void build_forward() {
    std::vector<int> group_of_use;  // index of the group that (node, operand) reads
    std::map<std::pair<int, int>, std::pair<int, const Use*>> reads;
    for (size_t g = 0; g < p.groups.size(); ++g) {
      for (const Use& u : p.groups[g].uses) reads[{u.node, u.operand}] = {static_cast<int>(g), &u};
    }
    for (const Node& n : p.graph.nodes) {
      if (is_store(n) || n.kind == NodeKind::kFeed) continue;
      const int chunks = p.tilings[n.id].chunks(), tiles = p.tilings[n.id].tiles();
      for (int c = 0; c < chunks; ++c) {
        std::vector<int> after;
        for (size_t i = 0; i < n.inputs.size(); ++i) {
          const auto& [g, use] = reads.at({n.id, static_cast<int>(i)});
          std::set<int> needed;
          for (int t = 0; t < tiles; ++t) {
            const int coord = use->coord_of[size_t(t) * chunks + c];
            if (coord >= 0) needed.insert(p.groups[g].copies.coords[coord].chunk);
          }
          for (int tag : needed) after.push_back(fill_task(g, tag, n, c));
        }
        if (n.kind != NodeKind::kOp) continue;
        const int id = static_cast<int>(forward.size());
        forward.push_back({.step = {StepKind::kCompute, {{n.id, c}}},
                           .after = after,
                           .devices = node_devices(n),
                           .phase = phase(n, c),
                           .rank = n.id * 2 + 1,
                           .work = work(n)});
        compute[{n.id, c}] = id;
      }
    }
  }

  int fill_task(int g, int tag, const Node& consumer, int chunk) {
    const auto it = fill.find({g, tag});
    if (it != fill.end()) return it->second;
    const CopyGroup& group = p.groups[g];
    const StepItem item{g, tag};
    const Flows flows = item_flows(p, StepKind::kFill, item);
    std::set<int> after;
    if (is_op(group.tensor)) {
      const NodeId producer = p.graph.tensors[group.tensor].producer;
      for (const Flow& x : flows.list) after.insert(compute.at({producer, p.tiles[group.tensor].coords[x.src].chunk}));
    }
    const int id = static_cast<int>(forward.size());
    // Rows that other processes feed come before everything where there are micro-batches: fetched in their turn, they would make stages wait for each other.
    const bool ahead =
        p.graph.nodes[p.graph.tensors[group.tensor].producer].kind == NodeKind::kFeed && p.tilings[consumer.id].chunks() > 1 && !flows.movement.ranks.empty();
    forward.push_back({.step = {StepKind::kFill, {item}},
                       .after = {after.begin(), after.end()},
                       .devices = devices_of(flows),
                       .phase = ahead ? -1 : phase(consumer, chunk),
                       .rank = consumer.id * 2,
                       .work = 0});
    fill[{g, tag}] = id;
    return id;
  }

  // Backward tasks, with dependencies on backward tasks only; the callers add those on forward tasks.
  void build_backward() {
    std::map<NodeId, std::vector<std::pair<int, const Use*>>> reads;
    for (size_t g = 0; g < p.groups.size(); ++g) {
      for (const Use& u : p.groups[g].uses) reads[u.node].emplace_back(static_cast<int>(g), &u);
    }
    for (auto n = p.graph.nodes.rbegin(); n != p.graph.nodes.rend(); ++n) {
      if (n->kind == NodeKind::kOp && p.differentiable[n->id]) {
        for (int c = p.tilings[n->id].chunks() - 1; c >= 0; --c) {
          std::vector<int> after;
          for (TensorId t : n->outputs) {
            for (int g : p.groups_of[t]) {
              if (p.groups[g].grad) after.push_back(grad_fill.at({g, c}));
            }
          }
          compute_back[{n->id, c}] = static_cast<int>(backward.size());
          backward.push_back(
              {.step = {StepKind::kComputeBackward, {{n->id, c}}}, .after = after, .devices = node_devices(*n), .work = 2 * work(*n), .backward = true});
        }
      }
      // All of this node's readers come later in the graph, so what it reads may be brought home once they are done: one task per
      // group, made when the group's first user (in graph order) has been passed.
      for (const auto& [g, use] : reads[n->id]) {
        if (p.groups[g].grad && p.groups[g].uses.front().node == n->id && !grad_fill.count({g, *source_chunks(p.groups[g]).begin()})) grad_tasks(g);
      }
    }
  }

  void grad_tasks(int g) {
    const CopyGroup& group = p.groups[g];
    for (int chunk : source_chunks(group)) {
      std::set<int> after, copies;
      const Flows flows = item_flows(p, StepKind::kGradFill, {g, chunk});
      for (const Flow& x : flows.list) copies.insert(x.src);
      for (const Use& u : group.uses) {
        if (!p.differentiable[u.node] || p.graph.nodes[u.node].kind != NodeKind::kOp) continue;
        const int chunks = p.tilings[u.node].chunks();
        for (size_t i = 0; i < u.coord_of.size(); ++i) {
          if (u.coord_of[i] >= 0 && copies.count(u.coord_of[i])) after.insert(compute_back.at({u.node, static_cast<int>(i) % chunks}));
        }
      }
      grad_fill[{g, chunk}] = static_cast<int>(backward.size());
      backward.push_back(
          {.step = {StepKind::kGradFill, {{g, chunk}}}, .after = {after.begin(), after.end()}, .devices = devices_of(flows), .work = 0, .backward = true});
    }
  }
};

// Gradients of parameters leave the order and come back in buckets: nothing waits for them.
std::vector<Step> bucketed(const Program& p, const std::vector<Step>& ordered, int64_t bucket_bytes) {
  std::vector<Step> out;
  Step bucket{StepKind::kGradFill, {}};
  int64_t bytes = 0;
  const auto flush = [&] {
    if (!bucket.items.empty()) out.push_back(bucket);
    bucket.items.clear();
    bytes = 0;
  };
  for (const Step& step : ordered) {
    const bool param = step.kind == StepKind::kGradFill && p.graph.nodes[p.graph.tensors[p.groups[step.items[0].id].tensor].producer].kind == NodeKind::kParam;
    if (!param) {
      out.push_back(step);
      continue;
    }
    if (!crosses(p, step.kind, step.items[0])) {  // stays on its device: no reason to wait
      out.push_back(step);
      continue;
    }
    const Tensor& t = p.graph.tensors[p.groups[step.items[0].id].tensor];
    bucket.items.push_back(step.items[0]);
    bytes += numel(t.shape) * t.element_bytes;
    if (bytes >= bucket_bytes) flush();
  }
  flush();
  return out;
}

// Neighbouring fills among the same ranks travel together, but for what processes feed to one micro-batch and to another, which would be held as long as the
// last.
std::vector<Step> merged(const Program& p, const std::vector<Step>& steps) {
  std::vector<Step> out;
  std::vector<int> last;
  for (const Step& step : steps) {
    if (step.kind != StepKind::kFill && step.kind != StepKind::kRefill) {
      last.clear();
      out.push_back(step);
      continue;
    }
    const std::vector<int> ranks = item_flows(p, step.kind, step.items[0]).movement.ranks;
    const bool fed = p.graph.nodes[p.graph.tensors[p.groups[step.items[0].id].tensor].producer].kind == NodeKind::kFeed;
    if (!ranks.empty() && ranks == last && out.back().kind == step.kind && !(fed && step.items[0].chunk != out.back().items.back().chunk)) {
      out.back().items.insert(out.back().items.end(), step.items.begin(), step.items.end());
    } else {
      out.push_back(step);
      last = ranks;
    }
  }
  return out;
}

// Inserts, before the first backward step that reads a copy kept for use only, the step that gathers it again. A region's first backward step may
// compute all of it again, so what any of its operators reads comes before it.
std::vector<Step> with_refills(const Program& p, const std::vector<Step>& steps) {
  std::map<std::pair<int, int>, std::vector<StepItem>> wanted;  // (node, chunk) -> items
  std::set<std::pair<int, int>> done;
  std::map<NodeId, std::vector<std::pair<int, const Use*>>> reads;
  for (size_t g = 0; g < p.groups.size(); ++g) {
    if (p.groups[g].keep != Keep::kUse) continue;
    for (const Use& u : p.groups[g].uses) reads[u.node].emplace_back(static_cast<int>(g), &u);
  }
  std::map<int, std::vector<NodeId>> readers;  // region -> its operators that read any
  for (const auto& [node, list] : reads) {
    if (p.regions[node] >= 0) readers[p.regions[node]].push_back(node);
  }
  std::vector<Step> out;
  const auto gather = [&](NodeId node, int chunk) {  // chunk -1: of all its chunks
    const int chunks = p.tilings[node].chunks();
    for (const auto& [g, use] : reads[node]) {
      for (size_t i = 0; i < use->coord_of.size(); ++i) {
        if ((chunk >= 0 && static_cast<int>(i) % chunks != chunk) || use->coord_of[i] < 0) continue;
        const StepItem item{g, p.groups[g].copies.coords[use->coord_of[i]].chunk};
        if (done.insert({item.id, item.chunk}).second && crosses(p, StepKind::kRefill, item)) out.push_back({StepKind::kRefill, {item}});
      }
    }
  };
  for (const Step& step : steps) {
    if (step.kind == StepKind::kComputeBackward) {
      const auto [node, chunk] = step.items[0];
      gather(node, chunk);
      if (const int region = p.regions[node]; region >= 0) {
        for (NodeId other : readers[region]) gather(other, -1);
        readers[region].clear();
      }
    }
    out.push_back(step);
  }
  return out;
}

void order_steps(Program& p, const Strategy& strategy) {
  TaskBuilder b{.p = p};
  b.build_forward();
  b.build_backward();
  std::vector<Step> steps;
  if (!p.interleaved) {
    const std::vector<int> forward = sort_by_priority(b.forward);
    std::vector<int64_t> position(b.forward.size());
    for (size_t i = 0; i < forward.size(); ++i) position[forward[i]] = static_cast<int64_t>(i);
    // Backward is the forward order reversed, as far as dependencies leave a choice.
    for (const auto& [key, task] : b.compute_back) b.backward[task].rank = -2 * position[b.compute.at(key)];
    for (const auto& [key, task] : b.grad_fill) {
      const NodeId producer = p.graph.tensors[p.groups[key.first].tensor].producer;
      const auto made = p.tilings[producer].chunks() > 1 && b.only_returned(p.groups[key.first]) ? b.compute.end() : b.compute.find({producer, key.second});
      b.backward[task].rank = made == b.compute.end() ? -(1 << 30) : -2 * position[made->second] - 1;
    }
    for (int i : forward) steps.push_back(b.forward[i].step);
    std::vector<Step> back;
    for (int i : sort_by_priority(b.backward)) back.push_back(b.backward[i].step);
    steps = merged(p, steps);
    for (Step& s : bucketed(p, with_refills(p, back), strategy.bucket_bytes)) steps.push_back(std::move(s));
  } else {
    std::vector<Task> all = b.forward;
    // At most: as many as sets of the size of the smallest that works on chunks.
    size_t smallest = p.world_size;
    int chunks = 1;
    for (const Node& n : p.graph.nodes) {
      if (n.kind != NodeKind::kOp || p.tilings[n.id].chunks() == 1) continue;
      smallest = std::min(smallest, p.tilings[n.id].devices.size());
      chunks = std::max(chunks, p.tilings[n.id].chunks());
    }
    const int stages = (p.world_size + static_cast<int>(smallest) - 1) / static_cast<int>(smallest);
    const int offset = static_cast<int>(all.size());
    for (Task t : b.backward) {
      for (int& a : t.after) a += offset;
      all.push_back(std::move(t));
    }
    for (const auto& [key, task] : b.compute_back) {
      Task& t = all[offset + task];
      t.after.push_back(b.compute.at(key));
      t.phase = b.forward[b.compute.at(key)].phase;
      t.rank = -b.forward[b.compute.at(key)].rank;
    }
    // No more chunks in flight than stages: the memory of 1F1B. Where the loss is no plain sum over chunks, backward waits for all of them.
    const auto limited = [&](int in_flight) {
      std::vector<Task> tasks = all;
      for (const auto& [key, task] : b.compute_back) {
        const auto later = b.compute.find({key.first, key.second + in_flight});
        if (later != b.compute.end()) tasks[later->second].after.push_back(offset + task);
      }
      return sort_interleaved(tasks, p.world_size);
    };
    std::vector<int> order = limited(stages);
    if (order.size() != all.size()) order = limited(chunks);
    if (order.size() != all.size()) {
      user_error("[plan] order 1f1b is impossible: a backward step needs the forward of every chunk (is the loss a plain sum over the chunks?)");
    }
    for (int i : order) steps.push_back(all[i].step);
    steps = bucketed(p, with_refills(p, steps), strategy.bucket_bytes);
  }
  p.steps = std::move(steps);
}

}  // namespace

std::vector<char> differentiable_nodes(const OpGraph& graph, const std::vector<Rule>& rules) {
  std::vector<char> out;
  for (const Node& n : graph.nodes) {
    bool grad = false;
    for (size_t i = 0; n.kind == NodeKind::kOp && i < rules[n.id].results.size(); ++i) {
      grad = grad || (graph.tensors[n.outputs[i]].requires_grad && rules[n.id].results[i].differentiable);
    }
    out.push_back(grad);
  }
  return out;
}

Program lower(const OpGraph& graph, const Strategy& strategy, const FedRows& rows) {
  if (!strategy.rewrites.empty()) return lower_rewritten(graph, strategy, rows);
  if (static_cast<int>(rows.size()) != strategy.world_size)
    user_error("[lower] {} processes feed rows, the plan is for {} devices", rows.size(), strategy.world_size);
  Resolved r = resolve(graph, strategy, rows);
  Program p{.graph = std::move(r.graph),
            .world_size = strategy.world_size,
            .rows = rows,
            .interleaved = strategy.order == Order::kInterleaved,
            .rules = std::move(r.rules),
            .tilings = std::move(r.tilings),
            .fed = std::move(r.fed)};
  p.differentiable = differentiable_nodes(p.graph, p.rules);
  p.regions = named_regions(p.graph, strategy.recompute);
  for (const Node& n : p.graph.nodes) {
    if (!p.differentiable[n.id] || !may_compute_again(n)) p.regions[n.id] = -1;
  }
  build_layouts(p, strategy);
  check_partials(p);
  if (p.interleaved) {
    int scalars = 0;
    for (const Node& n : p.graph.nodes) {
      if (n.kind != NodeKind::kReturn || n.target == "buffer_write" || !p.graph.input(n, 0).requires_grad) continue;
      ++scalars;
      if (numel(p.graph.input(n, 0).shape) != 1)
        user_error("[plan] order 1f1b needs the loss inside: output {} has {} elements", n.name, numel(p.graph.input(n, 0).shape));
    }
    if (scalars != 1) user_error("[plan] order 1f1b needs exactly one scalar output with a gradient, there are {}", scalars);
  }
  order_steps(p, strategy);
  return p;
}

}  // namespace soap
