// Chains: several Metropolis walks over strategies at once (FlexFlow, section 6), on as many threads as there are.
//
// A chain first tries what changes everything at once, and keeps what is faster. Then it changes one operator at a time and accepts by Metropolis'
// rule on the simulated time. Chains walk alone for a fixed number of
// simulations, a round; between rounds the calling thread looks at what they found and lets the chain that is farthest behind go on from the
// best. After the last round, and where memory is short after rounds 1, 2, 4, 8, ..., it prices the fastest whole: where that needs too much memory,
// its chain goes back to the last that didn't. What is stored (parameters with gradients and the optimizer's state) is held under the limit at every step. They
// stop at the budget, or, as FlexFlow does, when half of the search so far has brought nothing (after 256 simulations).
//
// The number of chains is the caller's and each has its own random numbers and cache, so the result depends on the seed alone, not on the
// number of threads or on which is faster.
#pragma once

#include <functional>

#include "search/constraints.h"
#include "search/proposals.h"
#include "search/search.h"

namespace soap {

struct ChainOptions {
  uint64_t seed = 0;
  int chains = 4;
  int simulations = 400;  // of all chains together, at most
  double temperature = 0.02;
  bool stops_early = true;                    // when half has brought nothing
  std::optional<int64_t> memory_limit_bytes;  // per device
  int threads = 0;                            // 0: as many as the machine has. Changes nothing but the time
};

struct ChainResult {
  Candidate best;
  int chains = 0, simulations = 0, illegal = 0;
};

// Prices a strategy whole: its time, which delta simulation has said, its memory, whether it fits. Called by the calling thread only.
using PriceWhole = std::function<Candidate(const Strategy&, int64_t step_ns)>;
// After each round, by the calling thread: simulations of chains so far and the fastest time known to fit. False: end now.
using BetweenRounds = std::function<bool(int simulations, int64_t best_ns)>;

// `starts` fit and are legal, the best first: chain i begins at start i, those beyond at the first. Never worse than the first. Each chain has a copy
// of the cache.
ChainResult run_chains(const LayoutCache& cache, const Proposals& proposals, const Constraints& constraints, const std::vector<Candidate>& starts,
                       const ChainOptions& options, const PriceWhole& price, const BetweenRounds& between);

}  // namespace soap
