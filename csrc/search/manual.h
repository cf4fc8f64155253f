// Manual plans: what a person writes with given degrees. Devices form a grid, pipeline stage slowest, tensor rank fastest:
//
//   device(stage, replica, rank) = (stage * dp + replica) * tp + rank
//
// dp: samples are cut in `dp` tiles (the processes' own rows where nothing else is cut), as data parallelism does.
// tp: operators with parameters are cut by output channels where their input is whole, by input channels where it comes cut, embeddings by
//     vocabulary, attention by heads, a cross entropy of cut logits by classes (Shoeybi et al. 2019, section 3); the rest follows, or is done
//     alike by the ranks of a group.
// pp: contiguous stages of balanced work, each on its sub-grid; `micro_batches` chunks of samples in time run through them (GPipe, Huang et
//     al. 2019; 1F1B, Narayanan et al. 2019).
// zero: parameters are stored in parts over a group of replicas (Rajbhandari et al. 2020): 1 gathered until the step, 2 until
//     backward, 3 for each use. A group smaller than dp is HSDP: parts within a group, alike over groups. A parameter that has fewer
//     indices in every dim than there are parts stays whole.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "search/hand_factors.h"
#include "sharding/rule.h"
#include "sharding/strategy.h"

namespace soap {

struct ManualOptions {
  int dp = 1, tp = 1, pp = 1;
  int micro_batches = 1;
  Order order = Order::kForwardThenBackward;
  int zero = 0;
  int zero_group = 0;      // replicas that share a parameter's parts; 0: all dp of them
  NodeId tensor_from = 0;  // operators before this node are data parallel over all devices (Krizhevsky 2014)
  // A degree that an operator can't be cut by (heads that don't divide, channels too few) is an error; else the operator is done alike by the
  // group.
  bool strict = false;
  // What the ranks of a group would do alike (normalisations, residuals, dropout) is cut along the sequence, dim 1 (Korthikanti et al. 2022).
  bool sequence = false;
  bool recompute = false;  // repeated blocks keep only what enters and leaves them, and compute the rest again in backward (Chen et al. 2016)
  // For prices alone, with zero 2 or 3: parts move as PyTorch's fully_shard moves them (search/fsdp.h), not as this runtime does.
  bool fsdp = false;
};

// Configurations of operators over the ranks of one tensor parallel group, in place of what the manual plan says; nullopt: follow.
using GroupConfigs = std::map<NodeId, std::optional<OpConfig>>;

// What all manual plans of a graph share. The graph must outlive it.
class ManualPlanner {
 public:
  ManualPlanner(const OpGraph& graph, int world_size);
  // Of the same operators, at other sizes (search/replica_graph.h) or not, in a world of their own: where samples lie is known.
  ManualPlanner(const OpGraph& graph, int world_size, const ManualPlanner& like);
  // Throws std::invalid_argument naming the operator, the degree and what would be legal.
  Strategy make(const ManualOptions& options, const GroupConfigs& configs = {}) const;

  bool has_loss() const { return has_loss_; }
  // The loss is a sum over samples, so that a micro-batch's backward can begin before the others' forward.
  bool loss_is_sum() const { return loss_is_sum_; }
  int64_t rows() const { return rows_; }                               // of the batch; 0: no feed has any
  int num_layers() const { return static_cast<int>(layers_.size()); }  // a stage has at least one
  const Rule& rule(const Node& node) const { return *rules_[node.id]; }
  // The factor that the processes' rows lie in, "" where they don't reach.
  const std::string& sample_factor(const Node& node) const { return sample_[node.id]; }
  std::vector<int> stages(int count) const;  // per node
  // Whether statistics over samples (BatchNorm) or other sums make the processes wait for each other within the forward pass.
  bool couples_samples() const { return couples_samples_; }

 private:
  void check(const ManualOptions& options) const;
  std::shared_ptr<const std::vector<HandFactors>> all_hand_factors() const;

  const OpGraph& graph_;
  int world_ = 1;
  int64_t rows_ = 0;
  bool has_loss_ = false, loss_is_sum_ = false, couples_samples_ = false;
  std::vector<std::shared_ptr<const Rule>> rules_;
  std::shared_ptr<const std::vector<HandFactors>> hand_;  // per node, of operators
  std::vector<std::string> sample_;                       // per node: the factor that the processes' rows lie in, "" where they don't reach
  std::vector<NodeId> layers_;                            // where each begins: an operator with weights, or a normalisation before it
  std::vector<double> work_;                              // per node
};

Strategy manual_strategy(const OpGraph& graph, int world_size, const ManualOptions& options);

// "n=fed" on every operator.
Strategy everywhere_fed(const OpGraph& graph, int world_size);
bool can_cut(const Rule& rule, const std::string& factor, int degree);
int64_t parameter_bytes(const OpGraph& graph, const Node& node);

}  // namespace soap
