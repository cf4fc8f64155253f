// Index maps against the arithmetic of windows, index by index.
#include <cmath>
#include <functional>

#include "gtest/gtest.h"
#include "random.h"
#include "sharding/rule.h"

namespace soap {
namespace {

using test::bits_of;
using test::Random;

// The indices that `reads` says the indices of the interval read, clipped.
std::vector<char> brute(int64_t begin, int64_t end, int64_t size, const std::function<void(int64_t, const std::function<void(int64_t)>&)>& reads) {
  std::vector<char> out(size);
  for (int64_t i = begin; i < end; ++i) {
    reads(i, [&](int64_t x) {
      if (x >= 0 && x < size) out[x] = 1;
    });
  }
  return out;
}

// Interval maps give the hull of what is read: it contains each index read, and its ends are read.
void expect_hull(const IndexSet& got, const std::vector<char>& read, const std::string& what) {
  EXPECT_TRUE(got.is_interval()) << what;
  int64_t first = -1, last = -1;
  for (int64_t i = 0; i < static_cast<int64_t>(read.size()); ++i) {
    if (!read[i]) continue;
    if (first < 0) first = i;
    last = i;
  }
  if (first < 0) return;  // may still name indices between two windows
  EXPECT_LE(got.begin(), first) << what;
  EXPECT_GE(got.end(), last + 1) << what;
}

TEST(IndexMap, Window) {
  for (uint32_t seed = 0; seed < 500; ++seed) {
    Random random(seed);
    const IndexMap m{.kind = IndexMap::Kind::kWindow,
                     .stride = random.between(1, 4),
                     .pad = random.between(0, 4),
                     .dilation = random.between(1, 3),
                     .kernel = random.between(1, 5)};
    const int64_t size = random.between(1, 20);
    const int64_t out = (size + 2 * m.pad - m.dilation * (m.kernel - 1) - 1) / m.stride + 1;
    if (size + 2 * m.pad < m.dilation * (m.kernel - 1) + 1 || out < 1) continue;
    const int64_t begin = random.below(out), end = random.between(begin + 1, out);
    const auto read = brute(begin, end, size, [&](int64_t o, const auto& add) {
      for (int64_t k = 0; k < m.kernel; ++k) add(o * m.stride - m.pad + k * m.dilation);
    });
    const IndexSet got = apply(m, IndexSet::interval(begin, end), size);
    expect_hull(got, read, "seed " + std::to_string(seed));
    // Exactly the window: first tap of the first output to last tap of the last, clipped.
    const int64_t lo = std::max<int64_t>(begin * m.stride - m.pad, 0),
                  hi = std::min<int64_t>((end - 1) * m.stride - m.pad + m.dilation * (m.kernel - 1) + 1, size);
    EXPECT_EQ(got, lo < hi ? IndexSet::interval(lo, hi) : IndexSet()) << "seed " << seed;
  }
}

TEST(IndexMap, TransposedWindow) {
  for (uint32_t seed = 0; seed < 500; ++seed) {
    Random random(seed);
    const IndexMap m{.kind = IndexMap::Kind::kTransposedWindow,
                     .stride = random.between(1, 4),
                     .pad = random.between(0, 3),
                     .dilation = random.between(1, 3),
                     .kernel = random.between(1, 5)};
    const int64_t size = random.between(1, 15);
    const int64_t out = (size - 1) * m.stride - 2 * m.pad + m.dilation * (m.kernel - 1) + 1 + random.below(m.stride);
    if (out < 1) continue;
    const int64_t begin = random.below(out), end = random.between(begin + 1, out);
    const auto read = brute(begin, end, size, [&](int64_t o, const auto& add) {
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t k = 0; k < m.kernel; ++k) {
          if (o == i * m.stride - m.pad + m.dilation * k) add(i);
        }
      }
    });
    expect_hull(apply(m, IndexSet::interval(begin, end), size), read, "seed " + std::to_string(seed));
  }
}

TEST(IndexMap, Adaptive) {
  for (int64_t size = 1; size < 14; ++size) {
    for (int64_t out = 1; out < 14; ++out) {
      const IndexMap m{.kind = IndexMap::Kind::kAdaptive, .out_size = out};
      for (int64_t begin = 0; begin < out; ++begin) {
        const auto read = brute(begin, begin + 1, size, [&](int64_t o, const auto& add) {
          for (int64_t i = o * size / out; i < static_cast<int64_t>(std::ceil(static_cast<double>((o + 1) * size) / static_cast<double>(out))); ++i) add(i);
        });
        EXPECT_EQ(bits_of(apply(m, IndexSet::interval(begin, begin + 1), size), size), read) << size << " to " << out << " at " << begin;
      }
    }
  }
}

TEST(IndexMap, PointMaps) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    const int64_t size = random.between(1, 20), n = random.between(1, 20), offset = random.between(-6, 6), stride = random.between(1, 4);
    const auto chosen = random.bits(n);
    const IndexSet set = test::set_of(chosen);
    const auto check = [&](const IndexMap& m, const std::function<int64_t(int64_t)>& f, const char* what) {
      std::vector<char> expected(size);
      for (int64_t i = 0; i < n; ++i) {
        if (chosen[i] && f(i) >= 0 && f(i) < size) expected[f(i)] = 1;
      }
      EXPECT_EQ(bits_of(apply(m, set, size), size), expected) << what << " seed " << seed;
    };
    using Kind = IndexMap::Kind;
    check({.kind = Kind::kShift, .offset = offset}, [&](int64_t i) { return i + offset; }, "shift");
    check({.kind = Kind::kStride, .stride = stride, .offset = offset}, [&](int64_t i) { return i * stride + offset; }, "stride");
    check({.kind = Kind::kModulo}, [&](int64_t i) { return i % size; }, "modulo");
    check({.kind = Kind::kFloorDiv, .stride = stride}, [&](int64_t i) { return i / stride; }, "floor division");
    check({.kind = Kind::kRoll, .offset = offset}, [&](int64_t i) { return (((i - offset) % size) + size) % size; }, "roll");
    if (n <= size) {
      check({.kind = Kind::kFlip}, [&](int64_t i) { return size - 1 - i; }, "flip");
    }
  }
}

TEST(IndexMap, EmptyStaysEmpty) {
  for (int kind = 0; kind <= static_cast<int>(IndexMap::Kind::kReflect); ++kind) {
    EXPECT_TRUE(apply({.kind = static_cast<IndexMap::Kind>(kind), .out_size = 3}, IndexSet(), 5).empty()) << kind;
  }
}

}  // namespace
}  // namespace soap
