#include "search/search.h"

#include <algorithm>

#include "graphs.h"
#include "gtest/gtest.h"
#include "plan/plan_text.h"

namespace soap {
namespace {

// Two wide linears on a small batch: parameters far outweigh activations.
OpGraph wide_mlp(int64_t width) {
  OpGraph g;
  TensorId x = test::source(g, NodeKind::kFeed, "in:0", {8, width}, false, 0);
  x = test::linear(g, "a", x, width);
  x = test::linear(g, "b", x, width);
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {x}, .sample_dim = 0});
  return g;
}

Machine slow_links(int devices) {
  Machine m = make_machine(devices, 1);
  m.intra = {.latency_ns = 50e3, .bytes_per_s = 1e8};
  return m;
}

TEST(Search, LeavesDataParallelWhereLinksAreSlow) {
  const OpGraph g = wide_mlp(512);
  const SearchResult r = search(g, {4, 4}, CostModel(slow_links(2)), {});
  EXPECT_LT(r.candidates[r.best].step_ns, r.candidates[0].step_ns / 2) << print_plan(g, r.candidates[r.best].strategy);
}

TEST(Search, IsNeverWorseThanItsSeedsAndSaysSo) {
  const OpGraph g = wide_mlp(128);
  for (const uint64_t seed : {0, 1, 2}) {
    const SearchResult r = search(g, {4, 4, 0, 0}, CostModel(slow_links(4)), {.seed = seed, .descent_simulations = 40, .mcmc_simulations = 80});
    for (const Candidate& c : r.candidates) {
      if (c.step_ns >= 0) EXPECT_LE(r.candidates[r.best].step_ns, c.step_ns) << c.name;
    }
  }
}

TEST(Search, SameSeedSamePlan) {
  const OpGraph g = wide_mlp(128);
  const SearchOptions options{.seed = 7, .descent_simulations = 40, .mcmc_simulations = 120};
  const auto run = [&] {
    const SearchResult r = search(g, {4, 4, 4}, CostModel(slow_links(3)), options);
    return print_plan(g, r.candidates[r.best].strategy);
  };
  EXPECT_EQ(run(), run());
}

TEST(Search, SaysWhenNothingFits) {
  const OpGraph g = wide_mlp(256);
  EXPECT_THROW(search(g, {4, 4}, CostModel(slow_links(2)), {.memory_limit_bytes = 1000}), std::invalid_argument);
}

TEST(Search, MemoryLimitLeavesWhatDoesNotFit) {
  const OpGraph g = wide_mlp(256);
  const SearchResult free = search(g, {4, 4}, CostModel(make_machine(2, 1)), {});
  const int64_t whole = free.candidates[0].memory_bytes;  // DDP: every parameter everywhere
  const SearchResult tight = search(g, {4, 4}, CostModel(make_machine(2, 1)), {.memory_limit_bytes = whole * 3 / 4});
  EXPECT_LE(tight.candidates[tight.best].memory_bytes, whole * 3 / 4);
}

TEST(Simulate, StepCoversComputeAndCommunicationOfEveryDevice) {
  const OpGraph g = wide_mlp(64);
  const Program p = lower(g, parse_plan(g, "a o=2\nb i=2 @ [1,0]", 2), {5, 3});
  const Simulation s = simulate(p, CostModel(slow_links(2)), true);
  for (size_t d = 0; d < 2; ++d) {
    EXPECT_LE(s.compute_ns[d] + s.communication_ns[d], s.step_ns);  // nothing overlaps on this machine
    int64_t busy = 0, last = 0;
    for (const Event& e : s.events) {
      if (e.device != static_cast<int>(d)) continue;
      EXPECT_GE(e.begin_ns, last);
      last = e.end_ns;
      busy += e.end_ns - e.begin_ns;
    }
    EXPECT_EQ(busy, s.compute_ns[d] + s.communication_ns[d]);
  }
}

TEST(Machine, MovementsFollowTheMeasuredTable) {
  Machine m = make_machine(2, 1);
  m.tables["exchange/2/1"] = {{1000, 2000}, {100000, 20000}};
  EXPECT_EQ(movement_ns(m, "exchange", {0, 1}, 10), 2000);
  EXPECT_EQ(movement_ns(m, "exchange", {0, 1}, 100000), 20000);
  const int64_t middle = movement_ns(m, "exchange", {0, 1}, 10000);
  EXPECT_NEAR(static_cast<double>(middle), 6325, 10);                    // log-linear: sqrt(2000 * 20000)
  EXPECT_EQ(movement_ns(m, "exchange", {0, 1}, 100000 + 99000), 38000);  // beyond: by the last bandwidth
  EXPECT_EQ(movement_ns(m, "exchange", {0}, 1 << 20), 0);
}

}  // namespace
}  // namespace soap
