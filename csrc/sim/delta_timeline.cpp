// The timeline of a DeltaSimulator: what simulate.cpp does over a Program, over slots.
#include <algorithm>

#include "sim/delta.h"
#include "sim/local_work.h"
#include "sim/simulate.h"

namespace soap {
namespace {

constexpr size_t kAhead = 3;  // nodes: their slots are asked for while those before them run

void prefetch(const void* memory) {
#if defined(__GNUC__)
  __builtin_prefetch(memory);
#endif
}

}  // namespace

void DeltaSimulator::wait(int64_t arrival, int64_t* clock, int first, int count) const {
  if (arrival < first_arrival_) return;
  const Arrival* a = &arrivals_[arrival - first_arrival_];
  while (true) {
    raise_within(clock, *a->devices, a->at, first, count);
    if (!a->more) return;
    ++a;
  }
}

void DeltaSimulator::compute(Slots& slots, const Slot& slot) {
  int64_t* clock = compute_clock_.data();
  if (shared_) {
    for (size_t d = 0; d < devices_; ++d) timeline_.compute(static_cast<int>(d), (*slot.spent)[d], -1, slot.differentiable);
    return;
  }
  if (!slot.spent) {
    for (int i = slot.first_wait; i < slot.end_wait; ++i) wait(*slots.waits[i], clock, slot.first, slot.count);
    advance(clock + slot.first, slot.each, slot.count);
  } else if (slot.first_wait == slot.end_wait) {
    advance(clock, slot.spent->on.data(), devices_);
  } else {
    std::fill(begin_.begin(), begin_.end(), 0);
    for (int i = slot.first_wait; i < slot.end_wait; ++i) wait(*slots.waits[i], begin_.data(), 0, static_cast<int>(devices_));
    advance_from(clock, begin_.data(), slot.spent->on.data(), devices_);
  }
  if (slot.first_read == slot.end_read) return;
  const size_t at = slot.op * devices_ + (slot.kind == SlotKind::kBackward ? slots.ends.size() / 2 : 0);
  std::copy(clock + slot.first_read, clock + slot.end_read, slots.ends.begin() + static_cast<int64_t>(at + slot.first_read));
}

const int64_t* DeltaSimulator::end_of(const Reader& r, bool backward) const {
  const std::vector<int64_t>& ends = nodes_[r.node].slots.ends;
  return ends.data() + r.op * devices_ + (backward ? ends.size() / 2 : 0);
}

template <class Visit>
void DeltaSimulator::for_sources(SlotKind kind, const Group& g, const Visit& visit) const {
  if (kind == SlotKind::kFill) {
    if (g.producer.node >= 0) visit(end_of(g.producer, false));
    return;
  }
  for (const Reader& r : g.readers) {
    if (kind == SlotKind::kRefill ? r.computes : r.differentiable) visit(end_of(r, kind == SlotKind::kGradientFill));
  }
}

void DeltaSimulator::transfer(const DeviceSet& ranks, int64_t from, int64_t price) {
  if (shared_) return timeline_.move(ranks.devices, price);
  assign(movement_clock().data(), ranks, from + price);
  if (overlap_ || launches_) arrivals_.push_back({.at = from + price, .devices = &ranks, .more = true});
}

// A step of one item.
void DeltaSimulator::move(SlotKind kind, Group& g) {
  const EdgeMove& m = kind == SlotKind::kGradientFill ? *g.gradient_fill : *g.fill;
  for (size_t d = 0; d < m.local_ns.size(); ++d) timeline_.local_work(static_cast<int>(d), m.local_ns[d]);
  if (m.pattern == Pattern::kLocal) return;
  if (m.reduced.size() > 1) {  // in groups, each with its own clock
    alone_.assign(1, &g);
    return move_together(kind, alone_);
  }
  int64_t from = latest(movement_clock().data(), *m.among);
  if (overlap_) {
    (kind == SlotKind::kFill ? g.filled : kind == SlotKind::kRefill ? g.refilled : g.gradient_filled) = first_arrival_ + static_cast<int64_t>(arrivals_.size());
    const DeviceSet& sources = kind == SlotKind::kRefill ? *m.receiving : *m.sending;
    for_sources(kind, g, [&](const int64_t* end) { from = std::max(from, latest(end, sources)); });
  }
  m.one_way ? timeline_.send(*m.one_way, m.price_ns) : transfer(*m.among, from, m.price_ns);
  if (overlap_) arrivals_.back().more = false;
}

// One step of several items, which travel together.
void DeltaSimulator::move_together(SlotKind kind, const std::vector<Group*>& groups) {
  if (groups.size() == 1) {
    const EdgeMove& m = kind == SlotKind::kGradientFill ? *groups[0]->gradient_fill : *groups[0]->fill;
    if (m.reduced.size() < 2) return move(kind, *groups[0]);
  }
  begin_ = movement_clock();
  reduced_.clear();
  exchanged_.clear();
  int exchange = -1;
  bool mixed = false;
  local_.assign(devices_, 0);
  for (const Group* g : groups) {
    const EdgeMove& m = kind == SlotKind::kGradientFill ? *g->gradient_fill : *g->fill;
    add_to(local_, m.local_ns);
    if (m.pattern == Pattern::kLocal) continue;
    if (overlap_) {
      const DeviceSet& sources = kind == SlotKind::kRefill ? *m.receivers : *m.senders;
      for_sources(kind, *g, [&](const int64_t* end) { raise(begin_.data(), sources, end); });
    }
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
    mixed = mixed || (exchange >= 0 && exchange != m.ranks);
    exchange = m.ranks;
    exchanged_.push_back(&m);
  }
  for (size_t d = 0; d < devices_ && shared_; ++d) timeline_.local_work(static_cast<int>(d), local_[d]);
  if (exchange < 0 && reduced_.empty()) return;
  if (mixed) {
    std::vector<char> takes_part(devices_);
    for (const EdgeMove* m : exchanged_) {
      for (int d : cache_.ranks(m->ranks)) takes_part[d] = 1;
    }
    ranks_.clear();
    for (size_t d = 0; d < devices_; ++d) {
      if (takes_part[d]) ranks_.push_back(static_cast<int>(d));
    }
    exchange = cache_.intern_ranks(ranks_);
  }
  if (overlap_) {
    const int64_t arrival = first_arrival_ + static_cast<int64_t>(arrivals_.size());
    for (Group* g : groups) (kind == SlotKind::kFill ? g->filled : kind == SlotKind::kRefill ? g->refilled : g->gradient_filled) = arrival;
  }
  const auto among = [&](int id, int64_t price) {
    const DeviceSet& ranks = cache_.set(id);
    transfer(ranks, std::max(latest(movement_clock().data(), ranks), latest(begin_.data(), ranks)), price);
  };
  if (exchange >= 0) {
    const auto& [price, way] = cache_.exchange(exchange, exchanged_);
    way ? timeline_.send(*way, price) : among(exchange, price);
  }
  std::sort(reduced_.begin(), reduced_.end(), [&](const auto& a, const auto& b) { return cache_.ranks(a.first) < cache_.ranks(b.first); });
  ranks_.clear();
  for (const auto& [ranks, bytes] : reduced_) ranks_.push_back(ranks);
  const int at_once = reduced_.empty() ? 1 : cache_.groups_at_once(ranks_);
  for (const auto& [ranks, bytes] : reduced_) among(ranks, cache_.reduce_price(ranks, bytes, at_once));
  if (overlap_) arrivals_.back().more = false;
}

// Neighbouring fills among the same ranks travel together.
void DeltaSimulator::run_forward() {
  pending_.clear();
  int ranks = -1;  // of what is pending
  const auto flush = [&] {
    if (!pending_.empty()) move_together(SlotKind::kFill, pending_);
    pending_.clear();
  };
  for (size_t i = 0; i < timed_.size(); ++i) {
    if (i + kAhead < timed_.size()) prefetch(nodes_[timed_[i + kAhead]].slots.forward.data());
    Slots& slots = nodes_[timed_[i]].slots;
    for (const Slot& slot : slots.forward) {
      if (slot.kind == SlotKind::kCompute) {
        flush();
        compute(slots, slot);
        continue;
      }
      if (slot.ranks < 0 || ranks != slot.ranks) flush();
      ranks = slot.ranks;
      slot.ranks < 0 ? move(SlotKind::kFill, *slot.group) : pending_.push_back(slot.group);
    }
  }
  flush();
}

// Parameters' gradients wait for a bucket to fill.
void DeltaSimulator::run_backward() {
  bucket_.clear();
  int64_t bucket_bytes = 0;
  const auto gradient = [&](Group* g) {
    if (!g->parameter || g->gradient_fill->pattern == Pattern::kLocal) return move(SlotKind::kGradientFill, *g);
    bucket_.push_back(g);
    bucket_bytes += g->bytes;
    if (bucket_bytes < strategy_.bucket_bytes) return;
    move_together(SlotKind::kGradientFill, bucket_);
    bucket_.clear();
    bucket_bytes = 0;
  };
  for (Group* g : at_once_) gradient(g);
  for (size_t i = timed_.size(); i-- > 0;) {
    if (i >= kAhead) prefetch(nodes_[timed_[i - kAhead]].slots.backward.data());
    Slots& slots = nodes_[timed_[i]].slots;
    for (const Slot& slot : slots.backward) {
      if (slot.kind == SlotKind::kBackward) {
        compute(slots, slot);
      } else if (slot.kind == SlotKind::kRefill) {
        move(SlotKind::kRefill, *slot.group);
      } else {
        gradient(slot.group);
      }
    }
  }
  if (!bucket_.empty()) move_together(SlotKind::kGradientFill, bucket_);
}

int64_t DeltaSimulator::hosts_end(int64_t device_end) {
  const Machine& machine = cache_.cost().machine();
  const int64_t update = machine.launch_ns("update"), collective = machine.launch_ns("collective");
  const int64_t most = *std::max_element(launched_.total.begin(), launched_.total.end()) + update;
  if (most + collective * static_cast<int64_t>(arrivals_.size()) <= device_end) return 0;
  host_clock_ = launched_.total;
  for (const Arrival& a : arrivals_) {
    for (int d : a.devices->devices) host_clock_[d] += collective;
  }
  return *std::max_element(host_clock_.begin(), host_clock_.end()) + update;
}

int64_t DeltaSimulator::run() {
  if (!has_fast_path()) return simulate(lower(graph_, strategy_, rows_), cache_.cost()).step_ns;
  rebuild();
  std::fill(compute_clock_.begin(), compute_clock_.end(), 0);
  std::fill(movement_clock_.begin(), movement_clock_.end(), 0);
  first_arrival_ += static_cast<int64_t>(arrivals_.size());
  arrivals_.clear();
  run_forward();
  run_backward();
  int64_t end = 0;
  if (shared_) {
    for (size_t d = 0; d < devices_; ++d) timeline_.update(static_cast<int>(d), updates_.total[d]);
    const std::vector<int64_t> done = timeline_.run();
    end = *std::max_element(done.begin(), done.begin() + static_cast<int64_t>(devices_));
  } else {
    for (size_t d = 0; d < devices_; ++d) end = std::max(end, std::max(compute_clock_[d], movement_clock_[d]) + updates_.total[d]);
  }
  if (launches_) end = std::max(end, hosts_end(end));
  return end + static_cast<int64_t>(cache_.cost().machine().step_overhead_ns);
}

}  // namespace soap
