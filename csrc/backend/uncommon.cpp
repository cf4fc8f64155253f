// What is made of other operations: sums of sparse tensors, the monitored barrier.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sparse_coo_tensor.h>

#include <chrono>
#include <limits>
#include <optional>

#include "backend/reduce.h"
#include "backend/soap_backend.h"
#include "fmt/format.h"
#include "fmt/ranges.h"
#include "transport/spanning_collectives.h"

namespace soap::backend {
namespace {

using c10d::OpType;
using transport::Memory;
using Milliseconds = std::chrono::milliseconds;

}  // namespace

// The exchanges of ranks on several hosts: who sends to whom follows from the call.
std::shared_ptr<transport::Operation> SoapBackend::spanning_exchange(const Call& call, std::vector<Memory> outgoing, std::vector<Memory> incoming,
                                                                     std::vector<bool> wanted) const {
  std::vector<bool> sends(size_);
  switch (call.type) {
    case OpType::BARRIER: return std::make_shared<transport::SpanningBarrier>();
    case OpType::BROADCAST: return std::make_shared<transport::SpanningBroadcast>(call.root, rank_ == call.root ? outgoing[0] : incoming[call.root]);
    case OpType::GATHER: {
      std::vector<Memory> to(size_);
      to[call.root] = outgoing[0];
      sends[call.root] = true;
      return std::make_shared<transport::SpanningExchange>(std::move(to), std::move(sends), std::move(incoming), std::move(wanted));
    }
    case OpType::SCATTER:
    case OpType::ALLTOALL:
    case OpType::ALLTOALL_BASE:
      sends.assign(size_, call.type != OpType::SCATTER || rank_ == call.root);
      return std::make_shared<transport::SpanningExchange>(std::move(outgoing), std::move(sends), std::move(incoming), std::move(wanted));
    default: return std::make_shared<transport::SpanningAllGather>(outgoing[0], std::move(incoming));
  }
}

// The tensors of all ranks, `rows[r]` rows from rank r.
std::vector<at::Tensor> SoapBackend::gather_uneven(const at::Tensor& input, const std::vector<int64_t>& rows, std::chrono::milliseconds timeout) {
  Tensors held;
  std::vector<at::Tensor> outputs;
  std::vector<Memory> incoming;
  for (int r = 0; r < size_; ++r) {
    std::vector<int64_t> sizes = input.sizes().vec();
    sizes[0] = rows[r];
    outputs.push_back(at::empty(sizes, input.options()));
    incoming.push_back(held.output(outputs.back()));
  }
  const Call call{OpType::ALLGATHER, "all_gather", "all_gather of a sparse tensor", timeout, true};
  exchange(call, {held.input(input)}, std::move(incoming), std::vector<bool>(size_, true), {input}, outputs, std::move(held))->wait();
  return outputs;
}

// Gathers the entries of all ranks and adds them up: blocks until all have come, also where it was called without blocking.
c10::intrusive_ptr<c10d::Work> SoapBackend::allreduce_sparse(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) {
  if (runner_ == nullptr) return fallback_->allreduce(tensors, options);
  TORCH_CHECK_VALUE(tensors.size() == 1 && tensors[0].is_sparse() && tensors[0].device().is_cpu(), "[soap] all_reduce: requires one sparse CPU tensor");
  TORCH_CHECK_VALUE(options.reduceOp == c10d::ReduceOp::SUM, "[soap] all_reduce: sparse tensors can only be summed, not ", name_of(options.reduceOp));
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  at::Tensor& tensor = tensors[0];
  const at::Tensor input = tensor.coalesce();
  const at::Tensor indices = input.indices().t().contiguous(), values = input.values().contiguous();
  std::vector<int64_t> rows(size_);
  {
    at::Tensor counts = at::empty({size_}, at::kLong), own = at::empty({1}, at::kLong);
    own.fill_(values.size(0));
    c10d::AllgatherOptions gather_options;
    gather_options.timeout = options.timeout;
    gather_options.asyncOp = false;
    _allgather_base(counts, own, gather_options)->wait();
    std::copy_n(counts.const_data_ptr<int64_t>(), size_, rows.begin());
  }
  const at::Tensor all_indices = at::cat(gather_uneven(indices, rows, options.timeout)).t().contiguous(),
                   all_values = at::cat(gather_uneven(values, rows, options.timeout));
  // One sum after another, in the order of the ranks.
  const at::Tensor sum = at::sparse_coo_tensor(all_indices, all_values, tensor.sizes(), all_values.options().layout(at::kSparse)).coalesce();
  tensor.copy_(sum);
  auto done = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
  done->markCompleted(c10::IValue(std::vector<at::Tensor>{tensor}));
  return c10d::Work::create_from_future(done);
}

void SoapBackend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  if (!shares_memory()) {
    fallback_->monitoredBarrier(options, wait_all_ranks);
    return;
  }
  const Milliseconds timeout = options.timeout == c10d::kUnsetTimeout ? options_->timeout : options.timeout;
  const int tag = std::numeric_limits<int>::min() + static_cast<int>(num_monitored_++ % 1024);  // one that users don't have
  const auto post = [&](int peer, bool sends) {
    auto message = std::make_shared<transport::Message>();
    message->peer = peer;
    message->tag = tag;
    message->call = fmt::format("monitored_barrier with rank {}", peer);
    if (sends) {
      group_->send(message, timeout);
    } else {
      group_->receive(message, timeout + Milliseconds(1000));
    }
    return message;
  };
  // Whether it came in time.
  const auto came = [&](const transport::MessagePtr& message, Milliseconds limit) {
    if (group_->wait(*message, limit)) return message->error == nullptr;
    group_->withdraw(message);
    return false;
  };
  if (rank_ != 0) {
    post(0, true);
    const auto answer = post(0, false);
    TORCH_CHECK(
        came(answer, timeout), "Rank ", rank_,
        " successfully reached monitoredBarrier, but received errors while waiting for send/recv from rank 0. Please check rank 0 logs for faulty rank.");
    return;
  }
  const auto begin = transport::Clock::now();
  std::vector<int> absent;
  for (int r = 1; r < size_; ++r) {
    const auto left = timeout - std::chrono::duration_cast<Milliseconds>(transport::Clock::now() - begin);
    TORCH_CHECK(wait_all_ranks || left.count() > 0, "Rank 0 timed out in monitoredBarrier after ", timeout.count(), " ms");
    if (came(post(r, false), std::max(left, Milliseconds(1)))) continue;
    absent.push_back(r);
    if (!wait_all_ranks) break;
  }
  TORCH_CHECK(absent.empty(), absent.size() == 1 ? "Rank " : "Ranks ", fmt::format("{}", fmt::join(absent, ", ")), " failed to pass monitoredBarrier in ",
              timeout.count(), " ms");
  for (int r = 1; r < size_; ++r) post(r, true);
}

}  // namespace soap::backend
