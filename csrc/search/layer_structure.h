// A layer's operators and what each cut of its head means for each of them. Cuts are independent of each other: a follower keeps a cut or turns
// it into replicas, whatever else is cut, so one look at each cut gives all their products without resolving each of them.
//
//   followed   nobody is expanded; each cut is followed from operator to operator (sharding/tiling.h: follow)
//   expanded   some operator's coupling factor is cut (statistics of a batch norm); read off one resolve() with every factor cut in two.
//              Where an operator's table says that a dim counts the parts of a cut (IndexMap::kTable: moments), that dim has as many entries
//              as the configuration at hand cuts parts, and isn't there where it cuts none.
//
// Where this doesn't hold (factors that exclude each other, several factors of one dim that only an expansion tells apart), there is
// no structure or no evaluation, and the caller resolves the configuration as lowering does.
#pragma once

#include <memory>
#include <optional>

#include "search/layer_table.h"

namespace soap {

// An even or fed cut of one factor of the head.
struct Variant {
  int factor = -1;
  std::vector<IndexSet> parts;
};

struct LayerStructure {
  struct NodeCut {
    int factor = -1;  // of this operator; -1: replicas
    std::vector<IndexSet> parts;
  };
  struct Slot {  // an operand or result
    const std::vector<DimExpr>* dims = nullptr;
    const std::vector<int64_t>* shape = nullptr;
    int tensor = -1;                                  // local number
    std::vector<std::vector<std::vector<int>>> sets;  // [dim][variant + 1][part]: numbers of index sets, filled when first wanted
    // Where dims count parts: per dim the factor of the head whose parts they are, -1 for an ordinary one; and what it is with all of them.
    std::vector<int> counts = {};
    std::vector<DimExpr> all_dims = {};
    std::vector<int64_t> all_sizes = {};
  };
  struct Table {  // from a factor of an operator, which counts the parts of one of the head's, to indices of an operand's dim
    int factor = -1, operand = -1, dim = -1, head = -1;
  };
  struct Member {
    NodeId node = -1;
    int from = -1;              // member that it follows; -1: the head, or every cut is as `cuts` say
    bool constant = false;      // alike on all devices
    std::vector<NodeCut> cuts;  // per variant
    std::vector<Table> tables;
    std::vector<int> order;  // expanded: factors of the head by how its devices are listed, slowest first
    std::vector<Slot> operands, results;
    int main = -1;                     // operand that it follows
    bool passes = false;               // the dims of that operand are factors, one each, and those of all results the same ones
    std::vector<int64_t> known_sizes;  // local sizes of all operands and results, one group after another
    std::vector<OpTime> times;         // of each group
  };
  Program* program = nullptr;
  std::vector<Member> members;
  std::vector<TensorId> tensors;     // local number -> tensor of the program
  std::vector<int> inputs, outputs;  // ports, local numbers

  // Variants that cut what only an expansion can cut.
  std::vector<char> expanding() const;
};

LayerStructure followed_structure(Program& program, const LayerShape& layer, const std::vector<Variant>& variants);
// `own` keeps the expanded graph, with counted dims as the last configuration had them. nullopt where the cuts can't be told apart.
std::optional<LayerStructure> expanded_structure(Program& own, const Program& fixed, const LayerShape& layer, const std::vector<Variant>& variants);

// What one configuration costs and how it reads and makes its ports.
struct LayerEntry {
  int64_t ns = 0, memory_bytes = 0;
  std::vector<std::vector<LayerTable::Read>> reads;
  std::vector<int> makes;
};
// Evaluates the configurations of one structure, one after another, in memory that it keeps. Everything outlives it.
class LayerEvaluator {
 public:
  LayerEvaluator(LayerStructure& structure, const std::vector<Variant>& variants, int world_size, const CostModel& cost, Layouts& layouts);
  ~LayerEvaluator();
  LayerEvaluator(const LayerEvaluator&) = delete;
  LayerEvaluator& operator=(const LayerEvaluator&) = delete;
  // The product of `cuts` (variants) in this order on devices 0, 1, ..., or with none of them `replicas` on as many devices.
  std::optional<LayerEntry> evaluate(const std::vector<int>& cuts, int replicas);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace soap
