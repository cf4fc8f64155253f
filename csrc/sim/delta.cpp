#include "sim/delta.h"

#include <algorithm>
#include <set>
#include <tuple>

#include "base/error.h"
#include "sharding/region.h"

namespace soap {

DeltaSimulator::DeltaSimulator(LayoutCache& cache, const Strategy& start, const FedRows& rows)
    : cache_(cache),
      graph_(cache.graph()),
      strategy_(start),
      rows_(rows),
      overlap_(cache.cost().machine().overlap),
      shared_(!cache.cost().machine().busy_speed.empty()),
      timeline_(cache.cost().machine()),
      devices_(rows.size()) {
  nodes_.resize(graph_.nodes.size());
  tensors_.resize(graph_.tensors.size());
  stale_.resize(graph_.tensors.size());
  consumers_.resize(graph_.tensors.size());
  updates_.resize(graph_.tensors.size());
  regions_ = named_regions(graph_, start.recompute);
  stored_update_.assign(devices_, 0);
  for (const Node& n : graph_.nodes) {
    for (TensorId t : cache.distinct_inputs(n.id)) consumers_[t].push_back(n.id);
  }
  for (const auto& [name, config] : start.nodes) {
    if (!graph_.find(name) && !graph_.find(name.substr(0, name.find('/')))) user_error("[plan] there is no operator {}", name);
  }
  std::vector<NodeId> all;
  for (const Node& n : graph_.nodes) all.push_back(n.id);
  resolve(std::move(all));
  step_ns_ = run();
  saved_fragments_.clear();
}

bool DeltaSimulator::has_fast_path() const {
  // What a region gathers again comes before the first of its backward steps, not before its own reader's.
  const auto gathered_again = [](const auto& node) { return node.second.keep == Keep::kUse; };
  return num_chunked_ == 0 && strategy_.order == Order::kForwardThenBackward && strategy_.edges.empty() && strategy_.stored.empty() &&
         (strategy_.recompute.empty() || std::none_of(strategy_.nodes.begin(), strategy_.nodes.end(), gathered_again));
}

int64_t DeltaSimulator::change(const std::vector<Change>& changes) {
  saved_configs_.clear();
  saved_fragments_.clear();
  saved_step_ns_ = step_ns_;
  std::vector<NodeId> dirty;
  for (const Change& c : changes) {
    const std::string& name = graph_.nodes.at(c.node).name;
    const auto it = strategy_.nodes.find(name);
    saved_configs_.emplace_back(c.node, it == strategy_.nodes.end() ? std::nullopt : std::optional(it->second));
    if (!c.config) {
      if (it != strategy_.nodes.end()) strategy_.nodes.erase(it);
    } else if (it != strategy_.nodes.end()) {
      it->second = *c.config;
    } else {
      strategy_.nodes.emplace(name, *c.config);
    }
    dirty.push_back(c.node);
  }
  try {
    resolve(std::move(dirty));
    return step_ns_ = run();
  } catch (...) {
    restore();
    throw;
  }
}

void DeltaSimulator::undo() {
  restore();
}

// Fragments and configurations as before the change; tensors and slots follow when the next run needs them.
void DeltaSimulator::restore() {
  for (auto it = saved_configs_.rbegin(); it != saved_configs_.rend(); ++it) {
    const std::string& name = graph_.nodes[it->first].name;
    if (it->second)
      strategy_.nodes[name] = *it->second;
    else
      strategy_.nodes.erase(name);
    // Storage of a parameter depends on its configuration alone, without its fragment having changed.
    for (TensorId t : graph_.nodes[it->first].outputs) {
      if (!stale_[t]) stale_list_.push_back(t);
      stale_[t] = 1;
    }
  }
  for (auto it = saved_fragments_.rbegin(); it != saved_fragments_.rend(); ++it) {
    const Node& n = graph_.nodes[it->node];
    num_chunked_ += it->fragment->chunked - nodes_[n.id].fragment->chunked;
    nodes_[n.id].fragment = it->fragment;
    changed_nodes_.push_back(n.id);
    for (const auto* list : {&cache_.distinct_inputs(n.id), &n.outputs}) {
      for (TensorId t : *list) {
        if (!stale_[t]) stale_list_.push_back(t);
        stale_[t] = 1;
      }
    }
  }
  saved_configs_.clear();
  saved_fragments_.clear();
  step_ns_ = saved_step_ns_;
}

std::vector<Change> DeltaSimulator::difference(const Strategy& other) const {
  std::vector<Change> out;
  for (const Node& n : graph_.nodes) {
    const auto mine = strategy_.nodes.find(n.name), its = other.nodes.find(n.name);
    const bool has = mine != strategy_.nodes.end(), wants = its != other.nodes.end();
    if (has != wants || (has && !(mine->second == its->second))) out.push_back({n.id, wants ? std::optional(its->second) : std::nullopt});
  }
  return out;
}

// Fragments of the dirty nodes and of all that read what these have moved, in the order of nodes.
void DeltaSimulator::resolve(std::vector<NodeId> dirty) {
  std::set<NodeId> queue(dirty.begin(), dirty.end());
  std::vector<int> placed, shadow;
  while (!queue.empty()) {
    const NodeId id = *queue.begin();
    queue.erase(queue.begin());
    const Node& n = graph_.nodes[id];
    placed.clear();
    shadow.clear();
    for (TensorId t : cache_.distinct_inputs(id)) {
      const Node& producer = graph_.nodes[graph_.tensors[t].producer];
      const Fragment& f = *nodes_[producer.id].fragment;
      const size_t result = std::find(producer.outputs.begin(), producer.outputs.end(), t) - producer.outputs.begin();
      placed.push_back(f.placed[result]);
      shadow.push_back(f.shadow[result]);
    }
    NodeState& state = nodes_[id];
    const Fragment* before = state.fragment;
    const Fragment* now = cache_.fragment(id, strategy_, placed, shadow);
    if (now == before) continue;
    if (before) saved_fragments_.push_back({id, before});
    num_chunked_ += now->chunked - (before ? before->chunked : 0);
    state.fragment = now;
    changed_nodes_.push_back(id);
    for (const auto* list : {&cache_.distinct_inputs(id), &n.outputs}) {
      for (TensorId t : *list) {
        if (!stale_[t]) stale_list_.push_back(t);
        stale_[t] = 1;
      }
    }
    for (size_t r = 0; r < n.outputs.size(); ++r) {
      if (before && before->placed[r] == now->placed[r] && before->shadow[r] == now->shadow[r]) continue;
      queue.insert(consumers_[n.outputs[r]].begin(), consumers_[n.outputs[r]].end());
    }
  }
}

DeltaSimulator::TensorState& DeltaSimulator::state_of(NodeId node, const FragmentTensor& tensor) {
  switch (tensor.kind) {
    case FragmentTensor::Kind::kOperand: return tensors_[cache_.distinct_inputs(node)[tensor.index]];
    case FragmentTensor::Kind::kResult: return tensors_[graph_.nodes[node].outputs[tensor.index]];
    case FragmentTensor::Kind::kInner: break;
  }
  return nodes_[node].inner[tensor.index];
}

void DeltaSimulator::add_reader(TensorState& state, const Tensor& tensor, const Reader& reader) {
  const FragmentRead& read = nodes_[reader.node].fragment->ops[reader.op].reads[reader.operand];
  auto group = std::find_if(state.groups.begin(), state.groups.end(), [&](const auto& g) { return g->copies == read.copies; });
  if (group == state.groups.end()) {
    state.groups.push_back(std::make_unique<Group>());
    group = state.groups.end() - 1;
    (*group)->copies = read.copies;
    (*group)->tensor = &tensor;
  }
  (*group)->readers.push_back(reader);
  (*group)->gradient = (*group)->gradient || (tensor.requires_grad && read.differentiable);
}

// What moves, and what it waits for, once all readers are known.
void DeltaSimulator::finish(TensorState& state, const Tensor& tensor, const Reader& producer, bool parameter, bool used_again) {
  for (auto& group : state.groups) {
    Group& g = *group;
    g.producer = producer;
    g.parameter = parameter;
    g.fill = cache_.edge(tensor, state.tiles, g.copies, false);
    const auto op_of = [&](const Reader& r) -> const FragmentOp& { return nodes_[r.node].fragment->ops[r.op]; };
    const auto reads = [&](const Reader& r, int coord) {
      const auto& coords = op_of(r).reads[r.operand].coord_of;
      return std::find(coords.begin(), coords.end(), coord) != coords.end();
    };
    if (used_again && g.fill->pattern != Pattern::kLocal) {
      for (const Reader& r : g.readers) {
        if (op_of(r).differentiable) g.regather = r;  // the last in forward is the first in backward
      }
      g.used_again = g.regather.node >= 0;
      for (const auto& [coord, device] : g.fill->to) {
        for (const Reader& r : g.readers) {
          if (overlap_ && op_of(r).computes && reads(r, coord)) g.refill_waits.emplace_back(r, device);
        }
      }
    }
    if (!g.gradient) continue;
    g.gradient_fill = cache_.edge(tensor, state.tiles, g.copies, true);
    for (const auto& [coord, device] : g.gradient_fill->from) {
      for (const Reader& r : g.readers) {
        if (!op_of(r).differentiable || !reads(r, coord)) continue;
        if (g.last.node < 0 || std::pair(r.node, r.op) < std::pair(g.last.node, g.last.op)) g.last = r;
        if (overlap_) g.gradient_waits.emplace_back(r, device);
      }
    }
  }
}

void DeltaSimulator::rebuild_tensor(TensorId t) {
  TensorState& state = tensors_[t];
  state.groups.clear();
  const Tensor& tensor = graph_.tensors[t];
  const Node& producer = graph_.nodes[tensor.producer];
  const Fragment& made = *nodes_[producer.id].fragment;
  const int result = static_cast<int>(std::find(producer.outputs.begin(), producer.outputs.end(), t) - producer.outputs.begin());
  const auto add = [&](NodeId node, FragmentTensor::Kind kind, int index) {
    const Fragment& f = *nodes_[node].fragment;
    for (const auto& [op, operand] : f.operand_uses) {
      const FragmentRead& read = f.ops[op].reads[operand];
      if (read.tensor.kind == kind && read.tensor.index == index) add_reader(state, tensor, {node, op, operand});
    }
  };
  add(producer.id, FragmentTensor::Kind::kResult, result);
  for (NodeId consumer : consumers_[t]) {
    const auto& inputs = cache_.distinct_inputs(consumer);
    add(consumer, FragmentTensor::Kind::kOperand, static_cast<int>(std::find(inputs.begin(), inputs.end(), t) - inputs.begin()));
  }
  bool used_again = false;
  Reader from;
  if (is_store(producer)) {
    const auto config = strategy_.nodes.find(producer.name);
    if (config == strategy_.nodes.end()) {
      state.tiles = cache_.derived(producer.id, state.groups.empty() ? -1 : state.groups.front()->copies);
    } else {
      state.tiles = cache_.intern(configured_storage(producer, made.rule, made.tiling, tensor));
      used_again = config->second.keep == Keep::kUse;
    }
  } else {
    state.tiles = made.tiles[result];
    if (producer.kind == NodeKind::kOp) from = {producer.id, made.producers[result]};
  }
  finish(state, tensor, from, producer.kind == NodeKind::kParam, used_again);
}

void DeltaSimulator::rebuild_inner(NodeId n) {
  NodeState& state = nodes_[n];
  const Fragment& f = *state.fragment;
  state.inner.clear();
  state.inner.resize(f.inner.size());
  for (size_t op = 0; op < f.ops.size(); ++op) {
    for (size_t i = 0; i < f.ops[op].reads.size(); ++i) {
      const FragmentRead& read = f.ops[op].reads[i];
      if (read.tensor.kind != FragmentTensor::Kind::kInner) continue;
      add_reader(state.inner[read.tensor.index], f.graph.tensors[f.inner[read.tensor.index].tensor], {n, static_cast<int>(op), static_cast<int>(i)});
    }
  }
  for (size_t k = 0; k < f.inner.size(); ++k) {
    state.inner[k].tiles = f.inner[k].tiles;
    finish(state.inner[k], f.graph.tensors[f.inner[k].tensor], {n, f.inner[k].producer}, false, false);
  }
  if (overlap_) {
    state.forward_end.assign(f.ops.size() * devices_, 0);
    state.backward_end.assign(f.ops.size() * devices_, 0);
  }
}

// The order in which lowering makes gradient tasks: by first reader from the last to the first, then by operand.
void DeltaSimulator::sort_newest_first(std::vector<Group*>& groups) {
  const auto key = [](const Group* g) {
    const Reader& first = g->readers.front();
    return std::tuple(-first.node, -first.op, first.operand);
  };
  std::stable_sort(groups.begin(), groups.end(), [&](const Group* a, const Group* b) { return key(a) < key(b); });
}

void DeltaSimulator::rebuild_slots(NodeId n) {
  NodeState& state = nodes_[n];
  const Fragment& f = *state.fragment;
  state.forward.clear();
  state.backward.clear();
  const auto group_of = [&](int op, int operand) -> Group* {
    const FragmentRead& read = f.ops[op].reads[operand];
    for (auto& g : state_of(n, read.tensor).groups) {
      if (g->copies == read.copies) return g.get();
    }
    throw InternalError(fmt::format("[delta] {}: operand {} of operator {} has no group", graph_.nodes[n].name, operand, op));
  };
  const auto computing = [&](SlotKind kind, int op) {
    const FragmentOp& what = f.ops[op];
    Slot slot{.kind = kind, .op = op, .spent = kind != SlotKind::kBackward ? &what.forward : regions_[n] >= 0 ? &what.again : &what.backward};
    if (!overlap_) return slot;
    for (int i = 0; i < static_cast<int>(what.reads.size()); ++i) slot.reads.push_back(group_of(op, i));
    for (const FragmentTensor& t : what.writes) {
      for (auto& g : state_of(n, t).groups) slot.writes.push_back(g.get());
    }
    return slot;
  };
  for (int op = 0; op < static_cast<int>(f.ops.size()); ++op) {
    for (int i = 0; i < static_cast<int>(f.ops[op].reads.size()); ++i) {
      Group* g = group_of(op, i);
      const Reader& first = g->readers.front();
      const bool here = first.node == n && first.op == op && first.operand == i;
      if (here && !cache_.layout(g->copies).coords.empty()) state.forward.push_back({SlotKind::kFill, g, op});
    }
    if (!f.ops[op].computes) continue;
    // A local fill only keeps those before and after it from travelling together.
    while (!state.forward.empty() && state.forward.back().kind == SlotKind::kFill && state.forward.back().group->fill->pattern == Pattern::kLocal) {
      state.forward.pop_back();
    }
    state.forward.push_back(computing(SlotKind::kCompute, op));
  }
  std::vector<Group*> groups;
  for (int op = static_cast<int>(f.ops.size()) - 1; op >= 0; --op) {
    if (!f.ops[op].computes) continue;
    groups.clear();
    for (const FragmentTensor& t : f.ops[op].writes) {
      for (auto& g : state_of(n, t).groups) {
        if (g->gradient && g->gradient_fill->pattern != Pattern::kLocal) groups.push_back(g.get());
      }
    }
    sort_newest_first(groups);
    for (Group* g : groups) state.backward.push_back({SlotKind::kGradientFill, g, op});
    if (!f.ops[op].differentiable) continue;
    groups.clear();
    for (int i = 0; i < static_cast<int>(f.ops[op].reads.size()); ++i) {
      Group* g = group_of(op, i);
      if (g->used_again && g->regather.node == n && g->regather.op == op && std::find(groups.begin(), groups.end(), g) == groups.end()) groups.push_back(g);
    }
    std::stable_sort(groups.begin(), groups.end(), [](const Group* a, const Group* b) {
      const Reader &x = a->readers.front(), &y = b->readers.front();
      return std::tuple(x.node, x.op, x.operand) < std::tuple(y.node, y.op, y.operand);
    });
    for (Group* g : groups) state.backward.push_back({SlotKind::kRefill, g, op});
    state.backward.push_back(computing(SlotKind::kBackward, op));
    groups.clear();
    for (int i = 0; i < static_cast<int>(f.ops[op].reads.size()); ++i) {
      Group* g = group_of(op, i);
      const bool last = g->gradient && g->gradient_fill->pattern != Pattern::kLocal && g->producer.node < 0 && g->last.node == n && g->last.op == op;
      if (last && std::find(groups.begin(), groups.end(), g) == groups.end()) groups.push_back(g);
    }
    sort_newest_first(groups);
    for (Group* g : groups) state.backward.push_back({SlotKind::kGradientFill, g, op});
  }
}

void DeltaSimulator::rebuild() {
  std::erase_if(at_once_, [&](const Group* g) { return stale_[g->tensor->id] != 0; });
  std::set<NodeId> slots(changed_nodes_.begin(), changed_nodes_.end());
  for (NodeId n : slots) rebuild_inner(n);
  for (TensorId t : stale_list_) {
    rebuild_tensor(t);
    slots.insert(graph_.tensors[t].producer);
    slots.insert(consumers_[t].begin(), consumers_[t].end());
  }
  for (NodeId n : slots) rebuild_slots(n);
  for (TensorId t : stale_list_) {
    const Node& producer = graph_.nodes[graph_.tensors[t].producer];
    if (!graph_.tensors[t].requires_grad || producer.kind == NodeKind::kOp) continue;
    for (auto& g : tensors_[t].groups) {
      if (g->gradient && g->last.node < 0 && g->gradient_fill->pattern != Pattern::kLocal) at_once_.push_back(g.get());
    }
    if (producer.kind != NodeKind::kParam) continue;
    const std::vector<int64_t>* now = &cache_.update(graph_.tensors[t], tensors_[t].tiles);
    for (size_t d = 0; d < devices_; ++d) stored_update_[d] += (*now)[d] - (updates_[t] ? (*updates_[t])[d] : 0);
    updates_[t] = now;
  }
  sort_newest_first(at_once_);
  for (TensorId t : stale_list_) stale_[t] = 0;
  stale_list_.clear();
  changed_nodes_.clear();
}

}  // namespace soap
