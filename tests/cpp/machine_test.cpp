// Models of collectives against numbers done by hand, and the order that they must keep.
#include "machine/machine.h"

#include <functional>
#include <numeric>

#include "cost/cost.h"
#include "fmt/format.h"
#include "graphs.h"
#include "gtest/gtest.h"
#include "machine/collectives.h"
#include "machine/presets.h"
#include "plan/plan_text.h"
#include "sim/simulate.h"

namespace soap {
namespace {

std::vector<int> first(int n) {
  std::vector<int> out(n);
  std::iota(out.begin(), out.end(), 0);
  return out;
}

// 1 us and 100 GB/s within a host, 10 us and 10 GB/s between hosts.
Machine pod(int hosts, int per_host, int nics) {
  Machine m = make_machine(hosts * per_host, hosts);
  m.intra = {1e3, 100e9, 0};
  m.inter = {10e3, 10e9, nics};
  return m;
}

std::string message(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing thrown";
}

TEST(Collectives, RingAndTreeByHand) {
  EXPECT_DOUBLE_EQ(ring_ns(1e3, 1e9, 4, 4e6), 6e3 + 6e6);  // 6 steps; 3/2 of 4 MB at 1 GB/s
  EXPECT_DOUBLE_EQ(tree_ns(1e3, 1e9, 4, 4e6), 4e3 + 8e6);  // twice 2 levels; twice 4 MB
  EXPECT_DOUBLE_EQ(tree_ns(1e3, 1e9, 5, 0), 6e3);          // 3 levels
  EXPECT_DOUBLE_EQ(ring_ns(1e3, 1e9, 2, 4e6), tree_ns(1e3, 1e9, 2, 2e6));
}

// A tree for small tensors, a ring for large ones.
TEST(Collectives, TheFasterOneIsTaken) {
  const Machine m = pod(1, 8, 0);
  const std::vector<int> all = first(8);
  EXPECT_DOUBLE_EQ(all_reduce_ns(m, all, 8), tree_ns(1e3, 100e9, 8, 8));
  EXPECT_DOUBLE_EQ(all_reduce_ns(m, all, 1e9), ring_ns(1e3, 100e9, 8, 1e9));
  EXPECT_EQ(movement_ns(m, "all_reduce", all, 8), static_cast<int64_t>(tree_ns(1e3, 100e9, 8, 8)));
  EXPECT_EQ(movement_ns(m, "all_reduce", {3}, 1 << 20), 0);
}

TEST(Collectives, RiseWithBytesRanksAndLatency) {
  for (const int nics : {0, 1, 2}) {
    for (const char* kind : {"exchange", "all_reduce"}) {
      int64_t last = 0;
      for (int64_t bytes = 1; bytes < (1LL << 32); bytes *= 4) {
        const int64_t ns = movement_ns(pod(4, 4, nics), kind, first(16), bytes);
        EXPECT_GE(ns, last) << kind << " " << bytes;
        last = ns;
      }
      EXPECT_GT(last, movement_ns(pod(4, 4, nics), kind, first(16), 1)) << kind;
      Machine slow = pod(4, 4, nics);
      slow.intra.latency_ns = slow.inter.latency_ns = 1e6;
      EXPECT_GT(movement_ns(slow, kind, first(16), 1 << 20), movement_ns(pod(4, 4, nics), kind, first(16), 1 << 20)) << kind;
    }
    for (const int64_t bytes : {8LL, 1LL << 20, 1LL << 30}) {
      int64_t last = 0;
      for (const int n : {2, 4, 8, 12, 16}) {  // within a host, then by whole hosts
        const int64_t ns = movement_ns(pod(4, 4, nics), "all_reduce", first(n), bytes);
        EXPECT_GE(ns, last) << n << " ranks, " << bytes << " bytes";
        last = ns;
      }
    }
  }
}

// 4 hosts of 8, a NIC for each device. 800 MB; flat: 32 ranks through one NIC each way, 2 * 31/32 * 800 MB at 10 GB/s = 155 ms.
// Hierarchical: 2 * 7/8 * 800 MB at 100 GB/s = 14 ms, then 2 * 3/4 * 100 MB at 10 GB/s = 15 ms.
TEST(Collectives, HierarchicalBeatsFlatWhereHostsHaveSeveralNics) {
  const Machine m = pod(4, 8, 0);
  const std::vector<int> all = first(32);
  EXPECT_NEAR(flat_all_reduce_ns(m, all, 800e6), 2 * 31 * 10e3 + 155e6, 1);
  EXPECT_NEAR(hierarchical_all_reduce_ns(m, all, 800e6), 2 * 7 * 1e3 + 14e6 + 4 * 10e3 * 1.5 + 15e6, 1);  // ring of 4 hosts: 6 steps
  EXPECT_DOUBLE_EQ(all_reduce_ns(m, all, 800e6), hierarchical_all_reduce_ns(m, all, 800e6));
  // Few bytes: 2 * 5 levels through the NIC against 2 * 7 steps within and 2 * 2 levels between.
  EXPECT_NEAR(flat_all_reduce_ns(m, all, 1), 100e3, 1);
  EXPECT_NEAR(hierarchical_all_reduce_ns(m, all, 1), 54e3, 1);
  // Within one host they are one.
  EXPECT_DOUBLE_EQ(hierarchical_all_reduce_ns(m, first(8), 1e9), flat_all_reduce_ns(m, first(8), 1e9));
}

// 4 hosts of 8, a NIC of 10 GB/s for each device: a ring takes 3 steps over NICs and 28 within. What a host lacks, 600 of 800 MB, enters it once by 8
// NICs in 7.5 ms, while within 775 MB take 7.75 ms; with one NIC 60 ms. An exchange would send 24/31 of 775 MB from each device: 60 ms with all NICs.
TEST(Collectives, RingsEnterAHostOnce) {
  const std::vector<int> all = first(32);
  EXPECT_NEAR(gather_ns(pod(4, 8, 0), all, 800e6), 3 * 10e3 + 28 * 1e3 + 7.75e6, 1);
  EXPECT_NEAR(gather_ns(pod(4, 8, 1), all, 800e6), 3 * 10e3 + 28 * 1e3 + 60e6, 1);
  EXPECT_NEAR(gather_ns(pod(4, 8, 0), first(8), 800e6), 7 * 1e3 + 7e6, 1);
  EXPECT_EQ(gather_ns(pod(4, 8, 0), {3}, 800e6), 0);
  // One rank of each host: by its own NIC; four such groups share two.
  const std::vector<int> across{0, 8, 16, 24};
  EXPECT_NEAR(gather_ns(pod(4, 8, 0), across, 800e6, 4), 3 * 10e3 + 60e6, 1);
  EXPECT_NEAR(gather_ns(pod(4, 8, 2), across, 800e6, 4), 3 * 10e3 + 120e6, 1);
}

// The bytes of large tensors: what two devices of a host send through one NIC takes twice as long as through two, and so do two groups at once.
TEST(Collectives, ASharedNicHalves) {
  const std::vector<int> all = first(4);
  const auto hierarchical = [&](int nics) { return hierarchical_all_reduce_ns(pod(2, 2, nics), all, 1e9) - 2 * 1e3 - 1e9 / 100e9 * 1e9; };
  EXPECT_NEAR(hierarchical(2), 2 * 10e3 + 0.5e9 / 10e9 * 1e9, 1);
  EXPECT_NEAR(hierarchical(1), 2 * 10e3 + 1e9 / 10e9 * 1e9, 1);
  const Machine one = pod(2, 2, 1);
  EXPECT_EQ(groups_at_once(one, {{0, 2}, {1, 3}}), 2);
  EXPECT_EQ(groups_at_once(one, {{0, 1}, {2, 3}}), 1);  // they stay at home
  EXPECT_EQ(movement_ns(one, "all_reduce", {0, 2}, 1'000'000'000, 1), 20'000 + 100'000'000);
  EXPECT_EQ(movement_ns(one, "all_reduce", {0, 2}, 1'000'000'000, 2), 20'000 + 200'000'000);
  EXPECT_EQ(movement_ns(pod(2, 2, 0), "all_reduce", {0, 2}, 1'000'000'000, 2), 20'000 + 100'000'000);
  // An exchange over all four: 1 GB from each, two thirds of it to the other host.
  EXPECT_NEAR(static_cast<double>(movement_ns(pod(2, 2, 0), "exchange", all, 1'500'000'000)), 10e3 + 1e9 / 10e9 * 1e9, 1);
  EXPECT_NEAR(static_cast<double>(movement_ns(one, "exchange", all, 1'500'000'000)), 10e3 + 2e9 / 10e9 * 1e9, 1);
}

TEST(Collectives, AnExchangeIsAsLongAsItsBusiestLink) {
  const Machine m = pod(2, 2, 1);
  Traffic t(m);
  EXPECT_TRUE(t.empty());
  t.add(0, 0, 1 << 30);  // stays
  EXPECT_EQ(t.exchange_ns(), 0);
  t.add(0, 1, 1'000'000'000);
  EXPECT_EQ(t.exchange_ns(), 1'000 + 10'000'000);
  t.add(2, 1, 10'000'000);  // 1 ms through the NIC
  EXPECT_EQ(t.exchange_ns(), 1'000 + 10'000'000);
  t.add(3, 0, 490'000'000);  // the other device of that host: 50 ms together
  EXPECT_EQ(t.exchange_ns(), 10'000 + 50'000'000);
  EXPECT_EQ(t.load(1).copied, 500'000'000);  // half of it each: what comes from another host doesn't count
  EXPECT_EQ(t.load(1).between_host, 500'000'000);
  const Machine host = pod(1, 4, 0);
  Traffic gather(host);  // what one receives from all counts, not what each sends
  for (int from : {1, 2, 3}) gather.add(from, 0, 100'000'000);
  EXPECT_EQ(gather.exchange_ns(), 1'000 + 3'000'000);
}

TEST(Machine, AMeasuredTableGoesBeforeTheModel) {
  Machine m = pod(1, 4, 0);
  m.tables["exchange/4/1"] = {{1000, 7000}, {1000000, 700000}};
  m.tables["all_reduce/4/1"] = {{1000, 9000}, {1000000, 900000}};
  Traffic t(m);
  t.add(0, 1, 1000000);
  EXPECT_LT(exchange_ns(m, first(4), t), 600000);  // one way only: each copies half of what it does below
  t.add(1, 0, 1000000);
  EXPECT_EQ(exchange_ns(m, first(4), t), 700000);
  EXPECT_EQ(movement_ns(m, "all_reduce", first(4), 1000000, 8), 900000);
}

// Tables that take 1 ns for each byte of a rank: over four ranks on two hosts 4/3 bytes leave a host for each, over two of them, two such pairs at once, 2.
TEST(Machine, ATableOverHostsSaysWhatTheirNetworkTakes) {
  Machine m = pod(2, 2, 1);
  m.tables["exchange/4/2"] = m.tables["exchange/2/2"] = m.tables["all_reduce/2/2"] = {{1000, 1000}, {1000000, 1000000}};
  m.tables["exchange/2/1"] = {{1000, 10000}, {1000000, 10000000}};
  Traffic t(m);
  t.add(0, 2, 40000);
  EXPECT_NEAR(static_cast<double>(exchange_ns(m, {0, 2}, t)), 20000, 2);
  EXPECT_NEAR(static_cast<double>(exchange_ns(m, first(4), t)), 30000, 2);
  t.add(1, 3, 40000);
  t.add(3, 0, 60000);  // the other way, less than both together
  EXPECT_NEAR(static_cast<double>(exchange_ns(m, first(4), t)), 60000, 2);
  t.add(0, 1, 2000);  // meanwhile
  EXPECT_NEAR(static_cast<double>(exchange_ns(m, first(4), t)), 60000, 2);
  t.add(0, 1, 18000);
  EXPECT_NEAR(static_cast<double>(exchange_ns(m, first(4), t)), 100000, 2);
  EXPECT_NEAR(static_cast<double>(movement_ns(m, "all_reduce", {0, 2}, 40000, 1)), 20000, 2);
  EXPECT_NEAR(static_cast<double>(movement_ns(m, "all_reduce", {0, 2}, 40000, 2)), 40000, 2);
}

// On a device of half the speed the step takes as long as twice the work: b's device does nothing else.
TEST(Machine, SlowDevicesTakeLonger) {
  OpGraph g;
  const TensorId x = test::linear(g, "a", test::source(g, NodeKind::kFeed, "in:0", {8, 4}, false, 0), 4);
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {x}, .sample_dim = 0});
  const Program p = lower(g, parse_plan(g, "* n=fed", 2), {4, 4});
  Machine m = make_machine(2, 1);
  const Simulation even = simulate(p, CostModel(m));
  m.speed = {1, 0.5};
  const Simulation uneven = simulate(p, CostModel(m));
  EXPECT_EQ(uneven.compute_ns[0], even.compute_ns[0]);
  EXPECT_EQ(uneven.compute_ns[1], 2 * even.compute_ns[1]);
}

TEST(Machine, RatesByTypeAndFamily) {
  const Machine m = preset("a100", 1, 1);
  EXPECT_EQ(m.flops_of("matmul", "bfloat16"), 312e12);
  EXPECT_EQ(m.flops_of("matmul", "float32"), 19.5e12);
  EXPECT_EQ(m.flops_of("convolution", "float32"), 156e12);  // cuDNN's default in torch
  EXPECT_EQ(m.flops_of("matmul", "int8"), m.flops_per_s);
  EXPECT_EQ(m.efficiency_of("matmul"), 0.7);
  EXPECT_EQ(make_machine(1, 1).efficiency_of("matmul"), 1.0);
}

TEST(Machine, PresetsAreMachinesAndGrow) {
  for (const std::string& name : preset_names()) {
    const Machine m = preset(name, 2, 4);
    check(m);
    EXPECT_EQ(m.num_devices(), 8) << name;
    EXPECT_EQ(m.num_hosts(first(8)), 2) << name;
    EXPECT_GT(movement_ns(m, "all_reduce", {0, 4}, 1 << 24), movement_ns(m, "all_reduce", {0, 1}, 1 << 24)) << name;
  }
  EXPECT_EQ(message([] { preset("tpu", 1, 1); }),
            "[machine] there is no preset \"tpu\"; there are a100, cpu-10g, cpu-1g, cpu-25g, h100, h200, k80, p100, v100");
  EXPECT_EQ(message([] { preset("h100", 0, 8); }), "[machine] 0 hosts with 8 devices each: both must be at least 1");
}

TEST(Machine, WhatIsNoMachineIsNamed) {
  const auto with = [](const std::function<void(Machine&)>& change) {
    Machine m = make_machine(2, 1);
    change(m);
    return message([&] { CostModel cost(m); });
  };
  EXPECT_EQ(with([](Machine&) {}), "nothing thrown");
  EXPECT_EQ(with([](Machine& m) { m.memory_bytes_per_s = 0; }), "[machine] memory_bytes_per_s is 0, it must be a positive number");
  EXPECT_EQ(with([](Machine& m) { m.inter.per_host = -1; }), "[machine] inter.per_host is -1, it must be 0 (one for each device) or their number");
  EXPECT_EQ(with([](Machine& m) { m.speed = {1}; }), "[machine] speed has 1 entries for 2 devices; it is empty or has one for each");
  EXPECT_EQ(with([](Machine& m) { m.host_of = {0, 5}; }), "[machine] host_of[1] is 5, hosts are counted from 0 and there are no more than devices (2)");
  EXPECT_EQ(with([](Machine& m) { m.tables["gather/2/1"] = {}; }),
            "[machine] tables has \"gather/2/1\", a key is exchange or all_reduce/<ranks>/<hosts>, such as all_reduce/4/2");
  EXPECT_EQ(with([](Machine& m) { m.tables["exchange/2/1"] = {{8, 1}, {8, 2}}; }), "[machine] tables[exchange/2/1] must rise in bytes: 8 follows 8");
  EXPECT_NE(with([](Machine& m) { m.efficiency["conv"] = 1; }).find("the families are convolution, matmul, attention"), std::string::npos);
}

}  // namespace
}  // namespace soap
