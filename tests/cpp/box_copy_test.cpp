#include "kernels/cpu/box_copy.h"

#include <numeric>

#include "base/error.h"
#include "gtest/gtest.h"
#include "random.h"

namespace soap::kernels::cpu {
namespace {

std::vector<Block> blocks(Runs src, Runs dst) {
  return blocks_of({std::move(src)}, {std::move(dst)});
}

std::vector<int64_t> dense(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  return strides;
}

TEST(BoxCopy, RunsAtOneDistanceAreOneBlock) {
  const std::vector<Block> found = blocks({{1, 3}, {5, 7}, {9, 11}}, {{0, 6}});
  ASSERT_EQ(found.size(), 1u);
  ASSERT_EQ(found[0].axes.size(), 2u);
  EXPECT_EQ(found[0].axes[0].extent, 3);
  EXPECT_EQ(found[0].axes[0].src_step, 4);
  EXPECT_EQ(found[0].axes[0].dst_step, 2);
  EXPECT_EQ(found[0].axes[1].extent, 2);
  EXPECT_EQ(blocks({{0, 2}, {3, 4}}, {{0, 3}}).size(), 2u);
  EXPECT_EQ(blocks({{0, 0}}, {{4, 4}}).size(), 0u);
  EXPECT_EQ(blocks_of({}, {}).size(), 1u);  // of a scalar
  EXPECT_THROW(blocks({{0, 3}}, {{0, 4}}), InternalError);
}

TEST(BoxCopy, LoopsAreMerged) {
  const std::vector<Runs> whole = {{{0, 4}}, {{0, 3}}, {{0, 5}}};
  Nest nest;
  lay_out(blocks_of(whole, whole)[0], dense({4, 3, 5}), dense({4, 3, 5}), nest);
  EXPECT_EQ(nest.loops, (std::vector<Loop>{{60, 1, 1}}));
  const std::vector<Runs> rows = {{{0, 4}}, {{1, 3}}, {{0, 5}}}, target = {{{0, 4}}, {{0, 2}}, {{0, 5}}};
  lay_out(blocks_of(rows, target)[0], dense({4, 3, 5}), dense({4, 2, 5}), nest);
  EXPECT_EQ(nest.src_offset, 5);
  EXPECT_EQ(nest.loops, (std::vector<Loop>{{4, 15, 10}, {10, 1, 1}}));
  EXPECT_TRUE(nest.has_rows());
  EXPECT_EQ(nest.elements(), 40);
}

// Positions of a set of `size` of them among `total`.
Runs random_runs(test::Random& random, int64_t size, int64_t total) {
  std::vector<char> chosen(total, 0);
  for (int64_t left = size; left > 0;) {
    char& bit = chosen[random.below(total)];
    left -= bit ? 0 : 1;
    bit = 1;
  }
  Runs runs;
  const IndexSet set = test::set_of(chosen);
  runs.assign(set.runs().begin(), set.runs().end());
  return runs;
}

std::vector<int64_t> positions_of(const Runs& runs) {
  std::vector<int64_t> out;
  for (const Run& run : runs) {
    for (int64_t i = run.begin; i < run.end; ++i) out.push_back(i);
  }
  return out;
}

struct RandomBox {
  std::vector<int64_t> src_shape, dst_shape, src_strides, dst_strides;
  std::vector<Runs> src, dst;
  int64_t src_size = 1, dst_size = 1;
  std::vector<std::pair<int64_t, int64_t>> elements;  // offsets from which and to which they go

  explicit RandomBox(test::Random& random) {
    const int64_t num_dims = random.below(5);
    for (int64_t d = 0; d < num_dims; ++d) {
      const int64_t size = random.between(1, 5);
      src_shape.push_back(size + (random.chance(50) ? random.below(6) : 0));
      dst_shape.push_back(size + (random.chance(50) ? random.below(6) : 0));
      src.push_back(random_runs(random, size, src_shape.back()));
      dst.push_back(random_runs(random, size, dst_shape.back()));
    }
    src_strides = dense(src_shape);
    dst_strides = dense(dst_shape);
    for (const int64_t n : src_shape) src_size *= n;
    for (const int64_t n : dst_shape) dst_size *= n;
    if (num_dims > 1 && random.chance(30)) {  // the outermost dim of the source is its innermost in memory
      src_strides[0] = 1;
      for (size_t d = src_strides.size(); d-- > 1;) src_strides[d] = d + 1 == src_strides.size() ? src_shape[0] : src_strides[d + 1] * src_shape[d + 1];
    }
    if (num_dims > 0 && random.chance(20)) src_strides[random.below(num_dims)] = 0;
    elements = {{0, 0}};
    for (int64_t d = 0; d < num_dims; ++d) {
      const std::vector<int64_t> from = positions_of(src[d]), to = positions_of(dst[d]);
      std::vector<std::pair<int64_t, int64_t>> grown;
      for (const auto& [s, t] : elements) {
        for (size_t i = 0; i < from.size(); ++i) grown.emplace_back(s + from[i] * src_strides[d], t + to[i] * dst_strides[d]);
      }
      elements = std::move(grown);
    }
  }
};

template <class Item>
void expect_copies(const RandomBox& box) {
  std::vector<Item> source(box.src_size), target(box.dst_size), expected(box.dst_size);
  std::iota(source.begin(), source.end(), Item{1});
  for (const auto& [from, to] : box.elements) expected.at(to) = source.at(from);
  Nest nest;
  for (const Block& block : blocks_of(box.src, box.dst)) {
    lay_out(block, box.src_strides, box.dst_strides, nest);
    copy(reinterpret_cast<char*>(target.data()), reinterpret_cast<const char*>(source.data()), nest, sizeof(Item));
  }
  EXPECT_EQ(target, expected);
}

TEST(BoxCopy, EveryElementGoesWhereItBelongs) {
  test::Random random(1);
  for (int i = 0; i < 500; ++i) {
    const RandomBox box(random);
    expect_copies<uint8_t>(box);
    expect_copies<uint16_t>(box);
    expect_copies<float>(box);
    expect_copies<double>(box);
    expect_copies<long double>(box);
  }
}

TEST(BoxCopy, AddsEveryElementOnce) {
  test::Random random(2);
  for (int i = 0; i < 500; ++i) {
    const RandomBox box(random);
    std::vector<int16_t> source(box.src_size);
    std::iota(source.begin(), source.end(), int16_t{1});
    std::vector<float> target(box.dst_size, 0.5f), expected = target;
    for (const auto& [from, to] : box.elements) expected.at(to) += source.at(from);
    Nest nest;
    for (const Block& block : blocks_of(box.src, box.dst)) {
      lay_out(block, box.src_strides, box.dst_strides, nest);
      add(target.data(), source.data(), nest);
    }
    EXPECT_EQ(target, expected);
  }
}

}  // namespace
}  // namespace soap::kernels::cpu
