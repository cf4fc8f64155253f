#include "search/chains.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <thread>

namespace soap {
namespace {

constexpr int kRounds = 24;        // of the whole budget, at least
constexpr int kExchanges = 8;      // of the whole budget
constexpr int kLeastPerRound = 8;  // simulations of a chain
constexpr int kMostPerRound = 32;  // so that whoever watches is soon heard
constexpr int kLeast = 256;        // simulations before the search may end for want of luck

// One walk. Used by one thread at a time.
struct Chain {
  const Proposals& proposals;
  const Constraints& constraints;
  const ChainOptions& options;
  LayoutCache cache;
  DeltaSimulator delta;
  std::mt19937_64 random;
  int64_t current_ns, fastest_ns;
  Strategy fastest;  // where it has been, since it was last sent somewhere
  int simulations = 0, illegal = 0;
  size_t opened = 0;  // of the proposals that change everything

  Chain(const LayoutCache& known, const Proposals& proposals, const Constraints& constraints, const Strategy& start, const ChainOptions& options, int index)
      : proposals(proposals),
        constraints(constraints),
        options(options),
        cache(known),
        delta(cache, start, known.rows()),
        random(options.seed * 0x9e3779b97f4a7c15 + static_cast<uint64_t>(index)),
        current_ns(delta.step_ns()),
        fastest_ns(current_ns),
        fastest(start) {}

  bool legal() const {
    if (options.memory_limit_bytes && delta.stored_bytes() > *options.memory_limit_bytes) return false;
    return constraints.empty() || allowed(cache.graph(), delta.strategy(), cache.rows(), constraints);
  }

  void walk(int steps) {
    for (int i = 0; i < steps; ++i) {
      std::optional<Proposal> opening = proposals.opening(opened, delta.strategy());
      opened += opening.has_value();
      const Proposal proposal = opening ? std::move(*opening) : proposals.draw(delta.strategy(), random);
      ++simulations;
      int64_t time = 0;
      try {
        time = delta.change(proposal.changes, proposal.bucket_bytes);
      } catch (const std::invalid_argument&) {  // a proposal, not a mistake
        ++illegal;
        continue;
      }
      if (!legal()) {
        ++illegal;
        delta.undo();
        continue;
      }
      const double loss = static_cast<double>(time - current_ns) / static_cast<double>(std::max<int64_t>(current_ns, 1));
      const double luck = static_cast<double>(random() >> 11) * 0x1p-53;
      if (opening ? time >= current_ns : time > current_ns && luck >= std::exp(-loss / options.temperature)) {
        delta.undo();
        continue;
      }
      current_ns = time;
      if (time < fastest_ns) {
        fastest_ns = time;
        fastest = delta.strategy();
      }
    }
  }

  void go_to(const Strategy& where) {
    current_ns = fastest_ns = delta.change(delta.difference(where), where.bucket_bytes);
    fastest = where;
  }
};

// Chains with the fastest first.
std::vector<Chain*> by_speed(const std::vector<std::unique_ptr<Chain>>& chains) {
  std::vector<Chain*> out;
  for (const auto& c : chains) out.push_back(c.get());
  std::stable_sort(out.begin(), out.end(), [](const Chain* a, const Chain* b) { return a->fastest_ns < b->fastest_ns; });
  return out;
}

// The fastest that fits becomes the best; the chains that are faster and don't fit go back to it.
void settle(const std::vector<std::unique_ptr<Chain>>& chains, const PriceWhole& price, Candidate& best) {
  for (Chain* c : by_speed(chains)) {
    if (c->fastest_ns >= best.step_ns) return;
    Candidate found = price(c->fastest, c->fastest_ns);
    if (found.fits && found.step_ns >= 0 && found.step_ns < best.step_ns) {
      best = std::move(found);
    } else {
      c->go_to(best.strategy);
    }
  }
}

// The chain that is farthest behind goes on from the fastest seen.
void catch_up(const std::vector<std::unique_ptr<Chain>>& chains) {
  const std::vector<Chain*> order = by_speed(chains);
  Chain* last = *std::max_element(order.begin(), order.end(), [](const Chain* a, const Chain* b) { return a->current_ns < b->current_ns; });
  if (last != order.front() && last->current_ns > order.front()->fastest_ns) last->go_to(order.front()->fastest);
}

// Each chain once, on as many threads as the machine has; the calling one is one of them.
template <class Work>
void on_threads(size_t chains, int most_threads, const Work& work) {
  const size_t count = std::min<size_t>(chains, std::max(most_threads > 0 ? static_cast<unsigned>(most_threads) : std::thread::hardware_concurrency(), 1u));
  const auto some = [&](size_t first) {
    for (size_t i = first; i < chains; i += count) work(i);
  };
  std::vector<std::thread> threads;
  for (size_t t = 1; t < count; ++t) threads.emplace_back(some, t);
  some(0);
  for (std::thread& t : threads) t.join();
}

}  // namespace

ChainResult run_chains(const LayoutCache& cache, const Proposals& proposals, const Constraints& constraints, const std::vector<Candidate>& starts,
                       const ChainOptions& options, const PriceWhole& price, const BetweenRounds& between) {
  ChainResult out{.best = starts.front()};
  const int count = std::clamp(options.simulations / kLeastPerRound, 0, options.chains);
  if (count == 0) return out;
  out.chains = count;
  std::vector<std::unique_ptr<Chain>> chains(count);
  std::vector<std::exception_ptr> failures(count);
  const auto each = [&](const auto& work) {
    on_threads(chains.size(), options.threads, [&](size_t i) {
      try {
        work(i);
      } catch (...) {
        failures[i] = std::current_exception();
      }
    });
    for (const std::exception_ptr& failure : failures) {
      if (failure) std::rethrow_exception(failure);
    }
  };
  each([&](size_t i) {
    const Strategy& start = starts[i < starts.size() ? i : 0].strategy;
    chains[i] = std::make_unique<Chain>(cache, proposals, constraints, start, options, static_cast<int>(i));
  });
  const int each_chain = options.simulations / count;
  const int steps = std::clamp(each_chain / kRounds, kLeastPerRound, kMostPerRound);
  const int exchange = std::max(each_chain / steps / kExchanges, 1);  // rounds between two
  int left = each_chain, done = 0, lucky = 0;                         // of each chain, of all
  int64_t seen_ns = out.best.step_ns;
  for (int round = 1, next_settling = 1; left > 0; ++round) {
    const int now = std::min(steps, left);
    left -= now;
    each([&](size_t i) { chains[i]->walk(now); });
    done += now * count;
    const int64_t fastest_ns = by_speed(chains).front()->fastest_ns;
    if (fastest_ns < seen_ns) lucky = done;
    seen_ns = std::min(seen_ns, fastest_ns);
    const bool end = left <= 0 || (options.stops_early && done >= kLeast && done - lucky > done / 2);
    const bool short_of_memory = options.memory_limit_bytes && out.best.memory_bytes > *options.memory_limit_bytes / 2;
    if ((round == next_settling && short_of_memory) || end) {
      settle(chains, price, out.best);
      seen_ns = out.best.step_ns;
    }
    if (round == next_settling) next_settling *= 2;
    if (!between(done, out.best.step_ns) || end) break;
    if (round % exchange == 0 && count > 1) catch_up(chains);
  }
  for (const auto& c : chains) {
    out.simulations += c->simulations;
    out.illegal += c->illegal;
  }
  each([&](size_t i) { chains[i].reset(); });  // much memory, which takes its time
  return out;
}

}  // namespace soap
