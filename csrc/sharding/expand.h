// Expansion: an operator whose factor couples everything (softmax, statistics, key-split attention, a recurrence) becomes sub-operators
// whose factors can be cut. Only operators whose configuration cuts such a factor are expanded; sub-operators are named
// "<name>/<sub>" and inherit the cuts by factor name unless the strategy names them.
#pragma once

#include <memory>

#include "sharding/tiling.h"

namespace soap {

class Expander;
// Adds the sub-operators of `node` by calls on the expander and binds every result of the node.
using Expansion = void (*)(Expander& e, const Node& node, const Rule& rule, const Tiling& tiling);

struct ExpansionRegistry {
  std::map<std::string, Expansion, std::less<>> expansions;
  void add(std::initializer_list<const char*> targets, Expansion expansion);
};
const ExpansionRegistry& expansion_registry();

// True when the tiling cuts a factor that only an expansion can cut.
bool needs_expansion(const Rule& rule, const Tiling& tiling);

// What an expansion writes with. Tensors are ids in the new graph.
class Expander {
 public:
  struct Sub {
    std::string name;    // "mean" -> "<node>/mean"
    std::string target;  // operator with a rule and a local computation
    std::vector<TensorId> inputs;
    std::vector<std::string> operand_names = {};
    AttrMap attrs = {};
    std::string family = "";
    // Factor names of the sub-operator that inherit a cut of the original's factor: {sub factor, original factor}. Empty: equal names.
    std::vector<std::pair<std::string, std::string>> inherit = {};
    // Factors of the sub-operator whose indices are the parts of a factor of the original (`part_sets`): {sub factor, original factor}.
    std::vector<std::pair<std::string, std::string>> parts = {};
    // Only the devices of these parts: {original factor, index of its part (tile * chunks + chunk)}. Cells of an exploded recurrence.
    std::vector<std::pair<std::string, int>> at = {};
  };
  // Operand i of the node that is being expanded, in the new graph.
  TensorId operand(int i) const;
  // By schema name; -1 when absent.
  TensorId operand(std::string_view name) const;
  const std::vector<int64_t>& shape(TensorId t) const;
  const std::string& dtype(TensorId t) const;
  // Operand i in float32 where it has fewer digits: statistics and sums of exponentials are not for bfloat16.
  TensorId wide(int i);
  // Adds a sub-operator with one result of this shape; dtype empty: that of the first input. Gradients: as the inputs need.
  TensorId add(Sub sub, std::vector<int64_t> shape, std::string dtype = "", bool differentiable = true);
  // A sub-operator with several results of one dtype.
  std::vector<TensorId> add_many(Sub sub, std::vector<std::vector<int64_t>> shapes, std::string dtype = "", bool differentiable = true);
  // Says which new tensor stands for a result of the original from now on, brought to its dtype.
  void bind(int result, TensorId t);

  // Tiles and chunks of a factor of the original (1 when not cut): an expansion may make them a real dim (softmax merge).
  int parts(std::string_view factor) const;
  // The index sets of those parts, [tile * chunks + chunk].
  std::vector<IndexSet> part_sets(std::string_view factor) const;

 private:
  friend struct ExpandPass;
  Expander(struct ExpandPass& pass, const Node& node, const Rule& rule, const Tiling& tiling) : pass_(pass), node_(node), rule_(rule), tiling_(tiling) {}
  struct ExpandPass& pass_;
  const Node& node_;
  const Rule& rule_;
  const Tiling& tiling_;
};

// Resolved graph: tilings for every node of the (expanded) graph.
struct Resolved {
  OpGraph graph;
  std::vector<Rule> rules;
  std::vector<Tiling> tilings;
  std::vector<FedFactor> fed;
};

// Walks the graph in topological order: makes each node's configuration concrete (its own, or following its producer), and expands where
// needed.
Resolved resolve(const OpGraph& graph, const Strategy& strategy, const FedRows& rows);

using KnownTiling = std::shared_ptr<const TensorTiling>;  // null where there is none

// What resolve does at one node, by itself: a graph of stand-ins for the producers of its distinct operands, then the node or the
// sub-operators that it became.
struct ResolvedNode {
  Resolved inner;
  NodeId first = 0;                         // nodes before it are stand-ins
  std::vector<TensorId> operands;           // of inner.graph, in the order of the node's inputs
  std::vector<TensorId> results;            // of inner.graph, in the order of its outputs
  std::vector<KnownTiling> placed, shadow;  // of the results: where its tiling puts them; where the processes' rows are
};
// `placed` and `shadow` of each input, as its producer's resolution gave them.
ResolvedNode resolve_node(const OpGraph& graph, const Node& node, const Strategy& strategy, const FedRows& rows, const std::vector<KnownTiling>& placed,
                          const std::vector<KnownTiling>& shadow);

}  // namespace soap
