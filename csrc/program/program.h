// Program: the ordered steps that a Strategy means, forward and backward. A pure function of (OpGraph, Strategy, rows fed): the
// simulator prices it and the runtime executes it, so what is simulated is what runs.
//
// [Note: tile and copy] A *tile* is what one coord of a producer makes. A *copy* is what one coord of a consumer's operand reads: the
// destination of a reshard, shared by all consumers that need the same boxes on the same devices (a CopyGroup). Gradients run the
// other way: consumers add into the gradient of their copy, and one GradFill per group brings it to the tiles.
#pragma once

#include <string>
#include <vector>

#include "reshard/reshard.h"

namespace soap {

struct Use {
  NodeId node = -1;
  int operand = 0;
  std::vector<int> coord_of;  // [tile * chunks + chunk] -> coord of the copy, -1 when not read
};

struct CopyGroup {
  TensorId tensor = -1;
  Sharding copies;
  std::vector<Use> uses;
  bool grad = false;  // its copies have gradients that must reach the tiles
  Keep keep = Keep::kUntilBackward;
  Via via = Via::kAuto;
};

enum class StepKind {
  kFill,             // items: (copy group, chunk tag)
  kCompute,          // item: (node, chunk)
  kGradFill,         // items: (copy group, chunk of the producer)
  kComputeBackward,  // item: (node, chunk)
  kRefill,           // items: (copy group, chunk tag): a parameter's copy gathered again for backward (Keep::kUse)
};

struct StepItem {
  int id = -1;
  int chunk = 0;
  bool operator==(const StepItem&) const = default;
};

struct Step {
  StepKind kind = StepKind::kCompute;
  std::vector<StepItem> items;
};

struct Program {
  OpGraph graph;  // after expansion
  int world_size = 1;
  FedRows rows;
  bool interleaved = false;     // forward and backward steps in one order (1F1B)
  std::vector<Rule> rules;      // per node
  std::vector<Tiling> tilings;  // per node
  std::vector<FedFactor> fed;   // per node: where the sample dim is; factor -1 when nowhere
  std::vector<Sharding> tiles;  // per tensor: how its producer lays it out
  std::vector<CopyGroup> groups;
  std::vector<std::vector<int>> groups_of;  // per tensor
  std::vector<char> differentiable;         // per node: has a backward step
  std::vector<int> regions;                 // per node: of Strategy::recompute, where backward computes it again; else -1
  std::vector<Step> steps;                  // forward first unless interleaved
};

// Lowers a strategy. Throws std::invalid_argument where the strategy isn't legal (plan line and what would be), InternalError where our
// own invariants fail (coverage).
Program lower(const OpGraph& graph, const Strategy& strategy, const FedRows& rows);

// Of each node, whether it has a backward step: from its rule and the gradients of its results (a stand-in has no rule and none).
std::vector<char> differentiable_nodes(const OpGraph& graph, const std::vector<Rule>& rules);

// Where a parameter is stored when the strategy doesn't say: on each device the box that its first user reads there (`copies`, null for
// what isn't a parameter or has no user), if those boxes are one per device and make up the whole; else whole on every device.
Sharding derived_storage(const Tensor& tensor, const Sharding* copies, int world_size);
// Where it is stored when the strategy does say. Throws std::invalid_argument when a device would store two parts, or what can't be stored in parts is.
Sharding configured_storage(const Node& node, const Rule& rule, const Tiling& tiling, const Tensor& tensor);

// The pieces of one item of a fill, refill or grad-fill step, and how they move.
std::vector<Piece> item_pieces(const Program& program, StepKind kind, const StepItem& item);
Movement item_movement(const Program& program, StepKind kind, const StepItem& item, const std::vector<Piece>& pieces);

// One line per step, and a header line per node with its rule and tiling.
std::string to_string(const Program& program);
std::string_view to_string(StepKind kind);

}  // namespace soap
