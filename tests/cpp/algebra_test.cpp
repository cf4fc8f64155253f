// Rules of the algebra that only a planted bug would show: each of these fails when its sentence isn't kept.
#include <algorithm>
#include <set>

#include "base/error.h"
#include "graphs.h"
#include "gtest/gtest.h"
#include "plan/plan_text.h"
#include "program/project.h"
#include "random.h"
#include "reshard/flows.h"

namespace soap {
namespace {

Sharding rows(std::vector<std::pair<IndexSet, std::vector<int>>> parts, Reduce partial = Reduce::kNone) {
  Sharding s{.partial = partial};
  for (auto& [set, devices] : parts) s.coords.push_back({.box = {set}, .devices = devices});
  return s;
}

IndexSet span(int64_t begin, int64_t end) {
  return IndexSet::interval(begin, end);
}

// A bias is read by the tile that holds index 0 of the sum, and by no other, wherever that tile is.
TEST(Anchor, IsReadByOnePart) {
  const OpGraph g = test::mlp(6);
  const Program p = lower(g, parse_plan(g, "down i=[0,0,3,8] @ [2,0,1]", 3), {6, 0, 0});
  const TensorId bias = p.graph.nodes[*p.graph.find("down")].inputs[2];
  ASSERT_EQ(p.groups_of[bias].size(), 1u);
  const CopyGroup& copies = p.groups[p.groups_of[bias][0]];
  EXPECT_EQ(copies.uses[0].coord_of, (std::vector<int>{-1, 0, -1}));  // the first part is empty
  EXPECT_EQ(copies.copies.coords[0].devices, std::vector<int>{0});
}

// A random layout of a 6 x 5 tensor: a grid of parts with replicas, or whole addends, on shuffled devices of eight.
Sharding random_layout(test::Random& random) {
  std::vector<int> devices{0, 1, 2, 3, 4, 5, 6, 7};
  for (size_t i = devices.size(); i-- > 1;) std::swap(devices[i], devices[random.below(static_cast<int64_t>(i) + 1)]);
  const auto cut = [&](int64_t size) {
    std::vector<int64_t> points{0, size};
    if (random.chance(60)) points.insert(points.begin() + 1, random.between(0, size));
    return points;
  };
  Sharding out;
  size_t next = 0;
  if (random.chance(30)) {
    out.partial = Reduce::kSum;
    for (int64_t k = random.between(1, 4); k > 0; --k) out.coords.push_back({.box = whole_box({6, 5}), .devices = {devices[next++]}});
    return out;
  }
  const int64_t replicas = random.between(1, 2);
  const auto rows_at = cut(6), columns_at = cut(5);
  for (size_t i = 0; i + 1 < rows_at.size(); ++i) {
    for (size_t j = 0; j + 1 < columns_at.size(); ++j) {
      Coord c{.box = {span(rows_at[i], rows_at[i + 1]), span(columns_at[j], columns_at[j + 1])}};
      for (int64_t r = 0; r < replicas; ++r) c.devices.push_back(devices[next++]);
      out.coords.push_back(c);
    }
  }
  return out;
}

TEST(Flows, AreThePiecesWithoutTheirBoxes) {
  test::Random random(1);
  int all_reduces = 0;
  for (int i = 0; i < 2000; ++i) {
    const Sharding tiles = random_layout(random);
    Sharding copies = random_layout(random);
    if (tiles.partial != Reduce::kNone && random.chance(50)) {  // the whole sum for those who hold an addend
      copies = {.coords = {{.box = whole_box({6, 5})}}};
      for (const Coord& c : tiles.coords) copies.coords[0].devices.push_back(c.devices[0]);
    }
    for (const bool gradient : {false, true}) {
      const bool collectives = random.chance(80);
      const Flows flows = gradient ? grad_flows(tiles, copies, 0, collectives) : fill_flows(tiles, copies, 0, collectives);
      const auto pieces = gradient ? grad_pieces(tiles, copies, 0) : fill_pieces(tiles, copies, 0);
      ASSERT_EQ(flows.list.size(), pieces.size());
      for (size_t k = 0; k < pieces.size(); ++k) {
        const auto& [src, from, dst, to, elements] = flows.list[k];
        ASSERT_EQ(std::tuple(src, from, dst, to, elements), std::tuple(pieces[k].src, pieces[k].from, pieces[k].dst, pieces[k].to, volume(pieces[k].box)));
      }
      const Reduce reduce = !collectives ? Reduce::kNone : gradient ? Reduce::kSum : tiles.partial;
      const Movement m = gradient ? recognise(pieces, copies, tiles, reduce) : recognise(pieces, tiles, copies, reduce);
      ASSERT_EQ(flows.movement.pattern, m.pattern) << i;
      ASSERT_EQ(flows.movement.ranks, m.ranks);
      ASSERT_EQ(flows.movement.elements, m.elements);
      ASSERT_EQ(flows.movement.groups, m.groups);
      all_reduces += m.pattern == Pattern::kAllReduce;
    }
  }
  EXPECT_GT(all_reduces, 20);
}

// Elements that several tiles of a partial value cover come from all of them; those of a complete one from exactly one, or it is our mistake.
TEST(Reshard, OverlapsAreSummedOrRefused) {
  const Sharding copy = rows({{span(1, 5), {2}}});
  const auto partial = fill_pieces(rows({{span(0, 4), {0}}, {span(2, 6), {1}}}, Reduce::kSum), copy, 0);
  ASSERT_EQ(partial.size(), 2u);
  EXPECT_EQ(partial[0].box, Box{span(1, 4)});
  EXPECT_EQ(partial[1].box, Box{span(2, 5)});
  EXPECT_THROW(fill_pieces(rows({{span(0, 4), {0}}, {span(2, 6), {1}}}), copy, 0), InternalError);
  EXPECT_THROW(fill_pieces(rows({{span(0, 2), {0}}, {span(3, 6), {1}}}), copy, 0), InternalError);
}

// The halo of a 3-row window at a border: the reader's own rows and one of its neighbour's; the gradient of that row goes back to its owner.
TEST(Reshard, GradientOfAHaloGoesBackToItsOwner) {
  const Sharding tiles = rows({{span(0, 4), {0}}, {span(4, 8), {1}}}), copies = rows({{span(0, 5), {0}}, {span(3, 8), {1}}});
  std::set<std::tuple<int, int, std::string>> back;
  for (const Piece& x : grad_pieces(tiles, copies, 0)) back.insert({x.src, x.dst, to_string(x.box)});
  const std::set<std::tuple<int, int, std::string>> expected{{0, 0, "([0,4))"}, {0, 1, "([4,5))"}, {1, 0, "([3,4))"}, {1, 1, "([4,8))"}};
  EXPECT_EQ(back, expected);
}

// A reader uses the replica on its own device, else the one of the index that it holds of another source, else of its own index; all replicas of a
// destination read all sources, in one order.
TEST(Reshard, ReadersKeepToTheirReplica) {
  const Sharding tiles = rows({{span(0, 2), {0, 1}}, {span(2, 4), {2, 3}}}), copies = rows({{span(0, 4), {1, 4}}});
  std::vector<std::tuple<int, int, int>> reads;  // to, src, from
  for (const Piece& x : fill_pieces(tiles, copies, 0)) reads.emplace_back(x.to, x.src, x.from);
  EXPECT_EQ(reads, (std::vector<std::tuple<int, int, int>>{{1, 0, 1}, {1, 1, 3}, {4, 0, 1}, {4, 1, 3}}));
}

Movement sum_of(const Sharding& tiles, const Sharding& copies) {
  return recognise(fill_pieces(tiles, copies, 0), tiles, copies, Reduce::kSum);
}

// Sums of disjoint devices are all-reduces of their own; replicas of one sum only where they add in the same order.
TEST(Reshard, AllReducesComeInGroups) {
  const Sharding two = rows({{span(0, 2), {0}}, {span(0, 2), {1}}, {span(2, 5), {2}}, {span(2, 5), {3}}}, Reduce::kSum);
  const Movement apart = sum_of(two, rows({{span(0, 2), {0, 1}}, {span(2, 5), {2, 3}}}));
  ASSERT_EQ(apart.pattern, Pattern::kAllReduce);
  EXPECT_EQ(apart.groups, (std::vector<ReduceGroup>{{{0, 1}, 2}, {{2, 3}, 3}}));
  EXPECT_EQ(apart.elements, 5);
  EXPECT_EQ(apart.group_of(3), &apart.groups[1]);
  EXPECT_EQ(apart.group_of(4), nullptr);

  const Sharding all = rows({{span(0, 2), {0, 1, 2, 3}}});
  const Movement alike = sum_of(rows({{span(0, 2), {0, 1}}, {span(0, 2), {2, 3}}}, Reduce::kSum), all);
  EXPECT_EQ(alike.groups, (std::vector<ReduceGroup>{{{0, 2}, 2}, {{1, 3}, 2}}));
  EXPECT_EQ(sum_of(rows({{span(0, 2), {0, 3}}, {span(0, 2), {2, 1}}}, Reduce::kSum), all).pattern, Pattern::kExchange);  // 0 + 2, but 1 + 3 the other way
}

TEST(Reshard, ASumThatIsWantedElsewhereIsNoAllReduce) {
  const Sharding tiles = rows({{span(0, 2), {0}}, {span(0, 2), {1}}}, Reduce::kSum);
  EXPECT_EQ(sum_of(tiles, rows({{span(0, 2), {2, 3}}})).pattern, Pattern::kExchange);  // another stage's devices
  EXPECT_EQ(sum_of(tiles, rows({{span(0, 1), {0}}, {span(1, 2), {1}}})).pattern, Pattern::kExchange);
  EXPECT_EQ(sum_of(tiles, rows({{span(0, 2), {0}}})).pattern, Pattern::kExchange);
}

// What all chunks and several consumers read alike is gathered once, and its gradient is summed before it moves, once.
TEST(Copies, AreSharedByChunksAndConsumers) {
  OpGraph g;
  const TensorId x = test::source(g, NodeKind::kFeed, "in:0", {12, 4}, false, 0), w = test::source(g, NodeKind::kParam, "param:w", {4, 4}, true);
  const TensorId a = test::op(g, "a", "linear", {x, w}, {"input", "weight"}, {12, 4}), b = test::op(g, "b", "linear", {a, w}, {"input", "weight"}, {12, 4});
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {b}, .sample_dim = 0});
  const Program p = lower(g, parse_plan(g, "* n=2x3t\nparam:w d0=2", 2), {6, 6});
  ASSERT_EQ(p.groups_of[w].size(), 1u);
  int fills = 0, back = 0;
  for (const Step& s : p.steps) {
    for (const StepItem& i : s.items) {
      fills += s.kind == StepKind::kFill && i.id == p.groups_of[w][0];
      back += s.kind == StepKind::kGradFill && i.id == p.groups_of[w][0];
    }
  }
  EXPECT_EQ(fills, 1);
  EXPECT_EQ(back, 1);
}

// A global return has each process' gradient, each counted once, summed into the value.
TEST(Returns, WithoutASampleSumTheGradientsOfAllProcesses) {
  OpGraph g;
  const TensorId x = test::source(g, NodeKind::kFeed, "in:0", {6}, true, 0);
  const TensorId y = test::op(g, "total", "sum", {x}, {"self"}, {});
  add_node(g, {.kind = NodeKind::kReturn, .name = "out:0", .inputs = {y}});
  const Program p = lower(g, parse_plan(g, "total d0=3", 3), {2, 2, 2});
  const StepItem item{p.groups_of[y][0], 0};
  std::map<int, std::set<int>> sources;  // tile -> processes
  for (const Piece& piece : item_pieces(p, StepKind::kGradFill, item)) sources[piece.dst].insert(piece.from);
  ASSERT_EQ(sources.size(), 3u);
  for (const auto& [tile, from] : sources) EXPECT_EQ(from, (std::set<int>{0, 1, 2}));
}

}  // namespace
}  // namespace soap
