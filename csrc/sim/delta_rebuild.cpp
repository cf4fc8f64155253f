// What a DeltaSimulator makes again after a change: the groups of the tensors that it touches and the slots of the nodes around them.
#include <algorithm>
#include <tuple>

#include "base/error.h"
#include "sim/delta.h"

namespace soap {

DeltaSimulator::TensorState& DeltaSimulator::state_of(NodeId node, const FragmentTensor& tensor) {
  switch (tensor.kind) {
    case FragmentTensor::Kind::kOperand: return tensors_[cache_.distinct_inputs(node)[tensor.index]];
    case FragmentTensor::Kind::kResult: return tensors_[graph_.nodes[node].outputs[tensor.index]];
    case FragmentTensor::Kind::kInner: break;
  }
  return nodes_[node].inner[tensor.index];
}

void DeltaSimulator::add_reader(TensorState& state, const Tensor& tensor, const Reader& reader) {
  const FragmentOp& op = nodes_[reader.node].fragment->ops[reader.op];
  const FragmentRead& read = op.reads[reader.operand];
  auto group = std::find_if(state.groups.begin(), state.groups.end(), [&](const Group* g) { return g->copies == read.copies; });
  if (group == state.groups.end()) {
    state.groups.push_back(take_group());
    group = state.groups.end() - 1;
    (*group)->copies = read.copies;
    (*group)->tensor = &tensor;
    (*group)->bytes = numel(tensor.shape) * tensor.element_bytes;
  }
  (*group)->readers.push_back({reader.node, reader.op, reader.operand, op.computes, op.differentiable});
  (*group)->gradient = (*group)->gradient || (tensor.requires_grad && read.differentiable);
}

// What moves, and what it waits for, once all readers are known.
void DeltaSimulator::finish(TensorState& state, const Reader& producer, bool parameter, bool used_again) {
  for (Group* group : state.groups) {
    Group& g = *group;
    g.producer = producer;
    g.parameter = parameter;
    g.fill = cache_.edge(*g.tensor, state.tiles, g.copies, false);
    if (used_again && g.fill->pattern != Pattern::kLocal) {
      for (const Reader& r : g.readers) {
        if (r.differentiable) g.regather = r;  // the last in forward is the first in backward
      }
      g.used_again = g.regather.node >= 0;
    }
    if (!g.gradient) continue;
    g.gradient_fill = cache_.edge(*g.tensor, state.tiles, g.copies, true);
    if (g.gradient_fill->pattern == Pattern::kLocal) continue;
    for (const Reader& r : g.readers) {
      if (r.differentiable && (g.last.node < 0 || std::pair(r.node, r.op) < std::pair(g.last.node, g.last.op))) g.last = r;
    }
  }
}

void DeltaSimulator::rebuild_tensor(TensorId t) {
  TensorState& state = old_tensors_.replace(t, tensors_[t]);
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
  for (const auto& [consumer, index] : consumers_[t]) add(consumer, FragmentTensor::Kind::kOperand, index);
  Reader from;
  state.tiles = made.tiles[result];
  if (state.tiles < 0) state.tiles = cache_.derived(producer.id, state.groups.empty() ? -1 : state.groups.front()->copies);
  if (producer.kind == NodeKind::kOp) from = {producer.id, made.producers[result]};
  finish(state, from, producer.kind == NodeKind::kParam, made.used_again);
}

void DeltaSimulator::rebuild_inner(NodeId n) {
  std::vector<TensorState>& inner = old_inner_.replace(n, nodes_[n].inner);
  const Fragment& f = *nodes_[n].fragment;
  inner.resize(f.inner.size());
  for (size_t op = 0; op < f.ops.size(); ++op) {
    for (size_t i = 0; i < f.ops[op].reads.size(); ++i) {
      const FragmentRead& read = f.ops[op].reads[i];
      if (read.tensor.kind != FragmentTensor::Kind::kInner) continue;
      add_reader(inner[read.tensor.index], f.graph.tensors[f.inner[read.tensor.index].tensor], {n, static_cast<int>(op), static_cast<int>(i)});
    }
  }
  for (size_t k = 0; k < f.inner.size(); ++k) {
    inner[k].tiles = f.inner[k].tiles;
    finish(inner[k], {n, f.inner[k].producer}, false, false);
  }
}

// The order in which lowering makes gradient tasks: by first reader from the last to the first, then by operand.
void DeltaSimulator::sort_newest_first(std::vector<Group*>& groups) {
  if (groups.size() < 2) return;
  const auto key = [](const Group* g) {
    const Reader& first = g->readers.front();
    return std::tuple(-first.node, -first.op, first.operand);
  };
  std::stable_sort(groups.begin(), groups.end(), [&](const Group* a, const Group* b) { return key(a) < key(b); });
}

DeltaSimulator::Group* DeltaSimulator::group_of(NodeId n, int op, int operand) {
  const FragmentRead& read = nodes_[n].fragment->ops[op].reads[operand];
  for (Group* g : state_of(n, read.tensor).groups) {
    if (g->copies == read.copies) return g;
  }
  throw InternalError(fmt::format("[delta] {}: operand {} of operator {} has no group", graph_.nodes[n].name, operand, op));
}

DeltaSimulator::Slot DeltaSimulator::computing(NodeId n, SlotKind kind, int op, Slots& slots) {
  const FragmentOp& what = nodes_[n].fragment->ops[op];
  const bool backward = kind == SlotKind::kBackward;
  const Spent& spent = !backward ? what.forward : regions_[n] >= 0 ? what.again : what.backward;
  Slot slot{.kind = kind, .differentiable = what.differentiable, .op = op};
  if (spent.alike() && !shared_) {
    slot.first = spent.first;
    slot.count = spent.count;
    slot.each = spent.each;
  } else {
    slot.spent = &spent;
  }
  if (!overlap_) return slot;
  const auto read_later = [&](const DeviceSet& devices) {
    if (devices.count == 0) return;
    slot.first_read = slot.end_read == 0 ? devices.first : std::min(slot.first_read, devices.first);
    slot.end_read = std::max(slot.end_read, devices.devices.back() + 1);
  };
  slot.first_wait = static_cast<int>(slots.waits.size());
  for (int i = 0; i < static_cast<int>(what.reads.size()); ++i) {
    Group* g = group_of(n, op, i);
    if (!backward && g->fill->pattern != Pattern::kLocal) slots.waits.push_back(&g->filled);
    if (backward && g->used_again) slots.waits.push_back(&g->refilled);
    if (backward ? g->gradient_moves() : g->used_again) read_later(backward ? *g->gradient_fill->senders : *g->fill->receivers);
  }
  for (const FragmentTensor& t : what.writes) {
    for (Group* g : state_of(n, t).groups) {
      if (backward && g->gradient_moves()) slots.waits.push_back(&g->gradient_filled);
      if (!backward && g->fill->pattern != Pattern::kLocal) read_later(*g->fill->senders);
    }
  }
  slot.end_wait = static_cast<int>(slots.waits.size());
  return slot;
}

// After a computation nothing waits to travel. So what takes no time is left out there, and operators between which nothing happens are one.
void DeltaSimulator::push_computing(std::vector<Slot>& list, Slot slot) {
  if (!list.empty() && (list.back().kind == SlotKind::kCompute || list.back().kind == SlotKind::kBackward) && !slot.spent && !shared_) {
    const Slot& last = list.back();
    if (slot.count == 0 && slot.end_read == 0) return;
    const bool idle = last.count == 0, alike = last.first == slot.first && last.count == slot.count;
    if (!last.spent && last.end_read == 0 && slot.first_wait == slot.end_wait && (idle || alike)) {
      if (!idle) {
        slot.each += last.each;
        slot.first_wait = last.first_wait;
        slot.end_wait = last.end_wait;
      }
      list.back() = slot;
      return;
    }
  }
  list.push_back(slot);
}

void DeltaSimulator::rebuild_slots(NodeId n) {
  Slots& slots = old_slots_.replace(n, nodes_[n].slots);
  slots.forward.clear();
  slots.backward.clear();
  slots.waits.clear();
  if (overlap_) slots.ends.resize(nodes_[n].fragment->ops.size() * devices_ * 2);
  rebuild_forward(n, slots);
  rebuild_backward(n, slots);
}

void DeltaSimulator::rebuild_forward(NodeId n, Slots& slots) {
  const Fragment& f = *nodes_[n].fragment;
  for (int op = 0; op < static_cast<int>(f.ops.size()); ++op) {
    for (int i = 0; i < static_cast<int>(f.ops[op].reads.size()); ++i) {
      Group* g = group_of(n, op, i);
      const Reader& first = g->readers.front();
      const bool here = first.node == n && first.op == op && first.operand == i;
      if (!here || cache_.layout(g->copies).coords.empty()) continue;
      slots.forward.push_back({.kind = SlotKind::kFill, .op = op, .ranks = g->fill->ranks, .group = g});
    }
    if (!f.ops[op].computes) continue;
    // A local fill only keeps those before and after it from travelling together, where it isn't work.
    const auto idle = [](const Slot& s) { return s.kind == SlotKind::kFill && s.ranks < 0 && s.group->fill->local_ns.empty(); };
    while (!slots.forward.empty() && idle(slots.forward.back())) slots.forward.pop_back();
    push_computing(slots.forward, computing(n, SlotKind::kCompute, op, slots));
  }
}

void DeltaSimulator::rebuild_backward(NodeId n, Slots& slots) {
  const Fragment& f = *nodes_[n].fragment;
  std::vector<Group*>& groups = sorting_;
  const auto add_once = [&](Group* g) {
    if (std::find(groups.begin(), groups.end(), g) == groups.end()) groups.push_back(g);
  };
  const auto push = [&](SlotKind kind, int op) {
    for (Group* g : groups) slots.backward.push_back({.kind = kind, .op = op, .group = g});
  };
  for (int op = static_cast<int>(f.ops.size()) - 1; op >= 0; --op) {
    if (!f.ops[op].computes) continue;
    groups.clear();
    for (const FragmentTensor& t : f.ops[op].writes) {
      for (Group* g : state_of(n, t).groups) {
        if (g->gradient_takes_time()) groups.push_back(g);
      }
    }
    sort_newest_first(groups);
    push(SlotKind::kGradientFill, op);
    if (!f.ops[op].differentiable) continue;
    groups.clear();
    for (int i = 0; i < static_cast<int>(f.ops[op].reads.size()); ++i) {
      Group* g = group_of(n, op, i);
      if (g->used_again && g->regather.node == n && g->regather.op == op) add_once(g);
    }
    std::stable_sort(groups.begin(), groups.end(), [](const Group* a, const Group* b) {
      const Reader &x = a->readers.front(), &y = b->readers.front();
      return std::tuple(x.node, x.op, x.operand) < std::tuple(y.node, y.op, y.operand);
    });
    push(SlotKind::kRefill, op);
    push_computing(slots.backward, computing(n, SlotKind::kBackward, op, slots));
    groups.clear();
    for (int i = 0; i < static_cast<int>(f.ops[op].reads.size()); ++i) {
      Group* g = group_of(n, op, i);
      if (g->gradient_takes_time() && g->producer.node < 0 && g->last.node == n && g->last.op == op) add_once(g);
    }
    sort_newest_first(groups);
    push(SlotKind::kGradientFill, op);
  }
}

// Of the stale tensors that are there from the start: gradients that are complete at once, what the optimizer takes and what they hold.
void DeltaSimulator::update_stored() {
  for (TensorId t : stale_list_) {
    const Tensor& tensor = graph_.tensors[t];
    const Node& producer = graph_.nodes[tensor.producer];
    if (producer.kind == NodeKind::kOp) continue;
    stored_.set(t, &cache_.stored(tensor, tensors_[t].tiles, producer.kind == NodeKind::kParam && tensor.requires_grad), true);
    if (!tensor.requires_grad) continue;
    for (Group* g : tensors_[t].groups) {
      if (g->gradient_takes_time() && g->last.node < 0) at_once_.push_back(g);
    }
    if (producer.kind != NodeKind::kParam) continue;
    updates_.set(t, &cache_.update(tensor, tensors_[t].tiles), true);
    if (launches_) launched_.set(producer.id, &cache_.update_launches(tensors_[t].tiles), true);
  }
  sort_newest_first(at_once_);
}

void DeltaSimulator::rebuild() {
  rebuilt_ = true;
  old_at_once_ = at_once_;
  std::erase_if(at_once_, [&](const Group* g) { return stale_[g->tensor->id] != 0; });
  rebuilt_slots_.clear();
  const auto add = [&](NodeId n) {
    if (!slots_stale_[n]) rebuilt_slots_.push_back(n);
    slots_stale_[n] = 1;
  };
  for (NodeId n : changed_nodes_) {
    if (!slots_stale_[n]) rebuild_inner(n);
    if (launches_ && graph_.nodes[n].kind == NodeKind::kOp) {
      const Fragment& f = *nodes_[n].fragment;
      launched_.set(n, regions_[n] >= 0 ? &f.launches_again : &f.launches, true);
    }
    add(n);
  }
  for (TensorId t : stale_list_) {
    rebuild_tensor(t);
    add(graph_.tensors[t].producer);
    for (const auto& [consumer, index] : consumers_[t]) add(consumer);
  }
  for (NodeId n : rebuilt_slots_) {
    slots_stale_[n] = 0;
    if (!is_store(graph_.nodes[n])) rebuild_slots(n);
  }
  update_stored();
  clear_marks();
}

}  // namespace soap
