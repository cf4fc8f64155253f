// Tilings, following, lowering and projection of random strategies for a small network.
#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"
#include "base/text.h"
#include "graphs.h"
#include "gtest/gtest.h"
#include "plan/plan_text.h"
#include "program/project.h"
#include "random.h"

namespace soap {
namespace {

using test::Random;

OpConfig random_config(const Rule& rule, int world, Random& random) {
  OpConfig c;
  for (const Factor& f : rule.factors) {
    if (f.cut == Cuttable::kWhole || random.chance(50)) continue;
    Cut cut{.tiles = static_cast<int>(random.between(1, 3)), .chunks = static_cast<int>(random.between(1, 2))};
    if (random.chance(40)) {
      cut.bounds = {0};
      for (int t = 1; t < cut.tiles; ++t) cut.bounds.push_back(random.between(cut.bounds.back(), f.size));
      cut.bounds.push_back(f.size);
    }
    c.cuts.push_back({f.name, cut});
  }
  for (int t = 0; t < c.num_tiles(); ++t) c.devices.push_back(static_cast<int>(random.below(world)));
  return c;
}

struct Drawn {
  OpGraph graph;
  Strategy strategy;
  Program program;
};

Drawn draw(uint32_t seed) {
  Random random(seed);
  const int world = static_cast<int>(random.between(1, 5));
  Drawn out{.graph = test::mlp(6), .strategy = {.world_size = world}};
  for (const Node& n : out.graph.nodes) {
    if (n.kind == NodeKind::kOp && random.chance(70)) out.strategy.nodes[n.name] = random_config(make_rule(out.graph, n, world), world, random);
  }
  FedRows rows(world, 0);
  for (int i = 0; i < 6; ++i) ++rows[random.below(world)];
  out.program = lower(out.graph, out.strategy, rows);
  return out;
}

TEST(Tiling, PartsPartitionTheFactor) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    const Drawn d = draw(seed);
    for (const Node& n : d.program.graph.nodes) {
      for (const FactorParts& c : d.program.tilings[n.id].cuts) {
        IndexSet all;
        int64_t total = 0;
        for (const auto& tile : c.parts) {
          for (const IndexSet& s : tile) {
            total += s.size();
            all = unite(all, s);
          }
        }
        const int64_t size = d.program.rules[n.id].factors[c.factor].size;
        EXPECT_EQ(total, size) << n.name << " seed " << seed;
        EXPECT_TRUE(all.is_all(size)) << n.name << " seed " << seed;
      }
    }
  }
}

TEST(Tiling, FollowerStaysWithItsProducer) {
  const OpGraph g = test::mlp(6);
  Strategy s{.world_size = 4};
  s.nodes["up"] = {.cuts = {{"n", {.tiles = 2, .bounds = {0, 1, 6}}}, {"o", {.tiles = 2}}}, .devices = {3, 1, 0, 2}};
  const Program p = lower(g, s, {6, 0, 0, 0});
  const TensorId t = g.nodes[*g.find("up")].outputs[0];
  const NodeId act = *p.graph.find("act");
  EXPECT_EQ(p.tilings[act].devices, (std::vector<int>{3, 1, 0, 2}));
  EXPECT_EQ(p.tiles[p.graph.nodes[act].outputs[0]].coords, p.tiles[t].coords);
  for (int id : p.groups_of[t]) EXPECT_EQ(p.groups[id].copies.coords.size(), 4u);
}

// Every value is complete before it is read, and gradients before they are used.
TEST(Lower, OrderIsTopological) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    const Program p = draw(seed).program;
    std::set<std::pair<int, int>> computed, filled, back, grad_filled;
    for (const Step& step : p.steps) {
      for (const StepItem& item : step.items) {
        const std::pair<int, int> key{item.id, item.chunk};
        switch (step.kind) {
          case StepKind::kCompute: {
            const Node& n = p.graph.nodes[item.id];
            const int chunks = p.tilings[n.id].chunks();
            for (size_t g = 0; g < p.groups.size(); ++g) {
              for (const Use& u : p.groups[g].uses) {
                if (u.node != n.id) continue;
                for (size_t i = 0; i < u.coord_of.size(); ++i) {
                  if (u.coord_of[i] < 0 || static_cast<int>(i) % chunks != item.chunk) continue;
                  EXPECT_TRUE(filled.count({static_cast<int>(g), p.groups[g].copies.coords[u.coord_of[i]].chunk})) << n.name << " seed " << seed;
                }
              }
            }
            EXPECT_TRUE(computed.insert(key).second);
            break;
          }
          case StepKind::kFill:
            for (const Piece& x : item_pieces(p, step.kind, item)) {
              const Node& producer = p.graph.nodes[p.graph.tensors[p.groups[item.id].tensor].producer];
              if (producer.kind == NodeKind::kOp) {
                EXPECT_TRUE(computed.count({producer.id, p.tiles[p.groups[item.id].tensor].coords[x.src].chunk})) << producer.name << " seed " << seed;
              }
            }
            EXPECT_TRUE(filled.insert(key).second);
            break;
          case StepKind::kComputeBackward:
            EXPECT_TRUE(computed.count(key));
            for (TensorId t : p.graph.nodes[item.id].outputs) {
              for (int g : p.groups_of[t]) {
                if (p.groups[g].grad) EXPECT_TRUE(grad_filled.count({g, item.chunk})) << "seed " << seed;
              }
            }
            EXPECT_TRUE(back.insert(key).second);
            break;
          case StepKind::kGradFill: EXPECT_TRUE(grad_filled.insert(key).second); break;
          case StepKind::kRefill: break;
        }
      }
    }
    for (const Node& n : p.graph.nodes) {
      if (n.kind != NodeKind::kOp) continue;
      for (int c = 0; c < p.tilings[n.id].chunks(); ++c) {
        EXPECT_TRUE(computed.count({n.id, c}));
        EXPECT_EQ(back.count({n.id, c}), p.differentiable[n.id] ? 1u : 0u);
      }
    }
  }
}

// What a rank sends is what the other end expects, in the same order, in the same step; participants agree on the exchange.
TEST(Project, RanksAgree) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    const Program p = draw(seed).program;
    std::map<std::tuple<int, int, int>, std::vector<int64_t>> sent, expected;  // (step, from, to) -> elements of each move
    std::map<int, std::set<std::vector<int>>> ranks;
    std::map<int, std::set<int>> present;
    for (int r = 0; r < p.world_size; ++r) {
      int last = -1;
      for (const Instruction& i : project(p, r).instructions) {
        if (i.kind == InstructionKind::kSegment || i.kind == InstructionKind::kSegmentBackward) continue;
        const bool local = std::all_of(i.transfers.begin(), i.transfers.end(), [](const Transfer& t) { return t.pattern == Pattern::kLocal; });
        if (!local) {  // what meets other ranks keeps the program's order
          EXPECT_GT(i.step, last);
          last = i.step;
        }
        if (!i.ranks.empty()) {
          ranks[i.step].insert(i.ranks);
          present[i.step].insert(r);
        }
        for (const Transfer& t : i.transfers) {
          if (t.pattern == Pattern::kAllReduce) continue;
          for (const Move& m : t.moves) {
            if (m.peer < 0) continue;
            (m.send ? sent[{i.step, r, m.peer}] : expected[{i.step, m.peer, r}]).push_back(m.elements);
          }
        }
      }
    }
    EXPECT_EQ(sent, expected) << "seed " << seed;
    for (const auto& [step, lists] : ranks) {
      ASSERT_EQ(lists.size(), 1u) << "seed " << seed << " step " << step;
      EXPECT_EQ(*lists.begin(), std::vector<int>(present[step].begin(), present[step].end()));
    }
  }
}

// All replicas of a destination combine the same sources in the same order.
TEST(Lower, ReplicasSumInTheSameOrder) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    const Program p = draw(seed).program;
    for (const Step& step : p.steps) {
      if (step.kind == StepKind::kCompute || step.kind == StepKind::kComputeBackward) continue;
      for (const StepItem& item : step.items) {
        std::map<int, std::map<int, std::vector<std::pair<int, Box>>>> arriving;  // dst -> device -> sources
        for (const Piece& x : item_pieces(p, step.kind, item)) arriving[x.dst][x.to].emplace_back(x.src, x.box);
        for (const auto& [dst, devices] : arriving) {
          for (const auto& [device, sources] : devices) EXPECT_EQ(sources, devices.begin()->second) << "seed " << seed << " to " << dst;
        }
      }
    }
  }
}

TEST(Lower, PlansPrintAndParse) {
  for (uint32_t seed = 0; seed < 60; ++seed) {
    const Drawn d = draw(seed);
    const std::string text = print_plan(d.graph, d.strategy);
    EXPECT_EQ(parse_plan(d.graph, text, d.strategy.world_size), d.strategy) << text;
    EXPECT_EQ(to_string(lower(d.graph, parse_plan(d.graph, text, d.strategy.world_size), d.program.rows)), to_string(d.program));
  }
}

TEST(Lower, Refuses) {
  const OpGraph g = test::mlp(6);
  const auto message = [&](const std::string& text) {
    try {
      lower(g, parse_plan(g, text, 2), {3, 3});
    } catch (const std::invalid_argument& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(message("up q=2"), "plan line 1: [plan] up (linear): no factor \"q\"; it has n (S, size 6), i (R, size 4), o (P, size 8)\n  up q=2");
  EXPECT_EQ(message("up o=2 @ [0]"), "plan line 1: [plan] up: @ [0] names 1 devices, 2 tiles x 1 replicas need 2\n  up o=2 @ [0]");
  EXPECT_EQ(message("param:up.bias d0=2 @ [1,1]"), "[plan] param:up.bias: device 1 would store two parts of it; a device stores one");
  EXPECT_EQ(message("up o=2"), "accepted");
}

TEST(PlanText, Patterns) {
  EXPECT_TRUE(matches("layer*.fc?", "layer12.mlp.fc1"));
  EXPECT_FALSE(matches("layer*.fc?", "layer1.fc"));
  EXPECT_TRUE(matches("*", ""));
  EXPECT_FALSE(matches("?", ""));
}

}  // namespace
}  // namespace soap
