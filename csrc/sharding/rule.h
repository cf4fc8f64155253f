// The rule of an operator: its factors, and how each dim of each operand and result is made of them (design: docs/concept.md).
//
//   linear   x[n i]  w[o i]  b[o]  -> y[n o] sum over i
//
// From a rule and a configuration everything else follows with no switch on the operator's kind: which part of each operand a tile
// reads, which results are partial values, and, by duality, every gradient's collectives.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/index_set.h"
#include "graph/op_graph.h"

namespace soap {

// The SOAP letter of a factor (O is the device grid). Only for people and for the search's proposals: lowering never reads it.
enum class FactorKind { kSample, kAttribute, kParameter, kReduction };

// How a factor may be cut.
enum class Cuttable {
  kAny,       // any index sets
  kInterval,  // contiguous parts only (windows, scans)
  kExpand,    // couples all indices (softmax, statistics): cut only after the operator is expanded, contiguous parts or any as the expansion's rules say
  kWhole,     // not at all
};

struct Factor {
  std::string name;
  int64_t size = 1;
  FactorKind kind = FactorKind::kAttribute;
  Cuttable cut = Cuttable::kAny;
  int64_t unit = 1;  // cut points are multiples of this
  bool operator==(const Factor&) const = default;
};

// From a set of a factor's indices to the set of indices of the operand's dim that they read.
struct IndexMap {
  enum class Kind {
    kShift,             // i -> i + offset, clipped to the dim (cat, narrow, pad)
    kStride,            // i -> i * stride + offset (slice with a step)
    kWindow,            // i -> [i*stride - pad, i*stride - pad + dilation*(kernel-1) + 1), clipped (conv, pool)
    kTransposedWindow,  // o -> every i with o = i*stride - pad + dilation*k for a k < kernel (transposed conv)
    kAdaptive,          // i -> [floor(i*in/out), ceil((i+1)*in/out)) (adaptive pools)
    kResample,          // i -> [floor(src(i)) - reach, floor(src(i)) + 1 + reach], src by `scale`, `align_corners` (interpolate)
    kFlip,              // i -> size - 1 - i
    kRoll,              // i -> (i - offset) mod size
    kModulo,            // i -> i mod size (repeat, circular)
    kFloorDiv,          // i -> i / stride (repeat_interleave)
    kTable,             // i -> table[i] (parts of a dim that have become a dim)
    kReflect,           // i -> reflection of i - offset into [0, size) (reflect and replicate pads read at most this interval)
  };
  Kind kind = Kind::kShift;
  int64_t stride = 1, offset = 0, pad = 0, dilation = 1, kernel = 1;
  int64_t out_size = 0;  // kAdaptive, kResample: size of the factor
  double scale = 1.0;    // kResample: input step per output step
  bool align_corners = false;
  std::vector<IndexSet> table = {};  // kTable
  int64_t reach = 0;                 // kResample: extra indices on either side (bicubic: 1)
  bool operator==(const IndexMap&) const = default;
};

IndexSet apply(const IndexMap& map, const IndexSet& set, int64_t dim_size);

// One dim of an operand or result: several factors in mixed radix (major first), one mapped factor, or, with no factor, read whole.
struct DimExpr {
  std::vector<int> factors;
  std::optional<IndexMap> map;
  bool operator==(const DimExpr&) const = default;
};

enum class Reduce { kNone, kSum, kMax };

struct Operand {
  std::vector<DimExpr> dims;
  // Reduction factors of which only the part that holds index 0 reads this operand (a bias under split inputs).
  std::vector<int> anchors;
  bool differentiable = true;
  bool saved = true;                // backward reads it
  int64_t backward_bytes_more = 0;  // that backward makes besides its results while it runs, for each of its elements
};

struct Result {
  std::vector<DimExpr> dims;
  Reduce reduce = Reduce::kNone;  // how tiles that differ only in factors this result lacks combine
  bool differentiable = true;
  bool saved = true;             // backward reads it
  int64_t saved_bytes_more = 0;  // that backward keeps besides, for each of its elements (indices of maxima, gates)
};

struct Rule {
  std::vector<Factor> factors;
  std::vector<Operand> operands;
  std::vector<Result> results;
  // Configurations that the factors alone can't refuse; names of factors that must not be cut together.
  std::vector<std::vector<int>> exclusive;
  bool view = false;  // result 0 is operand 0's memory

  int factor(std::string_view name) const;  // index or -1
};

// The rule of a node. An operator that nobody has described gets the whole rule: no factor, every operand read whole, always exact.
Rule make_rule(const OpGraph& graph, const Node& node, int world_size);
Rule whole_rule(const OpGraph& graph, const Node& node);
// Throws InternalError when a dim's factors don't multiply to its size or an index is out of range.
void verify(const Rule& rule, const OpGraph& graph, const Node& node);
// "x[n i] w[o i] b[o] -> y[n o]+": + sum, ^ max; mapped dims as h', whole dims as *.
std::string to_string(const Rule& rule);
std::string_view to_string(FactorKind kind);

// Registry: one file per family in sharding/rules/ has a function `register_<family>(RuleRegistry&)`, listed in rules/all.cpp.
using RuleBuilder = Rule (*)(const OpGraph& graph, const Node& node);
struct RuleRegistry {
  std::map<std::string, RuleBuilder, std::less<>> builders;
  void add(std::initializer_list<const char*> targets, RuleBuilder builder);
};
const RuleRegistry& rule_registry();

// A small builder so that a family's file reads like the einsum it stands for.
//   RuleSpec r(graph, node);
//   r.factor("n", N, kSample); r.operand("input", {"n", "i"}); r.operand("bias", {"o"}).anchor("i"); r.result({"n", "o"}, Reduce::kSum);
// A dim is written as factor names separated by blanks (major first), "*" for a whole dim. `map` replaces a dim of the last operand or
// result by a mapped factor.
class RuleSpec {
 public:
  RuleSpec(const OpGraph& graph, const Node& node) : graph_(graph), node_(node) { rule_.operands.resize(node.inputs.size()); }
  RuleSpec& factor(std::string_view name, int64_t size, FactorKind kind, Cuttable cut = Cuttable::kAny, int64_t unit = 1);
  // By schema argument name; absent operands are ignored. Operands never described are read whole.
  RuleSpec& operand(std::string_view name, std::vector<std::string> dims);
  RuleSpec& operand(int index, std::vector<std::string> dims);
  RuleSpec& map(int dim, std::string_view factor, IndexMap map);
  RuleSpec& anchor(std::string_view factor);
  RuleSpec& constant();  // the last operand or result has no gradient
  RuleSpec& result(std::vector<std::string> dims, Reduce reduce = Reduce::kNone);
  // Backward reads these operands (schema names or indices as text; absent ones are ignored), "result" (all of them), and nothing else. Not
  // called: everything.
  RuleSpec& saves(const std::vector<std::string>& names);
  RuleSpec& view();
  Rule build();  // verifies

 private:
  std::vector<DimExpr> parse(const std::vector<std::string>& dims) const;
  const OpGraph& graph_;
  const Node& node_;
  Rule rule_;
  std::vector<char> described_;
  std::optional<std::vector<std::string>> saves_;
  int last_operand_ = -1;  // -1: the last thing added was a result
};

}  // namespace soap
