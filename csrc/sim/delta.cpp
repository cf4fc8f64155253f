// A change of a DeltaSimulator and its undoing. What is made again is in delta_rebuild.cpp, the timeline in delta_timeline.cpp.
#include "sim/delta.h"

#include <algorithm>

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
      launches_(!cache.cost().machine().launch.empty()),
      timeline_(cache.cost().machine()),
      devices_(rows.size()) {
  nodes_.resize(graph_.nodes.size());
  slots_stale_.resize(graph_.nodes.size());
  queued_.resize(graph_.nodes.size());
  tensors_.resize(graph_.tensors.size());
  stale_.resize(graph_.tensors.size());
  consumers_.resize(graph_.tensors.size());
  regions_ = named_regions(graph_, start.recompute);
  for (Sums* sums : {&updates_, &stored_}) {
    sums->of.resize(graph_.tensors.size());
    sums->total.resize(devices_);
  }
  launched_.of.resize(graph_.nodes.size());
  launched_.total.resize(devices_);
  compute_clock_.resize(devices_);
  movement_clock_.resize(devices_);
  begin_.resize(devices_);
  for (const Node& n : graph_.nodes) {
    const auto& inputs = cache.distinct_inputs(n.id);
    for (size_t i = 0; i < inputs.size(); ++i) consumers_[inputs[i]].emplace_back(n.id, static_cast<int>(i));
    if (!is_store(n)) timed_.push_back(n.id);
  }
  for (const auto& [name, config] : start.nodes) {
    if (!cache.names(name) && !cache.names(std::string_view(name).substr(0, name.find('/')))) user_error("[plan] there is no operator {}", name);
  }
  std::vector<NodeId> all;
  for (const Node& n : graph_.nodes) all.push_back(n.id);
  resolve(all);
  step_ns_ = run();
  saved_fragments_.clear();
}

bool DeltaSimulator::has_fast_path() const {
  // What a region gathers again comes before the first of its backward steps, not before its own reader's.
  const auto gathered_again = [](const auto& node) { return node.second.keep == Keep::kUse; };
  return num_chunked_ == 0 && strategy_.order == Order::kForwardThenBackward && strategy_.edges.empty() && strategy_.stored.empty() &&
         (strategy_.recompute.empty() || std::none_of(strategy_.nodes.begin(), strategy_.nodes.end(), gathered_again));
}

int64_t DeltaSimulator::change(const std::vector<Change>& changes, std::optional<int64_t> bucket_bytes) {
  forget_replaced();
  saved_configs_.clear();
  saved_fragments_.clear();
  saved_step_ns_ = step_ns_;
  saved_bucket_bytes_ = strategy_.bucket_bytes;
  strategy_.bucket_bytes = bucket_bytes.value_or(strategy_.bucket_bytes);
  as_built_ = stale_list_.empty() && changed_nodes_.empty();
  rebuilt_ = false;
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
    resolve(dirty);
    return step_ns_ = run();
  } catch (...) {
    restore();
    throw;
  }
}

void DeltaSimulator::undo() {
  restore();
}

void DeltaSimulator::mark_stale(NodeId node) {
  changed_nodes_.push_back(node);
  for (const auto* list : {&cache_.distinct_inputs(node), &graph_.nodes[node].outputs}) {
    for (TensorId t : *list) {
      if (!stale_[t]) stale_list_.push_back(t);
      stale_[t] = 1;
    }
  }
}

void DeltaSimulator::clear_marks() {
  for (TensorId t : stale_list_) stale_[t] = 0;
  stale_list_.clear();
  changed_nodes_.clear();
}

// Fragments and configurations as before the change. Tensors and slots too, or, where some weren't built before it, when the next run needs them.
void DeltaSimulator::restore() {
  for (auto it = saved_configs_.rbegin(); it != saved_configs_.rend(); ++it) {
    const std::string& name = graph_.nodes[it->first].name;
    if (it->second)
      strategy_.nodes[name] = std::move(*it->second);
    else
      strategy_.nodes.erase(name);
  }
  for (auto it = saved_fragments_.rbegin(); it != saved_fragments_.rend(); ++it) {
    num_chunked_ += it->fragment->chunked - nodes_[it->node].fragment->chunked;
    nodes_[it->node].fragment = it->fragment;
    if (!as_built_) mark_stale(it->node);
  }
  if (as_built_) {
    put_back_replaced();
    clear_marks();
  }
  saved_configs_.clear();
  saved_fragments_.clear();
  strategy_.bucket_bytes = saved_bucket_bytes_;
  step_ns_ = saved_step_ns_;
}

int64_t DeltaSimulator::stored_bytes() const {
  return has_fast_path() ? *std::max_element(stored_.total.begin(), stored_.total.end()) : 0;
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
void DeltaSimulator::resolve(const std::vector<NodeId>& dirty) {
  const auto enqueue = [&](NodeId n) {
    if (queued_[n]) return;
    queued_[n] = 1;
    queue_.push_back(n);
    std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
  };
  for (NodeId n : queue_) queued_[n] = 0;  // left by a change that wasn't legal
  queue_.clear();
  for (NodeId n : dirty) enqueue(n);
  while (!queue_.empty()) {
    std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
    const NodeId id = queue_.back();
    queue_.pop_back();
    queued_[id] = 0;
    const Node& n = graph_.nodes[id];
    placed_.clear();
    shadow_.clear();
    for (TensorId t : cache_.distinct_inputs(id)) {
      const Node& producer = graph_.nodes[graph_.tensors[t].producer];
      const Fragment& f = *nodes_[producer.id].fragment;
      const size_t result = std::find(producer.outputs.begin(), producer.outputs.end(), t) - producer.outputs.begin();
      placed_.push_back(f.placed[result]);
      shadow_.push_back(f.shadow[result]);
    }
    NodeState& state = nodes_[id];
    const Fragment* before = state.fragment;
    const Fragment* now = cache_.fragment(id, strategy_, placed_, shadow_);
    if (now == before) continue;
    if (before) saved_fragments_.push_back({id, before});
    num_chunked_ += now->chunked - (before ? before->chunked : 0);
    state.fragment = now;
    mark_stale(id);
    for (size_t r = 0; r < n.outputs.size(); ++r) {
      if (before && before->placed[r] == now->placed[r] && before->shadow[r] == now->shadow[r]) continue;
      for (const auto& [consumer, index] : consumers_[n.outputs[r]]) enqueue(consumer);
    }
  }
}

DeltaSimulator::Group* DeltaSimulator::take_group() {
  if (free_groups_.empty()) {
    pool_.push_back(std::make_unique<Group>());
    return pool_.back().get();
  }
  Group* out = free_groups_.back();
  free_groups_.pop_back();
  std::vector<Reader> readers = std::move(out->readers);
  readers.clear();
  *out = Group{};
  out->readers = std::move(readers);
  return out;
}

void DeltaSimulator::release(TensorState& state) {
  free_groups_.insert(free_groups_.end(), state.groups.begin(), state.groups.end());
  state.groups.clear();
}

// The last change stays: what it replaced is spare memory.
void DeltaSimulator::forget_replaced() {
  for (size_t i = 0; i < old_tensors_.used; ++i) release(old_tensors_.entries[i].second);
  for (size_t i = 0; i < old_inner_.used; ++i) {
    for (TensorState& t : old_inner_.entries[i].second) release(t);
  }
  old_tensors_.used = old_inner_.used = old_slots_.used = 0;
  updates_.before.clear();
  stored_.before.clear();
  launched_.before.clear();
}

void DeltaSimulator::Sums::set(TensorId t, const std::vector<int64_t>* now, bool remember) {
  if (now == of[t]) return;
  if (remember) before.emplace_back(t, of[t]);
  for (size_t d = 0; d < total.size(); ++d) total[d] += (now ? (*now)[d] : 0) - (of[t] ? (*of[t])[d] : 0);
  of[t] = now;
}

void DeltaSimulator::Sums::put_back() {
  for (const auto& [tensor, was] : before) set(tensor, was, false);
  before.clear();
}

void DeltaSimulator::put_back_replaced() {
  if (!rebuilt_) return;
  rebuilt_ = false;
  for (size_t i = 0; i < old_tensors_.used; ++i) std::swap(tensors_[old_tensors_.entries[i].first], old_tensors_.entries[i].second);
  for (size_t i = 0; i < old_inner_.used; ++i) std::swap(nodes_[old_inner_.entries[i].first].inner, old_inner_.entries[i].second);
  for (size_t i = 0; i < old_slots_.used; ++i) std::swap(nodes_[old_slots_.entries[i].first].slots, old_slots_.entries[i].second);
  updates_.put_back();
  stored_.put_back();
  launched_.put_back();
  std::swap(at_once_, old_at_once_);
  forget_replaced();
}

}  // namespace soap
