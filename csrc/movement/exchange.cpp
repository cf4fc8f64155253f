#include "movement/exchange.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include "movement/sources.h"
#include "movement/strided.h"

namespace soap::movement {

using transport::Memory;

Exchange::Exchange(Packing packing, std::vector<int> to, Assembly assembly, std::vector<int> from, int rank, int num_ranks)
    : packing_(std::move(packing)), assembly_(std::move(assembly)), to_(std::move(to)), from_(std::move(from)), rank_(rank), num_ranks_(num_ranks) {
  SOAP_CHECK(static_cast<int>(to_.size()) == packing_.num_peers(), "{} ranks for {} peers", to_.size(), packing_.num_peers());
  SOAP_CHECK(static_cast<int>(from_.size()) == assembly_.num_messages(), "{} ranks for {} messages", from_.size(), assembly_.num_messages());
  for (const auto* ranks : {&to_, &from_}) {
    for (const int r : *ranks) SOAP_CHECK(r >= 0 && r < num_ranks && r != rank, "rank {} of {} exchanges with rank {}", rank, num_ranks, r);
  }
  sums_ = assembly_.sums_all(rank, num_ranks, from_);
}

std::vector<at::Tensor> Exchange::run(backend::SoapBackend& backend, const std::vector<at::Tensor>& outgoing, const std::vector<at::Tensor>& own,
                                      const std::vector<std::optional<at::Tensor>>& places) const {
  std::vector<at::Tensor> held;
  std::vector<Memory> sent = packing_.memory(outgoing, held), to_ranks(num_ranks_), from_ranks(num_ranks_);
  for (size_t i = 0; i < to_.size(); ++i) to_ranks[to_[i]] = std::move(sent[i]);
  if (sums_ && backend.shares_memory()) {
    Assembly::Sums sums = assembly_.sums(own);
    to_ranks[rank_] = std::move(sums.own);
    backend.exchange_sum(std::move(to_ranks), sums.memory, sums.dtype);
    return std::move(sums.results);
  }
  Assembly::Landing landing = assembly_.land(own, places);
  for (size_t m = 0; m < from_.size(); ++m) from_ranks[from_[m]] = landing.incoming[m];
  backend.exchange_memory(std::move(to_ranks), std::move(from_ranks));
  return assembly_.finish(std::move(landing), own);
}

std::vector<at::Tensor> all_reduce(backend::SoapBackend& backend, const std::vector<at::Tensor>& tensors, bool maximum) {
  const at::NoGradGuard no_grad;
  SOAP_CHECK(!tensors.empty(), "an all-reduce of no tensors");
  const at::ScalarType dtype = tensors.front().scalar_type();
  std::vector<at::Tensor> sources = plain(tensors);
  // Results begin where fresh memory would, so that nobody has to move them there.
  const int64_t stretch = static_cast<int64_t>(kAlignment) / bytes_of(dtype);
  std::vector<int64_t> begins;
  Memory memory, sums;
  int64_t total = 0;
  for (at::Tensor& source : sources) {
    SOAP_CHECK(source.scalar_type() == dtype, "{} and {} in one all-reduce", c10::toString(dtype), c10::toString(source.scalar_type()));
    if (!is_dense(source.sizes(), source.strides())) source = source.contiguous();
    memory.add(const_cast<char*>(data_of(source)), source.nbytes());
    begins.push_back(total);
    total += (source.numel() + stretch - 1) / stretch * stretch;
  }
  const at::Tensor flat = at::empty({total}, at::TensorOptions().dtype(dtype));
  std::vector<at::Tensor> out;
  for (size_t i = 0; i < sources.size(); ++i) {
    const at::Tensor& result = out.emplace_back(flat.as_strided(sources[i].sizes(), dense_strides(sources[i].sizes()), begins[i]));
    sums.add(const_cast<char*>(data_of(result)), result.nbytes());
  }
  backend.all_reduce_memory(memory, sums, dtype, maximum);
  return out;
}

}  // namespace soap::movement
