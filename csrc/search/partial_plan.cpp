#include "search/partial_plan.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "base/error.h"
#include "reshard/reshard.h"

namespace soap {
namespace {

constexpr int64_t kLongAgo = -(int64_t{1} << 50);  // ns: no wait

}  // namespace

PartialPlan::PartialPlan(LayoutCache& cache, int world_size, int64_t bucket_bytes)
    : cache_(cache), graph_(cache.graph()), world_(world_size), overlap_(cache.cost().machine().overlap) {
  if (world_size < 1 || world_size > kLargestExhaustiveWorld) {
    user_error("[search] an exhaustive search is for 1 to {} devices, not {}", kLargestExhaustiveWorld, world_size);
  }
  if (!cache.cost().machine().busy_speed.empty()) {
    user_error("[search] an exhaustive search needs a machine whose devices don't slow each other down (busy_speed), not {}", cache.cost().machine().name);
  }
  strategy_.world_size = world_size;
  strategy_.bucket_bytes = bucket_bytes;
  fragments_.resize(graph_.nodes.size());
  consumers_.resize(graph_.tensors.size());
  floors_.resize(graph_.tensors.size());
  int64_t trained = 0;
  for (const Node& n : graph_.nodes) {
    for (TensorId t : cache.distinct_inputs(n.id)) consumers_[t].push_back(n.id);
    for (TensorId t : n.outputs) {
      const Tensor& tensor = graph_.tensors[t];
      if (n.kind == NodeKind::kParam && tensor.requires_grad) trained += numel(tensor.shape) * tensor.element_bytes;
    }
  }
  one_bucket_ = trained < bucket_bytes;
  for (const Tensor& t : graph_.tensors) {
    const Node& producer = graph_.nodes[t.producer];
    slots_.push_back({.tensor = &t, .store = is_store(producer), .parameter = producer.kind == NodeKind::kParam});
  }
}

const PartialPlan::Move* PartialPlan::move_of(const Tensor& tensor, LayoutId tiles, LayoutId copies, bool gradient) {
  const EdgeMove* edge = cache_.edge(tensor, tiles, copies, gradient);
  const auto [it, fresh] = moves_.try_emplace(edge);
  if (!fresh) return &it->second;
  it->second.edge = edge;
  const Sharding &produced = cache_.layout(tiles), &copied = cache_.layout(copies);
  for (const Piece& x : gradient ? grad_pieces(produced, copied, 0) : fill_pieces(produced, copied, 0)) it->second.senders |= 1U << x.from;
  return &it->second;
}

int PartialPlan::slot_of(NodeId node, const FragmentTensor& tensor, size_t first_inner) const {
  switch (tensor.kind) {
    case FragmentTensor::Kind::kOperand: return cache_.distinct_inputs(node)[tensor.index];
    case FragmentTensor::Kind::kResult: return graph_.nodes[node].outputs[tensor.index];
    case FragmentTensor::Kind::kInner: break;
  }
  return static_cast<int>(first_inner) + tensor.index;
}

void PartialPlan::extend(NodeId end) {
  saved_.push_back({.next = next_,
                    .runs = num_runs_,
                    .groups = num_groups_,
                    .slots = slots_.size(),
                    .joined = joined_.size(),
                    .placed = placed_.size(),
                    .pending = pending_,
                    .compute = compute_,
                    .movement = movement_,
                    .update = update_});
  while (next_ < end) lower(next_++);
}

void PartialPlan::retreat() {
  const Saved& s = saved_.back();
  for (; joined_.size() > s.joined; joined_.pop_back()) {
    groups_[joined_.back()].readers.pop_back();
    groups_[joined_.back()].differentiable.pop_back();
    groups_[joined_.back()].adds.pop_back();
  }
  for (; num_groups_ > s.groups; --num_groups_) slots_[groups_[num_groups_ - 1].slot].newest = groups_[num_groups_ - 1].older;
  for (; placed_.size() > s.placed; placed_.pop_back()) slots_[placed_.back()].tiles = -1;
  slots_.resize(s.slots);
  num_runs_ = s.runs;
  next_ = s.next;
  pending_ = s.pending;
  compute_ = s.compute;
  movement_ = s.movement;
  update_ = s.update;
  saved_.pop_back();
}

void PartialPlan::lower(NodeId id) {
  const Node& n = graph_.nodes[id];
  std::vector<int> placed, shadow;
  for (TensorId t : cache_.distinct_inputs(id)) {
    const Node& producer = graph_.nodes[graph_.tensors[t].producer];
    placed.push_back(fragments_[producer.id]->placed[graph_.tensors[t].result]);
    shadow.push_back(fragments_[producer.id]->shadow[graph_.tensors[t].result]);
  }
  const Fragment& f = *(fragments_[id] = cache_.fragment(id, strategy_, placed, shadow));
  if (f.chunked) user_error("[search] {} is cut in time, which an exhaustive search can't bound", n.name);
  if (is_store(n)) return;
  for (size_t r = 0; r < n.outputs.size(); ++r) slots_[n.outputs[r]].tiles = f.tiles[r];
  const size_t first_inner = slots_.size();
  for (const FragmentInner& inner : f.inner) slots_.push_back({.tensor = &f.graph.tensors[inner.tensor], .tiles = inner.tiles});
  for (const FragmentOp& op : f.ops) {
    if (num_runs_ == runs_.size()) runs_.emplace_back();
    const int index = static_cast<int>(num_runs_++);
    Run& run = runs_[index];
    run.op = &op;
    run.reads.clear();
    run.writes.clear();
    for (size_t i = 0; i < op.reads.size(); ++i) read(index, static_cast<int>(i), slot_of(id, op.reads[i].tensor, first_inner), op.reads[i]);
    for (const FragmentTensor& t : op.writes) {
      run.writes.push_back(slot_of(id, t, first_inner));
      slots_[run.writes.back()].producer = op.computes ? index : -1;
    }
    if (!op.computes) continue;
    flush(overlap_ ? movement_ : compute_);
    pending_.clear();
    Clock begin = compute_;
    for (int g : run.reads) {
      for (int d = 0; d < world_ && overlap_; ++d) begin[d] = std::max(begin[d], groups_[g].filled[d]);
    }
    for (int d = 0; d < world_; ++d) compute_[d] = op.forward[d] ? begin[d] + op.forward[d] : compute_[d];
    run.end = compute_;
  }
}

// Adds a reader to the group of copies that it reads, which is filled where it is new.
void PartialPlan::read(int run, int operand, int slot_index, const FragmentRead& read) {
  Slot& slot = slots_[slot_index];
  int at = slot.newest;
  while (at >= 0 && groups_[at].copies != read.copies) at = groups_[at].older;
  if (at < 0) {
    if (slot.store && slot.tiles < 0) {
      slot.tiles = cache_.derived(slot.tensor->producer, read.copies);
      placed_.push_back(slot_index);
      if (slot.parameter && slot.tensor->requires_grad) {
        const std::vector<int64_t>& ns = cache_.update(*slot.tensor, slot.tiles);
        for (int d = 0; d < world_; ++d) update_[d] += ns[d];
      }
    }
    if (num_groups_ == groups_.size()) groups_.emplace_back();
    at = static_cast<int>(num_groups_++);
    Group& g = groups_[at];
    g.slot = slot_index;
    g.older = slot.newest;
    slot.newest = at;
    g.copies = read.copies;
    g.fill = move_of(*slot.tensor, slot.tiles, read.copies, false);
    g.gradient_fill = slot.tensor->requires_grad ? move_of(*slot.tensor, slot.tiles, read.copies, true) : nullptr;
    g.operand = operand;
    g.readers.clear();
    g.differentiable.clear();
    g.adds.clear();
    g.filled.fill(kLongAgo);
    // Neighbouring fills among the same ranks travel together.
    const bool local = g.fill->edge->pattern == Pattern::kLocal;
    if (local || (!pending_.empty() && groups_[pending_.back()].fill->edge->ranks != g.fill->edge->ranks)) {
      flush(overlap_ ? movement_ : compute_);
      pending_.clear();
    }
    if (!local) pending_.push_back(at);
  }
  Group& g = groups_[at];
  g.readers.push_back(run);
  g.differentiable.push_back(static_cast<char>(runs_[run].op->differentiable));
  g.adds.push_back(static_cast<char>(read.differentiable));
  joined_.push_back(at);
  runs_[run].reads.push_back(at);
}

// Fills that nothing has come after yet.
void PartialPlan::flush(Clock& clock) {
  if (pending_.empty()) return;
  Clock begin = clock;
  for (int g : pending_) {
    const Clock ready = sources(g, false, clock);
    for (int d = 0; d < world_; ++d) begin[d] = std::max(begin[d], ready[d]);
  }
  transfer(pending_, false, clock, begin);
}

// When each device has what it sends of a group, and is free.
PartialPlan::Clock PartialPlan::sources(int group, bool gradient, const Clock& clock) const {
  Clock begin = clock;
  if (!overlap_) return begin;
  const Group& g = groups_[group];
  const auto wait = [&](const Clock& end, uint32_t senders) {
    for (; senders != 0; senders &= senders - 1) {
      const int d = std::countr_zero(senders);
      begin[d] = std::max(begin[d], end[d]);
    }
  };
  if (!gradient) {
    if (slots_[g.slot].producer >= 0) wait(runs_[slots_[g.slot].producer].end, g.fill->senders);
    return begin;
  }
  for (size_t i = 0; i < g.readers.size(); ++i) {
    if (g.differentiable[i]) wait(runs_[g.readers[i]].backward_end, g.gradient_fill->senders);
  }
  return begin;
}

void PartialPlan::transfer(const std::vector<int>& groups, bool gradient, Clock& clock, const Clock& begin) {
  Clock arrival;
  arrival.fill(kLongAgo);
  const auto move = [&](int ranks, int64_t price) {
    int64_t from = 2 * kLongAgo;
    for (int r : cache_.ranks(ranks)) from = std::max({from, clock[r], begin[r]});
    for (int r : cache_.ranks(ranks)) clock[r] = arrival[r] = from + price;
  };
  const auto edge_of = [&](int g) { return (gradient ? groups_[g].gradient_fill : groups_[g].fill)->edge; };
  if (groups.size() == 1 && edge_of(groups[0])->reduced.size() < 2) {
    move(edge_of(groups[0])->ranks, edge_of(groups[0])->price_ns);
  } else {
    std::vector<std::pair<int, int64_t>> reduced;
    std::vector<const EdgeMove*> exchanged;
    std::vector<int> exchanging;
    for (int g : groups) {
      const EdgeMove& m = *edge_of(g);
      if (m.pattern == Pattern::kExchange) {
        exchanged.push_back(&m);
        exchanging.insert(exchanging.end(), cache_.ranks(m.ranks).begin(), cache_.ranks(m.ranks).end());
      }
      for (const auto& [ranks, bytes] : m.reduced) {
        const auto same = std::find_if(reduced.begin(), reduced.end(), [&](const auto& r) { return r.first == ranks; });
        if (same == reduced.end())
          reduced.emplace_back(ranks, bytes);
        else
          same->second += bytes;
      }
    }
    if (!exchanged.empty()) {
      std::sort(exchanging.begin(), exchanging.end());
      exchanging.erase(std::unique(exchanging.begin(), exchanging.end()), exchanging.end());
      const int ranks = cache_.intern_ranks(exchanging);
      move(ranks, cache_.exchange(ranks, exchanged).price_ns);
    }
    std::sort(reduced.begin(), reduced.end(), [&](const auto& a, const auto& b) { return cache_.ranks(a.first) < cache_.ranks(b.first); });
    std::vector<int> sets;
    for (const auto& [ranks, bytes] : reduced) sets.push_back(ranks);
    const int at_once = sets.empty() ? 1 : cache_.groups_at_once(sets);
    for (const auto& [ranks, bytes] : reduced) move(ranks, cache_.reduce_price(ranks, bytes, at_once));
  }
  for (int g : groups) (gradient ? groups_[g].returned : groups_[g].filled) = arrival;
}

// As lowering makes them: by first reader from the last to the first, then by operand.
void PartialPlan::sort_newest_first(std::vector<int>& groups) const {
  std::stable_sort(groups.begin(), groups.end(), [&](int a, int b) {
    const Group &x = groups_[a], &y = groups_[b];
    return std::pair(-x.readers.front(), x.operand) < std::pair(-y.readers.front(), y.operand);
  });
}

int64_t PartialPlan::least_ns(NodeId node) const {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  int64_t least = kNone;
  for (const FragmentOp& op : fragments_[node]->ops) {
    for (int d = 0; d < world_ && op.computes; ++d) {
      const int64_t ns = op.forward[d] + (op.differentiable ? op.backward[d] : 0);
      if (op.forward[d] > 0) least = std::min(least, ns);
    }
  }
  return least == kNone ? 0 : least;
}

int64_t PartialPlan::work_ns(NodeId node) const {
  int64_t work = 0;
  for (const FragmentOp& op : fragments_[node]->ops) {
    for (int d = 0; d < world_ && op.computes; ++d) work += op.forward[d] + (op.differentiable ? op.backward[d] : 0);
  }
  return work;
}

// returned(t) of each tile, on all of its devices.
void PartialPlan::floors(const std::vector<int64_t>& paths) {
  for (const Tensor& t : graph_.tensors) {
    floors_[t.id].fill(0);
    const Slot& slot = slots_[t.id];
    if (t.producer >= next_ || slot.producer < 0 || !t.requires_grad) continue;
    int64_t path = 0;
    for (NodeId n : consumers_[t.id]) path = std::max(path, n >= next_ ? paths[n] : 0);
    if (path == 0) continue;
    for (const Coord& c : cache_.layout(slot.tiles).coords) {
      int64_t ready = std::numeric_limits<int64_t>::max();
      for (int d : c.devices) ready = std::min(ready, runs_[slot.producer].end[d]);
      for (int d : c.devices) floors_[t.id][d] = std::max(floors_[t.id][d], ready + path);
    }
  }
}

int64_t PartialPlan::bound(const Remainder& remainder, int64_t enough) {
  const bool complete = next_ == static_cast<NodeId>(graph_.nodes.size());
  Clock compute = compute_, movement = movement_;
  flush(overlap_ ? movement : compute);
  for (size_t g = 0; g < num_groups_; ++g) {
    groups_[g].gradient = groups_[g].gradient_fill && std::count(groups_[g].adds.begin(), groups_[g].adds.end(), 1) > 0;
  }
  floors(remainder.paths);
  const Clock ends = backward(compute, movement, true);
  const auto overhead = static_cast<int64_t>(cache_.cost().machine().step_overhead_ns);
  const int64_t by_paths = *std::max_element(ends.begin(), ends.begin() + world_) + overhead;
  if (complete || by_paths >= enough) return by_paths;
  int64_t sum = remainder.work[next_];
  for (const Slot& slot : slots_) {
    if (slot.parameter && slot.tiles < 0) sum += remainder.update[slot.tensor->id];
  }
  for (int d = 0; d < world_; ++d) {
    Clock alone;
    alone.fill(kLongAgo);
    alone[d] = 0;
    Clock quiet;
    quiet.fill(kLongAgo);
    sum += compute_[d] + std::max<int64_t>(backward(alone, quiet, false)[d], 0);
  }
  return std::max(by_paths, sum / world_ + overhead);
}

PartialPlan::Clock PartialPlan::backward(Clock compute, Clock movement, bool floored) {
  const bool complete = next_ == static_cast<NodeId>(graph_.nodes.size());
  Clock loose;
  loose.fill(kLongAgo);
  Clock& clock = overlap_ ? movement : compute;
  for (size_t g = 0; g < num_groups_; ++g) groups_[g].returned.fill(kLongAgo);
  std::vector<int> groups, one(1), bucket;
  int64_t bucket_bytes = 0;
  const auto moves = [&](int g) { return groups_[g].gradient && groups_[g].gradient_fill->edge->pattern != Pattern::kLocal; };
  const auto move_one = [&](int g) {
    one[0] = g;
    transfer(one, true, clock, sources(g, true, clock));
  };
  const auto flush_bucket = [&] {
    Clock begin = clock;
    for (int g : bucket) {
      const Clock ready = sources(g, true, clock);
      for (int d = 0; d < world_; ++d) begin[d] = std::max(begin[d], ready[d]);
    }
    if (!bucket.empty()) transfer(bucket, true, clock, begin);
    bucket.clear();
    bucket_bytes = 0;
  };
  // Which gradients share a bucket is known where all are lowered, or where one bucket takes all: then fewer of them travel no longer. Else one
  // that fills a bucket travels when it is there, perhaps with others; a smaller one some time after it is there.
  const auto parameter = [&](int g) {
    const Tensor& t = *slots_[groups_[g].slot].tensor;
    const int64_t bytes = numel(t.shape) * t.element_bytes;
    if (complete || one_bucket_) {
      bucket.push_back(g);
      bucket_bytes += bytes;
      if (bucket_bytes >= strategy_.bucket_bytes) flush_bucket();
    } else if (bytes >= strategy_.bucket_bytes) {
      move_one(g);
    } else {
      Clock scratch = clock;
      one[0] = g;
      transfer(one, true, scratch, sources(g, true, clock));
      for (int d = 0; d < world_; ++d) loose[d] = std::max(loose[d], groups_[g].returned[d]);
    }
  };
  for (size_t r = num_runs_; r-- > 0;) {
    Run& run = runs_[r];
    if (!run.op->computes) continue;
    groups.clear();
    for (int slot : run.writes) {
      for (int g = slots_[slot].newest; g >= 0; g = groups_[g].older) {
        if (moves(g)) groups.push_back(g);
      }
    }
    if (groups.size() > 1) sort_newest_first(groups);
    for (int g : groups) move_one(g);
    if (!run.op->differentiable) continue;
    Clock begin = compute;
    for (int slot : run.writes) {
      for (int d = 0; floored && d < world_ && slot < static_cast<int>(floors_.size()); ++d) begin[d] = std::max(begin[d], floors_[slot][d]);
      for (int g = overlap_ ? slots_[slot].newest : -1; g >= 0; g = groups_[g].older) {
        for (int d = 0; d < world_; ++d) begin[d] = std::max(begin[d], groups_[g].returned[d]);
      }
    }
    for (int d = 0; d < world_; ++d) compute[d] = run.op->backward[d] ? begin[d] + run.op->backward[d] : compute[d];
    run.backward_end = compute;
    groups.clear();
    for (int g : run.reads) {
      const Group& group = groups_[g];
      if (slots_[group.slot].producer >= 0 || !moves(g) || std::count(groups.begin(), groups.end(), g)) continue;
      const size_t last = std::find(group.differentiable.begin(), group.differentiable.end(), 1) - group.differentiable.begin();
      if (last < group.readers.size() && group.readers[last] == static_cast<int>(r)) groups.push_back(g);
    }
    if (groups.size() > 1) sort_newest_first(groups);
    for (int g : groups) slots_[groups_[g].slot].parameter ? parameter(g) : move_one(g);
  }
  flush_bucket();
  Clock end = compute;
  for (int d = 0; d < world_; ++d) end[d] = std::max({compute[d], movement[d], loose[d]}) + update_[d];
  return end;
}

}  // namespace soap
