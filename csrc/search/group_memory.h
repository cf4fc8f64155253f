// Group memory: the most that a rank of a stage holds, from what its group holds in one micro-batch (search/group_cost.h: GroupTensor). The terms are those of
// sim/memory.h, on a line of slots for the N operators of a micro-batch:
//
//   forward, operator p       fill(p) what is moved for it, compute(p)
//   backward, N-1 first       refill(p) what is gathered or computed again, back(p), bring(p) gradients to where they belong
//
//   one micro-batch           the peak over all slots
//   several                   the largest of: the first backward, with all that forward keeps of the others; a later one, beside the sums of the parameters'
//                             gradients; the last, which brings these to the replicas
//
// What activations hold is alike for all plans of the same groups, stages and recomputation (search/grid_stages.h): it is walked once, parameters for each.
#pragma once

#include <vector>

#include "search/group_cost.h"

namespace soap {

struct StageParameter {
  const GroupParameter* p = nullptr;
  NodeId first = -1, last = -1;  // readers of its stage
  int group = 1;                 // replicas that share its parts
};

// Of one stage. Its slots are those of the operators at which something of the stage happens: of `places` in place of N.
struct StageActivations {
  std::vector<int> place;  // by position: what it is among those operators
  int places = 0;
  std::vector<int64_t> changes;  // bytes more than in the slot before
  int64_t kept = 0;              // from forward to backward
  std::vector<int64_t> fed;      // what processes feed, each
};

// Per stage. `region_of`: per node, the repeated block that it is in, -1 for none. `parameters`: of each stage, whose readers are in its slots too.
std::vector<StageActivations> stage_activations(const GroupCost& cost, const std::vector<int>& stage_of, const std::vector<int>& region_of, bool recompute,
                                                const std::vector<std::vector<StageParameter>>& parameters);

struct GroupStage {
  const GroupCost& cost;
  const StageActivations& activations;
  const ManualOptions& options;
  int index = 0;
  const std::vector<StageParameter>& parameters;
  const std::vector<int>& by_end;  // the trained ones, in the order in which their gradients are complete
  bool early_backward = true;      // micro-batches can take turns (1F1B)
  int64_t bucket_bytes = 0;
};

// Bytes of the fullest rank.
int64_t stage_memory(const GroupStage& stage);

}  // namespace soap
