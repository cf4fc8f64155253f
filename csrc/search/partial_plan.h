// PartialPlan: a plan of which only the first operators are configured, and a lower bound on the step time of everything that it can become.
//
// Lowers and times the graph's nodes in their order, as the simulator does (sim/simulate.h), and takes back what it lowered last. The bound is the
// larger of two. In both, what is lowered is simulated, forward and backward.
//
// By paths: each tile t of a tensor that a later operator n reads gets its gradient no earlier than
//
//   returned(t) = min over the replicas r of t of  end of the producer's forward on r  +  path(n)
//   path(n)     = least time of a tile of n, forward and backward,  +  max over readers m of n's results of  path(m)
//
// By work: on average over the D devices
//
//   step >= 1/D [ sum over d of (end of forward on d + b(d))  +  work of what isn't lowered + its parameters' update ]
//   b(d)  = from when d begins backward until it has done its update, waiting for nothing but what depends on d
//
// Neither exceeds the step time: lowering more operators adds work, movements and waits to what is there and takes none away, and all that they compute
// comes between the forward and the backward of what is there. For paths: every tile of t is read by some tile of n (it counts only where n reads
// every element), whose backward comes after its forward and after what reads its own result, and only then does t's gradient come back.
// Gradients of parameters that share a bucket with later ones: see `loose` in the source. Takes for granted that a movement costs no less for
// more bytes.
#pragma once

#include <array>
#include <unordered_map>
#include <vector>

#include "sim/layout_cache.h"

namespace soap {

constexpr int kLargestExhaustiveWorld = 8;

// What is known of nodes, however they are configured.
struct Remainder {
  std::vector<int64_t> paths;   // per node: path(n), 0 for what gives no bound
  std::vector<int64_t> work;    // per node n: least work of the nodes from n on, ns of all devices together; one more entry, 0
  std::vector<int64_t> update;  // per tensor, of a trained parameter: least time of its update, all devices together
};

class PartialPlan {
 public:
  using Clock = std::array<int64_t, kLargestExhaustiveWorld>;  // ns per device

  // The cache outlives it. Throws std::invalid_argument for more than kLargestExhaustiveWorld devices, and for machines whose devices slow each
  // other down (Machine::busy_speed).
  PartialPlan(LayoutCache& cache, int world_size, int64_t bucket_bytes);

  // Configurations of all nodes; those below next() are what has been lowered.
  Strategy& strategy() { return strategy_; }
  NodeId next() const { return next_; }
  // Lowers the nodes up to `end`. Throws std::invalid_argument where they aren't legal; it has then to be taken back too.
  void extend(NodeId end);
  // Takes the last extend back.
  void retreat();
  // Least positive time of forward and backward on a device that `node`, lowered, takes; of the least of its operators where it is expanded.
  int64_t least_ns(NodeId node) const;
  // Forward and backward of all its operators, all devices together.
  int64_t work_ns(NodeId node) const;
  // ns. With all nodes lowered it is the step time. By work only where paths bound it by less than `enough`.
  int64_t bound(const Remainder& remainder, int64_t enough);

 private:
  struct Move {
    const EdgeMove* edge = nullptr;
    uint32_t senders = 0;  // devices
  };
  struct Group {
    int slot = -1, older = -1;  // the slot's group before this one
    LayoutId copies = -1;
    const Move* fill = nullptr;
    const Move* gradient_fill = nullptr;
    bool gradient = false;
    int operand = 0;                   // of its first reader
    std::vector<int> readers;          // runs
    std::vector<char> differentiable;  // per reader: its operator has a backward step
    std::vector<char> adds;            // per reader: it adds to the gradient
    Clock filled{}, returned{};        // arrivals
  };
  struct Slot {  // a tensor: the graph's by id, then inner ones of expansions
    const Tensor* tensor = nullptr;
    LayoutId tiles = -1;
    int producer = -1;  // run; -1: there from the start
    int newest = -1;    // group
    bool store = false, parameter = false;
  };
  struct Run {  // an operator in its place
    const FragmentOp* op = nullptr;
    std::vector<int> reads, writes;  // groups, slots
    Clock end{}, backward_end{};
  };
  struct Saved {
    NodeId next = 0;
    size_t runs = 0, groups = 0, slots = 0, joined = 0, placed = 0;
    std::vector<int> pending;
    Clock compute{}, movement{}, update{};
  };

  void lower(NodeId node);
  int slot_of(NodeId node, const FragmentTensor& tensor, size_t first_inner) const;
  void read(int run, int operand, int slot, const FragmentRead& read);
  void flush(Clock& clock);
  const Move* move_of(const Tensor& tensor, LayoutId tiles, LayoutId copies, bool gradient);
  // Groups that travel together; `begin`: when what they send is there. Sets their arrivals.
  void transfer(const std::vector<int>& groups, bool gradient, Clock& clock, const Clock& begin);
  Clock sources(int group, bool gradient, const Clock& clock) const;
  void sort_newest_first(std::vector<int>& groups) const;
  void floors(const std::vector<int64_t>& paths);
  // Backward and update from these clocks on: when each device is done. `floored`: no earlier than `floors` says.
  Clock backward(Clock compute, Clock movement, bool floored);

  LayoutCache& cache_;
  const OpGraph& graph_;
  Strategy strategy_;
  int world_;
  bool overlap_, one_bucket_;
  std::vector<std::vector<NodeId>> consumers_;  // per tensor
  std::unordered_map<const EdgeMove*, Move> moves_;

  NodeId next_ = 0;
  std::vector<const Fragment*> fragments_;  // per node
  std::vector<Run> runs_;                   // entries beyond the counts are spare memory
  std::vector<Group> groups_;
  std::vector<Slot> slots_;
  size_t num_runs_ = 0, num_groups_ = 0;
  std::vector<int> joined_;   // groups that a reader was added to, in order
  std::vector<int> placed_;   // stores whose tiles were derived, in order
  std::vector<int> pending_;  // fills that may travel with the next one
  Clock compute_{}, movement_{}, update_{};
  std::vector<Saved> saved_;
  std::vector<Clock> floors_;  // per slot of the graph's tensors
};

}  // namespace soap
