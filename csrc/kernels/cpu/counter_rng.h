// Fills a part of a tile with counter-based random numbers (kernels/counter_rng.h) on the CPU.
//
// Each function writes out[begin .. end), local positions of the tile; disjoint parts may be filled by different
// threads.
#pragma once

#include <cstdint>

#include "kernels/counter_rng.h"
#include "kernels/tile_elements.h"

namespace soap::kernels::cpu {

// `precision`: bits kept, 24 or less.
void fill_uniform(float* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key, int precision);
void fill_uniform(double* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key);
void fill_normal(float* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key);
void fill_normal(double* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key);
// p in [0, 1].
void fill_bernoulli(bool* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key, double p);
// Integers in [low, low + range), range > 0.
void fill_randint(int64_t* out, const TileElements& tile, int64_t begin, int64_t end, CounterKey key, int64_t low, uint64_t range);

}  // namespace soap::kernels::cpu
