// Search of the parallelization and the graph rewrites together, as in Unity (Unger et al., OSDI 2022, section 4), greedily.
//
// 1. The search of search.h on the graph as it is.
// 2. Of the rewrites that fit, those that do the same to equal operators are one group: layers alike are rewritten alike. Each group is done to
//    the graph, the best plan so far taken along by names (substitution/transfer.h), and priced. The best group stays if the step gets shorter
//    by more than `least_gain`; again until none does.
// 3. The search goes on from there on the graph that is left.
#pragma once

#include <functional>

#include "search/search.h"
#include "substitution/sample.h"

namespace soap {

struct RewriteOptions {
  double least_gain = 0.005;  // of the step time: less is noise
  int rounds = 6;             // groups that may stay; 0: none are tried
  // Why a rewrite may not be used, "" where it may: asked once for rewrites of one signature, before any of them is priced.
  std::function<std::string(const Rewrite&, const Sample&)> refusal = {};
};

struct UsedRewrites {
  std::vector<Rewrite> rewrites;
  int64_t gain_ns = 0;  // simulated, when they were chosen
};

struct RewriteSearchResult {
  SearchResult search;  // strategies are for the graph that was given; their rewrites are part of them
  std::vector<UsedRewrites> used;
  std::vector<std::string> refused;  // reasons
  int priced = 0;                    // groups
};

// `observer`: of each search (search/progress.h); interrupted, no rewrites are tried any more.
RewriteSearchResult search_with_rewrites(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const SearchOptions& options,
                                         const RewriteOptions& rewriting, const Observer& observer = {});

}  // namespace soap
