#include "search/replica_graph.h"

#include <algorithm>

#include "base/error.h"

namespace soap {

OpGraph replica_graph(const OpGraph& graph, const ManualPlanner& planner, int64_t parts) {
  if (parts > 1 && planner.couples_samples()) user_error("[plan] the model has statistics over samples (BatchNorm): its replicas don't compute apart");
  OpGraph out = graph;
  const auto divide = [&](const Node& n, Tensor& t, size_t dim) {
    if (t.shape[dim] % parts != 0) user_error("[plan] {}: dim {} of {} can't be shared evenly by {}", n.name, dim, t.shape[dim], parts);
    t.shape[dim] /= parts;
  };
  for (const Node& n : graph.nodes) {
    if (n.kind == NodeKind::kFeed && n.sample_dim >= 0) divide(n, out.tensors[n.outputs[0]], n.sample_dim);
    if (n.kind != NodeKind::kOp || planner.sample_factor(n).empty()) continue;
    const Rule& rule = planner.rule(n);
    const int factor = rule.factor(planner.sample_factor(n));
    for (size_t r = 0; r < n.outputs.size(); ++r) {
      for (size_t d = 0; d < rule.results[r].dims.size(); ++d) {
        const auto& factors = rule.results[r].dims[d].factors;
        if (std::count(factors.begin(), factors.end(), factor)) divide(n, out.tensors[n.outputs[r]], d);
      }
    }
  }
  return out;
}

}  // namespace soap
