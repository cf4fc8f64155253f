// Proposals: the changes of a strategy that the descent and the Markov chains try.
#pragma once

#include <optional>
#include <random>
#include <vector>

#include "sharding/rule.h"
#include "sim/delta.h"

namespace soap {

// A change of some nodes' configurations, or of the size of gradient buckets.
struct Proposal {
  std::vector<Change> changes;
  std::optional<int64_t> bucket_bytes;
};

// Immutable once made: chains on several threads share one, each with its own random numbers.
class Proposals {
 public:
  // Of the cache's graph and processes. The graph outlives it.
  explicit Proposals(const LayoutCache& cache);

  // Operators but views, which follow; those with the most bytes of parameters and activations first.
  const std::vector<const Node*>& operators() const { return operators_; }
  // What a person would try: following, the rows of each process, every factor cut over all devices.
  std::vector<std::optional<OpConfig>> usual_configs(const Node& node) const;
  // A random operator gets a random configuration, follows, gets the rows of each process or its parameters stored in parts; or all
  // parameters are, or all gradients travel in buckets of another size.
  Proposal draw(const Strategy& from, std::mt19937_64& random) const;
  // What changes everything at once, so that nobody has to be lucky to try it: buckets of each size, then all parameters in parts (or no
  // longer). nullopt from the last on.
  std::optional<Proposal> opening(size_t index, const Strategy& from) const;

 private:
  Proposal all_in_parts(const Strategy& from) const;
  const Rule& rule_of(const Node& node) const { return rules_[cache_class_[node.id]]; }
  OpConfig random_config(const Node& node, std::mt19937_64& random) const;

  const OpGraph& graph_;
  int world_;
  std::vector<const Node*> operators_, parameters_;
  std::vector<Rule> rules_;  // per class of nodes (LayoutCache)
  std::vector<int> cache_class_;
};

}  // namespace soap
