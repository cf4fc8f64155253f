// Index sets against a bitset, at random.
#include "base/index_set.h"

#include "gtest/gtest.h"
#include "random.h"

namespace soap {
namespace {

using test::bits_of;
using test::Random;
using test::set_of;

void expect_normal(const IndexSet& s) {
  for (size_t i = 0; i < s.runs().size(); ++i) {
    EXPECT_LT(s.runs()[i].begin, s.runs()[i].end);
    if (i > 0) {
      EXPECT_GT(s.runs()[i].begin, s.runs()[i - 1].end) << to_string(s);
    }
  }
}

TEST(IndexSet, FromRunsMerges) {
  EXPECT_EQ(IndexSet::from_runs({{4, 6}, {0, 2}, {2, 3}, {5, 9}, {7, 7}}), IndexSet::from_runs({{0, 3}, {4, 9}}));
  EXPECT_TRUE(IndexSet::from_runs({{3, 3}, {5, 2}}).empty());
  EXPECT_EQ(to_string(IndexSet::from_runs({{0, 4}, {8, 12}})), "[0,4)+[8,12)");
  EXPECT_EQ(to_string(IndexSet()), "[]");
}

TEST(IndexSet, SetOperations) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    const int64_t size = random.between(1, 40);
    const auto a = random.bits(size), b = random.bits(size);
    const IndexSet x = set_of(a), y = set_of(b);
    std::vector<char> both(size), either(size);
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
      both[i] = a[i] && b[i];
      either[i] = a[i] || b[i];
      count += a[i];
      EXPECT_EQ(x.contains(i), a[i] != 0);
    }
    expect_normal(intersect(x, y));
    expect_normal(unite(x, y));
    EXPECT_EQ(bits_of(intersect(x, y), size), both);
    EXPECT_EQ(bits_of(unite(x, y), size), either);
    EXPECT_EQ(x.size(), count);
    EXPECT_EQ(x.is_all(size), count == size);
    EXPECT_EQ(x.empty(), count == 0);
  }
}

TEST(IndexSet, ShiftAndSlice) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    const int64_t size = random.between(1, 30), offset = random.between(-10, 10), to = random.between(1, 30);
    const auto a = random.bits(size);
    std::vector<char> moved(to);
    std::vector<int64_t> members;
    for (int64_t i = 0; i < size; ++i) {
      if (!a[i]) continue;
      members.push_back(i);
      if (i + offset >= 0 && i + offset < to) moved[i + offset] = 1;
    }
    EXPECT_EQ(bits_of(shift(set_of(a), offset, to), to), moved);
    const int64_t count = static_cast<int64_t>(members.size()), begin = random.between(0, count), end = random.between(begin, count);
    std::vector<char> part(size);
    for (int64_t i = begin; i < end; ++i) part[members[i]] = 1;
    EXPECT_EQ(bits_of(slice(set_of(a), begin, end), size), part);
  }
}

TEST(IndexSet, MixedRadix) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    const int64_t outer = random.between(1, 7), inner = random.between(1, 7);
    const auto a = random.bits(outer), b = random.bits(inner);
    std::vector<char> all(outer * inner), major(outer), minor(inner);
    for (int64_t i = 0; i < outer * inner; ++i) all[i] = a[i / inner] && b[i % inner];
    const IndexSet both = product(set_of(a), set_of(b), inner);
    expect_normal(both);
    EXPECT_EQ(bits_of(both, outer * inner), all);
    for (int64_t i = 0; i < outer * inner; ++i) {
      major[i / inner] |= all[i];
      minor[i % inner] |= all[i];
    }
    EXPECT_EQ(bits_of(digit(both, inner, outer), outer), major);
    EXPECT_EQ(bits_of(digit(both, 1, inner), inner), minor);
  }
}

TEST(IndexSet, Positions) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    const int64_t size = random.between(1, 30);
    const auto a = random.bits(size), b = random.bits(size);
    std::vector<char> expected;
    for (int64_t i = 0; i < size; ++i) {
      if (a[i]) expected.push_back(b[i]);
    }
    const IndexSet sub = intersect(set_of(a), set_of(b));
    EXPECT_EQ(bits_of(positions(sub, set_of(a)), static_cast<int64_t>(expected.size())), expected);
  }
}

TEST(Box, VolumeAndIntersection) {
  const Box a{IndexSet::interval(0, 4), IndexSet::from_runs({{0, 1}, {3, 6}})}, b{IndexSet::interval(2, 9), IndexSet::interval(5, 7)};
  EXPECT_EQ(volume(a), 16);
  EXPECT_EQ(volume({}), 1);
  EXPECT_EQ(to_string(intersect(a, b)), to_string(Box{IndexSet::interval(2, 4), IndexSet::interval(5, 6)}));
  EXPECT_EQ(positions(intersect(a, b), a), (Box{IndexSet::interval(2, 4), IndexSet::interval(3, 4)}));
}

}  // namespace
}  // namespace soap
