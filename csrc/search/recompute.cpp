#include "search/recompute.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "sharding/region.h"

namespace soap {
namespace {

// The smallest count of regions, the first of `all`, with which the plan fits. `most` of them are known to fit: `known` is that plan.
Candidate fewest_regions(const std::string& name, Strategy s, const std::vector<Region>& all, Candidate known, const Pricing& price) {
  size_t low = 0, high = known.strategy.recompute.size();  // low don't fit, high do
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    s.recompute.assign(all.begin(), all.begin() + static_cast<int64_t>(middle));
    Candidate c = price(name, s);
    if (c.step_ns >= 0 && c.fits) {
      high = middle;
      known = std::move(c);
    } else {
      low = middle;
    }
  }
  return known;
}

}  // namespace

std::vector<Region> usual_regions(const OpGraph& graph) {
  std::vector<Region> blocks = repeated_blocks(graph);
  if (!blocks.empty()) return blocks;
  const auto operators = std::count_if(graph.nodes.begin(), graph.nodes.end(), [](const Node& n) { return n.kind == NodeKind::kOp; });
  return consecutive_regions(graph, std::max(static_cast<int>(std::sqrt(static_cast<double>(operators))), 1));
}

Candidate with_recomputation(const Candidate& plan, const std::vector<Region>& regions, const Pricing& price) {
  Strategy s = plan.strategy;
  s.recompute = regions;
  const std::string name = plan.name + " + recompute";
  Candidate all = price(name, s);
  return all.step_ns >= 0 && all.fits ? fewest_regions(name, std::move(s), regions, std::move(all), price) : all;
}

std::vector<Candidate> recomputed_candidates(const OpGraph& graph, const std::vector<Candidate>& candidates, const Pricing& price, int most) {
  int64_t fitting_ns = -1;
  std::vector<const Candidate*> large;
  for (const Candidate& c : candidates) {
    if (c.step_ns < 0) continue;
    if (c.fits && (fitting_ns < 0 || c.step_ns < fitting_ns)) fitting_ns = c.step_ns;
    if (!c.fits && c.strategy.recompute.empty()) large.push_back(&c);
  }
  std::erase_if(large, [&](const Candidate* c) { return fitting_ns >= 0 && c->step_ns >= fitting_ns; });
  std::stable_sort(large.begin(), large.end(), [](const Candidate* a, const Candidate* b) { return a->step_ns < b->step_ns; });
  std::vector<Candidate> out;
  if (large.empty()) return out;
  const std::vector<Region> regions = usual_regions(graph);
  if (static_cast<int>(large.size()) > most) {  // the fastest, and the smallest of the others: it may be the only one that can fit
    const auto smallest =
        std::min_element(large.begin() + most - 1, large.end(), [](const Candidate* a, const Candidate* b) { return a->memory_bytes < b->memory_bytes; });
    std::swap(large[most - 1], *smallest);
    large.resize(most);
  }
  for (const Candidate* c : large) out.push_back(with_recomputation(*c, regions, price));
  return out;
}

bool gathers_regions_again(const Strategy& strategy) {
  const auto gathered_again = [](const auto& node) { return node.second.keep == Keep::kUse; };
  return !strategy.recompute.empty() && std::any_of(strategy.nodes.begin(), strategy.nodes.end(), gathered_again);
}

Candidate without_spare_regions(Candidate plan, const Pricing& price) {
  if (plan.strategy.recompute.empty() || !plan.fits) return plan;
  Strategy s = plan.strategy;
  s.recompute.clear();
  Candidate none = price(plan.name, s);
  if (none.step_ns >= 0 && none.fits) return none.step_ns < plan.step_ns ? none : plan;
  const std::vector<Region> all = plan.strategy.recompute;
  const std::string name = plan.name;
  return fewest_regions(name, std::move(s), all, std::move(plan), price);
}

}  // namespace soap
