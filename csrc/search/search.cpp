#include "search/search.h"

#include <algorithm>
#include <limits>
#include <random>

#include "base/error.h"
#include "search/chains.h"
#include "search/layouts.h"
#include "search/optimize_layers.h"
#include "search/recompute.h"
#include "sim/delta.h"

namespace soap {
namespace {

constexpr int64_t kIllegal = -1;
constexpr int64_t kNotCounted = -1;
constexpr int kLayerWiseTries = 3;
constexpr int64_t kRegionsWork = 200;  // nodes x devices
constexpr int kRecomputed = 6;         // plans that are too large and tried with recomputation

struct Searcher {
  const OpGraph& graph;
  const FedRows& rows;
  const CostModel& cost;
  const SearchOptions& options;
  ProgressWatch& watch;
  SearchResult result;
  std::mt19937_64 random;
  LayoutCache& cache;
  const Proposals& proposals;

  int64_t memory_limit() const {
    return options.count_memory ? options.memory_limit_bytes.value_or(cost.machine().memory_bytes) : std::numeric_limits<int64_t>::max();
  }
  int world() const { return static_cast<int>(rows.size()); }

  // Simulated time of a strategy, where that isn't `known`; a candidate's score is the time, plus a penalty that no time reaches when it doesn't fit.
  Candidate price(std::string name, const Strategy& s, std::optional<int64_t> known = std::nullopt) {
    Candidate c{.name = std::move(name), .strategy = s};
    try {
      if (!allowed(graph, s, rows, options.constraints)) user_error("[search] {} leaves the constraints", c.name);
      if (options.count_memory) {
        const Simulation sim = simulate(lower(graph, s, rows), cost);
        c.step_ns = sim.step_ns;
        c.memory_bytes = *std::max_element(sim.memory_bytes.begin(), sim.memory_bytes.end());
        c.fits = c.memory_bytes <= memory_limit();
      } else {
        c.step_ns = known ? *known : DeltaSimulator(cache, s, rows).step_ns();
        c.memory_bytes = kNotCounted;
      }
    } catch (const std::invalid_argument&) {  // not legal for this graph: a proposal, not a mistake
      c.step_ns = kIllegal;
      ++result.illegal;
    }
    ++result.simulations;
    watch.simulated();
    if (c.step_ns != kIllegal && c.fits) watch.priced(c.step_ns);
    return c;
  }

  static bool better(const Candidate& a, const Candidate& b) {
    if (a.step_ns == kIllegal) return false;
    if (b.step_ns == kIllegal) return true;
    if (a.fits != b.fits) return a.fits;
    return a.fits ? a.step_ns < b.step_ns : a.memory_bytes < b.memory_bytes;
  }

  // The step time with these changes, which stay unless they aren't legal.
  std::optional<int64_t> attempt(DeltaSimulator& delta, const Proposal& proposal) {
    ++result.simulations;
    watch.simulated();
    try {
      const int64_t time = delta.change(proposal.changes, proposal.bucket_bytes);
      if (options.constraints.empty() || allowed(graph, delta.strategy(), rows, options.constraints)) return time;
      delta.undo();
    } catch (const std::invalid_argument&) {  // a proposal, not a mistake
    }
    ++result.illegal;
    return std::nullopt;
  }

  Candidate descend(Candidate best) {
    int left = options.descent_simulations;
    if (left <= 0) return best;
    DeltaSimulator delta(cache, best.strategy, rows);
    for (bool improved = true; improved;) {
      improved = false;
      for (const Node* n : proposals.operators()) {
        if (options.constraints.pinned(n->name)) continue;
        for (const auto& config : proposals.usual_configs(*n)) {
          if (left-- <= 0 || watch.stopped()) return best;
          const auto it = best.strategy.nodes.find(n->name);
          if (config ? it != best.strategy.nodes.end() && it->second == *config : it == best.strategy.nodes.end()) continue;
          const std::optional<int64_t> time = attempt(delta, {.changes = {{n->id, config}}});
          if (!time) continue;
          // A tie is no reason to leave what a person would write.
          if (!best.fits || *time < best.step_ns - best.step_ns / 500) {
            Candidate c = price("descent", delta.strategy());
            if (better(c, best)) {
              best = std::move(c);
              improved = true;
              continue;
            }
          }
          delta.undo();
        }
      }
    }
    return best;
  }

  // Chains from the fastest candidates that fit and differ from the best in nodes and buckets only.
  Candidate anneal(const Candidate& best) {
    const auto frame = [](Strategy s) {
      s.nodes.clear();
      s.bucket_bytes = 0;
      return s;
    };
    std::vector<Candidate> starts{best};
    for (const Candidate& c : result.candidates) {
      if (c.step_ns != kIllegal && c.fits && frame(c.strategy) == frame(best.strategy) && !(c.strategy == best.strategy)) starts.push_back(c);
    }
    std::stable_sort(starts.begin() + 1, starts.end(), [](const Candidate& a, const Candidate& b) { return a.step_ns < b.step_ns; });
    const ChainOptions chains{.seed = options.seed,
                              .chains = options.chains,
                              .simulations = options.mcmc_simulations,
                              .temperature = options.temperature,
                              .stops_early = options.stops_early,
                              .memory_limit_bytes = options.count_memory ? std::optional(memory_limit()) : std::nullopt};
    ChainResult found = run_chains(
        cache, proposals, options.constraints, starts, chains, [&](const Strategy& s, int64_t step_ns) { return price("mcmc", s, step_ns); },
        [&, told = 0](int simulations, int64_t best_ns) mutable {
          for (; told < simulations; ++told) watch.simulated();
          watch.priced(best_ns);
          return !watch.stopped();
        });
    result.chains = found.chains;
    result.simulations += found.simulations;
    result.illegal += found.illegal;
    return std::move(found.best);
  }

  // A walk where nothing fits yet: towards less memory, every step priced whole.
  Candidate shrink(Candidate best) {
    DeltaSimulator delta(cache, best.strategy, rows);
    for (int i = 0; i < options.descent_simulations && !best.fits && !watch.stopped(); ++i) {
      if (!attempt(delta, proposals.draw(delta.strategy(), random))) continue;
      Candidate c = price("mcmc", delta.strategy());
      if (better(c, best)) {
        best = std::move(c);
      } else {
        delta.undo();
      }
    }
    return best;
  }

  std::string why_illegal(const Strategy& s) const {
    try {
      lower(graph, s, rows);
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "a forbidden cut is left";
  }

  // The optimum of the layer-wise cost. Its memory is an estimate: where the simulation needs more than the limit, once more with less.
  void add_layer_wise() {
    if (world() == 1 || world() > kLargestLayoutWorld) return;
    watch.enter("optcnn");
    int64_t limit = memory_limit();
    for (int attempt = 0; attempt < kLayerWiseTries; ++attempt) {
      const LayerPlan plan = optimize_layers(graph, rows, cost, {.max_configurations = world() > 8 ? 16 : 32}, limit);
      Candidate c = price("optcnn", options.constraints.empty() ? plan.strategy : adapted(graph, plan.strategy, rows, options.constraints));
      const int64_t needed = c.memory_bytes;
      const bool done = c.step_ns == kIllegal || c.fits || !plan.fits;
      if (done || attempt == kLayerWiseTries - 1) result.candidates.push_back(std::move(c));
      if (done) return;
      limit = static_cast<int64_t>(static_cast<double>(limit) * static_cast<double>(memory_limit()) / static_cast<double>(needed));
    }
  }

  void run() {
    const auto starts = options.starts.empty() ? seeds(graph, world()) : options.starts;
    watch.set_budget(static_cast<int>(starts.size()) + kLayerWiseTries + 2 * options.descent_simulations + options.mcmc_simulations);
    watch.enter("seeds");
    bool any = false;  // that is legal and fits
    for (const auto& [name, strategy] : starts) {
      if (any && watch.stopped()) break;
      result.candidates.push_back(price(name, options.constraints.empty() ? strategy : adapted(graph, strategy, rows, options.constraints)));
      any |= result.candidates.back().step_ns != kIllegal && result.candidates.back().fits;
    }
    if (options.starts.empty() && !watch.stopped()) add_layer_wise();
    const auto pricing = [&](std::string name, const Strategy& s) { return price(std::move(name), s); };
    if (!watch.stopped()) {
      for (Candidate& c : recomputed_candidates(graph, result.candidates, pricing, kRecomputed)) result.candidates.push_back(std::move(c));
    }
    const auto best_so_far = [&] {
      size_t best = 0;
      for (size_t i = 1; i < result.candidates.size(); ++i) {
        if (better(result.candidates[i], result.candidates[best])) best = i;
      }
      return best;
    };
    if (!options.constraints.empty() && result.candidates[best_so_far()].step_ns == kIllegal) {
      user_error("[plan] no plan keeps what is pinned and forbidden: {}", why_illegal(result.candidates[0].strategy));
    }
    SOAP_CHECK(result.candidates[best_so_far()].step_ns != kIllegal, "[search] no seed is legal");
    const auto walks = [&](const Candidate& c) {
      return !gathers_regions_again(c.strategy) || static_cast<int64_t>(graph.nodes.size()) * world() <= kRegionsWork;
    };
    if (world() > 1 && !watch.stopped()) {
      watch.enter("descent");
      std::vector<Candidate> starts{result.candidates[0]};
      if (best_so_far() != 0) starts.push_back(result.candidates[best_so_far()]);
      for (Candidate& s : starts) {
        if (s.step_ns == kIllegal || !walks(s)) continue;
        Candidate found = descend(s);
        if (better(found, s)) result.candidates.push_back(std::move(found));
      }
      watch.enter("mcmc");
      Candidate found = result.candidates[best_so_far()];
      if (!found.fits) found = shrink(std::move(found));
      if (found.fits && walks(found)) found = without_spare_regions(anneal(found), pricing);
      if (better(found, result.candidates[best_so_far()])) result.candidates.push_back(std::move(found));
    }
    result.best = static_cast<int>(best_so_far());
    result.progress = watch.points();
    result.interrupted = watch.stopped();
    if (!result.candidates[result.best].fits) {
      user_error(
          "[plan] {}: the smallest plan found ({}) needs {} MiB on a device, the limit is {} MiB; give more devices, a smaller batch or a higher "
          "memory_limit",
          result.interrupted ? "interrupted before anything was found that fits" : "nothing fits", result.candidates[result.best].name,
          result.candidates[result.best].memory_bytes >> 20, memory_limit() >> 20);
    }
  }
};

}  // namespace

SearchResult search(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const SearchOptions& options, Observer observer) {
  if (!options.count_memory && options.memory_limit_bytes) {
    user_error("[search] a memory limit of {} bytes, and memory isn't counted: leave one of them out", *options.memory_limit_bytes);
  }
  ProgressWatch watch(std::move(observer));
  LayoutCache cache(graph, rows, cost);
  const Proposals proposals(cache);
  Searcher s{.graph = graph,
             .rows = rows,
             .cost = cost,
             .options = options,
             .watch = watch,
             .random = std::mt19937_64(options.seed),
             .cache = cache,
             .proposals = proposals};
  s.run();
  return std::move(s.result);
}

}  // namespace soap
