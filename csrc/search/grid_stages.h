// What the plans of a grid share, however they store parameters and order micro-batches: operators and parameters of each stage, what stages send each other,
// and a micro-batch that gathers and brings nothing. Known once, a grid's storages are priced from it one after the other.
#pragma once

#include <vector>

#include "search/grid_links.h"
#include "search/group_memory.h"
#include "search/walk.h"

namespace soap {

struct StageTransfer {  // of one micro-batch from a stage to a later one
  int from = 0, to = 0;
  int64_t forward_bytes = 0, backward_bytes = 0;
  int64_t forward_ns = 0, backward_ns = 0;
};

// A parameter that a later stage reads too: its copy comes once, its gradient goes home with the first bucket after that stage's last backward.
struct SharedParameter {
  int home = 0, other = 0;
  size_t parameter = 0;  // of its home
  int64_t fill_ns = 0;   // these as the plan at hand stores it
  ExchangeLoad gradient = {};
};

struct GridStages {
  // Of one stage.
  struct Stage {
    std::vector<NodeId> nodes;                  // operators
    std::vector<int64_t> fill_ns, gradient_ns;  // of these, among its ranks
    std::vector<int> refills, ends;             // parameters by last reader, and the trained ones by the reader that completes the gradient; the last first
    int64_t compute = 0, host = 0;              // of a micro-batch
    double work = 0;                            // of its forward, as lowering estimates it
    int64_t extra_bytes = 0;                    // parameters that it shares with an earlier stage: copies with gradients
    // Of the first forward besides: before these operators (by index in `nodes`), what processes feed and where samples meet. Of the last backward besides:
    // behind them, where the gradients of samples do.
    struct Meeting {
      size_t at = 0;
      int64_t ns = 0;
      bool computed = false;  // what it moves
    };
    std::vector<Meeting> first_fills, last_gradients;
    WalkTimes forward, backward;  // of a micro-batch that moves nothing but what its groups do
  };
  const GroupCost* cost = nullptr;
  int dp = 1, pp = 1;
  bool recompute = false, interleaved = false;
  std::vector<Stage> stages = {};
  std::vector<std::vector<StageParameter>> parameters = {};  // of each stage, in the order of their first readers; groups as the plan at hand has them
  std::vector<StageTransfer> transfers = {};
  std::vector<SharedParameter> shared = {};
  // Movements of all stages: what processes feed to micro-batches, before everything; the loss to all processes, behind the last stage's forward; its gradient
  // to the last stage, for each micro-batch.
  int64_t ahead_ns = 0, return_ns = 0, return_gradient_ns = 0;
  int64_t num_ahead = 0, num_returns = 0, num_return_gradients = 0;
  std::vector<StageActivations> activations = {};  // empty until somebody asks for memory
};

// Whether backward steps may come before other micro-batches' forward.
inline bool is_interleaved(const ManualOptions& o) {
  return o.order == Order::kInterleaved && o.micro_batches > 1;
}

// `region_of`: per node, the repeated block that it is in, -1 for none.
GridStages grid_stages(const OpGraph& graph, const GroupCost& cost, const ManualOptions& options, const std::vector<int>& stage_of,
                       const std::vector<int>& region_of, const Machine& machine);

}  // namespace soap
