// Micro-batches through the stages of a grid, as lowering orders their steps (program/order.h) and the simulator takes them (sim/simulate.h).
//
//   gpipe   forward, micro-batch by micro-batch and stage by stage; then backward, all of it reversed
//   1f1b    a stage takes the first micro-batch whose gradient has come, else the first that may go forward: no more are under way than there are stages. What
//           comes interrupts what it does. Lowering decides by an estimate of work, so does this; what takes time follows in that order. Where the loss is no
//           sum over micro-batches, backward waits for all forwards
//
// What moves between two stages takes the time of both, where it meets them, or, where the machine overlaps, of their links.
#pragma once

#include <cstdint>
#include <vector>

#include "search/grid_stages.h"

namespace soap {

// Of one stage, in ns: of a micro-batch, of the first forward, and of the first and the last backward. Of one micro-batch all is the last backward.
struct StageTimes {
  int64_t forward = 0, first_forward = 0;
  int64_t gathers = 0;  // of first_forward: parameters from their parts
  int64_t backward = 0, first_backward = 0, last_backward = 0;
  int64_t synchronised = 0;    // when gradients of full buckets are where they are stored, after the begin of the last backward
  int64_t first_bucket = 0;    // when the first is full, likewise; 0: none is
  ExchangeLoad left = {};      // of gradients that fill none: what is exchanged,
  int64_t left_reduce_ns = 0;  // and what is summed
};

struct ScheduleOptions {
  const Machine& machine;
  int stage_devices = 1;
  int micro_batches = 1;
  bool early_backward = true;
  bool meets = true;  // with what all stages do together: rows from those who feed them, the loss and its gradient
};

// When each stage is done but for the update. The options outlive the call.
std::vector<int64_t> stage_ends(const GridStages& grid, const std::vector<StageTimes>& times, const ScheduleOptions& options);

}  // namespace soap
