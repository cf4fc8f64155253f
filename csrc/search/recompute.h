// Recomputation where memory is short: plans that are too large get regions (sharding/region.h) whose activations are computed again.
#pragma once

#include <functional>

#include "search/search.h"

namespace soap {

// What a person would compute again: the repeated blocks; where nothing repeats, about sqrt(n) stretches of n operators (Chen et al. 2016, section 4.1).
std::vector<Region> usual_regions(const OpGraph& graph);

// Prices a strategy under a name: Searcher::price.
using Pricing = std::function<Candidate(std::string, const Strategy&)>;

// A plan that is too large, with as few of the regions as let it fit, the first ones; with all of them where even that is too large. The first: at
// the peak, when forward turns into backward, the last is computed again at once. O(log regions) simulations.
Candidate with_recomputation(const Candidate& plan, const std::vector<Region>& regions, const Pricing& price);

// The same for the fastest of the plans that are too large and that would be the best if they did fit; not more than `most`.
std::vector<Candidate> recomputed_candidates(const OpGraph& graph, const std::vector<Candidate>& candidates, const Pricing& price, int most);

// Whether each simulation of a change of this plan lowers all of it (sim/delta.h): regions beside parameters that are gathered again.
bool gathers_regions_again(const Strategy& strategy);

// A plan that fits without the regions that it no longer needs, taken out from the last.
Candidate without_spare_regions(Candidate plan, const Pricing& price);

}  // namespace soap
