// Lowering of a strategy that has rewrites.
#pragma once

#include "program/program.h"

namespace soap {

// `lower` of the graph that the strategy's rewrites leave.
Program lower_rewritten(const OpGraph& graph, const Strategy& strategy, const FedRows& rows);

}  // namespace soap
