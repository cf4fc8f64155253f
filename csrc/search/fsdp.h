// Stored parts as PyTorch's fully_shard moves them, to price what people run today (Zhao et al. 2023, arXiv:2304.11277, section 3.3; torch.distributed.fsdp).
// This runtime gathers parameter by parameter with exchanges; there
//
//   unit        the parameters that one repeated block reads first, or what lies between blocks; one all-gather, one reduce-scatter, both rings over
//               hosts (gather_ns in machine/collectives.h)
//   forward     unit i+1's all-gather runs beside unit i's compute
//   backward    unit i-1's likewise (ZeRO-3: gathered again); unit i's reduce-scatter, in float32, runs beside unit i-1's compute
//   recompute   block by block, until everything that its backward keeps is there again (early stop in torch.utils.checkpoint): not its last product
//   update      of float32 parts, whatever type the parameters are gathered in
//   HSDP        an all-reduce of the parts over the groups follows each reduce-scatter
//
// Every micro-batch does all of it. Movements within a tensor parallel group take its links and its time.
#pragma once

#include "search/manual.h"
#include "search/walk.h"

namespace soap {

struct FsdpStage {
  std::vector<NodeId> nodes;  // its operators, in order
  int first_device = 0;
};

struct FsdpTimes {
  int64_t forward = 0, backward = 0;
  int64_t synchronised = 0;  // when gradients are there, after the begin of backward
  int64_t moved = 0;         // of both
  int movements = 0;
};

// `region_of`: per node, the repeated block that it is in, -1 for none. Needs zero 2 or 3.
FsdpTimes fsdp_times(const FsdpStage& stage, const GroupCost& cost, const ManualOptions& options, const std::vector<int>& region_of, const Machine& machine);

}  // namespace soap
