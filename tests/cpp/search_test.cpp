#include "search/search.h"

#include <algorithm>

#include "fmt/format.h"
#include "graphs.h"
#include "gtest/gtest.h"
#include "plan/plan_text.h"
#include "search/chains.h"
#include "search/manual.h"

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

// Chains' random numbers and meetings depend on the seed alone.
TEST(Search, ThreadsDoNotChangeThePlan) {
  const OpGraph g = wide_mlp(512);
  const CostModel cost(slow_links(4));
  const FedRows rows{4, 4, 4, 4};
  const LayoutCache cache(g, rows, cost);
  const Proposals proposals(cache);
  const auto price = [&](const Strategy& s, int64_t) {
    const Simulation sim = simulate(lower(g, s, rows), cost);
    return Candidate{.name = "mcmc", .strategy = s, .step_ns = sim.step_ns, .memory_bytes = sim.memory_bytes[0]};
  };
  const std::vector<Candidate> starts{price(seeds(g, 4)[0].second, 0)};
  std::vector<std::string> plans;
  std::vector<int> told;
  for (const int threads : {1, 3}) {
    const ChainOptions options{.seed = 3, .chains = 5, .simulations = 600, .threads = threads};
    const ChainResult r = run_chains(cache, proposals, {}, starts, options, price, [&](int done, int64_t) {
      told.push_back(done);
      return true;
    });
    EXPECT_EQ(r.chains, 5);
    EXPECT_LT(r.best.step_ns, starts[0].step_ns);
    plans.push_back(print_plan(g, r.best.strategy));
  }
  EXPECT_EQ(plans[0], plans[1]);
  EXPECT_EQ(std::vector(told.begin(), told.begin() + static_cast<int64_t>(told.size()) / 2),
            std::vector(told.begin() + static_cast<int64_t>(told.size()) / 2, told.end()));
}

// A step that stores more than the limit isn't taken, whatever its time.
TEST(Search, ChainsKeepWhatIsStoredUnderTheLimit) {
  const OpGraph g = wide_mlp(256);
  const CostModel cost(slow_links(2));
  const FedRows rows{4, 4};
  LayoutCache cache(g, rows, cost);
  const Proposals proposals(cache);
  const auto price = [&](const Strategy& s, int64_t) {
    const Simulation sim = simulate(lower(g, s, rows), cost);
    EXPECT_LE(DeltaSimulator(cache, s, rows).stored_bytes(), *std::max_element(sim.memory_bytes.begin(), sim.memory_bytes.end()));
    return Candidate{.name = "mcmc", .strategy = s, .step_ns = sim.step_ns};
  };
  const Strategy tensor_parallel = manual_strategy(g, 2, {.tp = 2});  // each weight in two
  const int64_t limit = DeltaSimulator(cache, tensor_parallel, rows).stored_bytes();
  ASSERT_LT(limit, DeltaSimulator(cache, seeds(g, 2)[0].second, rows).stored_bytes());
  const ChainOptions options{.seed = 1, .chains = 2, .simulations = 300, .temperature = 10, .memory_limit_bytes = limit};
  const ChainResult r = run_chains(cache, proposals, {}, {price(tensor_parallel, 0)}, options, price, [](int, int64_t) { return true; });
  EXPECT_GT(r.illegal, 20);
  EXPECT_LE(DeltaSimulator(cache, r.best.strategy, rows).stored_bytes(), limit);
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

const Candidate& named(const SearchResult& r, const std::string& name) {
  const auto it = std::find_if(r.candidates.begin(), r.candidates.end(), [&](const Candidate& c) { return c.name == name; });
  if (it == r.candidates.end()) throw std::out_of_range(name);
  return *it;
}

// Six devices: Megatron within groups of three and of two. Each device computes a sixth, and reads a third or a half of each weight.
TEST(Seeds, GridsOfSamplesAndChannels) {
  OpGraph g;
  TensorId x = test::source(g, NodeKind::kFeed, "in:0", {12, 6}, false, 0);
  x = test::linear(g, "up", x, 6);
  x = test::op(g, "act", "relu", {x}, {"self"}, {12, 6}, "pointwise");
  x = test::linear(g, "down", x, 6);
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {x}, .sample_dim = 0});
  for (const int samples : {2, 3}) {
    const auto all = seeds(g, 6);
    const std::string name = fmt::format("dp {} x tp {}", samples, 6 / samples);
    const auto it = std::find_if(all.begin(), all.end(), [&](const auto& s) { return s.first == name; });
    ASSERT_NE(it, all.end()) << name;
    const Program p = lower(g, it->second, {2, 2, 2, 2, 2, 2});
    for (const char* op : {"up", "act", "down"}) {
      const Tiling& t = p.tilings[*p.graph.find(op)];
      EXPECT_EQ(t.tiles(), 6) << name << " " << op;
      EXPECT_EQ(t.replicas, 1) << name << " " << op;
    }
    const TensorId weight = p.graph.nodes[*p.graph.find("up")].inputs[1];
    for (const Coord& c : p.tiles[weight].coords) {
      EXPECT_EQ(volume(c.box), 36 / (6 / samples)) << name;
      EXPECT_EQ(static_cast<int>(c.devices.size()), samples) << name;
    }
  }
}

TEST(Seeds, PipelineOnlyWithALoss) {
  OpGraph g = wide_mlp(64);
  const auto has = [](const OpGraph& graph, const std::string& name) {
    const auto all = seeds(graph, 2);
    return std::any_of(all.begin(), all.end(), [&](const auto& s) { return s.first == name; });
  };
  EXPECT_FALSE(has(g, "1f1b"));
  OpGraph with;
  TensorId x = test::source(with, NodeKind::kFeed, "in:0", {8, 64}, false, 0);
  x = test::linear(with, "a", x, 64);
  x = test::linear(with, "b", x, 64);
  x = test::op(with, "loss", "mean", {x}, {"self"}, {});
  add_node(with, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {x}});
  ASSERT_TRUE(has(with, "1f1b"));
  const SearchResult r = search(with, {4, 4}, CostModel(make_machine(2, 1)), {.descent_simulations = 10, .mcmc_simulations = 10});
  for (const char* name : {"gpipe", "1f1b"}) EXPECT_GT(named(r, name).step_ns, 0) << name;
  const Program p = lower(with, named(r, "gpipe").strategy, {4, 4});
  EXPECT_EQ(p.tilings[*p.graph.find("a")].devices, std::vector<int>{0});
  EXPECT_EQ(p.tilings[*p.graph.find("b")].devices, std::vector<int>{1});
  EXPECT_EQ(p.tilings[*p.graph.find("a")].chunks(), 4);
}

TEST(Seeds, EveryGridOfSamplesChannelsAndStages) {
  OpGraph g;
  TensorId x = test::source(g, NodeKind::kFeed, "in:0", {32, 16}, false, 0);
  for (const char* name : {"a", "b", "c", "d", "e", "f", "g", "h"}) x = test::linear(g, name, x, 16);
  x = test::op(g, "loss", "mean", {x}, {"self"}, {});
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {x}});
  std::vector<std::string> names;
  for (const auto& [name, strategy] : seeds(g, 8)) {
    EXPECT_NO_THROW(lower(g, strategy, FedRows(8, 4))) << name;
    names.push_back(name);
  }
  for (const char* name : {"zero-1", "zero-2", "zero-3", "hsdp 2", "hsdp 4", "dp 2 x tp 4", "dp 4 x tp 2", "tp 4 x pp 2", "dp 2 x tp 2 x pp 2", "dp 4 x pp 2",
                           "tp 2 x pp 4", "dp 2 x pp 4", "gpipe", "1f1b"}) {
    EXPECT_EQ(std::count(names.begin(), names.end(), name), 1) << name;
  }
}

// Eight linears of equal work but one: the busiest of three stages has as little as can be.
TEST(Manual, StagesAreBalanced) {
  OpGraph g;
  TensorId x = test::source(g, NodeKind::kFeed, "in:0", {8, 8}, false, 0);
  for (const char* name : {"a", "b", "c", "d"}) x = test::linear(g, name, x, 8);
  x = test::linear(g, "wide", x, 32);
  x = test::linear(g, "narrow", x, 8);
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {x}, .sample_dim = 0});
  const Strategy s = manual_strategy(g, 3, {.pp = 3, .micro_batches = 2});
  const Program p = lower(g, s, {3, 3, 2});
  const auto stage = [&](const char* name) { return p.tilings[*p.graph.find(name)].devices.at(0); };
  for (const char* name : {"a", "b", "c", "d"}) EXPECT_EQ(stage(name), 0) << name;
  EXPECT_EQ(stage("wide"), 1);
  EXPECT_EQ(stage("narrow"), 2);
  EXPECT_THROW(manual_strategy(g, 7, {.pp = 7}), std::invalid_argument);
}

TEST(Constraints, HoldInEveryCandidate) {
  const OpGraph g = wide_mlp(256);
  SearchOptions options{.descent_simulations = 60, .mcmc_simulations = 100};
  options.constraints.pin["a"] = OpConfig{.cuts = {{"o", {.tiles = 2}}}};
  options.constraints.forbid["b"] = {"i", "n", "devices"};
  const SearchResult r = search(g, {4, 4}, CostModel(slow_links(2)), options);
  for (const Candidate& c : r.candidates) {
    if (c.step_ns < 0) continue;
    EXPECT_EQ(c.strategy.nodes.at("a"), *options.constraints.pin["a"]) << c.name;
    const Program p = lower(g, c.strategy, {4, 4});
    const NodeId b = *p.graph.find("b");
    for (const FactorParts& cut : p.tilings[b].cuts) {
      if (cut.tiles() > 1) EXPECT_EQ(p.rules[b].factors[cut.factor].name, "o") << c.name;
    }
  }
}

// A forbidden cut is taken out of a grid; the devices along it do alike what they shared.
TEST(Constraints, AForbiddenCutBecomesReplicas) {
  const OpGraph g = wide_mlp(64);
  Strategy s{.world_size = 4};
  s.nodes["a"] = {.cuts = {{"n", {.tiles = 2}}, {"o", {.tiles = 2}}}, .devices = {3, 1, 2, 0}};
  Constraints c;
  c.forbid["a"] = {"n"};
  const Strategy out = adapted(g, s, {2, 2, 2, 2}, c);
  EXPECT_EQ(print_config(out.nodes.at("a")), "o=2 replicas=2 @ [3,2,1,0]");
  EXPECT_TRUE(allowed(g, out, {2, 2, 2, 2}, c));
  EXPECT_FALSE(allowed(g, s, {2, 2, 2, 2}, c));
}

// A node without a configuration comes by its producer's cut.
TEST(Constraints, AreOfTheTilingNotTheText) {
  const OpGraph g = wide_mlp(64);
  Strategy s{.world_size = 2};
  s.nodes["a"] = {.cuts = {{"n", {.tiles = 2, .fed = true}}}};
  Constraints c;
  c.forbid["b"] = {"n"};
  EXPECT_FALSE(allowed(g, s, {4, 4}, c));
  const Strategy out = adapted(g, s, {4, 4}, c);
  EXPECT_TRUE(allowed(g, out, {4, 4}, c)) << print_plan(g, out);
  EXPECT_EQ(out.nodes.at("a"), s.nodes.at("a"));
}

// Convolutions by rows, what lies between them with them, what comes after data parallel.
TEST(Seeds, Spatial) {
  OpGraph g;
  TensorId x = test::source(g, NodeKind::kFeed, "in:0", {4, 2, 8, 8}, false, 0);
  for (const char* name : {"c0", "c1"}) {
    const TensorId w = test::source(g, NodeKind::kParam, std::string("param:") + name, {2, 2, 3, 3}, true);
    x = test::op(g, name, "conv2d", {x, w}, {"input", "weight"}, {4, 2, 8, 8}, "", {{"padding", std::vector<int64_t>{1, 1}}});
    x = test::op(g, std::string(name) + "/relu", "relu", {x}, {"self"}, {4, 2, 8, 8}, "pointwise");
  }
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {x}, .sample_dim = 0});
  const auto all = seeds(g, 2);
  const auto it = std::find_if(all.begin(), all.end(), [](const auto& s) { return s.first == "spatial"; });
  ASSERT_NE(it, all.end());
  const Program p = lower(g, it->second, {2, 2});
  const auto cut = [&](const char* name) {
    const NodeId n = *p.graph.find(name);
    return p.rules[n].factors[p.tilings[n].cuts.at(0).factor].name;
  };
  EXPECT_EQ(cut("c0"), "h");
  EXPECT_EQ(cut("c0/relu"), "d2");
  EXPECT_EQ(cut("c1"), "h");
  EXPECT_EQ(cut("c1/relu"), "d0");
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
