// What the plans of a grid share, however they store parameters and order micro-batches: operators and parameters of each stage, what stages send each other,
// and a micro-batch that gathers and brings nothing. Known once, a grid's storages are priced from it one after the other.
#pragma once

#include <vector>

#include "search/group_memory.h"
#include "search/walk.h"

namespace soap {

struct StageTransfer {  // of one micro-batch from a stage to a later one
  int from = 0, to = 0;
  int64_t forward_bytes = 0, backward_bytes = 0;
  int64_t forward_ns = 0, backward_ns = 0;
};

struct GridStages {
  // Of one stage.
  struct Stage {
    std::vector<NodeId> nodes;           // operators
    std::vector<int> refills, ends;      // parameters by last reader, and the trained ones by the reader that completes the gradient; the last first
    int64_t compute = 0, host = 0;       // of a micro-batch
    int64_t extra = 0, extra_bytes = 0;  // parameters that it shares with an earlier stage: their time in a step, and copies with gradients
    WalkTimes forward, backward;         // of a micro-batch that moves nothing but what its groups do
  };
  const GroupCost* cost = nullptr;
  int dp = 1, pp = 1;
  bool recompute = false;
  std::vector<Stage> stages = {};
  std::vector<std::vector<StageParameter>> parameters = {};  // of each stage, in the order of their first readers; groups as the plan at hand has them
  std::vector<StageTransfer> transfers = {};
  std::vector<StageActivations> activations = {};  // empty until somebody asks for memory
};

// `region_of`: per node, the repeated block that it is in, -1 for none.
GridStages grid_stages(const OpGraph& graph, const GroupCost& cost, const ManualOptions& options, const std::vector<int>& stage_of,
                       const std::vector<int>& region_of, const Machine& machine);

}  // namespace soap
