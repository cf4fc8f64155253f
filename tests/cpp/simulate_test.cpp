// The simulator's clocks and memory on programs small enough to be done by hand.
#include "sim/simulate.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>

#include "fmt/format.h"
#include "graphs.h"
#include "gtest/gtest.h"
#include "plan/plan_text.h"
#include "sim/local_work.h"
#include "sim/shared_timeline.h"

namespace soap {
namespace {

constexpr int64_t kMove = 100;

// in:0 [8, 4] -> a -> b -> out:0, weights without bias.
OpGraph chain(bool process_feeds = true) {
  OpGraph g;
  const TensorId x = test::source(g, NodeKind::kFeed, "in:0", {8, 4}, false, process_feeds ? 0 : -1);
  const TensorId wa = test::source(g, NodeKind::kParam, "param:a", {4, 4}, true), wb = test::source(g, NodeKind::kParam, "param:b", {4, 4}, true);
  const TensorId a = test::op(g, "a", "linear", {x, wa}, {"input", "weight"}, {8, 4}), b = test::op(g, "b", "linear", {a, wb}, {"input", "weight"}, {8, 4});
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {b}, .sample_dim = 0});
  return g;
}

// Forward of any operator 10, backward 20, any movement 100, updates nothing.
CostModel simple(const Program& p, bool overlap) {
  Machine m = make_machine(p.world_size, 1);
  m.overlap = overlap;
  m.op_overhead_ns = 0;
  m.memory_bytes_per_s = 1e30;
  for (const char* kind : {"exchange", "all_reduce"}) m.tables[fmt::format("{}/2/1", kind)] = {{1, kMove}, {1 << 30, kMove}};
  CostModel cost(m);
  for (const OpSample& s : cost.missing(p)) cost.set(s.key, {10, 20});
  return cost;
}

struct Times {
  int64_t begin = -1, end = -1;
  bool operator==(const Times&) const = default;
};

// By step_name and device.
std::map<std::pair<std::string, int>, Times> timeline(const Program& p, const Simulation& s) {
  std::map<std::pair<std::string, int>, Times> out;
  for (const Event& e : s.events) out[{step_name(p, e.step), e.device}] = {e.begin_ns, e.end_ns};
  return out;
}

// Data parallel, a bucket for each gradient. Forward a 0-10, b 10-20; backward b 20-40.
//   without overlap: reduce b 40-140, backward a 140-160, reduce a 160-260
//   with overlap:    reduce b 40-140 beside backward a 40-60; reduce a begins when the first is through: 140-240
TEST(Simulate, GradientsAreReducedBesideBackward) {
  const OpGraph g = chain();
  const Program p = lower(g, parse_plan(g, "set bucket_bytes=1\n* n=fed", 2), {4, 4});
  EXPECT_EQ(simulate(p, simple(p, false)).step_ns, 260);
  const Simulation s = simulate(p, simple(p, true), true);
  EXPECT_EQ(s.step_ns, 240);
  const auto t = timeline(p, s);
  EXPECT_EQ(t.at({"grad_fill param:b", 0}), (Times{40, 140}));
  EXPECT_EQ(t.at({"compute_backward a", 0}), (Times{40, 60}));
  EXPECT_EQ(t.at({"grad_fill param:a", 1}), (Times{140, 240}));
}

// Two stages, two chunks, forward. Without overlap both ends wait for each movement: a#0 0-10, move 10-110, then a#1 and b#0 110-120, move
// 120-220, b#1 220-230. With overlap a#1 runs 10-20, and its movement begins when the first is through, though device 1 is then at b#0:
// 110-210, b#1 210-220.
TEST(Simulate, MovementsBeginWhenTheirSourcesAreComputed) {
  const OpGraph g = chain();
  const Program p = lower(g, parse_plan(g, "a n=1x2t @ [0]\nb n=1x2t @ [1]", 2), {8, 0});
  const auto apart = timeline(p, simulate(p, simple(p, false), true)), beside = timeline(p, simulate(p, simple(p, true), true));
  EXPECT_EQ(apart.at({"compute b#0", 1}), (Times{110, 120}));
  EXPECT_EQ(apart.at({"compute a#1", 0}), (Times{110, 120}));
  EXPECT_EQ(apart.at({"compute b#1", 1}), (Times{220, 230}));
  EXPECT_EQ(beside.at({"compute a#1", 0}), (Times{10, 20}));
  EXPECT_EQ(beside.at({"compute b#0", 1}), (Times{110, 120}));
  EXPECT_EQ(beside.at({"compute b#1", 1}), (Times{210, 220}));
}

// Alone a device is twice as fast: a#0 alone 0-5, move 5-105, a#1 beside b#0 105-115, move 115-215, b#1 alone 215-220. The step's own 7 come on top.
TEST(Simulate, DevicesOfAHostSlowEachOtherDown) {
  const OpGraph g = chain(false);
  const Program p = lower(g, parse_plan(g, "a n=1x2t @ [0]\nb n=1x2t @ [1]", 2), {8, 0});
  Machine m = simple(p, false).machine();
  m.busy_speed = {2, 1};
  m.step_overhead_ns = 7;
  CostModel cost(m);
  for (const OpSample& s : cost.missing(p)) cost.set(s.key, {10, 0});
  const auto t = timeline(p, simulate(p, cost, true));
  EXPECT_EQ(t.at({"compute a#0", 0}), (Times{0, 5}));
  EXPECT_EQ(t.at({"compute a#1", 0}), (Times{105, 115}));
  EXPECT_EQ(t.at({"compute b#0", 1}), (Times{105, 115}));
  EXPECT_EQ(t.at({"compute b#1", 1}), (Times{215, 220}));
}

// Both at rate 1 until 10, the second's other 10 at rate 2: hosts of their own, and one machine's cores.
TEST(SharedTimeline, HostsThatShareCoresSlowEachOtherDown) {
  Machine m = make_machine(2, 2);
  m.busy_speed = {2, 1};
  const auto run = [&] {
    SharedTimeline timeline(m);
    timeline.compute(0, 10);
    timeline.compute(1, 20);
    return timeline.run();
  };
  EXPECT_EQ(run(), (std::vector<int64_t>{5, 10}));
  m.cores_of = {0, 0};
  EXPECT_EQ(run(), (std::vector<int64_t>{10, 15}));
}

// Device 1, with the larger weight, is done before device 0, and updates when both are.
TEST(Simulate, NobodyUpdatesBeforeAllHaveRunAnInterleavedProgram) {
  OpGraph g;
  const TensorId x = test::source(g, NodeKind::kFeed, "in:0", {8, 4}, false);
  const TensorId wa = test::source(g, NodeKind::kParam, "param:a", {4, 4}, true), wb = test::source(g, NodeKind::kParam, "param:b", {64, 4}, true);
  const TensorId a = test::op(g, "a", "linear", {x, wa}, {"input", "weight"}, {8, 4}), b = test::op(g, "b", "linear", {a, wb}, {"input", "weight"}, {8, 64});
  const TensorId loss = test::op(g, "loss", "sum", {b}, {"self"}, {});
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {loss}});
  const Program p = lower(g, parse_plan(g, "set order=1f1b\na n=1x2t @ [0]\nb n=1x2t @ [1]\nloss n=1x2t @ [1]", 2), {8, 0});
  ASSERT_TRUE(p.interleaved);
  Machine m = simple(p, false).machine();
  m.busy_speed = {1, 1};
  m.update = {{128, 1}, {2048, 1000}};
  CostModel cost(m);
  for (const OpSample& s : cost.missing(p)) cost.set(s.key, {10, 20});
  const Simulation s = simulate(p, cost, true);
  std::array<int64_t, 2> ends{};
  for (const Event& e : s.events) ends[e.device] = std::max(ends[e.device], e.end_ns);
  EXPECT_LT(ends[1], ends[0]);
  EXPECT_EQ(s.step_ns, ends[0] + 1000);
}

// Both at rate 1 until 10; the 10 of device 0's update that are left alone at rate 4.
TEST(SharedTimeline, UpdatesHaveSpeedsOfTheirOwn) {
  Machine m = make_machine(2, 1);
  m.busy_speed = {2, 1};
  m.update_speed = {4, 1};
  SharedTimeline timeline(m);
  timeline.update(0, 20);
  timeline.compute(1, 10);
  EXPECT_EQ(timeline.run(), (std::vector<int64_t>{12, 10}));
  timeline.update(1, 20);
  EXPECT_EQ(timeline.run()[1], 5);
  m.update_speed.clear();
  timeline.update(1, 20);
  EXPECT_EQ(timeline.run()[1], 10);
}

// A segment's call takes 4. 30 of device 1 beside 10 of device 0: both at rate 1 until 10, the 20 that are left alone at rate 2. Then they meet: 20-70.
TEST(SharedTimeline, TheRateChangesWhenAnotherIsDone) {
  Machine m = make_machine(2, 1);
  m.busy_speed = {2, 1};
  m.segment_overhead_ns = 4;
  SharedTimeline timeline(m);
  timeline.compute(0, 6);
  timeline.compute(1, 20);
  timeline.compute(1, 6);
  timeline.move({0, 1}, 50);
  timeline.compute(1, 4);
  std::vector<SharedTimeline::Span> spans;
  EXPECT_EQ(timeline.run(&spans), (std::vector<int64_t>{70, 74}));
  EXPECT_EQ(spans[2].end_ns, 20);
  EXPECT_EQ(spans[3].begin_ns, 20);
}

// Work for a movement ends a segment: 6 + 4, 3, 6 + 4. Without it the two computations are one: 12 + 4.
TEST(SharedTimeline, WorkForAMovementEndsASegment) {
  Machine m = make_machine(1, 1);
  m.busy_speed = {1};
  m.segment_overhead_ns = 4;
  SharedTimeline timeline(m);
  for (const int64_t local : {3, 0}) {
    timeline.compute(0, 6);
    timeline.local_work(0, local);
    timeline.compute(0, 6);
    EXPECT_EQ(timeline.run(), std::vector<int64_t>{local > 0 ? 23 : 16});
  }
}

// The latest of two equal normal variables comes 1 / sqrt(pi) deviations late, that of four 1.029 (Clark's formulas: 1.03); one that comes six deviations
// before the other doesn't count, and what was computed before the last movement doesn't either.
TEST(SharedTimeline, RanksWaitForTheSlowestWhereComputationsVary) {
  Machine m = make_machine(4, 1);
  m.busy_speed = {1};
  m.jitter = 0.1;
  SharedTimeline timeline(m);
  const auto end = [&](const std::vector<int64_t>& works) {
    std::vector<int> ranks;
    for (const int64_t work : works) {
      timeline.compute(static_cast<int>(ranks.size()), work);
      ranks.push_back(static_cast<int>(ranks.size()));
    }
    timeline.move(ranks, 50);
    timeline.move(ranks, 50);
    return timeline.run()[0];
  };
  EXPECT_NEAR(static_cast<double>(end({1000, 1000})), 1100 + 56.4, 1);
  EXPECT_NEAR(static_cast<double>(end({1000, 1000, 1000, 1000})), 1100 + 103, 1.5);
  EXPECT_NEAR(static_cast<double>(end({1000, 3000})), 3100, 1);
  m.jitter = 0;
  EXPECT_EQ(end({1000, 1000}), 1100);
}

// After half a millisecond of computation a movement takes half of cold_ns longer, after two all of it, and directly after another one nothing.
TEST(SharedTimeline, MovementsTakeLongerAfterComputation) {
  Machine m = make_machine(2, 1);
  m.busy_speed = {1};
  m.cold_ns = 1000;
  SharedTimeline timeline(m);
  for (const auto& [work, more] : {std::pair<int64_t, int64_t>{500'000, 500}, {2'000'000, 1000}}) {
    timeline.compute(0, work);
    timeline.compute(1, work / 2);
    timeline.move({0, 1}, 50);
    timeline.move({0, 1}, 50);
    EXPECT_EQ(timeline.run(), (std::vector<int64_t>{work + more + 100, work + more + 100}));
  }
}

// Three devices on two cores: two meet after a quarter of a millisecond and one, the roots of which are three quarters in the mean. While the third computes
// that is the part of turn_ns that it costs, without it nothing, and directly after another movement nothing either.
TEST(SharedTimeline, DevicesThatTakeTurnsMeetLaterAfterComputation) {
  Machine m = make_machine(3, 1);
  m.busy_speed = {1, 1, 0.5};
  m.turn_ns = 1000;
  SharedTimeline timeline(m);
  for (const int64_t other : {0, 1}) {
    timeline.compute(0, 250'000);
    timeline.compute(1, 1'000'000);
    timeline.compute(2, 9'000'000 * other);
    timeline.move({0, 1}, 50);
    timeline.move({0, 1}, 50);
    const int64_t end = other ? 250'000 * 2 + 750'000 + 750 + 100 : 1'000'100;
    EXPECT_EQ(timeline.run()[0], end);
  }
}

// Two cores for three devices: while two move, the third gets half of one.
TEST(SharedTimeline, WhatMovesInSharedMemoryTakesTheCores) {
  Machine m = make_machine(3, 1);
  m.busy_speed = {1, 1, 0.5};
  SharedTimeline timeline(m);
  const auto ends = [&](int64_t other) {
    timeline.move({0, 1}, 100);
    timeline.compute(2, other);
    return timeline.run();
  };
  EXPECT_EQ(ends(60), (std::vector<int64_t>{100, 100, 60}));
  m.packs = false;
  EXPECT_EQ(ends(60), (std::vector<int64_t>{100, 100, 110}));
  EXPECT_EQ(ends(0), (std::vector<int64_t>{100, 100, 0}));
  m.host_of = {0, 1, 1};
  m.cores_of = {0, 0, 0};
  EXPECT_EQ(ends(60), (std::vector<int64_t>{100, 100, 60})) << "on its way between hosts";
}

// Sending takes 3, having what has come 5; buffers hold what takes 200, the receiver's 60 of it.
class OneWaySends : public testing::Test {
 protected:
  OneWay way{.senders = {0}, .receivers = {2}, .times = {.send_ns = 3, .receive_ns = 5, .buffer_ns = 200, .ahead_ns = 60}};
  Machine machine = [] {
    Machine m = make_machine(4, 2);
    m.busy_speed = {1};
    return m;
  }();
  SharedTimeline timeline{machine};
};

// Device 0 goes on after 3; the first arrives at 110, the second, which the first is in the way of, at 210: the buffers hold it, but not a third, of which no
// more than 200 may be left when device 0 goes on. The fourth arrives while device 2 computes, which is busy with it for 5.
TEST_F(OneWaySends, TheSenderGoesOn) {
  timeline.compute(0, 10);
  timeline.send(way, 100);
  timeline.send(way, 100);
  timeline.compute(0, 5);
  EXPECT_EQ(timeline.run(), (std::vector<int64_t>{21, 0, 210, 0}));
  for (int i = 0; i < 3; ++i) timeline.send(way, 100);
  EXPECT_EQ(timeline.run(), (std::vector<int64_t>{100, 0, 300, 0}));
  timeline.send(way, 100);
  timeline.compute(2, 500);
  EXPECT_EQ(timeline.run(), (std::vector<int64_t>{3, 0, 600, 0}));
  timeline.compute(2, 500);
  timeline.send(way, 100);
  EXPECT_EQ(timeline.run(), (std::vector<int64_t>{3, 0, 505, 0}));
}

// 300 of which 200 lie in buffers, 60 of these the receiver's: it comes at 500, and 240 are left. Where it comes at once they take 300.
TEST_F(OneWaySends, WhatNoBufferHoldsWaitsForTheReceiver) {
  timeline.compute(2, 500);
  timeline.send(way, 300);
  EXPECT_EQ(timeline.run(), (std::vector<int64_t>{540, 0, 740, 0}));
  timeline.send(way, 300);
  EXPECT_EQ(timeline.run(), (std::vector<int64_t>{100, 0, 300, 0}));
}

// Of two on a host the first waits for the second, which comes at 10; so do those who receive: one comes at 400.
TEST_F(OneWaySends, RanksOfAHostMeet) {
  way.senders = {0, 1};
  way.receivers = {2, 3};
  way.times.senders_meet = way.times.receivers_meet = true;
  timeline.compute(1, 10);
  timeline.compute(3, 400);
  timeline.send(way, 100);
  EXPECT_EQ(timeline.run(), (std::vector<int64_t>{13, 13, 405, 405}));
}

// What sending takes is work on a core that others compute on as well.
TEST_F(OneWaySends, TheKernelTakesTurnsWithWhoComputes) {
  machine.cores_of = {0, 0, 0, 0};
  machine.busy_speed = {1, 0.5};
  timeline.compute(1, 10);
  timeline.send(way, 100);
  EXPECT_EQ(timeline.run(), (std::vector<int64_t>{6, 13, 100, 0}));
  timeline.compute(1, 100);
  timeline.compute(2, 100);
  timeline.send(way, 100);
  EXPECT_EQ(timeline.run(), (std::vector<int64_t>{6, 200, 205, 0}));
}

TEST(OneWay, OnlyBetweenHostsInOneDirectionAndWithoutPacking) {
  Machine m = make_machine(4, 2);
  m.packs = false;
  const auto way = [&](const std::vector<std::array<int, 2>>& flows, int64_t bytes) {
    Traffic traffic(m);
    std::set<int> ranks;
    for (const auto& [from, to] : flows) traffic.add(from, to, bytes), ranks.insert({from, to});
    return one_way(m, {ranks.begin(), ranks.end()}, traffic);
  };
  const auto is_one_way = [&](const std::vector<std::array<int, 2>>& flows) { return way(flows, 1000).has_value(); };
  EXPECT_TRUE(is_one_way({{0, 2}}));
  EXPECT_TRUE(is_one_way({{0, 2}, {1, 2}}));
  EXPECT_FALSE(is_one_way({{0, 2}, {2, 0}}));
  EXPECT_FALSE(is_one_way({{0, 2}, {3, 1}})) << "0 and 1 meet, of which one waits for 3";
  EXPECT_FALSE(is_one_way({{0, 1}})) << "they share memory";
  EXPECT_FALSE(is_one_way({{0, 1}, {0, 2}})) << "0 and 1 meet";
  const auto times = [&](const std::vector<std::array<int, 2>>& flows) { return way(flows, 1000)->times; };
  EXPECT_FALSE(times({{0, 2}}).senders_meet || times({{0, 2}}).receivers_meet);
  EXPECT_TRUE(times({{0, 2}, {1, 2}}).senders_meet && !times({{0, 2}, {1, 2}}).receivers_meet);
  EXPECT_TRUE(times({{0, 2}, {0, 3}}).receivers_meet && !times({{0, 2}, {0, 3}}).senders_meet);
  const int64_t before = times({{0, 2}}).send_ns;
  m.send_ns_per_byte = 2;
  m.receive_ns_per_byte = 3;
  EXPECT_EQ(times({{0, 2}}).send_ns, before + 2000);
  EXPECT_EQ(times({{0, 2}}).receive_ns, before + 3000);
  m.packs = true;
  EXPECT_FALSE(is_one_way({{0, 2}})) << "another transport";
}

// One float takes 1 ns to read or write, and a device's part in it two calls of 100.
class LocalWork : public testing::Test {
 protected:
  using Boxes = std::vector<std::pair<Box, int>>;
  static IndexSet span(int64_t begin, int64_t end) { return IndexSet::interval(begin, end); }
  static Sharding layout(const Boxes& boxes, Reduce partial = Reduce::kNone) {
    Sharding out{.partial = partial};
    for (const auto& [box, device] : boxes) out.coords.push_back({.box = box, .devices = {device}});
    return out;
  }
  std::vector<int64_t> fill(const Sharding& tiles, const Sharding& copies) {
    const Flows f = fill_flows(tiles, copies, 0);
    return local_work_ns(machine, f.list, f.movement.pattern, tiles, copies, 4);
  }
  Machine machine = [] {
    Machine m = make_machine(2, 1);
    m.busy_speed = {1};
    m.memory_bytes_per_s = 4e9;
    m.op_overhead_ns = 100;
    return m;
  }();
};

TEST_F(LocalWork, WhatStaysWhereItIsTakesNone) {
  const Sharding whole = layout({{{span(0, 6), span(0, 4)}, 0}});
  EXPECT_EQ(fill(whole, whole), std::vector<int64_t>());
  // Rows lie together: sent as they are, and all of the copy.
  EXPECT_EQ(fill(whole, layout({{{span(0, 3), span(0, 4)}, 1}})), std::vector<int64_t>());
  machine.busy_speed.clear();
  EXPECT_EQ(fill(whole, layout({{{span(0, 6), span(0, 2)}, 1}})), std::vector<int64_t>());
}

// Columns of two elements have no rows: the sender packs 12 elements, a read and a write; the receiver has them as they come.
TEST_F(LocalWork, ColumnsArePacked) {
  const Sharding whole = layout({{{span(0, 6), span(0, 4)}, 0}});
  EXPECT_EQ(fill(whole, layout({{{span(0, 6), span(0, 2)}, 1}})), (std::vector<int64_t>{24 + 200, 0}));
  machine.piece_ns = 7;
  EXPECT_EQ(fill(whole, layout({{{span(0, 6), span(0, 2)}, 1}})), (std::vector<int64_t>{24 + 7, 0}));
}

// Of 16 elements, 64 bytes, they have.
TEST_F(LocalWork, RowsGoAsTheyAre) {
  const Sharding whole = layout({{{span(0, 6), span(0, 32)}, 0}});
  EXPECT_EQ(fill(whole, layout({{{span(0, 6), span(0, 16)}, 1}})), std::vector<int64_t>());
  EXPECT_EQ(fill(whole, layout({{{span(0, 6), span(0, 15)}, 1}})), (std::vector<int64_t>{180 + 200, 0}));
}

// Halves become a whole on device 0: its own 48 elements are read and written, the others come into their place.
TEST_F(LocalWork, CopiesArePutTogether) {
  const Sharding halves = layout({{{span(0, 3), span(0, 16)}, 0}, {{span(3, 6), span(0, 16)}, 1}});
  EXPECT_EQ(fill(halves, layout({{{span(0, 6), span(0, 16)}, 0}})), (std::vector<int64_t>{96 + 200, 0}));
}

// Of two whole addends one comes: 24 of the own are read. Where both are the device's own, one is added to the other: two reads and a write of 24.
TEST_F(LocalWork, AddendsAreAdded) {
  const Box all{span(0, 6), span(0, 4)};
  EXPECT_EQ(fill(layout({{all, 0}, {all, 1}}, Reduce::kSum), layout({{all, 0}})), (std::vector<int64_t>{24 + 200, 0}));
  EXPECT_EQ(fill(layout({{all, 0}, {all, 0}}, Reduce::kSum), layout({{all, 0}})), (std::vector<int64_t>{72 + 200, 0}));
}

// The gradient of 12 of 24 elements: 24 are set to zero, 12 added to.
TEST_F(LocalWork, TheGradientOfAPartIsAddedToZeros) {
  const Sharding whole = layout({{{span(0, 6), span(0, 4)}, 0}}), part = layout({{{span(0, 3), span(0, 4)}, 0}});
  const Flows f = grad_flows(whole, part, 0);
  EXPECT_EQ(local_work_ns(machine, f.list, f.movement.pattern, part, whole, 4), (std::vector<int64_t>{24 + 36 + 200, 0}));
}

// Parameters are there from the start: with overlap b's is gathered while a runs, not after it. fill a 0-100, a 100-110, fill b 100-200, b 200-210.
TEST(Simulate, ParametersAreGatheredAhead) {
  const OpGraph g = chain();
  const Program p = lower(g, parse_plan(g, "a n=fed store=shard\nb n=fed store=shard", 2), {4, 4});
  const auto t = timeline(p, simulate(p, simple(p, true), true));
  EXPECT_EQ(t.at({"compute a", 0}), (Times{100, 110}));
  EXPECT_EQ(t.at({"fill param:b", 0}), (Times{100, 200}));
  EXPECT_EQ(t.at({"compute b", 0}), (Times{200, 210}));
}

// Of each device, in elements: 3 * (16 + 16) for parameters and two moments, 16 of the input. Backward of b holds besides: the output and its
// gradient, a's result and its gradient, the gradient of b's weight: 5 * 16. So does the end: the output, both gradients before and after
// their sum. Forward's end holds less: the last step's gradients (32), a's result and the output.
TEST(Simulate, MemoryOfDataParallelByHand) {
  const OpGraph g = chain();
  const Program p = lower(g, parse_plan(g, "* n=fed", 2), {4, 4});
  const Simulation s = simulate(p, simple(p, false));
  EXPECT_EQ(s.memory_bytes[0], 8 * (3 * 32 + 16 + 5 * 16));
}

// Gathered parameters live as long as the plan says: `use` gives them back between forward and backward.
TEST(Simulate, GatheredParametersLiveAsLongAsTheyAreKept) {
  OpGraph g;
  TensorId x = test::source(g, NodeKind::kFeed, "in:0", {4, 64}, false, 0);
  for (int i = 0; i < 6; ++i) x = test::linear(g, fmt::format("l{}", i), x, 64);
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {x}, .sample_dim = 0});
  const auto memory = [&](const char* plan) {
    const Program p = lower(g, parse_plan(g, plan, 2), {2, 2});
    return simulate(p, simple(p, false)).memory_bytes[0];
  };
  const int64_t layer = 8 * 64 * 64;
  const int64_t whole = memory("* n=fed"), kept = memory("set bucket_bytes=1\n* n=fed store=shard"),
                used = memory("set bucket_bytes=1\n* n=fed store=shard keep=use");
  EXPECT_GT(whole, 4 * 6 * layer);
  EXPECT_GT(kept, 4 * 3 * layer + 6 * layer);
  EXPECT_LT(used, 4 * 3 * layer + 4 * layer);
}

// Ranks that were not measured together: an exchange as the nearest number of ranks, an all-reduce by what a ring sends, and never across
// the border of hosts.
TEST(Machine, SubgroupsArePricedByTheNearestTable) {
  Machine m = make_machine(8, 2);
  m.tables["exchange/8/2"] = {{1000, 8000}, {1000000, 800000}};
  m.tables["exchange/4/1"] = {{1000, 1000}, {1000000, 100000}};
  m.tables["all_reduce/4/1"] = {{1000, 1000}, {1000000, 1000000}};
  EXPECT_EQ(movement_ns(m, "exchange", {0, 1}, 1000000), 100000);
  EXPECT_EQ(movement_ns(m, "exchange", {0, 4}, 1000000), 800000);
  EXPECT_NEAR(static_cast<double>(movement_ns(m, "all_reduce", {0, 1}, 900000)), 600000, 2);         // (1/2) / (3/4) of the tensor
  EXPECT_EQ(movement_ns(m, "all_reduce", {0, 4}, 0), static_cast<int64_t>(2 * m.inter.latency_ns));  // nobody measured: the link
}

}  // namespace
}  // namespace soap
