// The layer-wise cost of OptCNN (Jia et al., ICML 2018, section 4): of a strategy, the sum over layers of computing and of bringing its
// parameters' gradients together, and over edges of moving what one layer makes to where the next reads it. Tables of it for all
// configurations of all layers are what search/dynamic_programming.h minimizes.
//
// [Note: layer] A layer is an operator and what follows it: pointwise operators, views and batch norms without a second input that depends on the
// batch, which have no entry in the strategy and so lie where their producer does (sharding/tiling.h). OptCNN's layers have their activation
// inside, too. Configurations of their own would gain nothing but reshards between an operator and its activation (a transition costs as much
// before as after a pointwise operator, and a pool, a sum or a norm of its own row is a layer of its own), and they would make the
// graphs of ResNet-50 and Inception-v3 three times as large. What depends on no input (masks, positions) is alike on all devices and belongs to the layer that
// reads it first.
//
// [Note: layer-wise cost] In ns, of one step. It equals the simulation without overlap, with every gradient in a bucket of its own, where all devices
// have equal work (tests/unit/test_optcnn.py). It doesn't see that movements overlap with compute, that layers on different devices run at the
// same time, that two readers can share one copy, or that a parameter has two users: each layer and edge pays for itself.
//
//   layer   forward and backward of its slowest device, with its followers; movements between its own operators (statistics of a batch norm,
//           an expanded softmax); fill and gradient of parameters stored where they are used; the update of the parameters
//   edge    fill and gradient fill from the tiles of the producer to the copies of the reader, 0 where nothing crosses devices
//   feeds and returns are edges to fixed configurations, and are counted with the layer
#pragma once

#include <optional>
#include <vector>

#include "cost/cost.h"
#include "search/dynamic_programming.h"

namespace soap {

struct LayerOptions {
  bool reductions = true;       // cut also what an operator sums over, which OptCNN doesn't
  int max_configurations = 64;  // of a layer: fewest cuts first, of those with as many the ones on most devices
  bool by_resolving = false;    // every configuration resolved by itself as lowering does, every movement priced by itself: slow, equal (tests)
};

struct Layer {
  NodeId head = -1;           // the operator that is configured; -1: what nothing but outputs read and no input reaches
  std::vector<NodeId> nodes;  // with its followers, in the graph's order
  // One device, all of them alike, the processes' rows, and every product of even cuts of the head's factors whose degrees
  // divide the world, on devices 0, 1, ...
  std::vector<OpConfig> configs;
};

struct LayerCosts {
  int world_size = 1;
  std::vector<Layer> layers;
  ChoiceGraph choices;  // nodes: layers
  // Estimate per layer and configuration, largest device: parameters with gradients and optimizer state, and the results that backward reads.
  std::vector<std::vector<int64_t>> memory_bytes;
  int distinct_layers = 0;
  int resolved = 0;  // configurations of these that had to be resolved as lowering does
};

// Throws std::invalid_argument for more than 64 devices.
LayerCosts layer_costs(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const LayerOptions& options = {});

Strategy strategy_of(const OpGraph& graph, const LayerCosts& costs, const std::vector<int>& choice);
// The choices that a strategy makes; nullopt when some layer's configuration is none of the layer's.
std::optional<std::vector<int>> choices_of(const OpGraph& graph, const LayerCosts& costs, const Strategy& strategy);

}  // namespace soap
