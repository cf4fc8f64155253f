// One layer under each of its configurations: what it costs by itself, and the layouts in which it reads and makes what crosses its border.
// Equal layers (by signature) have one table.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "search/layer_cost.h"
#include "search/layouts.h"
#include "sharding/expand.h"

namespace soap {

// A layer in its graph. Ports: tensors from other layers or feeds; results that others or returns read.
struct LayerShape {
  NodeId head = -1;
  std::vector<NodeId> nodes;
  std::vector<TensorId> inputs, outputs;
};

struct LayerTable {
  struct Read {
    int copies = -1;  // layout
    bool gradient = false;
  };
  std::vector<OpConfig> configs;
  std::vector<int64_t> ns, memory_bytes;              // per configuration
  std::vector<std::vector<std::vector<Read>>> reads;  // [configuration][input]: copies that several operators need may differ
  std::vector<std::vector<int>> makes;                // [configuration][output]: layout
  int resolved = 0;                                   // configurations that no structure tells, which is slow (search/layer_structure.h)
};

// The layer as a graph of its own: what comes from outside is there from the start on every device, what others read is returned.
struct LayerAlone {
  OpGraph graph;
  std::string head;
  std::vector<std::string> inputs, outputs;  // ports: names of nodes
  std::set<std::string> constants;           // operators that no input reaches
};
LayerAlone layer_alone(const OpGraph& graph, const LayerShape& layer);

// Operators, attributes, shapes, types, who reads whom, and the rows of the head.
std::string signature(const Program& fixed, const LayerShape& layer);

// `fixed` gives graph, rules and rows by node id; tilings of the layer's operators are written over. A configuration that lowering refuses
// is left out.
LayerTable layer_table(Program& fixed, const LayerShape& layer, const CostModel& cost, const LayerOptions& options, Layouts& layouts);

}  // namespace soap
