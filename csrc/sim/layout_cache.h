// LayoutCache: what lowering computes for one node or one edge, computed once for all that are alike.
//
// A node lowers from its own configuration and from where its operands' producers put them, and a movement from the layouts at its two
// ends, so both are functions of small keys. Layouts, tilings and sets of ranks are interned: equal values have equal ids. Layers of the same
// operator, shapes and attributes share everything.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "cost/cost.h"
#include "machine/collectives.h"
#include "sharding/expand.h"
#include "sim/clocks.h"

namespace soap {

using LayoutId = int;
// Which tensor an operator of a fragment reads.
struct FragmentTensor {
  enum class Kind { kOperand, kResult, kInner };
  Kind kind = Kind::kInner;
  int index = -1;  // among the node's distinct inputs, its outputs, or the fragment's inner tensors
};

struct FragmentRead {
  FragmentTensor tensor;
  LayoutId copies = -1;
  bool differentiable = false;  // it adds to the gradient of what it reads, where that has one
};

// An operator as it runs: the node itself or one sub-operator of its expansion.
struct FragmentOp {
  bool computes = false;               // false: a feed, return or store
  bool differentiable = false;         // has a backward step
  Spent forward, backward;             // ns
  Spent again;                         // backward that computes forward again
  std::vector<FragmentRead> reads;     // by operand
  std::vector<FragmentTensor> writes;  // by result
};

struct FragmentInner {
  TensorId tensor = -1;  // in `graph`
  LayoutId tiles = -1;
  int producer = -1;  // index in ops
};

// A node resolved under one configuration.
struct Fragment {
  OpGraph graph;  // stand-ins for its operands, then its operators
  std::vector<FragmentOp> ops;
  std::vector<FragmentInner> inner;
  std::vector<LayoutId> tiles;                    // per output, -1 for a store that isn't configured (its storage depends on its readers)
  std::vector<int> producers;                     // per output: index in ops
  std::vector<int> placed, shadow;                // per output: ids of tensor tilings, -1 when there is none
  std::vector<std::pair<int, int>> operand_uses;  // (operator, operand), in order; of operands and results only
  // Of the host for all operators, per device, forward and backward; and where backward computes forward again. Empty where nothing is launched.
  std::vector<int64_t> launches, launches_again;
  bool used_again = false;  // a configured store whose copies are gathered again in backward (Keep::kUse)
  bool chunked = false;
};

// How one tensor moves between two layouts. What every run reads comes first.
struct EdgeMove {
  Pattern pattern = Pattern::kLocal;
  int ranks = -1;        // id of `among`
  int64_t price_ns = 0;  // where it travels alone
  // The participants; where pieces begin and end, local ones too; and those of them that take part. Null for kLocal.
  const DeviceSet* among = nullptr;
  const DeviceSet *sending = nullptr, *receiving = nullptr, *senders = nullptr, *receivers = nullptr;
  std::vector<std::pair<int, int64_t>> reduced;  // kAllReduce: (id of a group's ranks, bytes of an addend)
  std::optional<Traffic> traffic;                // kExchange
  std::optional<OneWay> one_way;                 // of it; only where devices share what computes, as for `one_way` below
  std::vector<int64_t> local_ns;                 // what devices do by themselves (sim/local_work.h); empty where it is nothing
};

class LayoutCache {
 public:
  struct Exchange {
    int64_t price_ns = 0;
    std::optional<OneWay> one_way;
  };
  // A short key.
  using Numbers = std::array<int64_t, 4>;
  struct NumbersHash {
    size_t operator()(const Numbers& key) const {
      uint64_t h = 0;
      for (int64_t v : key) {
        h = (h ^ static_cast<uint64_t>(v)) * 0x9e3779b97f4a7c15;
        h ^= h >> 32;
      }
      return h;
    }
  };

  LayoutCache(const OpGraph& graph, const FedRows& rows, const CostModel& cost);
  // Knows what the other does, which stays as it is: several threads may copy one at a time.
  LayoutCache(const LayoutCache&) = default;

  const OpGraph& graph() const { return graph_; }
  const FedRows& rows() const { return rows_; }
  const CostModel& cost() const { return cost_; }
  // Equal for nodes of the same operator, shapes and attributes, which have the same rule and lower alike.
  int class_of(NodeId node) const { return classes_[node]; }
  int classes() const { return static_cast<int>(class_ids_.size()); }
  // Whether a node of the graph has this name.
  bool names(std::string_view name) const { return names_.count(name) > 0; }
  // Inputs of a node, each once, in the order in which they first appear.
  const std::vector<TensorId>& distinct_inputs(NodeId node) const { return distinct_[node]; }

  // Ids of the producers' tilings, one for each distinct input. `strategy` holds the configurations of the node and of its sub-operators. Throws
  // std::invalid_argument where the configuration isn't legal, of an operator or of a parameter's storage.
  const Fragment* fragment(NodeId node, const Strategy& strategy, const std::vector<int>& placed, const std::vector<int>& shadow);
  // What fills the copies from the tiles, or brings their gradient back.
  const EdgeMove* edge(const Tensor& tensor, LayoutId tiles, LayoutId copies, bool gradient);
  // Storage of a store that isn't configured, whose first reader needs these copies (-1: nobody reads it).
  LayoutId derived(NodeId store, LayoutId copies);
  LayoutId intern(Sharding layout);
  const Sharding& layout(LayoutId id) const { return *layouts_[id]; }
  // Of a sorted list of devices.
  int intern_ranks(const std::vector<int>& ranks);
  const std::vector<int>& ranks(int id) const { return sets_[id]->devices; }
  const DeviceSet& set(int id) const { return *sets_[id]; }
  // What one exchange of all these takes, among `ranks`.
  const Exchange& exchange(int ranks, const std::vector<const EdgeMove*>& moves);
  // An all-reduce, `at_once` of which share each host's links: see movement_ns.
  int64_t reduce_price(int ranks, int64_t bytes, int at_once);
  int groups_at_once(const std::vector<int>& rank_sets);
  // The optimizer's time for a parameter stored like this, per device.
  const std::vector<int64_t>& update(const Tensor& tensor, LayoutId tiles);
  // Of the host to launch that.
  const std::vector<int64_t>& update_launches(LayoutId tiles);
  // Bytes of a tensor stored like this, per device; of a trained one with its gradient and the optimizer's state (sim/memory.h: stored).
  const std::vector<int64_t>& stored(const Tensor& tensor, LayoutId tiles, bool trained);

 private:
  std::unique_ptr<Fragment> build(NodeId node, const Strategy& strategy, const std::vector<int>& placed, const std::vector<int>& shadow);
  int intern_tiling(const KnownTiling& tiling);

  const OpGraph& graph_;
  const FedRows rows_;
  const CostModel& cost_;
  std::vector<std::vector<TensorId>> distinct_;
  std::vector<int> classes_;  // per node
  std::unordered_set<std::string_view> names_;
  std::unordered_map<std::string, int> class_ids_, layout_ids_, tiling_ids_, rank_ids_;
  // Shared with copies: what is made once isn't changed.
  std::vector<std::shared_ptr<const Sharding>> layouts_;
  std::vector<std::shared_ptr<const DeviceSet>> sets_;
  std::vector<KnownTiling> tilings_;
  std::unordered_map<std::string, std::shared_ptr<const Fragment>> fragments_;
  template <class T>
  using ByNumbers = std::unordered_map<Numbers, T, NumbersHash>;
  ByNumbers<std::shared_ptr<const EdgeMove>> edges_;
  ByNumbers<int64_t> reduce_prices_;
  ByNumbers<std::vector<int64_t>> updates_, update_launches_, stored_;
  std::unordered_map<std::string, LayoutId> derived_;
  std::unordered_map<std::string, Exchange> exchange_prices_;  // forgotten when there are kMostExchanges: every bucket is another one
  std::unordered_map<std::string, int> at_once_;
  std::string scratch_, inner_name_;  // of keys
};

}  // namespace soap
