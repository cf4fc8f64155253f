// Replica graph: what one of `parts` equal shares of the samples computes. All shares of a data parallel model do the same, so one stands for all.
#pragma once

#include "search/manual.h"

namespace soap {

// The same nodes; tensors that hold samples have a share of them. Throws std::invalid_argument where the shares can't be equal or don't compute apart
// (statistics over samples).
OpGraph replica_graph(const OpGraph& graph, const ManualPlanner& planner, int64_t parts);

}  // namespace soap
