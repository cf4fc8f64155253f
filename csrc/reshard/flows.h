// Flows: how much each copy takes from each tile, without the boxes: what an order and a price need of reshard.h's pieces. The same
// pieces in the same meaning (tests/cpp/algebra_test.cpp), but for n coords on either side it takes n^2 products of small integers.
#pragma once

#include <functional>
#include <span>

#include "reshard/reshard.h"

namespace soap {

struct Flow {
  int src = -1, from = -1;
  int dst = -1, to = -1;
  int64_t elements = 0;
};

struct Flows {
  std::vector<Flow> list;
  Movement movement;  // what `recognise` says of the pieces
};

// Of fill_pieces and of grad_pieces of this chunk. Without `collectives` nothing is recognised as an all-reduce (Via::kExchange). Throws
// InternalError as those do.
Flows fill_flows(const Sharding& tiles, const Sharding& copies, int chunk, bool collectives = true);
Flows grad_flows(const Sharding& tiles, const Sharding& copies, int chunk, bool collectives = true);

// The same without a list: `visit` gets its stretches one after the other, of each copy (or tile) on each device.
using VisitFlows = std::function<void(std::span<const Flow>)>;
Movement visit_fill_flows(const Sharding& tiles, const Sharding& copies, int chunk, const VisitFlows& visit, bool collectives = true);
Movement visit_grad_flows(const Sharding& tiles, const Sharding& copies, int chunk, const VisitFlows& visit, bool collectives = true);

}  // namespace soap
