// The timeline of a DeltaSimulator: what simulate.cpp does over a Program, over slots.
#include <algorithm>

#include "sim/delta.h"
#include "sim/simulate.h"

namespace soap {

void DeltaSimulator::wait(int arrival) {
  if (arrival < 0) return;
  const int64_t* at = &arrivals_[static_cast<size_t>(arrival) * devices_];
  for (size_t d = 0; d < devices_; ++d) begin_[d] = std::max(begin_[d], at[d]);
}

void DeltaSimulator::compute(NodeState& state, const Slot& slot) {
  const int64_t* spent = slot.spent->data();
  int64_t* clock = compute_clock_.data();
  if (shared_) {
    for (size_t d = 0; d < devices_; ++d) timeline_.compute(static_cast<int>(d), spent[d], -1, state.fragment->ops[slot.op].differentiable);
    return;
  }
  if (!overlap_) {
    for (size_t d = 0; d < devices_; ++d) clock[d] += spent[d];
    return;
  }
  const bool backward = slot.kind == SlotKind::kBackward;
  begin_ = compute_clock_;
  for (const Group* g : slot.reads) wait(backward ? g->refilled : g->filled);
  if (backward) {
    for (const Group* g : slot.writes) wait(g->gradient_filled);
  }
  for (size_t d = 0; d < devices_; ++d) clock[d] = spent[d] ? begin_[d] + spent[d] : clock[d];
  std::copy(clock, clock + devices_, (backward ? state.backward_end : state.forward_end).begin() + static_cast<int64_t>(slot.op * devices_));
}

void DeltaSimulator::wait_for_sources(SlotKind kind, const Group& g) {
  const auto wait_at = [&](const Reader& r, int device, bool backward) {
    const NodeState& state = nodes_[r.node];
    begin_[device] = std::max(begin_[device], (backward ? state.backward_end : state.forward_end)[r.op * devices_ + device]);
  };
  switch (kind) {
    case SlotKind::kFill:
      if (g.producer.node < 0) return;
      for (const auto& [coord, device] : g.fill->from) wait_at(g.producer, device, false);
      return;
    case SlotKind::kRefill:
      for (const auto& [reader, device] : g.refill_waits) wait_at(reader, device, false);
      return;
    default:
      for (const auto& [reader, device] : g.gradient_waits) wait_at(reader, device, true);
  }
}

void DeltaSimulator::transfer(int ranks, int64_t price) {
  if (shared_) {
    timeline_.move(cache_.ranks(ranks), price);
    return;
  }
  std::vector<int64_t>& clock = overlap_ ? movement_clock_ : compute_clock_;
  int64_t from = 0;
  for (int r : cache_.ranks(ranks)) from = std::max({from, clock[r], begin_[r]});
  int64_t* arrival = overlap_ ? &arrivals_[arrivals_.size() - devices_] : nullptr;
  for (int r : cache_.ranks(ranks)) {
    clock[r] = from + price;
    if (arrival) arrival[r] = clock[r];
  }
}

// One step of the Program: its items travel together.
void DeltaSimulator::move(SlotKind kind, const std::vector<Group*>& groups) {
  begin_ = overlap_ ? movement_clock_ : compute_clock_;
  reduced_.clear();
  exchanged_.clear();
  std::vector<int> exchanging;
  int exchange = -1;
  bool mixed = false;
  for (const Group* g : groups) {
    const EdgeMove& m = kind == SlotKind::kGradientFill ? *g->gradient_fill : *g->fill;
    if (m.pattern == Pattern::kLocal) continue;
    if (overlap_) wait_for_sources(kind, *g);
    if (m.pattern == Pattern::kAllReduce) {
      for (const auto& [ranks, bytes] : m.reduced) {
        const auto same = std::find_if(reduced_.begin(), reduced_.end(), [&](const auto& r) { return r.first == ranks; });
        if (same == reduced_.end())
          reduced_.emplace_back(ranks, bytes);
        else
          same->second += bytes;
      }
      continue;
    }
    if (exchange < 0) {
      exchange = m.ranks;
    } else if (exchange != m.ranks || mixed) {
      if (!mixed) exchanging = cache_.ranks(exchange);
      exchanging.insert(exchanging.end(), cache_.ranks(m.ranks).begin(), cache_.ranks(m.ranks).end());
      mixed = true;
    }
    exchanged_.push_back(&m);
  }
  if (exchange < 0 && reduced_.empty()) return;
  if (mixed) {
    std::sort(exchanging.begin(), exchanging.end());
    exchanging.erase(std::unique(exchanging.begin(), exchanging.end()), exchanging.end());
    exchange = cache_.intern_ranks(exchanging);
  }
  if (overlap_) {
    const int arrival = static_cast<int>(arrivals_.size() / devices_);
    arrivals_.resize(arrivals_.size() + devices_, 0);
    for (Group* g : groups) (kind == SlotKind::kFill ? g->filled : kind == SlotKind::kRefill ? g->refilled : g->gradient_filled) = arrival;
  }
  if (groups.size() == 1 && reduced_.size() < 2) {
    const EdgeMove& m = kind == SlotKind::kGradientFill ? *groups[0]->gradient_fill : *groups[0]->fill;
    transfer(m.ranks, m.price_ns);
    return;
  }
  if (exchange >= 0) transfer(exchange, cache_.exchange_price(exchange, exchanged_));
  std::sort(reduced_.begin(), reduced_.end(), [&](const auto& a, const auto& b) { return cache_.ranks(a.first) < cache_.ranks(b.first); });
  std::vector<int> rank_sets;
  for (const auto& [ranks, bytes] : reduced_) rank_sets.push_back(ranks);
  const int at_once = reduced_.empty() ? 1 : cache_.groups_at_once(rank_sets);
  for (const auto& [ranks, bytes] : reduced_) transfer(ranks, cache_.reduce_price(ranks, bytes, at_once));
}

int64_t DeltaSimulator::run() {
  if (!has_fast_path()) return simulate(lower(graph_, strategy_, rows_), cache_.cost()).step_ns;
  rebuild();
  compute_clock_.assign(devices_, 0);
  movement_clock_.assign(devices_, 0);
  begin_.assign(devices_, 0);
  arrivals_.clear();
  if (overlap_) {
    const auto forget = [](TensorState& state) {
      for (auto& g : state.groups) g->filled = g->refilled = g->gradient_filled = -1;
    };
    for (TensorState& t : tensors_) forget(t);
    for (NodeState& n : nodes_) {
      for (TensorState& t : n.inner) forget(t);
    }
  }
  // Forward: neighbouring fills among the same ranks travel together.
  pending_.clear();
  const auto flush = [&] {
    if (!pending_.empty()) move(SlotKind::kFill, pending_);
    pending_.clear();
  };
  for (NodeId n = 0; n < static_cast<NodeId>(nodes_.size()); ++n) {
    for (const Slot& slot : nodes_[n].forward) {
      if (slot.kind == SlotKind::kCompute) {
        flush();
        compute(nodes_[n], slot);
        continue;
      }
      const bool local = slot.group->fill->pattern == Pattern::kLocal;
      if (local || (!pending_.empty() && pending_.back()->fill->ranks != slot.group->fill->ranks)) flush();
      if (!local) pending_.push_back(slot.group);
    }
  }
  flush();
  // Backward: parameters' gradients wait for a bucket to fill.
  bucket_.clear();
  int64_t bucket_bytes = 0;
  std::vector<Group*> one(1);
  const auto gradient = [&](Group* g) {
    if (!g->parameter) {
      one[0] = g;
      move(SlotKind::kGradientFill, one);
      return;
    }
    bucket_.push_back(g);
    bucket_bytes += numel(g->tensor->shape) * g->tensor->element_bytes;
    if (bucket_bytes < strategy_.bucket_bytes) return;
    move(SlotKind::kGradientFill, bucket_);
    bucket_.clear();
    bucket_bytes = 0;
  };
  for (Group* g : at_once_) gradient(g);
  for (NodeId n = static_cast<NodeId>(nodes_.size()) - 1; n >= 0; --n) {
    for (const Slot& slot : nodes_[n].backward) {
      if (slot.kind == SlotKind::kBackward) {
        compute(nodes_[n], slot);
      } else if (slot.kind == SlotKind::kRefill) {
        one[0] = slot.group;
        move(SlotKind::kRefill, one);
      } else {
        gradient(slot.group);
      }
    }
  }
  if (!bucket_.empty()) move(SlotKind::kGradientFill, bucket_);
  int64_t end = 0;
  if (shared_) {
    for (size_t d = 0; d < devices_; ++d) timeline_.compute(static_cast<int>(d), stored_update_[d]);
    const std::vector<int64_t> done = timeline_.run();
    end = *std::max_element(done.begin(), done.begin() + static_cast<int64_t>(devices_));
  } else {
    for (size_t d = 0; d < devices_; ++d) end = std::max(end, std::max(compute_clock_[d], movement_clock_[d]) + stored_update_[d]);
  }
  return end + static_cast<int64_t>(cache_.cost().machine().step_overhead_ns);
}

}  // namespace soap
