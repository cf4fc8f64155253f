#include "search/search.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include "base/error.h"
#include "search/layouts.h"
#include "search/optimize_layers.h"
#include "search/recompute.h"
#include "sim/delta.h"

namespace soap {
namespace {

constexpr int64_t kIllegal = -1;
constexpr int kMemoryChecks = 32;  // of a walk
constexpr int kLayerWiseTries = 3;
constexpr int64_t kChunkedWork = 1000;  // nodes x devices
constexpr int64_t kRegionsWork = 200;   // nodes x devices
constexpr int kRecomputed = 6;          // plans that are too large and tried with recomputation

struct Searcher {
  const OpGraph& graph;
  const FedRows& rows;
  const CostModel& cost;
  const SearchOptions& options;
  ProgressWatch& watch;
  SearchResult result;
  std::mt19937_64 random;
  LayoutCache cache;
  std::vector<const Node*> operators;  // with work, largest parameters first
  std::vector<Rule> rules;

  int64_t memory_limit() const { return options.memory_limit_bytes.value_or(cost.machine().memory_bytes); }
  int world() const { return static_cast<int>(rows.size()); }

  // Simulated time of a strategy; a candidate's score is the time, plus a penalty that no time reaches when it doesn't fit.
  Candidate price(std::string name, const Strategy& s) {
    Candidate c{.name = std::move(name), .strategy = s};
    try {
      if (!allowed(graph, s, rows, options.constraints)) user_error("[search] {} leaves the constraints", c.name);
      const Simulation sim = simulate(lower(graph, s, rows), cost);
      c.step_ns = sim.step_ns;
      c.memory_bytes = *std::max_element(sim.memory_bytes.begin(), sim.memory_bytes.end());
      c.fits = c.memory_bytes <= memory_limit();
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

  void rank_operators() {
    for (const Node& n : graph.nodes) rules.push_back(make_rule(graph, n, world()));
    std::vector<std::pair<int64_t, const Node*>> sized;
    for (const Node& n : graph.nodes) {
      if (n.kind != NodeKind::kOp) continue;
      int64_t parameters = 0, activations = 0;
      for (TensorId t : n.inputs) {
        const int64_t bytes = numel(graph.tensors[t].shape) * graph.tensors[t].element_bytes;
        (graph.nodes[graph.tensors[t].producer].kind == NodeKind::kParam ? parameters : activations) += bytes;
      }
      sized.emplace_back(parameters * 4 + activations, &n);
    }
    std::stable_sort(sized.begin(), sized.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    for (const auto& [bytes, node] : sized) operators.push_back(node);
  }

  std::vector<std::optional<OpConfig>> usual_configs(const Node& n) const {
    std::vector<std::optional<OpConfig>> out{std::nullopt, OpConfig{.cuts = {{"n", {.tiles = world(), .fed = true}}}}};
    for (const Factor& f : rules[n.id].factors) {
      if (f.cut != Cuttable::kWhole && f.size / f.unit >= world()) out.push_back(OpConfig{.cuts = {{f.name, {.tiles = world()}}}});
    }
    return out;
  }

  // The step time with these changes, which stay unless they aren't legal.
  std::optional<int64_t> attempt(DeltaSimulator& delta, const std::vector<Change>& changes) {
    ++result.simulations;
    watch.simulated();
    try {
      const int64_t time = delta.change(changes);
      if (options.constraints.empty() || allowed(graph, delta.strategy(), rows, options.constraints)) return time;
      delta.undo();
    } catch (const std::invalid_argument&) {  // a proposal, not a mistake
    }
    ++result.illegal;
    return std::nullopt;
  }

  Candidate descend(Candidate best) {
    int left = options.descent_simulations;
    DeltaSimulator delta(cache, best.strategy, rows);
    for (bool improved = true; improved;) {
      improved = false;
      for (const Node* n : operators) {
        if (options.constraints.pinned(n->name)) continue;
        for (const auto& config : usual_configs(*n)) {
          if (left-- <= 0 || watch.stopped()) return best;
          const auto it = best.strategy.nodes.find(n->name);
          if (config ? it != best.strategy.nodes.end() && it->second == *config : it == best.strategy.nodes.end()) continue;
          const std::optional<int64_t> time = attempt(delta, {{n->id, config}});
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

  template <class T>
  T draw(T n) {
    return static_cast<T>(random() % static_cast<uint64_t>(n));
  }

  // What is cut in time is lowered whole: on large graphs only the seeds are.
  bool may_chunk() const { return static_cast<int64_t>(graph.nodes.size()) * world() <= kChunkedWork; }

  // Any legal configuration: up to two factors, degrees up to the world, sometimes chunks, uneven parts, any devices.
  OpConfig random_config(const Node& n) {
    OpConfig c;
    std::vector<const Factor*> factors;
    for (const Factor& f : rules[n.id].factors) {
      if (f.cut != Cuttable::kWhole && f.size >= 2) factors.push_back(&f);
    }
    int tiles = 1;
    for (int cuts = 1 + draw(4) / 3; cuts > 0 && !factors.empty(); --cuts) {
      const size_t at = draw(factors.size());
      const Factor& f = *factors[at];
      factors.erase(factors.begin() + static_cast<int64_t>(at));
      const int degree = std::min<int>(world() / tiles, static_cast<int>(f.size / f.unit));
      if (degree < 2) continue;
      Cut cut{.tiles = 2 + draw(degree - 1)};
      if (draw(16) == 0 && f.size / f.unit >= cut.tiles * 2 && may_chunk()) cut.chunks = 2;
      if (draw(8) == 0 && cut.tiles == 2 && f.size > 2 && f.unit == 1) cut.bounds = {0, 1 + draw(f.size - 1), f.size};
      tiles *= cut.tiles;
      c.cuts.push_back({f.name, cut});
    }
    if (draw(4) == 0 && world() / tiles >= 2) c.replicas = world() / tiles;
    c.devices.resize(world());
    std::iota(c.devices.begin(), c.devices.end(), 0);
    if (draw(4) == 0) std::shuffle(c.devices.begin(), c.devices.end(), random);
    c.devices.resize(static_cast<size_t>(tiles) * c.replicas);
    return c;
  }

  std::vector<Change> propose(const Strategy& from) {
    const Node& n = *operators[draw(std::min<size_t>(operators.size(), 8 + operators.size() / 2))];
    switch (draw(8)) {
      case 0: return {{n.id, std::nullopt}};
      case 1: return {{n.id, OpConfig{.cuts = {{"n", {.tiles = world(), .fed = true}}}}}};
      case 2: {  // an operator's parameters stored in parts, or where they are used
        std::vector<Change> out;
        for (TensorId t : n.inputs) {
          const Node& producer = graph.nodes[graph.tensors[t].producer];
          if (producer.kind != NodeKind::kParam || graph.tensors[t].shape.empty()) continue;
          if (from.nodes.count(producer.name))
            out.push_back({producer.id, std::nullopt});
          else
            out.push_back({producer.id, OpConfig{.cuts = {{"d0", {.tiles = world()}}}, .keep = draw(2) ? Keep::kUse : Keep::kUntilBackward}});
        }
        return out;
      }
      default: return {{n.id, random_config(n)}};
    }
  }

  // Metropolis' rule on the simulated time. Memory takes the whole simulation, so it is looked at now and then: where the fastest so far doesn't
  // fit, the walk goes back to the last that does.
  Candidate anneal(Candidate best) {
    DeltaSimulator delta(cache, best.strategy, rows);
    int64_t current = delta.step_ns(), fastest_ns = current;
    Strategy fastest;
    const auto settle = [&] {
      if (fastest_ns >= best.step_ns) return;
      Candidate c = price("mcmc", fastest);
      if (better(c, best)) {
        best = std::move(c);
      } else {
        delta.change(delta.difference(best.strategy));
        current = fastest_ns = best.step_ns;
      }
    };
    const int interval = std::max(options.mcmc_simulations / kMemoryChecks, 1);
    int since = 0;
    for (int i = 1; i <= options.mcmc_simulations && ++since <= std::max(options.mcmc_simulations / 2, 1); ++i) {
      const std::optional<int64_t> time = attempt(delta, propose(delta.strategy()));
      if (time) {
        const double loss = static_cast<double>(*time - current) / static_cast<double>(std::max<int64_t>(current, 1));
        const double luck = static_cast<double>(random() >> 11) * 0x1p-53;
        if (*time > current && luck >= std::exp(-loss / options.temperature)) {
          delta.undo();
        } else {
          current = *time;
        }
        if (current < fastest_ns) {
          fastest_ns = current;
          fastest = delta.strategy();
          since = 0;
        }
      }
      if (watch.stopped()) break;
      if (i % interval == 0) settle();
    }
    settle();
    return best;
  }

  // The same walk where nothing fits yet: towards less memory, every step priced whole.
  Candidate shrink(Candidate best) {
    DeltaSimulator delta(cache, best.strategy, rows);
    for (int i = 0; i < options.descent_simulations && !best.fits && !watch.stopped(); ++i) {
      if (!attempt(delta, propose(delta.strategy()))) continue;
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
    rank_operators();
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
      if (found.fits && walks(found)) found = without_spare_regions(anneal(std::move(found)), pricing);
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
  ProgressWatch watch(std::move(observer));
  Searcher s{.graph = graph,
             .rows = rows,
             .cost = cost,
             .options = options,
             .watch = watch,
             .random = std::mt19937_64(options.seed),
             .cache = LayoutCache(graph, rows, cost)};
  s.run();
  return std::move(s.result);
}

}  // namespace soap
