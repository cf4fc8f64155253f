#include "movement/strided.h"

#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/maximum.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

namespace soap::movement {
namespace {

using kernels::cpu::Loop;
using kernels::cpu::Nest;

constexpr int64_t kShared = 1 << 15;  // elements from which torch shares work among threads
constexpr int64_t kShortest = 64;     // bytes of a row that moves by itself
constexpr int64_t kLarge = 1 << 12;   // elements from which torch's dispatch takes less time than its loops save

// Whether torch's own operator is the faster one.
bool is_for_torch(const Nest& nest) {
  const int64_t elements = nest.elements();
  return elements >= kLarge && ((elements >= kShared && at::get_num_threads() > 1) || !nest.has_rows());
}

at::Tensor view_of(char* data, at::ScalarType dtype, const Nest& nest, bool of_source) {
  std::vector<int64_t> sizes, strides;
  for (const Loop& loop : nest.loops) {
    sizes.push_back(loop.extent);
    strides.push_back(of_source ? loop.src_stride : loop.dst_stride);
  }
  char* begin = data + (of_source ? nest.src_offset : nest.dst_offset) * static_cast<int64_t>(c10::elementSize(dtype));
  return at::from_blob(begin, sizes, strides, at::TensorOptions().dtype(dtype));
}

void by_torch(char* dst, at::ScalarType dtype, const Source& src, const Nest& nest, Combine how) {
  at::Tensor to = view_of(dst, dtype, nest, false);
  const at::Tensor from = view_of(const_cast<char*>(src.data), src.dtype, nest, true);
  if (how == Combine::kReplace) {
    to.copy_(from);
  } else if (how == Combine::kAdd) {
    at::add_out(to, to, from.to(dtype));
  } else {
    at::maximum_out(to, to, from.to(dtype));
  }
}

template <class To, class From>
void add(char* dst, const Source& src, const Nest& nest) {
  kernels::cpu::add(reinterpret_cast<To*>(dst), reinterpret_cast<const From*>(src.data), nest);
}

using Add = void (*)(char*, const Source&, const Nest&);

// Null where there is no kernel of ours.
Add adding(at::ScalarType to, at::ScalarType from) {
  if (to == at::kFloat && from == at::kFloat) return add<float, float>;
  if (to == at::kFloat && from == at::kBFloat16) return add<float, c10::BFloat16>;
  if (to == at::kFloat && from == at::kHalf) return add<float, c10::Half>;
  if (to == at::kDouble && from == at::kDouble) return add<double, double>;
  return nullptr;
}

}  // namespace

std::vector<int64_t> dense_strides(at::IntArrayRef shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  return strides;
}

bool is_dense(at::IntArrayRef shape, at::IntArrayRef strides) {
  int64_t stride = 1;
  bool dense = true;
  for (size_t d = shape.size(); d-- > 0;) {
    if (shape[d] == 0) return true;
    dense &= shape[d] == 1 || strides[d] == stride;
    stride *= shape[d];
  }
  return dense;
}

void combine(char* dst, at::ScalarType dtype, const Source& src, const Nest& nest, Combine how) {
  if (is_for_torch(nest)) return by_torch(dst, dtype, src, nest, how);
  if (how == Combine::kReplace && dtype == src.dtype) return kernels::cpu::copy(dst, src.data, nest, static_cast<int64_t>(c10::elementSize(dtype)));
  const Add own = how == Combine::kAdd ? adding(dtype, src.dtype) : nullptr;
  own != nullptr ? own(dst, src, nest) : by_torch(dst, dtype, src, nest, how);
}

void combine(char* dst, at::ScalarType dtype, at::IntArrayRef dst_strides, const Source& src, const std::vector<kernels::cpu::Block>& blocks, Combine how,
             Nest& nest) {
  for (const kernels::cpu::Block& block : blocks) {
    kernels::cpu::lay_out(block, src.strides, dst_strides, nest);
    combine(dst, dtype, src, nest, how);
  }
}

bool add_rows(transport::Memory& memory, char* data, const Nest& nest, bool of_source, int64_t item_bytes) {
  std::span<const Loop> outer = nest.loops;
  int64_t row_bytes = item_bytes;
  if (nest.has_rows()) {
    row_bytes *= outer.back().extent;
    outer = outer.first(outer.size() - 1);
  }
  if (!outer.empty() && row_bytes < kShortest) return false;
  std::vector<transport::Loop> loops;
  for (const Loop& loop : outer) loops.push_back({static_cast<uint64_t>(loop.extent), (of_source ? loop.src_stride : loop.dst_stride) * item_bytes});
  memory.add(data + (of_source ? nest.src_offset : nest.dst_offset) * item_bytes, row_bytes, std::move(loops));
  return true;
}

}  // namespace soap::movement
