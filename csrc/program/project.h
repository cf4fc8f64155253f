// project: what one rank does for a Program.
//
// [Note: local values] A rank holds tiles (of coords placed on it) and copies. A copy that is exactly one local tile, and whose gradient
// is the only one that this tile gets from its group, is that tile's value: no movement either way, and neighbouring operators join one
// segment. Other copies are values of their own, assembled by moves.
//
// [Note: segment] The longest run of compute items between movements, contiguous on this rank both forward and backward; items without a gradient
// that it neither reads nor is read by don't end it: they come after it, or before, and those of which only buffers' new values are made come last of
// all where that takes no memory. It becomes one fx.GraphModule with its own autograd graph. Those of a region (sharding/region.h) hold one chunk of that
// region alone. Items with a gradient that several devices do alike (replicas) only join where the *global* order has no movement between them, so that
// every replica adds its gradients in the same order and stays bitwise equal.
#pragma once

#include <string>
#include <vector>

#include "program/program.h"

namespace soap {

struct LocalValue {
  TensorId tensor = -1;
  Box box;
  int group = -1;  // copies: their group; tiles: -1
  int coord = -1;
  bool grad = false;  // its gradient is wanted
};

// One tile of one operator in one chunk.
struct ComputeItem {
  NodeId node = -1;
  int tile = 0, chunk = 0;
  std::vector<IndexSet> sets;  // per factor of the node's rule, global indices
  std::vector<int> operands;   // local values, -1 where the operand isn't read (anchored elsewhere)
  std::vector<int> results;    // local values
  bool empty = false;          // a factor's part is empty: the results are the identity of their reduction, without gradient
};

struct Segment {
  std::vector<ComputeItem> items;
  std::vector<int> inputs;   // values made outside
  std::vector<int> outputs;  // values used outside
  bool differentiable = false;
  int region = -1;         // of Program::regions: forward runs it without a graph, backward computes it again
  std::vector<int> again;  // outputs that others of its region read when they are computed again
};

// Part of a movement that concerns this rank. Boxes are positions within the values.
struct Move {
  int peer = -1;           // other rank; -1: both ends are here
  bool send = false;       // remote moves only
  int src = -1, dst = -1;  // local values (the end that is here)
  Box src_box, dst_box;    // of the end that is here
  int64_t elements = 0;
};

// One item of a step. Receivers first set their value to the identity, then combine moves in the order given; so do all replicas.
struct Transfer {
  StepItem item;
  Pattern pattern = Pattern::kLocal;
  Reduce reduce = Reduce::kNone;  // kNone: every element arrives once
  std::vector<int> ranks;         // participants
  std::vector<Move> moves;
  std::vector<int> results;  // values (fill) or gradients (grad fill) that this transfer completes here
  int64_t elements = 0;      // kAllReduce: size of the addend
};

// One part of what backward computes again: a segment, or a fill (an instruction) of copies on this rank alone.
struct Again {
  int segment = -1, fill = -1;
};

enum class InstructionKind { kSegment, kSegmentBackward, kFill, kGradFill, kRefill };

struct Instruction {
  InstructionKind kind = InstructionKind::kSegment;
  int step = -1;  // index in Program::steps: equal on every rank that takes part
  int segment = -1;
  std::vector<Transfer> transfers;
  std::vector<int> ranks;         // of the step's exchange (union over kExchange transfers), empty if none
  std::vector<Again> recomputes;  // kSegmentBackward: what to compute again first, in this order
  std::vector<int> frees;         // values whose last use this is (what backward reads otherwise is held by autograd's graphs)
  std::vector<int> kept;          // values whose last use in forward this is, but on which backward computes again
};

struct RankProgram {
  int rank = 0;
  std::vector<LocalValue> values;
  std::vector<Segment> segments;
  std::vector<Instruction> instructions;
  // Values by what they stand for, -1 where this rank has none.
  std::vector<int> params;   // per node of kind param, buffer, const, feed: the local tile (indexed by node id)
  std::vector<int> returns;  // per return node: the local copy
};

RankProgram project(const Program& program, int rank);
std::string to_string(const Program& program, const RankProgram& rank_program);

}  // namespace soap
