#include "kernels/cpu/counter_rng.h"

#include <algorithm>

namespace soap::kernels::cpu {
namespace {

constexpr int kBlocks = 64;  // generated at a time: the words of both halves stay in L1
constexpr int kLanes = 16;   // blocks side by side, so that the compiler can use vector registers

// words[4 * b ..] = block_words(key, first + b, half) for b in [0, count rounded up to kLanes).
void generate(uint32_t* words, CounterKey key, uint64_t first, int count, uint32_t half) {
  for (int done = 0; done < count; done += kLanes) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t block = first + static_cast<uint64_t>(done + i);
      c0[i] = static_cast<uint32_t>(block);
      c1[i] = static_cast<uint32_t>(block >> 32) | half << 30;
      c2[i] = key.op_index;
      c3[i] = key.call;
    }
    uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
      for (int i = 0; i < kLanes; ++i) philox_round(c0[i], c1[i], c2[i], c3[i], key0, key1);
    }
    for (int i = 0; i < kLanes; ++i) {
      uint32_t* out = words + 4 * (done + i);
      out[0] = c0[i];
      out[1] = c1[i];
      out[2] = c2[i];
      out[3] = c3[i];
    }
  }
}

// The words of `count` elements from global index `global`, whose values belong at local position `local`.
struct Batch {
  const uint32_t* high;  // of the first element; its whole block may be read, before and after it
  const uint32_t* low;   // only where asked for
  int64_t global;
  int64_t local;
  int count;
};

template <bool kNeedsLow, class Emit>
void for_each_batch(const TileElements& tile, int64_t begin, int64_t end, CounterKey key, Emit emit) {
  alignas(64) uint32_t high[4 * kBlocks];
  alignas(64) uint32_t low[kNeedsLow ? 4 * kBlocks : 4];
  for_each_piece(tile, begin, end, [&](int64_t global, int64_t local, int64_t count) {
    while (count > 0) {
      const int skip = static_cast<int>(global % 4);
      const int now = static_cast<int>(std::min<int64_t>(count, 4 * kBlocks - skip));
      const uint64_t block = static_cast<uint64_t>(global / 4);
      generate(high, key, block, (skip + now + 3) / 4, kHighHalf);
      if constexpr (kNeedsLow) generate(low, key, block, (skip + now + 3) / 4, kLowHalf);
      emit(Batch{high + skip, low + skip, global, local, now});
      global += now;
      local += now;
      count -= now;
    }
  });
}

template <class T>
void fill_normal_as(T* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key) {
  for_each_batch<true>(tile, begin, end, key, [&](const Batch& b) {
    for (int even = -static_cast<int>(b.global % 2); even < b.count; even += 2) {
      const int odd = even + 1;
      const NormalPair normal = box_muller(unit_from_words(b.high[even], b.low[even]), unit_from_words(b.high[odd], b.low[odd]));
      if (even >= 0) out[b.local + even] = static_cast<T>(normal.even);
      if (odd < b.count) out[b.local + odd] = static_cast<T>(normal.odd);
    }
  });
}

}  // namespace

void fill_uniform(float* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key, int precision) {
  for_each_batch<false>(tile, begin, end, key, [&](const Batch& b) {
    for (int i = 0; i < b.count; ++i) out[b.local + i] = uniform_from_high_word(b.high[i], precision);
  });
}

void fill_uniform(double* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key) {
  for_each_batch<true>(tile, begin, end, key, [&](const Batch& b) {
    for (int i = 0; i < b.count; ++i) out[b.local + i] = unit_from_words(b.high[i], b.low[i]);
  });
}

void fill_normal(float* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key) {
  fill_normal_as(out, tile, begin, end, key);
}

void fill_normal(double* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key) {
  fill_normal_as(out, tile, begin, end, key);
}

void fill_bernoulli(bool* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key, double p) {
  const uint64_t threshold = bernoulli_threshold(p);
  // The high word decides, but for the one of its 2^32 values that begins the threshold.
  const uint64_t high_threshold = threshold >> 21;
  for_each_batch<false>(tile, begin, end, key, [&](const Batch& b) {
    bool tied = false;
    for (int i = 0; i < b.count; ++i) {
      out[b.local + i] = b.high[i] < high_threshold;
      tied |= b.high[i] == high_threshold;
    }
    for (int i = 0; tied && i < b.count; ++i) {
      const uint64_t index = static_cast<uint64_t>(b.global + i);
      const uint32_t low = block_words(key, index / 4, kLowHalf).word[index % 4];
      out[b.local + i] = leading_53_bits(b.high[i], low) < threshold;
    }
  });
}

void fill_randint(int64_t* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key, int64_t low, uint64_t range) {
  for_each_batch<true>(tile, begin, end, key, [&](const Batch& b) {
    for (int i = 0; i < b.count; ++i) {
      const uint64_t offset = scale_to_range(b.high[i], b.low[i], range);
      out[b.local + i] = static_cast<int64_t>(static_cast<uint64_t>(low) + offset);
    }
  });
}

}  // namespace soap::kernels::cpu
