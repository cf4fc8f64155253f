// Search over grids (search/manual.h) for worlds in which a strategy that names each device is too large to be priced often.
//
// 1. Every way to write the world as stages x replicas x ranks, with micro-batches of 1, 2, 4, ... rows, ZeRO over all replicas or those of a host,
//    sequence parallelism and recomputation, priced folded (search/grid_price.h); what needs no recomputation isn't tried with it.
// 2. Descent from the best: repeated blocks are folded, so that an operator's configuration within its group changes in all of them at once; an
//    operator outside of blocks is free for itself.
#pragma once

#include <string>

#include "search/grid_price.h"

namespace soap {

struct GridSearchOptions {
  std::optional<int64_t> memory_limit_bytes;  // per device; default: the machine's
  int descents = 2;                           // from so many of the best grids
  int descent_simulations = 200;              // of each
};

struct GridCandidate {
  std::string name;  // "dp 8 x tp 8, 4 micro-batches, zero-1"
  ManualOptions options;
  GroupConfigs configs;
  GridPrice price;
  bool fits = true;
};

struct GridSearchResult {
  std::vector<GridCandidate> candidates;  // the best first
  Strategy strategy;                      // of the best
  int simulations = 0;
};

// Throws std::invalid_argument where the samples don't compute apart (statistics over the batch), or nothing fits: then it says what would.
GridSearchResult search_grids(const OpGraph& graph, int world_size, const CostModel& cost, const GridSearchOptions& options);
std::string grid_name(const ManualOptions& options);

}  // namespace soap
