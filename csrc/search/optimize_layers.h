// OptCNN's search: the strategy with the smallest layer-wise cost (search/layer_cost.h), by elimination (search/dynamic_programming.h).
#pragma once

#include <string>

#include "search/layer_cost.h"

namespace soap {

struct LayerPlan {
  Strategy strategy;
  int64_t cost_ns = 0;       // layer-wise
  int64_t memory_bytes = 0;  // sum of the layers' estimates
  bool fits = true;          // in the limit, by that estimate
  Choices choices;
  int layers = 0, distinct_layers = 0, edges = 0;
  int64_t configurations = 0;                         // of all layers together
  int largest = 0;                                    // configurations of a layer
  double table_seconds = 0, elimination_seconds = 0;  // of this thread's CPU time, whatever else runs on the machine
};

LayerPlan optimize_layers(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const LayerOptions& options = {},
                          std::optional<int64_t> memory_limit_bytes = std::nullopt);

}  // namespace soap
