// torch operators over kernels/counter_rng.h: random tiles that are the same parts of the same whole tensor for every
// tiling.
//
// All take (seed, call, op_index), the sizes of the whole tensor, and the tile: per dim a list of runs [begin, end) of
// global indices, flat in `runs`, counted in `runs_per_dim`. They return the tile, contiguous. Under the meta device
// only its shape.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "base/error.h"
#include "kernels/cpu/counter_rng.h"

namespace soap {
namespace {

using kernels::CounterKey;
using kernels::TileElements;

constexpr int64_t kGrain = 1 << 15;  // elements per task

struct Draw {
  CounterKey key;
  TileElements tile;
  std::vector<int64_t> local_sizes;
};

Draw make_draw(int64_t seed, int64_t call, int64_t op_index, at::IntArrayRef global_sizes, at::IntArrayRef runs, at::IntArrayRef runs_per_dim) {
  constexpr int64_t kMax = std::numeric_limits<uint32_t>::max();
  if (call < 0 || call > kMax || op_index < 0 || op_index > kMax) {
    user_error("call {} and op_index {} must be in [0, 2^32)", call, op_index);
  }
  Draw draw;
  draw.key = {static_cast<uint64_t>(seed), static_cast<uint32_t>(call), static_cast<uint32_t>(op_index)};
  draw.tile = kernels::tile_elements(global_sizes.vec(), runs.vec(), runs_per_dim.vec());
  std::size_t next = 0;
  for (const int64_t num_runs : runs_per_dim) {
    int64_t size = 0;
    for (int64_t r = 0; r < num_runs; ++r, next += 2) size += runs[next + 1] - runs[next];
    draw.local_sizes.push_back(size);
  }
  return draw;
}

at::Tensor empty_tile(const Draw& draw, at::ScalarType dtype, at::Device device) {
  if (!device.is_cpu() && !device.is_meta()) {
    user_error("no counter-based random numbers on device {} yet", device.str());
  }
  return at::empty(draw.local_sizes, at::TensorOptions().dtype(dtype).device(device));
}

// fill(pointer, begin, end) in parallel over the tile; T is the type of `out`'s elements.
template <class T, class Fill>
void fill_parallel(at::Tensor& out, Fill fill) {
  if (out.is_meta()) return;
  T* data = out.mutable_data_ptr<T>();
  at::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) { fill(data, begin, end); });
}

at::Tensor counter_uniform(int64_t seed, int64_t call, int64_t op_index, at::IntArrayRef global_sizes, at::IntArrayRef runs, at::IntArrayRef runs_per_dim,
                           at::ScalarType dtype, at::Device device) {
  const Draw draw = make_draw(seed, call, op_index, global_sizes, runs, runs_per_dim);
  if (!at::isFloatingType(dtype)) user_error("uniform numbers of dtype {} don't exist", c10::toString(dtype));
  if (dtype == at::kDouble) {
    at::Tensor out = empty_tile(draw, dtype, device);
    fill_parallel<double>(out, [&](double* data, int64_t begin, int64_t end) { kernels::cpu::fill_uniform(data, draw.tile, begin, end, draw.key); });
    return out;
  }
  const int precision = dtype == at::kFloat ? 24 : dtype == at::kHalf ? 11 : dtype == at::kBFloat16 ? 8 : 0;
  if (precision == 0) user_error("uniform numbers of dtype {} aren't supported", c10::toString(dtype));
  at::Tensor out = empty_tile(draw, at::kFloat, device);
  fill_parallel<float>(out, [&](float* data, int64_t begin, int64_t end) { kernels::cpu::fill_uniform(data, draw.tile, begin, end, draw.key, precision); });
  return out.to(dtype);
}

at::Tensor counter_normal(int64_t seed, int64_t call, int64_t op_index, at::IntArrayRef global_sizes, at::IntArrayRef runs, at::IntArrayRef runs_per_dim,
                          at::ScalarType dtype, at::Device device) {
  const Draw draw = make_draw(seed, call, op_index, global_sizes, runs, runs_per_dim);
  if (!at::isFloatingType(dtype)) user_error("normal numbers of dtype {} don't exist", c10::toString(dtype));
  at::Tensor out = empty_tile(draw, dtype == at::kDouble ? at::kDouble : at::kFloat, device);
  const auto fill = [&](auto* data, int64_t begin, int64_t end) { kernels::cpu::fill_normal(data, draw.tile, begin, end, draw.key); };
  if (dtype == at::kDouble) {
    fill_parallel<double>(out, fill);
  } else {
    fill_parallel<float>(out, fill);
  }
  return out.to(dtype);
}

at::Tensor counter_bernoulli(double p, int64_t seed, int64_t call, int64_t op_index, at::IntArrayRef global_sizes, at::IntArrayRef runs,
                             at::IntArrayRef runs_per_dim, at::ScalarType dtype, at::Device device) {
  if (!(p >= 0 && p <= 1)) user_error("a probability is in [0, 1], got {}", p);
  const Draw draw = make_draw(seed, call, op_index, global_sizes, runs, runs_per_dim);
  at::Tensor out = empty_tile(draw, at::kBool, device);
  fill_parallel<bool>(out, [&](bool* data, int64_t begin, int64_t end) { kernels::cpu::fill_bernoulli(data, draw.tile, begin, end, draw.key, p); });
  return out.to(dtype);
}

at::Tensor counter_randint(int64_t low, int64_t high, int64_t seed, int64_t call, int64_t op_index, at::IntArrayRef global_sizes, at::IntArrayRef runs,
                           at::IntArrayRef runs_per_dim, at::ScalarType dtype, at::Device device) {
  if (low >= high) user_error("randint needs low < high, got {} and {}", low, high);
  const Draw draw = make_draw(seed, call, op_index, global_sizes, runs, runs_per_dim);
  const uint64_t range = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
  at::Tensor out = empty_tile(draw, at::kLong, device);
  fill_parallel<int64_t>(out,
                         [&](int64_t* data, int64_t begin, int64_t end) { kernels::cpu::fill_randint(data, draw.tile, begin, end, draw.key, low, range); });
  return out.to(dtype);
}

}  // namespace

// No tensor goes in, so there is no backend to dispatch on: one kernel looks at `device`, and serves meta and fake
// tensors too.
TORCH_LIBRARY_FRAGMENT(torch_soap, m) {
  const auto define = [&](const std::string& head) {
    const std::string where = "int seed, int call, int op_index, int[] global_sizes, int[] runs, int[] runs_per_dim";
    m.def((head + where + ", *, ScalarType dtype, Device device) -> Tensor").c_str());
  };
  define("counter_uniform(");
  define("counter_normal(");
  define("counter_bernoulli(float p, ");
  define("counter_randint(int low, int high, ");
}

TORCH_LIBRARY_IMPL(torch_soap, CompositeExplicitAutograd, m) {
  m.impl("counter_uniform", counter_uniform);
  m.impl("counter_normal", counter_normal);
  m.impl("counter_bernoulli", counter_bernoulli);
  m.impl("counter_randint", counter_randint);
}

}  // namespace soap
