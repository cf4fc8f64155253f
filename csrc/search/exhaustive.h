// Exhaustive search: the plan with the smallest simulated step time in a stated space, and the proof that there is none better in it, by branch and
// bound (FlexFlow, arXiv:1807.05358, section 8.4: depth-first search for LeNet and two steps of an RNN language model on up to 4 devices).
//
// [Note: exhaustive space] Every layer (search/layer_cost.h: an operator and what follows it) has, independently of all others: the processes' rows;
// every product of even cuts of its operator's factors whose degrees divide the world, alone and with replicas up to the world; one device;
// all devices alike. What takes g < world devices is on each block of g devices, {0..g-1}, {g..2g-1}, ... Parameters are stored where they are used, all
// gradients as the strategy's bucket says, nothing is cut in time or computed again.
//
// Layers are configured in the order of the graph, the configuration with the smallest bound first (search/partial_plan.h). A subtree is left out where
// its bound isn't below the best step time so far. Every complete plan that is left is priced by the simulator (sim/delta.h), so that the result rests on
// the bound for what it leaves out alone, not for what it returns.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "search/progress.h"
#include "sim/delta.h"

namespace soap {

struct ExhaustiveOptions {
  std::vector<std::string> operators;  // by name, the layers that are configured; the others follow their producers. Empty: all layers
  // Plans to begin with, which should be in the space: the faster the best of them, the less is looked at. Where nothing is faster than one that isn't in it,
  // that one is what comes back.
  std::vector<Strategy> starts;
  bool reductions = true;            // cut also what an operator sums over
  int64_t bucket_bytes = 25 << 20;   // of gradients: see Strategy
  int64_t most_bounds = 50'000'000;  // then it ends without proof
  // Of every bound; 1 proves, more leaves out what may be better. Only for tests of the tests.
  double bound_scale = 1;
};

struct ExhaustiveResult {
  Strategy strategy;
  int64_t step_ns = 0;
  bool proven = false;              // nothing in the space is faster: the search wasn't ended by its observer or by most_bounds
  std::vector<int> configurations;  // per layer
  double plans = 0;                 // in the space: their product
  int64_t bounds = 0;               // partial plans that were bounded
  int64_t pruned = 0;               // of these, left out with all that they can become
  int64_t simulated = 0;            // complete plans
  int64_t illegal = 0;              // configurations that lowering refused
  int64_t last_better = 0;          // bounds when the best plan was found
};

// `configs` of [Note: exhaustive space], per layer; heads[i] is the node of layer i, ascending.
struct ExhaustiveSpace {
  std::vector<NodeId> heads;
  std::vector<std::vector<OpConfig>> configs;
};
ExhaustiveSpace exhaustive_space(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const ExhaustiveOptions& options = {});

// Throws std::invalid_argument for more than kLargestExhaustiveWorld devices, or where no plan is legal. Doesn't look at memory. Where it is ended before it
// has priced a plan, all is on device 0.
ExhaustiveResult exhaustive_search(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const ExhaustiveSpace& space,
                                   const ExhaustiveOptions& options = {}, Observer observer = {});

// The bounds of a plan (choice[l] of space.configs[l]) as its layers are configured one after another; the last is of the complete plan.
std::vector<int64_t> partial_bounds(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const ExhaustiveSpace& space,
                                    const std::vector<int>& choice, const ExhaustiveOptions& options = {});

}  // namespace soap
