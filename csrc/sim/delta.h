// DeltaSimulator: the simulated step time of a strategy that changes a little at a time (FlexFlow, section 5.2: delta simulation).
//
// Keeps what lowering made of every node and edge. A change of one node's configuration resolves that node again, then those whose operands
// it has moved; the movements of the tensors in between; and nothing else. All of it comes from a LayoutCache, so what has been tried
// before costs a lookup. The timeline is then run again over plain arrays.
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
  int64_t change(const std::vector<Change>& changes);
  // Takes the last change back; once.
  void undo();
  // The changes that make the current strategy `other` (of the same world size, order and buckets).
  std::vector<Change> difference(const Strategy& other) const;

 private:
  // A consumer's operand that reads a tensor: (node, operator of its fragment, operand).
  struct Reader {
    NodeId node = -1;
    int op = 0, operand = 0;
  };
  // CopyGroup (program/program.h) as far as time goes.
  struct Group {
    LayoutId copies = -1;
    std::vector<Reader> readers;
    bool gradient = false, used_again = false;  // used_again: gathered again in backward (Keep::kUse)
    const EdgeMove* fill = nullptr;
    const EdgeMove* gradient_fill = nullptr;
    Reader last;      // the reader whose backward completes the gradient; node -1: none, it is complete at once
    Reader regather;  // the reader whose backward needs the copy again first
    const Tensor* tensor = nullptr;
    Reader producer;  // node -1 where the tensor is there from the start
    bool parameter = false;
    // Readers whose backward each sender of the gradient waits for; whose forward each receiver of a refill waits for. Only with overlap.
    std::vector<std::pair<Reader, int>> gradient_waits, refill_waits;
    int filled = -1, refilled = -1, gradient_filled = -1;  // arrivals of this run
  };
  struct TensorState {
    LayoutId tiles = -1;
    std::vector<std::unique_ptr<Group>> groups;
  };
  enum class SlotKind { kFill, kCompute, kGradientFill, kRefill, kBackward };
  struct Slot {
    SlotKind kind = SlotKind::kCompute;
    Group* group = nullptr;
    int op = 0;
    const std::vector<int64_t>* spent = nullptr;  // of a computing slot, per device
    std::vector<Group*> reads, writes;            // what it waits for; only with overlap
  };
  struct NodeState {
    const Fragment* fragment = nullptr;
    std::vector<TensorState> inner;
    std::vector<Slot> forward, backward;
    std::vector<int64_t> forward_end, backward_end;  // [op][device], only with overlap
  };
  struct Saved {
    NodeId node = -1;
    const Fragment* fragment = nullptr;
  };

  bool has_fast_path() const;
  void resolve(std::vector<NodeId> dirty);
  void rebuild();
  void add_reader(TensorState& state, const Tensor& tensor, const Reader& reader);
  void finish(TensorState& state, const Tensor& tensor, const Reader& producer, bool parameter, bool used_again);
  void rebuild_tensor(TensorId t);
  void rebuild_inner(NodeId n);
  void rebuild_slots(NodeId n);
  TensorState& state_of(NodeId node, const FragmentTensor& tensor);
  static void sort_newest_first(std::vector<Group*>& groups);
  void restore();

  int64_t run();
  void compute(NodeState& state, const Slot& slot);
  void move(SlotKind kind, const std::vector<Group*>& groups);
  void transfer(int ranks, int64_t price);
  void wait_for_sources(SlotKind kind, const Group& group);
  void wait(int arrival);

  LayoutCache& cache_;
  const OpGraph& graph_;
  Strategy strategy_;
  FedRows rows_;
  bool overlap_, shared_;
  SharedTimeline timeline_;
  std::vector<int> regions_;  // per node: the region that names it, -1 for none
  size_t devices_;
  std::vector<NodeState> nodes_;
  std::vector<TensorState> tensors_;
  std::vector<std::vector<NodeId>> consumers_;  // per tensor, each once
  std::vector<char> stale_;                     // per tensor: its groups must be rebuilt
  std::vector<TensorId> stale_list_;
  std::vector<NodeId> changed_nodes_;                 // whose slots and inner tensors must be rebuilt
  std::vector<Group*> at_once_;                       // gradients that nothing has to be computed for
  std::vector<const std::vector<int64_t>*> updates_;  // per tensor: the optimizer's time, null for what it leaves alone
  int num_chunked_ = 0;
  int64_t step_ns_ = 0;

  std::vector<std::pair<NodeId, std::optional<OpConfig>>> saved_configs_;
  std::vector<Saved> saved_fragments_;
  int64_t saved_step_ns_ = 0;

  // Of one run.
  std::vector<int64_t> compute_clock_, movement_clock_, begin_, arrivals_, stored_update_;
  std::vector<Group*> pending_, bucket_;
  std::vector<std::pair<int, int64_t>> reduced_;
  std::vector<const EdgeMove*> exchanged_;
};

}  // namespace soap
