// DeltaSimulator: the simulated step time of a strategy that changes a little at a time (FlexFlow, section 5.2: delta simulation).
//
// Keeps what lowering made of every node and edge. A change of one node's configuration resolves that node again, then those whose operands
// it has moved; the movements of the tensors in between; and nothing else. All of it comes from a LayoutCache, so what has been tried
// before costs a lookup. The timeline is then run again over plain arrays. Undoing puts back what the change replaced.
//
//   step_ns() == simulate(lower(graph, strategy(), rows), cost).step_ns      to the bit (tests/cpp/delta_test.cpp)
//
// The order of steps is lowering's, in closed form: forward in the order of nodes, each after the fills that it is the first to need; backward
// the reverse, where a tensor's gradient is brought home before its producer's backward and a parameter's when its last reader is done.
// Strategies with chunks in time, the order 1f1b, chosen reshard paths, given storage, or regions that are computed again beside parameters that are
// gathered again are lowered whole; they cost what simulate costs.
#pragma once

#include <optional>
#include <vector>

#include "sim/layout_cache.h"
#include "sim/shared_timeline.h"

namespace soap {

// One node's new configuration; nullopt: none, it follows.
struct Change {
  NodeId node = -1;
  std::optional<OpConfig> config;
};

class DeltaSimulator {
 public:
  // The cache outlives it; several may share one, on one thread. Throws std::invalid_argument when the strategy isn't legal.
  DeltaSimulator(LayoutCache& cache, const Strategy& start, const FedRows& rows);

  int64_t step_ns() const { return step_ns_; }
  const Strategy& strategy() const { return strategy_; }
  // Step time with the changes. Throws std::invalid_argument when they aren't legal together, and is as it was before.
  int64_t change(const std::vector<Change>& changes, std::optional<int64_t> bucket_bytes = std::nullopt);
  // Takes the last change back; once.
  void undo();
  // What the fullest device stores after a change: parameters with their gradients and the optimizer's state, buffers, inputs. Peak memory is
  // this and activations. 0 where the strategy is lowered whole.
  int64_t stored_bytes() const;
  // The changes that make the current strategy `other`, where all but nodes and buckets are the same.
  std::vector<Change> difference(const Strategy& other) const;

 private:
  // A consumer's operand that reads a tensor: (node, operator of its fragment, operand).
  struct Reader {
    NodeId node = -1;
    int op = 0, operand = 0;
    bool computes = false, differentiable = false;  // the operator
  };
  // CopyGroup (program/program.h) as far as time goes.
  struct Group {
    const EdgeMove* fill = nullptr;
    const EdgeMove* gradient_fill = nullptr;
    int64_t filled = -1, refilled = -1, gradient_filled = -1;  // arrivals; of an earlier run where below first_arrival_
    int64_t bytes = 0;                                         // of the whole tensor
    bool gradient = false, used_again = false;                 // used_again: gathered again in backward (Keep::kUse)
    bool parameter = false;
    Reader producer;              // node -1 where the tensor is there from the start
    std::vector<Reader> readers;  // each reads all coords of the copies
    Reader last;                  // the reader whose backward completes the gradient; node -1: none, it is complete at once
    Reader regather;              // the reader whose backward needs the copy again first
    LayoutId copies = -1;
    const Tensor* tensor = nullptr;

    bool gradient_moves() const { return gradient && gradient_fill->pattern != Pattern::kLocal; }
    bool gradient_takes_time() const { return gradient_moves() || (gradient && !gradient_fill->local_ns.empty()); }
  };
  struct TensorState {
    LayoutId tiles = -1;
    std::vector<Group*> groups;  // of the pool
  };
  enum class SlotKind : uint8_t { kFill, kCompute, kGradientFill, kRefill, kBackward };
  struct Slot {
    SlotKind kind = SlotKind::kCompute;
    bool differentiable = false;
    int op = 0;
    // Moving. `ranks`: -1 where nothing crosses devices.
    int ranks = -1;
    Group* group = nullptr;
    // Computing. `each` on `count` devices from `first` on, several operators together, or what `spent` says where that isn't null.
    int first = 0, count = 0;
    int64_t each = 0;
    const Spent* spent = nullptr;
    int first_wait = 0, end_wait = 0;  // with overlap: of Slots::waits
    int first_read = 0, end_read = 0;  // with overlap: movements wait for when this ends on some of these devices
  };
  struct Slots {
    std::vector<Slot> forward, backward;
    std::vector<const int64_t*> waits;  // arrivals in groups
    std::vector<int64_t> ends;          // [forward, then backward][op][device], only with overlap
  };
  struct NodeState {
    const Fragment* fragment = nullptr;
    std::vector<TensorState> inner;
    Slots slots;
  };
  struct Saved {
    NodeId node = -1;
    const Fragment* fragment = nullptr;
  };
  // A movement has arrived at these devices then; `more`: and what the next entry says.
  struct Arrival {
    int64_t at = 0;
    const DeviceSet* devices = nullptr;
    bool more = false;
  };
  // A sum over tensors or nodes of what each is on every device.
  struct Sums {
    std::vector<const std::vector<int64_t>*> of;  // per tensor or node, null for nothing
    std::vector<int64_t> total;                   // per device
    std::vector<std::pair<TensorId, const std::vector<int64_t>*>> before;

    void set(TensorId t, const std::vector<int64_t>* now, bool remember);
    void put_back();
  };
  // What a list of states was before the last change. Entries beyond `used` are spare memory.
  template <class State>
  struct Journal {
    std::vector<std::pair<int, State>> entries;
    size_t used = 0;

    // The state goes to the journal; it becomes what a spare one was.
    State& replace(int id, State& state) {
      if (used == entries.size()) entries.emplace_back();
      entries[used].first = id;
      std::swap(entries[used].second, state);
      ++used;
      return state;
    }
  };

  bool has_fast_path() const;
  void resolve(const std::vector<NodeId>& dirty);
  void mark_stale(NodeId node);
  void clear_marks();
  void rebuild();
  Group* take_group();
  void release(TensorState& state);
  void forget_replaced();
  void put_back_replaced();
  void add_reader(TensorState& state, const Tensor& tensor, const Reader& reader);
  void finish(TensorState& state, const Reader& producer, bool parameter, bool used_again);
  void rebuild_tensor(TensorId t);
  void rebuild_inner(NodeId n);
  void rebuild_slots(NodeId n);
  void rebuild_forward(NodeId n, Slots& slots);
  void rebuild_backward(NodeId n, Slots& slots);
  Group* group_of(NodeId n, int op, int operand);
  Slot computing(NodeId n, SlotKind kind, int op, Slots& slots);
  void push_computing(std::vector<Slot>& list, Slot slot);
  void update_stored();
  TensorState& state_of(NodeId node, const FragmentTensor& tensor);
  static void sort_newest_first(std::vector<Group*>& groups);
  void restore();

  int64_t run();
  // When the last host has launched all of this run, or 0 where that is sure to be before `device_end`.
  int64_t hosts_end(int64_t device_end);
  void run_forward();
  void run_backward();
  void compute(Slots& slots, const Slot& slot);
  void move(SlotKind kind, Group& group);
  void move_together(SlotKind kind, const std::vector<Group*>& groups);
  void transfer(const DeviceSet& ranks, int64_t from, int64_t price);
  // clock[d] is not before the movement has arrived at d, for d of the stretch.
  void wait(int64_t arrival, int64_t* clock, int first, int count) const;
  const int64_t* end_of(const Reader& reader, bool backward) const;
  // For each reader or producer that the movement waits for: where it ends, on which devices.
  template <class Visit>
  void for_sources(SlotKind kind, const Group& group, const Visit& visit) const;
  std::vector<int64_t>& movement_clock() { return overlap_ ? movement_clock_ : compute_clock_; }

  LayoutCache& cache_;
  const OpGraph& graph_;
  Strategy strategy_;
  FedRows rows_;
  bool overlap_, shared_, launches_;
  SharedTimeline timeline_;
  std::vector<int> regions_;  // per node: the region that names it, -1 for none
  size_t devices_;
  std::vector<NodeState> nodes_;
  std::vector<NodeId> timed_;  // nodes that have slots: all but stores
  std::vector<TensorState> tensors_;
  std::vector<std::vector<std::pair<NodeId, int>>> consumers_;  // per tensor, each once: (node, index in its distinct inputs)
  std::vector<char> stale_, slots_stale_, queued_;              // per tensor: its groups must be rebuilt; per node: its slots; is in the queue
  std::vector<TensorId> stale_list_;
  std::vector<NodeId> changed_nodes_;  // whose slots and inner tensors must be rebuilt
  std::vector<NodeId> rebuilt_slots_;
  std::vector<Group*> at_once_;  // gradients that nothing has to be computed for
  Sums updates_, stored_;        // the optimizer's time, and bytes
  Sums launched_;                // by node: of the host, movements left out
  std::vector<std::unique_ptr<Group>> pool_;
  std::vector<Group*> free_groups_;
  int num_chunked_ = 0;
  int64_t step_ns_ = 0;

  // Before the last change. `as_built_`: nothing was left to rebuild then, so undoing can put back what it replaced.
  std::vector<std::pair<NodeId, std::optional<OpConfig>>> saved_configs_;
  std::vector<Saved> saved_fragments_;
  int64_t saved_step_ns_ = 0, saved_bucket_bytes_ = 0;
  bool as_built_ = false, rebuilt_ = false;
  Journal<TensorState> old_tensors_;
  Journal<std::vector<TensorState>> old_inner_;
  Journal<Slots> old_slots_;
  std::vector<Group*> old_at_once_;

  // Of one run.
  std::vector<int64_t> compute_clock_, movement_clock_, host_clock_, begin_, local_;
  std::vector<Arrival> arrivals_;
  int64_t first_arrival_ = 0;  // number of arrivals_[0]; numbers are never used again
  std::vector<Group*> pending_, bucket_, sorting_, alone_;
  std::vector<std::pair<int, int64_t>> reduced_;
  std::vector<const EdgeMove*> exchanged_;
  std::vector<int> ranks_;
  std::vector<NodeId> queue_;
  std::vector<int> placed_, shadow_;
};

}  // namespace soap
