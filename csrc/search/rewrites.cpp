#include "search/rewrites.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "substitution/transfer.h"

namespace soap {
namespace {

constexpr int64_t kLoweredWork = 400'000;  // nodes x devices that one round may lower to price its groups

struct RewriteSearcher {
  const OpGraph& graph;
  const FedRows& rows;
  const CostModel& cost;
  const SearchOptions& options;
  const RewriteOptions& rewriting;
  const Observer& observer;
  RewriteSearchResult out;
  std::map<std::string, std::string> refusals;  // by signature
  int best = -1;

  static bool better(const Candidate& a, const Candidate& b) {
    if (a.step_ns < 0 || b.step_ns < 0) return b.step_ns < 0 && a.step_ns >= 0;
    if (a.fits != b.fits) return a.fits;
    return a.fits ? a.step_ns < b.step_ns : a.memory_bytes < b.memory_bytes;
  }

  // Searches on the graph after `rewrites`, whose strategies `starts` are for, and takes over what is found.
  void search_after(const std::vector<Rewrite>& rewrites, SearchOptions own) {
    for (auto& [name, strategy] : own.starts) strategy.rewrites.clear();
    SearchResult found = rewrites.empty() ? search(graph, rows, cost, own, observer) : search(rewritten(graph, rewrites), rows, cost, own, observer);
    const int first = static_cast<int>(out.search.candidates.size());
    for (Candidate& c : found.candidates) {
      c.strategy.rewrites = rewrites;
      if (!rewrites.empty() && !c.name.starts_with("rewritten")) c.name = "rewritten, " + c.name;
      out.search.candidates.push_back(std::move(c));
    }
    if (best < 0 || better(out.search.candidates[first + found.best], out.search.candidates[best])) best = first + found.best;
    for (Progress& p : found.progress) {
      p.simulations += out.search.simulations;
      out.search.progress.push_back(std::move(p));
    }
    out.search.interrupted = out.search.interrupted || found.interrupted;
    out.search.chains = std::max(out.search.chains, found.chains);
    out.search.simulations += found.simulations;
    out.search.illegal += found.illegal;
  }

  bool constrained(const std::string& name) const { return options.constraints.pin.count(name) || options.constraints.forbid.count(name); }

  // Whether a rewrite replaces an operator that a person has decided about.
  bool touches_constraints(const OpGraph& before, const Rewrite& r) const {
    if (options.constraints.empty()) return false;
    const OpGraph after = rewritten(before, {r});
    return std::any_of(before.nodes.begin(), before.nodes.end(), [&](const Node& n) { return constrained(n.name) && !after.find(n.name); });
  }

  bool keeps_constraints(const std::vector<Rewrite>& rewrites) const {
    const OpGraph after = rewritten(graph, rewrites);
    return std::none_of(graph.nodes.begin(), graph.nodes.end(), [&](const Node& n) { return constrained(n.name) && !after.find(n.name); });
  }

  void search_starts() {
    std::map<std::vector<Rewrite>, SearchOptions> by_rewrites;
    for (const auto& start : options.starts) {
      if (!keeps_constraints(start.second.rewrites)) continue;
      const auto [it, fresh] = by_rewrites.try_emplace(start.second.rewrites, options);
      if (fresh) it->second.starts.clear();
      it->second.starts.push_back(start);
    }
    if (by_rewrites.empty()) {
      SearchOptions own = options;
      own.starts.clear();
      search_after({}, own);
    }
    for (auto& [rewrites, own] : by_rewrites) search_after(rewrites, std::move(own));
  }

  std::string refusal(const std::string& key, const OpGraph& now, const Rewrite& r) {
    const auto [it, fresh] = refusals.try_emplace(key);
    if (!fresh) return it->second;
    try {
      if (rewriting.refusal) it->second = rewriting.refusal(r, sample_of(now, r));
    } catch (const std::invalid_argument& e) {
      it->second = e.what();
    }
    if (!it->second.empty()) out.refused.push_back(it->second);
    return it->second;
  }

  // All of a group, one after another, with the plan taken along.
  std::optional<Candidate> price(const OpGraph& before, const Strategy& strategy, const std::vector<Rewrite>& group, std::vector<Rewrite>& done) {
    OpGraph now = before;
    try {
      now = rewritten(before, group);
      done = group;
    } catch (const std::invalid_argument&) {  // one of the group has taken what another one needs
      done = fitting(before, group);
      now = rewritten(before, done);
    }
    Strategy taken = transferred(before, strategy, done, now);
    if (done.empty()) return std::nullopt;
    ++out.search.simulations;
    ++out.priced;
    Candidate c{.name = "rewritten", .strategy = taken};
    taken.rewrites.clear();
    try {
      if (!options.constraints.empty() && !allowed(now, taken, rows, options.constraints)) return std::nullopt;
      const Simulation sim = simulate(lower(now, taken, rows), cost);
      c.step_ns = sim.step_ns;
      c.memory_bytes = *std::max_element(sim.memory_bytes.begin(), sim.memory_bytes.end());
      c.fits = c.memory_bytes <= options.memory_limit_bytes.value_or(cost.machine().memory_bytes);
    } catch (const std::invalid_argument&) {  // the plan isn't legal there
      ++out.search.illegal;
      return std::nullopt;
    }
    return c;
  }

  // The best group of rewrites, where it is worth it.
  bool improve(Candidate& current) {
    const OpGraph now = rewritten(graph, current.strategy.rewrites);
    std::vector<std::pair<std::string, std::vector<Rewrite>>> groups;
    for (Rewrite& r : find_rewrites(now)) {
      const std::string key = signature(now, r);
      auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == key; });
      if (group == groups.end()) group = groups.insert(group, {key, {}});
      group->second.push_back(std::move(r));
    }
    std::optional<Candidate> chosen;
    std::vector<Rewrite> rewrites;
    int64_t tried = 0;
    const int64_t most = std::max<int64_t>(kLoweredWork / (static_cast<int64_t>(now.nodes.size()) * static_cast<int64_t>(rows.size())), 1);
    for (auto& [key, group] : groups) {
      if (++tried > most) break;
      std::erase_if(group, [&](const Rewrite& r) { return touches_constraints(now, r); });
      if (group.empty() || !refusal(key, now, group[0]).empty()) continue;
      std::vector<Rewrite> done;
      std::optional<Candidate> c = price(now, current.strategy, group, done);
      if (!c || !c->fits || (chosen && c->step_ns >= chosen->step_ns)) continue;
      chosen = std::move(c);
      rewrites = std::move(done);
    }
    const auto limit = static_cast<int64_t>(static_cast<double>(current.step_ns) * (1 - rewriting.least_gain));
    if (!chosen || chosen->step_ns >= limit) return false;
    out.used.push_back({std::move(rewrites), current.step_ns - chosen->step_ns});
    current = std::move(*chosen);
    return true;
  }

  void run() {
    search_starts();
    Candidate current = out.search.candidates[best];
    bool improved = false;
    for (int i = 0; i < rewriting.rounds && !out.search.interrupted && current.fits && improve(current); ++i) improved = true;
    if (improved) {
      SearchOptions own = options;
      own.starts = {{"rewritten", current.strategy}};
      search_after(current.strategy.rewrites, std::move(own));
    }
    out.search.best = best;
    if (out.search.candidates[best].strategy.rewrites.empty()) out.used.clear();
  }
};

}  // namespace

RewriteSearchResult search_with_rewrites(const OpGraph& graph, const FedRows& rows, const CostModel& cost, const SearchOptions& options,
                                         const RewriteOptions& rewriting, const Observer& observer) {
  RewriteSearcher s{.graph = graph, .rows = rows, .cost = cost, .options = options, .rewriting = rewriting, .observer = observer};
  s.run();
  return std::move(s.out);
}

}  // namespace soap
