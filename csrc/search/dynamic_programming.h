// Dynamic programming over a graph of choices: one configuration per node, so that the sum of node costs and edge costs is smallest.
// OptCNN (Jia et al., ICML 2018, section 5): a node between two others is replaced by an edge (node elimination), edges between the same
// two nodes are added (edge elimination), and choices are read back in reverse. Beyond the paper: a node with one neighbour is added to
// it, and what is left (every node has three neighbours or more) is eliminated with tables over all neighbours, smallest table first, which
// never costs more than the paper's enumeration of the K nodes that are left.
//
//   node elimination   e'(i, k) = min over j of  e(i, j) + v(j) + e(j, k)              O(C^3)
//   a leaf             v'(i)    = v(i) + min over j of  v(j) + e(i, j)                  O(C^2)
//   d neighbours       t'(..)   = min over j of the sum of all tables with j            O(C^(d+1))
//
// Knows nothing of operators. Costs are integers (ns), so that the optimum doesn't depend on the order of additions.
#pragma once

#include <cstdint>
#include <vector>

namespace soap {

struct ChoiceGraph {
  struct Edge {
    int a = -1, b = -1;
    int table = -1;  // [choice of a * choices of b + choice of b]
  };
  std::vector<std::vector<int64_t>> nodes;   // [node][choice]
  std::vector<std::vector<int64_t>> tables;  // of edges, shared by equal ones
  std::vector<Edge> edges;                   // any number between two nodes, none from a node to itself

  int64_t cost(const std::vector<int>& choice) const;
};

struct EliminationOptions {
  int64_t largest_table = 1 << 22;  // entries of a table over the neighbours of an eliminated node
};

struct Choices {
  std::vector<int> choice;  // per node
  int64_t cost = 0;
  bool exact = true;  // false: some node was fixed at the choice best for it alone, then every node improved by itself
  int node_eliminations = 0, edge_eliminations = 0;
  int left = 0;         // nodes after node and edge elimination: the paper's K
  int with_tables = 0;  // of these, eliminated with tables over three or more neighbours
  int fixed = 0;
};

// Throws std::invalid_argument where a node has no choice or a table another size than its edge needs.
Choices minimize(const ChoiceGraph& graph, const EliminationOptions& options = {});

// The same within a limit on the sum of weights (bytes), by a multiplier: minimize cost + multiplier * weight, smallest multiplier that
// keeps the limit, by bisection. It finds the optima on the convex hull of (weight, cost), not those between.
struct LimitedChoices {
  Choices choices;
  int64_t weight = 0;
  double multiplier = 0;
  bool fits = true;  // false: `choices` are the lightest
};
LimitedChoices minimize_within(const ChoiceGraph& graph, const std::vector<std::vector<int64_t>>& weights, int64_t limit,
                               const EliminationOptions& options = {});

}  // namespace soap
