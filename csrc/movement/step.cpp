#include "movement/step.h"

#include <ATen/ops/empty.h>

#include "movement/sources.h"
#include "movement/strided.h"

namespace soap::movement {
namespace {

// With the strides of what comes by wire, also along dims of size 1, and where a fresh tensor would lie: kernels choose by both how they sum, and replicas must
// agree to the last bit.
at::Tensor settled(at::Tensor tensor) {
  const std::vector<int64_t> strides = dense_strides(tensor.sizes());
  if (tensor.strides() != at::IntArrayRef(strides)) {
    tensor = tensor.contiguous();
    if (tensor.strides() != at::IntArrayRef(strides)) tensor = tensor.as_strided(tensor.sizes(), strides);
  }
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0 ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

std::vector<at::Tensor> all(const std::vector<Read>& wanted, const std::function<at::Tensor(const Read&)>& read) {
  std::vector<at::Tensor> out;
  out.reserve(wanted.size());
  for (const Read& one : wanted) out.push_back(read(one));
  return out;
}

}  // namespace

void Step::run(const std::function<at::Tensor(const Read&)>& read, const std::function<void(int, at::Tensor)>& put, Counts& counts) const {
  if (same.has_value()) {
    const at::Tensor source = read(same->source);
    put(same->result, settled(source.scalar_type() == same->source.dtype ? source : source.to(same->source.dtype)));
    return;
  }
  if (pieces.has_value()) {
    std::vector<at::Tensor> made;
    if (pieces->exchange.has_value()) {
      made = pieces->exchange->run(*pieces->backend, all(pieces->outgoing, read), all(pieces->own, read), {});
      ++counts.exchanges;
      counts.exchanged_bytes += pieces->num_bytes;
    } else {
      made = pieces->assembly->unpack(all(pieces->own, read), {}, {});
    }
    for (size_t i = 0; i < made.size(); ++i) put(pieces->results[i], std::move(made[i]));
  }
  for (const Bucket& bucket : buckets) {
    const std::vector<at::Tensor> sources = all(bucket.sources, read);
    const std::vector<at::Tensor> sums = all_reduce(*bucket.backend, sources, bucket.maximum);
    ++counts.all_reduces;
    for (size_t i = 0; i < sums.size(); ++i) {
      counts.reduced_bytes += static_cast<int64_t>(sources[i].nbytes());
      for (const int value : bucket.reached[i]) put(value, sums[i]);
    }
    for (const auto& [value, shape] : bucket.empty) put(value, at::empty(shape, at::TensorOptions().dtype(bucket.sources.front().dtype)));
  }
}

}  // namespace soap::movement
