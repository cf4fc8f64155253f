// Group cost: what the ranks of one tensor parallel group spend on one micro-batch of one replica, operator by operator, from the same layouts, tiles and
// movements as the simulator's (sim/layout_cache.h). Grid plans (search/grid_price.h) are priced from it: all groups and all micro-batches of a
// grid do the same.
#pragma once

#include <memory>
#include <vector>

#include "search/manual.h"
#include "sim/layout_cache.h"

namespace soap {

struct GroupNode {
  std::vector<int64_t> forward, backward;  // ns per rank; empty where nothing is computed
  int64_t launch_ns = 0;                   // of the busiest rank's host, forward and backward, movements left out
  int64_t launch_again_ns = 0;             // the same where backward computes forward again
  int64_t fill_ns = 0;                     // movements among the ranks that forward waits for
  int64_t gradient_ns = 0;                 // movements of gradients among the ranks, before and after its backward, of activations
  // Of the fullest rank: results (views are nothing); those of them that backward keeps; copies moved for it that backward keeps.
  int64_t result_bytes = 0, saved_bytes = 0, copied_bytes = 0;
  bool keeps_operand = false, keeps_result = false;  // for backward
};

struct GroupParameter {
  NodeId node = -1;
  std::vector<NodeId> readers;  // in order
  NodeId last = -1;             // whose backward completes its gradient
  std::vector<int64_t> shape;   // of a rank's part
  int64_t bytes = 0;            // of a rank's part
  int64_t whole_bytes = 0;
  int64_t element_bytes = 4, reduced_element_bytes = 4;
  bool trained = false;
  bool alike = false;  // the ranks' gradients of it are addends of one sum (sequence parallelism): they are reduced with the replicas'
};

// A tensor that later operators read: what one rank gets where they are on other devices.
struct GroupEdge {
  TensorId tensor = -1;
  NodeId producer = -1, consumer = -1;
  int64_t bytes = 0;
  bool gradient = false;
};

struct GroupCost {
  int ranks = 1;
  std::vector<GroupNode> nodes;
  std::vector<GroupParameter> parameters;
  std::vector<GroupEdge> edges;  // of results of operators
};

// The cache's graph: one micro-batch of one replica (search/replica_graph.h); the group are the first devices of its machine. Throws
// std::invalid_argument when the strategy isn't legal or cuts in time.
GroupCost group_cost(LayoutCache& cache, const ManualPlanner& planner, const Strategy& strategy);

}  // namespace soap
