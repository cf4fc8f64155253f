// Group memory: the most that a rank of a stage holds, from what its group holds in one micro-batch (search/group_cost.h: GroupTensor). The terms are those of
// sim/memory.h, on a line of slots for the N operators of a micro-batch:
//
//   forward, operator p       fill(p) what is moved for it, compute(p)
//   backward, N-1 first       refill(p) what is gathered or computed again, back(p), bring(p) gradients to where they belong
//
//   one micro-batch           the peak over all slots
//   several                   the largest of: the first backward, with all that forward keeps of the others; a later one, beside the sums of the parameters'
//                             gradients; the last, which brings these to the replicas
#pragma once

#include <vector>

#include "search/group_cost.h"

namespace soap {

struct StageParameter {
  const GroupParameter* p = nullptr;
  int group = 1;  // replicas that share its parts
};

struct GroupStage {
  const GroupCost& cost;
  const ManualOptions& options;
  const std::vector<int>& stage_of;   // per node
  const std::vector<int>& region_of;  // per node: the repeated block that it is in, -1 for none
  int index = 0;
  std::vector<StageParameter> parameters;
  bool early_backward = true;  // micro-batches can take turns (1F1B)
  int64_t bucket_bytes = 0;
};

// Bytes of the fullest rank.
int64_t stage_memory(const GroupStage& stage);

}  // namespace soap
