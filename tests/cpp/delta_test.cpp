#include "sim/delta.h"

#include <gtest/gtest.h>

#include "graphs.h"
#include "random.h"
#include "sim/simulate.h"

namespace soap::test {
namespace {

constexpr int kWorld = 4;

// Two blocks with a shared weight, a residual, a coupling operator (softmax), a sum, and an operator without a backward in each: every kind of edge that
// time knows.
OpGraph blocks() {
  OpGraph g;
  const TensorId x = source(g, NodeKind::kFeed, "in:0", {24, 12}, false, 0);
  const TensorId shared = source(g, NodeKind::kParam, "param:shared", {12, 12}, true);
  TensorId h = x;
  for (const char* block : {"a", "b"}) {
    const std::string name(block);
    const TensorId up = linear(g, name + ".up", h, 16);
    const TensorId act = op(g, name + ".act", "relu", {up}, {"self"}, {24, 16}, "pointwise");
    const TensorId down = linear(g, name + ".down", act, 12);
    const TensorId tied = op(g, name + ".tied", "linear", {down, shared}, {"input", "weight"}, {24, 12});
    const TensorId sum = op(g, name + ".sum", "add", {h, tied}, {"self", "other"}, {24, 12}, "pointwise");
    const TensorId scale = op(g, name + ".scale", "relu", {x}, {"self"}, {24, 12}, "pointwise");
    g.tensors[scale].requires_grad = false;
    const TensorId scaled = op(g, name + ".scaled", "mul", {sum, scale}, {"self", "other"}, {24, 12}, "pointwise");
    h = op(g, name + ".softmax", "softmax", {scaled}, {"self"}, {24, 12}, "", {{"dim", int64_t{1}}});
  }
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {h}, .operand_names = {"value"}, .sample_dim = 0});
  return g;
}

std::optional<OpConfig> random_config(const OpGraph& graph, const Node& node, Random& random) {
  if (random.chance(20)) return std::nullopt;
  OpConfig out;
  int tiles = 1;
  for (const Factor& f : make_rule(graph, node, kWorld).factors) {
    if (f.cut == Cuttable::kWhole || random.chance(60)) continue;
    const int degree = static_cast<int>(random.between(1, 3));
    if (tiles * degree > kWorld) continue;
    Cut cut{.tiles = degree};
    if (random.chance(30) && degree == 2 && f.size > 2) cut.bounds = {0, random.between(1, f.size - 1), f.size};
    if (random.chance(5) && node.kind == NodeKind::kOp) cut.chunks = 2;
    tiles *= degree;
    out.cuts.push_back({f.name, cut});
  }
  if (tiles * 2 <= kWorld && random.chance(30)) out.replicas = 2;
  for (int d = 0; d < tiles * out.replicas; ++d) out.devices.push_back(d);
  for (size_t i = out.devices.size(); i-- > 1 && random.chance(50);) std::swap(out.devices[i], out.devices[random.below(static_cast<int64_t>(i) + 1)]);
  if (random.chance(30)) out.keep = Keep::kUse;
  return out;
}

// `changes` random changes, each compared with the full simulation; every fourth is taken back.
void compare(bool overlap, int64_t bucket_bytes, int changes, uint32_t seed, bool shared = false, double launch_ns = 0) {
  const OpGraph graph = blocks();
  const FedRows rows{6, 6, 6, 6};
  Machine machine = make_machine(kWorld, 2);
  machine.overlap = overlap;
  machine.op_overhead_ns = 500;
  machine.intra = {300, 4e9};
  machine.inter = {900, 1e9, 1};
  machine.speed = {1, 0.5, 1, 1};
  machine.step_overhead_ns = 250;
  machine.segment_overhead_ns = 60;
  if (shared) {
    machine.busy_speed = {1.7, 1};
    machine.jitter = 0.07;
    machine.cold_ns = 3000;
    machine.turn_ns = 2000;
    machine.piece_ns = 40;
    machine.packs = false;  // what is sent one way between hosts
    machine.send_ns_per_byte = 0.3;
    machine.receive_ns_per_byte = 0.2;
  }
  if (launch_ns > 0)
    machine.launch = {{"matmul", {launch_ns, 2 * launch_ns}}, {"relu", {launch_ns, 0}}, {"update", {launch_ns, 300}}, {"collective", {900, 0}}};
  const CostModel cost(machine);
  LayoutCache cache(graph, rows, cost);
  Strategy strategy{.world_size = kWorld, .bucket_bytes = bucket_bytes};
  DeltaSimulator delta(cache, strategy, rows);
  Random random(seed);
  const auto full = [&](const Strategy& s) { return simulate(lower(graph, s, rows), cost).step_ns; };
  ASSERT_EQ(delta.step_ns(), full(strategy));
  for (int i = 0; i < changes; ++i) {
    const Node& node = graph.nodes[random.below(static_cast<int64_t>(graph.nodes.size()))];
    if (node.kind != NodeKind::kOp && node.kind != NodeKind::kParam) continue;
    const auto config = random_config(graph, node, random);
    Strategy next = strategy;
    if (config)
      next.nodes[node.name] = *config;
    else
      next.nodes.erase(node.name);
    const int64_t before = delta.step_ns();
    int64_t expected = -1;
    try {
      expected = full(next);
    } catch (const std::invalid_argument&) {
      EXPECT_THROW(delta.change({{node.id, config}}), std::invalid_argument) << i << " " << node.name;
      EXPECT_EQ(delta.step_ns(), before);
      EXPECT_EQ(delta.strategy(), strategy);
      continue;
    }
    ASSERT_EQ(delta.change({{node.id, config}}), expected) << "change " << i << " of " << node.name;
    if (random.chance(25)) {
      delta.undo();
      ASSERT_EQ(delta.step_ns(), before);
      ASSERT_EQ(delta.strategy(), strategy);
    } else {
      strategy = next;
    }
  }
}

TEST(Delta, EqualsFullSimulation) {
  compare(false, 25 << 20, 400, 1);
}
TEST(Delta, EqualsFullSimulationWithOverlap) {
  compare(true, 25 << 20, 400, 2);
}
TEST(Delta, EqualsFullSimulationOnSharedCores) {
  compare(false, 1000, 200, 5, true);
}
// Hosts bound many steps, few, and those with many movements.
TEST(Delta, EqualsFullSimulationWithLaunches) {
  compare(true, 25 << 20, 300, 6, false, 2000);
  compare(false, 1000, 200, 7, false, 800);
  compare(true, 1, 200, 8, false, 100);
}
TEST(Delta, EqualsFullSimulationWithSmallBuckets) {
  compare(false, 1, 200, 3);
  compare(true, 1000, 200, 4);
}

TEST(Delta, DifferenceLeadsToTheOtherStrategy) {
  const OpGraph graph = blocks();
  const FedRows rows{12, 12};
  const CostModel cost(make_machine(2, 1));
  LayoutCache cache(graph, rows, cost);
  Strategy from{.world_size = 2}, to{.world_size = 2};
  from.nodes["a.up"] = {.cuts = {{"o", {.tiles = 2}}}};
  to.nodes["b.up"] = {.cuts = {{"i", {.tiles = 2}}}};
  DeltaSimulator delta(cache, from, rows);
  EXPECT_EQ(delta.change(delta.difference(to)), simulate(lower(graph, to, rows), cost).step_ns);
  EXPECT_EQ(delta.strategy(), to);
  EXPECT_TRUE(delta.difference(to).empty());
}

}  // namespace
}  // namespace soap::test
