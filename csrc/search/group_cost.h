// Group cost: what the ranks of one tensor parallel group spend on one micro-batch of one replica, operator by operator, from the same layouts, tiles and
// movements as the simulator's (sim/layout_cache.h). Grid plans (search/grid_price.h) are priced from it: all groups and all micro-batches of a
// grid do the same.
#pragma once

#include <memory>
#include <vector>

#include "machine/collectives.h"
#include "search/manual.h"
#include "sim/layout_cache.h"

namespace soap {

// What moves among the ranks of a group for an operator, as all groups of a stage move it at once.
struct GroupMove {
  int64_t price_ns = 0;  // where one group is alone
  bool exchange = false;
  ExchangeLoad load = {};  // of an exchange, of one group
  bool joins = false;      // lowering may let it travel with the one before it: the same ranks, nothing between
  bool fed = false;        // what processes feed
};

struct GroupNode {
  std::vector<int64_t> forward, backward;            // ns per rank; empty where nothing is computed
  int64_t launch_ns = 0;                             // of the busiest rank's host, forward and backward, movements left out
  int64_t launch_again_ns = 0;                       // the same where backward computes forward again
  double work = 0;                                   // of its forward, as lowering estimates it to put micro-batches in order
  int64_t fill_ns = 0;                               // movements among the ranks that forward waits for
  int64_t gradient_ns = 0;                           // movements of gradients among the ranks, before and after its backward, of activations
  std::vector<GroupMove> fills, gradients;           // these movements
  bool keeps_operand = false, keeps_result = false;  // for backward
  int position = 0;                                  // of its first operator, see GroupTensor
};

// What a rank holds while a micro-batch runs (search/group_memory.h): a tile of a result, those of an expansion's operators too, or a copy that isn't a part of
// its tile. Bytes are the fullest rank's. Positions number operators as they run; backward goes through them in reverse.
struct GroupRead {
  NodeId node = -1;
  int position = 0;
  bool saved = false;          // backward reads it
  bool gradient = false;       // adds to its gradient
  bool view = false;           // whose gradient is a view of the reader's
  int64_t backward_bytes = 0;  // that the reader's backward makes besides while it runs
  bool moves = false;          // before the reader computes: all that reads it is the movement of a copy
};

struct GroupTensor {
  NodeId node = -1;  // that makes it; of a copy, the first that reads it
  int position = 0;
  int64_t bytes = 0;
  int64_t bytes_more = 0;        // kept besides until its own backward
  int root = -1;                 // whose memory it is: itself, or what it is a view of; -1: a parameter's
  int source = -1;               // of a copy: its tile
  bool fed = false;              // what a process feeds: there before and after
  bool moved = false;            // of a copy, which else is put together from what is there
  bool returns = false;          // of a copy: its gradient moves; else it is the tile's
  bool saved = false;            // its own backward reads it
  std::vector<GroupRead> reads;  // what keeps it: those of its views too, which add to no gradient of it
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
  bool saved = false;  // backward reads it
  bool alike = false;  // the ranks' gradients of it are addends of one sum (sequence parallelism): they are reduced with the replicas'
};

// A tensor that later operators read: what one rank gets where they are on other devices.
struct GroupEdge {
  TensorId tensor = -1;
  NodeId producer = -1, consumer = -1;
  int64_t bytes = 0;
  bool gradient = false;
};

// What an operator or return reads of a feed: equal copies of a stage are made once.
struct GroupFeed {
  TensorId tensor = -1;
  LayoutId copies = -1;
  NodeId reader = -1;
  int64_t bytes = 0;  // of a rank's copy
};

// Where samples meet: a sum over them that an operator or a return reads whole (the number of rows that count, the loss); or what is alike for all of them
// (embedded positions), whose gradient is a sum over them.
struct GroupMeeting {
  NodeId producer = -1, reader = -1;
  int64_t bytes = 0;      // of the sum
  bool gradient = false;  // of a return's
  bool spread = false;    // alike for all samples
};

struct GroupCost {
  int ranks = 1;
  std::vector<GroupNode> nodes;
  std::vector<GroupTensor> tensors;
  int positions = 0;
  std::vector<GroupParameter> parameters;
  std::vector<GroupEdge> edges;  // of results of operators
  std::vector<GroupFeed> feeds;  // by reader
  std::vector<GroupMeeting> meetings;
};

// The cache's graph: one micro-batch of one replica (search/replica_graph.h); the group are the first devices of its machine. Throws
// std::invalid_argument when the strategy isn't legal or cuts in time. `held`: with tensors and positions, and what operators keep.
GroupCost group_cost(LayoutCache& cache, const ManualPlanner& planner, const Strategy& strategy, bool held);

}  // namespace soap
