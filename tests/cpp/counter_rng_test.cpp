#include "kernels/counter_rng.h"

#include <cmath>

#include "gtest/gtest.h"

namespace soap::kernels {
namespace {

void expect_words(Words4 actual, Words4 expected) {
  for (int i = 0; i < 4; ++i) EXPECT_EQ(actual.word[i], expected.word[i]) << "word " << i;
}

// The known answers that Random123 publishes for philox4x32 with 10 rounds.
TEST(Philox, KnownAnswers) {
  expect_words(philox4x32_10({{0, 0, 0, 0}}, 0, 0), {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  const uint32_t ones = 0xffffffff;
  expect_words(philox4x32_10({{ones, ones, ones, ones}}, ones, ones), {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  expect_words(philox4x32_10({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0), {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST(CounterRng, EveryPartOfTheKeyCounts) {
  const CounterKey key = {.seed = 1, .call = 2, .op_index = 3};
  const uint32_t base = block_words(key, 4, kHighHalf).word[0];
  EXPECT_NE(base, block_words(key, 4, kLowHalf).word[0]);
  EXPECT_NE(base, block_words(key, 5, kHighHalf).word[0]);
  EXPECT_NE(base, block_words(key, 4 + (uint64_t{1} << 32), kHighHalf).word[0]);
  EXPECT_NE(base, block_words({.seed = 1 + (uint64_t{1} << 32), .call = 2, .op_index = 3}, 4, kHighHalf).word[0]);
  EXPECT_NE(base, block_words({.seed = 1, .call = 3, .op_index = 2}, 4, kHighHalf).word[0]);
}

TEST(CounterRng, UniformStaysBelowOneAndIsAPrefix) {
  for (const uint32_t high : {0u, 1u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
    const double unit = unit_from_words(high, 0xffffffff);
    EXPECT_LT(unit, 1.0);
    for (const int precision : {8, 11, 24}) {
      const float uniform = uniform_from_high_word(high, precision);
      EXPECT_EQ(uniform, std::floor(std::ldexp(unit, precision)) / std::ldexp(1.0, precision));
    }
  }
}

TEST(CounterRng, BernoulliThresholdIsExact) {
  EXPECT_EQ(bernoulli_threshold(0), 0u);
  EXPECT_EQ(bernoulli_threshold(1), uint64_t{1} << 53);
  EXPECT_EQ(bernoulli_threshold(0x1p-53), 1u);
  EXPECT_EQ(bernoulli_threshold(0x1p-60), 1u);  // unit 0 is below any positive p
}

TEST(CounterRng, ScaleToRangeIsTheHighHalfOfTheProduct) {
  const uint64_t values[] = {0, 1, 2, 3, 0xffffffff, 0x100000000, 0x123456789abcdef0, ~uint64_t{0}};
  for (const uint64_t bits : values) {
    for (const uint64_t range : values) {
      __extension__ using Wide = unsigned __int128;
      EXPECT_EQ(scale_to_range(static_cast<uint32_t>(bits >> 32), static_cast<uint32_t>(bits), range),
                static_cast<uint64_t>(static_cast<Wide>(bits) * range >> 64));
    }
  }
}

TEST(CounterRng, BoxMullerIsFiniteAtTheEnds) {
  const double last = 1 - 0x1p-53;
  EXPECT_EQ(box_muller(0, 0).even, 0);
  EXPECT_TRUE(std::isfinite(box_muller(last, last).even));
  EXPECT_GT(box_muller(last, 0).even, 8);
}

}  // namespace
}  // namespace soap::kernels
