// Counter-based random numbers: each number is a pure function of (seed, call, operator, global element index), so it
// doesn't depend on how a tensor is tiled, on threads, or on whether it is computed again.
//
// Generator: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11).
//   key     = seed (64 bits)
//   counter = (index / 4: 62 bits, half: 2 bits, op_index: 32 bits, call: 32 bits)
// Lane index % 4 of half 0 is the high, of half 1 the low 32-bit word of the element's 64 bits. Derived from these:
//   unit     the leading 53 bits as a fraction in [0, 1)
//   uniform  unit cut off (never rounded up to 1) at the precision of the dtype: fp64 53 bits, fp32 24, fp16 11,
//            bf16 8. So the narrower dtypes hold prefixes of the wider ones.
//   bernoulli(p)        unit < p, in every dtype
//   randint(low, high)  low + floor(bits * (high - low) / 2^64); the bias is below (high - low) / 2^64
//   normal   Box-Muller in double on the units of the pair (2k, 2k+1): the even element takes the cosine, the odd one
//            the sine; rounded to the dtype. libm may differ between devices in the last bit of a double.
//
// Host and device share this file; it includes nothing of torch.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define SOAP_HOST_DEVICE __host__ __device__ inline
#else
#define SOAP_HOST_DEVICE inline
#endif

namespace soap::kernels {

struct CounterKey {
  uint64_t seed = 0;
  uint32_t call = 0;
  uint32_t op_index = 0;  // n-th random operator within the forward
};

struct Words4 {
  uint32_t word[4];
};

SOAP_HOST_DEVICE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
  const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
  c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
  c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
  c1 = static_cast<uint32_t>(product1);
  c3 = static_cast<uint32_t>(product0);
}

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;  // added to the key after each round
constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;

SOAP_HOST_DEVICE Words4 philox4x32_10(Words4 counter, uint32_t key0, uint32_t key1) {
  auto& [c0, c1, c2, c3] = counter.word;
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
    philox_round(c0, c1, c2, c3, key0, key1);
  }
  return counter;
}

constexpr uint32_t kHighHalf = 0;
constexpr uint32_t kLowHalf = 1;

// One half of the 64 bits of elements 4 * block .. 4 * block + 3; block < 2^62.
SOAP_HOST_DEVICE Words4 block_words(CounterKey key, uint64_t block, uint32_t half) {
  const uint32_t block_low = static_cast<uint32_t>(block), block_high = static_cast<uint32_t>(block >> 32);
  const Words4 counter = {{block_low, block_high | half << 30, key.op_index, key.call}};
  return philox4x32_10(counter, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
}

SOAP_HOST_DEVICE uint64_t leading_53_bits(uint32_t high, uint32_t low) {
  return (uint64_t{high} << 32 | low) >> 11;
}

SOAP_HOST_DEVICE double unit_from_words(uint32_t high, uint32_t low) {
  return static_cast<double>(leading_53_bits(high, low)) * 0x1p-53;
}

// `precision` is 24 or less: 11 for fp16, 8 for bf16.
SOAP_HOST_DEVICE float uniform_from_high_word(uint32_t high, int precision) {
  // Signed, because CPUs convert signed integers faster.
  const float unit = 1.0f / static_cast<float>(1 << precision);
  return static_cast<float>(static_cast<int32_t>(high >> (32 - precision))) * unit;
}

// unit < p exactly when the leading 53 bits are less than this.
SOAP_HOST_DEVICE uint64_t bernoulli_threshold(double p) {
  return static_cast<uint64_t>(std::ceil(p * 0x1p53));
}

// floor(bits * range / 2^64).
SOAP_HOST_DEVICE uint64_t scale_to_range(uint32_t high, uint32_t low, uint64_t range) {
  const uint64_t range_high = range >> 32, range_low = range & 0xFFFFFFFFu;
  const uint64_t cross = high * range_low + (low * range_low >> 32);
  const uint64_t middle = low * range_high + (cross & 0xFFFFFFFFu);
  return high * range_high + (cross >> 32) + (middle >> 32);
}

struct NormalPair {
  double even;
  double odd;
};

SOAP_HOST_DEVICE NormalPair box_muller(double unit_even, double unit_odd) {
  const double radius = std::sqrt(-2.0 * std::log(1.0 - unit_even));  // 1 - unit is in (0, 1]
  const double angle = 6.283185307179586476925 * unit_odd;
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

}  // namespace soap::kernels
