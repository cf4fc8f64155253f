// Search: the Strategy with the smallest simulated step time that fits in memory.
//
// 1. Seeds: what a person would write. One device; DDP (every operator cut at the processes' rows); ZeRO-1/2/3 and HSDP (parameters stored in
//    parts); Megatron; every grid of samples, channels and pipeline stages (search/manual.h); OWT (convolutions data parallel, linears by
//    channel, Krizhevsky 2014); images by rows.
// 2. OptCNN's dynamic program: the optimum of the layer-wise cost (search/optimize_layers.h), on up to 64 devices.
//    Of those that are too large for the memory limit, the fastest are tried with regions computed again (search/recompute.h).
//    What is simulated whole (chunks in time on large graphs, regions beside keep=use) stays as the seed is.
// 3. Descent: from the best seeds, operator by operator in the order of their parameters' bytes, each configuration that a person would
//    try (follow, fed, every factor cut over all devices). The hybrids come from here.
// 4. MCMC (FlexFlow, section 6): a random operator gets a random legal configuration; accepted by Metropolis' rule on the simulated time;
//    several chains on threads, until the budget or until half of the search has brought nothing (search/chains.h).
//
// Descent and MCMC re-time only what they change (sim/delta.h).
//
// Same seed, same plan, on any number of threads: budgets are numbers of simulations, never seconds.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "search/constraints.h"
#include "search/progress.h"
#include "sim/simulate.h"

namespace soap {

struct SearchOptions {
  uint64_t seed = 0;
  int descent_simulations = 400;
  int mcmc_simulations = 400;  // of all chains together
  int chains = 4;
  double temperature = 0.02;                  // accepted with exp(-relative loss / temperature)
  bool stops_early = true;                    // MCMC ends when half of it has brought nothing; false: at its budget
  std::optional<int64_t> memory_limit_bytes;  // per device; default: the machine's
  // False: nothing is too large, and no candidate's memory is known (-1). Each then costs its timeline alone, as in FlexFlow's search.
  bool count_memory = true;
  Constraints constraints;
  // Where the search begins, by name; empty: the seeds. Either is adapted to the constraints.
  std::vector<std::pair<std::string, Strategy>> starts;
};

struct Candidate {
  std::string name;  // "ddp", "megatron", ..., "optcnn", "descent", "mcmc"
  Strategy strategy;
  int64_t step_ns = 0;
  int64_t memory_bytes = 0;  // largest device; -1 where it isn't counted
  bool fits = true;
};

struct SearchResult {
  std::vector<Candidate> candidates;  // seeds in order, then what was found; the best is `candidates[best]`
  int best = 0;
  int simulations = 0;
  int chains = 0;                  // of MCMC
  int illegal = 0;                 // proposals that lowering refused
  std::vector<Progress> progress;  // where the best step time or the phase changed, and the end
  bool interrupted = false;        // the observer ended the search
};

std::vector<std::pair<std::string, Strategy>> seeds(const OpGraph& graph, int world_size);
// Throws std::invalid_argument when nothing fits, nothing keeps the constraints, or there is a limit on memory that isn't counted. Where the observer ends the
// search, seeds are still priced until one fits, so that what comes back is a legal plan.
SearchResult search(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const SearchOptions& options, Observer observer = {});

}  // namespace soap
