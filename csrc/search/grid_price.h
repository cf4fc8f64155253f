// The price of a grid plan (search/manual.h: stages x replicas x ranks) of any size, without naming its devices.
//
// All replicas do the same, and so do all micro-batches: one group of ranks is timed on one micro-batch of one replica (search/group_cost.h), the
// replicas' gradients and stored parts by the size of their groups, and stages by the schedule of their micro-batches. So a plan for 16,384
// devices is priced as fast as one for the ranks of a group.
//
//   stage s, micro-batch i   forward  F = sum over its operators of compute and of movements within the group
//                            backward B = the same backwards (and F's compute once more where it is recomputed)
//   first forward            waits for parameters gathered from their parts (ZeRO), in order, beside the compute where the machine overlaps
//   first backward           for those that are gathered again (ZeRO-3)
//   last backward            brings gradients to the replicas in buckets; a bucket that isn't full is passed on to the stage before (search/grid_schedule.h)
//   options.fsdp             these two as PyTorch's fully_shard does them, in every micro-batch (search/fsdp.h)
//   schedule                 GPipe (Huang et al. 2019) or 1F1B (Narayanan et al. 2019): search/grid_schedule.h
//   step                     the last stage to end, and its update; or what a stage's host takes to launch all of it, where that is longer (sim/simulate.h)
//
// Memory of a stage: search/group_memory.h. tests/unit/test_grids.py holds both against simulate(lower(...)).
#pragma once

#include <array>
#include <map>
#include <memory>
#include <vector>

#include "search/grid_stages.h"

namespace soap {

struct GridPrice {
  int64_t step_ns = 0;
  int64_t compute_ns = 0;        // of the busiest stage
  int64_t communication_ns = 0;  // of that stage
  int64_t host_ns = 0;           // of the stage whose host launches longest (Machine::launch); it bounds the step where the devices' take less
  int64_t device_step_ns = 0;    // the step of hosts that take no time
  int64_t memory_bytes = 0;      // of the fullest stage
  std::vector<int64_t> stage_memory;
};

class GridPricer {
 public:
  // Graph, planner and machine outlive it.
  GridPricer(const OpGraph& graph, const ManualPlanner& planner, const CostModel& cost);
  // Throws std::invalid_argument where the grid isn't legal for the graph.
  // Without memory (0) it is quicker, for who tries one configuration after the other.
  GridPrice price(const ManualOptions& options, const GroupConfigs& configs = {}, bool memory = true);

 private:
  // The graph of one micro-batch.
  struct Replica {
    OpGraph graph;
    std::unique_ptr<ManualPlanner> planner;  // of one device
  };
  // What lowers it for groups of one size.
  struct Share {
    const OpGraph* graph = nullptr;
    std::unique_ptr<ManualPlanner> planner;
    std::unique_ptr<CostModel> cost;
    std::unique_ptr<LayoutCache> cache;
    std::array<std::unique_ptr<GroupCost>, 2> manual;  // without and with the sequence cut
  };
  Share& share(int ranks, int64_t parts);

  const OpGraph& graph_;
  const ManualPlanner& planner_;
  const CostModel& cost_;
  std::vector<int> regions_;             // per node: the repeated block that it is in
  std::map<int64_t, Replica> replicas_;  // by how many share the batch
  std::map<std::pair<int, int64_t>, std::unique_ptr<Share>> shares_;
  std::map<int, std::vector<int>> stages_;
  GridStages last_;  // of the last manual plan: the next one is mostly the same grid with its parameters stored otherwise
};

}  // namespace soap
