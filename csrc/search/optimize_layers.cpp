#include "search/optimize_layers.h"

#include <algorithm>
#include <ctime>

namespace soap {

LayerPlan optimize_layers(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const LayerOptions& options,
                          std::optional<int64_t> memory_limit_bytes) {
  const auto now = [] {
    timespec t{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
  };
  const double begin = now();
  const LayerCosts costs = layer_costs(graph, rows, cost, options);
  const double built = now();
  LayerPlan out;
  if (memory_limit_bytes) {
    LimitedChoices limited = minimize_within(costs.choices, costs.memory_bytes, *memory_limit_bytes);
    out.choices = std::move(limited.choices);
    out.fits = limited.fits;
  } else {
    out.choices = minimize(costs.choices);
  }
  out.table_seconds = built - begin;
  out.elimination_seconds = now() - built;
  out.strategy = strategy_of(graph, costs, out.choices.choice);
  out.cost_ns = out.choices.cost;
  out.layers = static_cast<int>(costs.layers.size());
  out.distinct_layers = costs.distinct_layers;
  out.edges = static_cast<int>(costs.choices.edges.size());
  for (size_t l = 0; l < costs.layers.size(); ++l) {
    const int n = static_cast<int>(costs.layers[l].configs.size());
    out.configurations += n;
    out.largest = std::max(out.largest, n);
    out.memory_bytes += costs.memory_bytes[l][out.choices.choice[l]];
  }
  return out;
}

}  // namespace soap
