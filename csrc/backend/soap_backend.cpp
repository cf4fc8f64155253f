#include "backend/soap_backend.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sparse_coo_tensor.h>
#include <ATen/ops/tensor.h>
#include <Python.h>

#include <mutex>
#include <set>
#include <torch/csrc/distributed/c10d/Utils.hpp>

#include "backend/checks.h"
#include "backend/meeting.h"
#include "backend/reduce.h"
#include "fmt/format.h"
#include "transport/spanning_collectives.h"

namespace soap::backend {
namespace {

using c10d::OpType;
using c10d::Work;
using transport::Memory;
using WorkPtr = c10::intrusive_ptr<Work>;
using TensorList = std::vector<at::Tensor>;

// Of this process, for leave_all_groups.
struct Groups {
  std::mutex mutex;
  std::vector<std::weak_ptr<transport::Runner>> alive;
};

Groups& groups() {
  static Groups out;
  return out;
}

// The most ranks on one machine that a group of this process has had: with fewer cores a rank that waits gives its core away at once, in small groups too.
int most_ranks(int num_ranks) {
  static std::atomic<int> most{1};
  int seen = most.load();
  while (seen < num_ranks && !most.compare_exchange_weak(seen, num_ranks)) {
  }
  return std::max(seen, num_ranks);
}

std::string of_dtype(const c10d::ReduceOp& reduce, const at::Tensor& tensor) {
  return fmt::format("({} of {})", name_of(reduce), c10::toString(tensor.scalar_type()));
}

// Waits for the group's thread, which may be in a callback that waits for Python's lock.
void leave(transport::Runner& group) {
  if (Py_IsInitialized() == 0 || PyGILState_Check() == 0) {
    group.leave();
    return;
  }
  PyThreadState* const held = PyEval_SaveThread();
  group.leave();
  PyEval_RestoreThread(held);
}

int64_t row_elements(const at::Tensor& tensor) {
  return tensor.size(0) == 0 ? 1 : tensor.numel() / tensor.size(0);
}

}  // namespace

SoapBackend::SoapBackend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int num_ranks, std::chrono::milliseconds timeout, const std::string& host)
    : Backend(rank, num_ranks), options_(c10::make_intrusive<Options>("soap", timeout)) {
  Meeting meeting = meet(store, rank, num_ranks, timeout, host);
  why_not_ = meeting.why_not;
  one_host_ = meeting.one_host;
  hosts_ = transport::Hosts::of(meeting.hosts);
  if (meeting.segment == nullptr) return;
  const std::vector<int>& here = hosts_.ranks[hosts_.host[rank]];
  transport::GroupOptions options;
  for (const int r : here) options.processes.push_back(meeting.processes[r]);
  int num_sharing = 0;  // ranks that share this one's cores, be it as another host (a container)
  std::set<int> cores;
  for (const transport::ProcessIdentity& process : meeting.processes) {
    if (process.kernel != meeting.processes[rank].kernel) continue;
    ++num_sharing;
    cores.insert(process.cores.begin(), process.cores.end());
  }
  options.timeout = timeout;
  const transport::Patience patience = transport::Patience::of(most_ranks(num_sharing), static_cast<int>(cores.size()));
  options.patience = patience;
  if (!one_host_) options.labels = here;
  group_ = std::make_shared<transport::Group>(std::move(meeting.segment), hosts_.place[rank], std::move(options));
  if (one_host_) {
    take(group_);
    return;
  }
  spanning_ = std::make_shared<transport::SpanningGroup>(hosts_, rank_, group_, connect(meeting, rank, timeout), timeout, patience);
  take(spanning_);
}

void SoapBackend::take(std::shared_ptr<transport::Runner> runner) {
  runner_ = std::move(runner);
  const std::lock_guard lock(groups().mutex);
  std::erase_if(groups().alive, [](const auto& group) { return group.expired(); });
  groups().alive.push_back(runner_);
}

SoapBackend::~SoapBackend() {
  if (runner_ != nullptr) leave(*runner_);
}

void leave_all_groups() {
  std::vector<std::weak_ptr<transport::Runner>> alive;
  {
    const std::lock_guard lock(groups().mutex);
    alive = groups().alive;
  }
  for (const auto& weak : alive) {
    if (const auto group = weak.lock()) leave(*group);
  }
}

void SoapBackend::set_random_delay(std::chrono::microseconds most) {
  if (runner_ != nullptr) runner_->set_random_delay(most);
}

void SoapBackend::setTimeout(std::chrono::milliseconds timeout) {
  options_->timeout = timeout;
  if (runner_ != nullptr) runner_->set_timeout(timeout);
  if (fallback_ != nullptr) fallback_->setTimeout(timeout);
}

uint64_t SoapBackend::getSequenceNumberForGroup() {
  return runner_ == nullptr ? fallback_->getSequenceNumberForGroup() : runner_->num_collectives();
}

void SoapBackend::abort() {
  if (runner_ != nullptr) runner_->abort("the process group was aborted");
  if (fallback_ != nullptr) fallback_->abort();
}

void SoapBackend::shutdown() {
  if (runner_ != nullptr) leave(*runner_);
  if (fallback_ != nullptr) fallback_->shutdown();
}

WorkPtr SoapBackend::run(const Call& call, std::shared_ptr<transport::Operation> operation, TensorList inputs, TensorList outputs, Tensors tensors) {
  operation->call = call.text;
  const std::string title = profiler_name_ + call.title;
  auto work = c10::make_intrusive<SoapWork>(runner_, rank_, call.type, runner_->num_collectives() + 1, title.c_str(), std::move(inputs), std::move(outputs),
                                            std::move(tensors));
  work->attach(operation);
  const auto timeout = call.timeout == c10d::kUnsetTimeout ? std::chrono::milliseconds::zero() : call.timeout;
  if (spanning_ != nullptr) {
    spanning_->submit(std::static_pointer_cast<transport::Spanning>(operation), timeout, call.blocking);
  } else {
    group_->submit(std::static_pointer_cast<transport::Collective>(operation), timeout, call.blocking);
  }
  return work;
}

WorkPtr SoapBackend::exchange(const Call& call, std::vector<Memory> outgoing, std::vector<Memory> incoming, std::vector<bool> wanted, TensorList inputs,
                              TensorList outputs, Tensors tensors) {
  std::shared_ptr<transport::Operation> operation;
  if (spanning_ != nullptr) {
    operation = spanning_exchange(call, std::move(outgoing), std::move(incoming), std::move(wanted));
  } else {
    operation = std::make_shared<transport::Exchange>(rank_, size_, std::move(outgoing), std::move(incoming), std::move(wanted));
  }
  return run(call, std::move(operation), std::move(inputs), std::move(outputs), std::move(tensors));
}

WorkPtr SoapBackend::reduce_scatter(const Call& call, std::vector<Memory> parts, const Memory& result, at::ScalarType dtype, const c10d::ReduceOp& reduce,
                                    TensorList inputs, TensorList outputs, Tensors tensors) {
  std::shared_ptr<transport::Operation> operation;
  if (spanning_ != nullptr) {
    operation = std::make_shared<transport::SpanningReduceScatter>(std::move(parts), result, make_reducers(dtype, reduce, size_));
  } else {
    operation = std::make_shared<transport::ReduceScatter>(rank_, size_, std::move(parts), result, make_reducer(dtype, reduce, size_));
  }
  return run(call, std::move(operation), std::move(inputs), std::move(outputs), std::move(tensors));
}

WorkPtr SoapBackend::broadcast(TensorList& tensors, const c10d::BroadcastOptions& options) {
  if (runner_ == nullptr) return fallback_->broadcast(tensors, options);
  const at::Tensor& tensor = only("broadcast", tensors);
  check_root("broadcast", options.rootRank, size_);
  const int root = static_cast<int>(options.rootRank);
  Tensors held;
  std::vector<Memory> incoming(size_);
  std::vector<bool> wanted(size_);
  Memory outgoing;
  if (rank_ == root) {
    outgoing = held.input(tensor);
  } else {
    incoming[root] = held.output(tensor);
    wanted[root] = true;
  }
  const Call call{OpType::BROADCAST, "broadcast", fmt::format("broadcast(from rank {})", root), options.timeout, !options.asyncOp, root};
  return exchange(call, {outgoing}, std::move(incoming), std::move(wanted), tensors, tensors, std::move(held));
}

WorkPtr SoapBackend::all_reduce(const Call& call, TensorList& tensors, const c10d::ReduceOp& reduce) {
  Tensors held;
  Memory memory;
  for (const at::Tensor& tensor : tensors) {
    held.in_place(tensor).for_each(0, tensor.nbytes(), [&](std::byte* data, uint64_t, uint64_t bytes) { memory.add(data, bytes); });
  }
  const at::ScalarType dtype = tensors[0].scalar_type();
  std::shared_ptr<transport::Operation> operation;
  if (spanning_ != nullptr) {
    operation = std::make_shared<transport::SpanningAllReduce>(memory, make_reducers(dtype, reduce, size_));
  } else {
    operation = std::make_shared<transport::AllReduce>(rank_, size_, memory, make_reducer(dtype, reduce, size_));
  }
  return run(call, std::move(operation), tensors, tensors, std::move(held));
}

WorkPtr SoapBackend::allreduce(TensorList& tensors, const c10d::AllreduceOptions& options) {
  if (runner_ == nullptr) return fallback_->allreduce(tensors, options);
  if (tensors.size() == 1 && tensors[0].is_sparse()) return allreduce_sparse(tensors, options);
  const at::Tensor& tensor = only("all_reduce", tensors);
  const Call call{OpType::ALLREDUCE, "all_reduce", "all_reduce" + of_dtype(options.reduceOp, tensor), options.timeout, !options.asyncOp};
  return all_reduce(call, tensors, options.reduceOp);
}

WorkPtr SoapBackend::allreduce_coalesced(TensorList& tensors, const c10d::AllreduceCoalescedOptions& options) {
  if (runner_ == nullptr) return fallback_->allreduce_coalesced(tensors, options);
  check_tensors("all_reduce_coalesced", tensors);
  for (const at::Tensor& tensor : tensors) {
    if (tensor.scalar_type() != tensors[0].scalar_type()) invalid("all_reduce_coalesced")("tensors must all have the same type");
  }
  const Call call{OpType::ALLREDUCE_COALESCED, "all_reduce", "all_reduce_coalesced" + of_dtype(options.reduceOp, tensors[0]), options.timeout,
                  !options.asyncOp};
  return all_reduce(call, tensors, options.reduceOp);
}

WorkPtr SoapBackend::reduce(TensorList& tensors, const c10d::ReduceOptions& options) {
  if (runner_ == nullptr) return fallback_->reduce(tensors, options);
  const at::Tensor& tensor = only("reduce", tensors);
  check_root("reduce", options.rootRank, size_);
  const int root = static_cast<int>(options.rootRank);
  Tensors held;
  std::shared_ptr<transport::Operation> operation;
  if (spanning_ != nullptr) {  // everyone's sum costs between hosts what the root's does
    const Memory memory = rank_ == root ? held.in_place(tensor) : held.copy(tensor);
    operation = std::make_shared<transport::SpanningAllReduce>(memory, make_reducers(tensor.scalar_type(), options.reduceOp, size_));
  } else {
    const Memory memory = rank_ == root ? held.in_place(tensor) : held.input(tensor);
    operation = std::make_shared<transport::Reduce>(rank_, size_, root, memory, make_reducer(tensor.scalar_type(), options.reduceOp, size_));
  }
  const Call call{OpType::REDUCE, "reduce", fmt::format("reduce{} to rank {}", of_dtype(options.reduceOp, tensor), root), options.timeout, !options.asyncOp};
  return run(call, std::move(operation), tensors, tensors, std::move(held));
}

WorkPtr SoapBackend::allgather(std::vector<TensorList>& outputs, TensorList& inputs, const c10d::AllgatherOptions& options) {
  if (runner_ == nullptr) return fallback_->allgather(outputs, inputs, options);
  const at::Tensor& input = only("all_gather", inputs);
  if (outputs.size() != 1) invalid("all_gather")(fmt::format("requires input/output tensor lists to have the same length, got 1 and {}", outputs.size()));
  check_parts("all_gather", outputs[0], size_, input);
  Tensors held;
  std::vector<Memory> incoming;
  for (const at::Tensor& output : outputs[0]) incoming.push_back(held.output(output));
  const Call call{OpType::ALLGATHER, "all_gather", "all_gather", options.timeout, !options.asyncOp};
  return exchange(call, {held.input(input)}, std::move(incoming), std::vector<bool>(size_, true), inputs, outputs[0], std::move(held));
}

WorkPtr SoapBackend::_allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) {
  if (runner_ == nullptr) return fallback_->_allgather_base(output, input, options);
  TensorList outputs{output}, inputs{input};
  check_tensors("all_gather_into_tensor", {output, input});
  if (output.scalar_type() != input.scalar_type()) invalid("all_gather_into_tensor")("output tensor must have the same type as input tensor");
  if (output.numel() != input.numel() * size_) {
    invalid("all_gather_into_tensor")(
        fmt::format("output tensor size must be equal to world_size times input tensor size: {} elements, {} times {}", output.numel(), size_, input.numel()));
  }
  Tensors held;
  const Memory whole = held.output(output);
  std::vector<Memory> incoming;
  for (int r = 0; r < size_; ++r) incoming.push_back(part_of(whole, r, size_));
  const Call call{OpType::_ALLGATHER_BASE, "all_gather", "all_gather_into_tensor", options.timeout, !options.asyncOp};
  return exchange(call, {held.input(input)}, std::move(incoming), std::vector<bool>(size_, true), inputs, outputs, std::move(held));
}

WorkPtr SoapBackend::allgather_coalesced(std::vector<TensorList>& outputs, TensorList& inputs, const c10d::AllgatherOptions& options) {
  if (runner_ == nullptr) return fallback_->allgather_coalesced(outputs, inputs, options);
  check_tensors("all_gather_coalesced", inputs);
  c10d::assertAllgatherCoalescedOutputTensorLists(invalid("all_gather_coalesced"), outputs, inputs.size(), size_);
  Tensors held;
  Memory outgoing;
  const auto add = [](Memory& to, const Memory& from) {
    from.for_each(0, from.num_bytes(), [&](std::byte* data, uint64_t, uint64_t bytes) { to.add(data, bytes); });
  };
  for (const at::Tensor& input : inputs) add(outgoing, held.input(input));
  std::vector<Memory> incoming(size_);
  TensorList flat;
  for (int r = 0; r < size_; ++r) {
    check_tensors("all_gather_coalesced", outputs[r]);
    for (const at::Tensor& output : outputs[r]) {
      add(incoming[r], held.output(output));
      flat.push_back(output);
    }
  }
  const Call call{OpType::ALLGATHER_COALESCED, "all_gather", "all_gather_coalesced", options.timeout, !options.asyncOp};
  return exchange(call, {outgoing}, std::move(incoming), std::vector<bool>(size_, true), inputs, std::move(flat), std::move(held));
}

WorkPtr SoapBackend::allgather_into_tensor_coalesced(TensorList& outputs, TensorList& inputs, const c10d::AllgatherOptions& options) {
  if (runner_ == nullptr) return fallback_->allgather_into_tensor_coalesced(outputs, inputs, options);
  constexpr const char* kCall = "all_gather_into_tensor_coalesced";
  check_tensors(kCall, inputs);
  check_tensors(kCall, outputs);
  c10d::assertInputOutputTensorListsSameSize(invalid(kCall), inputs.size(), outputs.size());
  Tensors held;
  Memory outgoing;
  std::vector<Memory> incoming(size_);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (outputs[i].nbytes() != inputs[i].nbytes() * size_) {
      invalid(kCall)(fmt::format("output {} has {} bytes, its input {} on each of {} ranks", i, outputs[i].nbytes(), inputs[i].nbytes(), size_));
    }
    const Memory own = held.input(inputs[i]), whole = held.output(outputs[i]);
    own.for_each(0, own.num_bytes(), [&](std::byte* data, uint64_t, uint64_t bytes) { outgoing.add(data, bytes); });
    for (int r = 0; r < size_; ++r) {
      const Memory part = part_of(whole, r, size_);
      part.for_each(0, part.num_bytes(), [&](std::byte* data, uint64_t, uint64_t bytes) { incoming[r].add(data, bytes); });
    }
  }
  const Call call{OpType::_ALLGATHER_BASE, "all_gather", kCall, options.timeout, !options.asyncOp};
  return exchange(call, {outgoing}, std::move(incoming), std::vector<bool>(size_, true), inputs, outputs, std::move(held));
}

WorkPtr SoapBackend::gather(std::vector<TensorList>& outputs, TensorList& inputs, const c10d::GatherOptions& options) {
  if (runner_ == nullptr) return fallback_->gather(outputs, inputs, options);
  const at::Tensor& input = only("gather", inputs);
  check_root("gather", options.rootRank, size_);
  const int root = static_cast<int>(options.rootRank);
  Tensors held;
  std::vector<Memory> incoming(size_);
  TensorList results;
  if (rank_ == root) {
    if (outputs.size() != 1) invalid("gather")("requires a single-element output list containing a list with <size> tensors.");
    check_parts("gather", outputs[0], size_, input);
    results = outputs[0];
    for (int r = 0; r < size_; ++r) incoming[r] = held.output(outputs[0][r]);
  } else if (!outputs.empty()) {
    invalid("gather")("requires empty output on non-root");
  }
  const Call call{OpType::GATHER, "gather", fmt::format("gather(to rank {})", root), options.timeout, !options.asyncOp, root};
  return exchange(call, {held.input(input)}, std::move(incoming), std::vector<bool>(size_, rank_ == root), inputs, std::move(results), std::move(held));
}

WorkPtr SoapBackend::scatter(TensorList& outputs, std::vector<TensorList>& inputs, const c10d::ScatterOptions& options) {
  if (runner_ == nullptr) return fallback_->scatter(outputs, inputs, options);
  const at::Tensor& output = only("scatter", outputs);
  check_root("scatter", options.rootRank, size_);
  const int root = static_cast<int>(options.rootRank);
  Tensors held;
  std::vector<Memory> outgoing(size_), incoming(size_);
  std::vector<bool> wanted(size_);
  TensorList sources;
  if (rank_ == root) {
    if (inputs.size() != 1) invalid("scatter")("requires a single-element input list containing a list with <size> tensors");
    check_parts("scatter", inputs[0], size_, output);
    sources = inputs[0];
    for (int r = 0; r < size_; ++r) outgoing[r] = held.input(inputs[0][r]);
  } else if (!inputs.empty()) {
    invalid("scatter")("requires empty input on non-root");
  }
  incoming[root] = held.output(output);
  wanted[root] = true;
  if (size_ == 1) outgoing.resize(1);
  const Call call{OpType::SCATTER, "scatter", fmt::format("scatter(from rank {})", root), options.timeout, !options.asyncOp, root};
  return exchange(call, std::move(outgoing), std::move(incoming), std::move(wanted), std::move(sources), outputs, std::move(held));
}

WorkPtr SoapBackend::reduce_scatter(TensorList& outputs, std::vector<TensorList>& inputs, const c10d::ReduceScatterOptions& options) {
  if (runner_ == nullptr) return fallback_->reduce_scatter(outputs, inputs, options);
  const at::Tensor& output = only("reduce_scatter", outputs);
  if (inputs.size() != 1) invalid("reduce_scatter")("requires a single-element input list containing a list with <size> tensors");
  check_parts("reduce_scatter", inputs[0], size_, output);
  if (inputs[0][rank_].numel() != output.numel()) {
    invalid("reduce_scatter")(fmt::format("the part for this rank has {} elements, its output {}", inputs[0][rank_].numel(), output.numel()));
  }
  Tensors held;
  std::vector<Memory> parts;
  for (const at::Tensor& input : inputs[0]) parts.push_back(held.input(input));
  const Memory result = held.output(output);
  const Call call{OpType::REDUCE_SCATTER, "reduce_scatter", "reduce_scatter" + of_dtype(options.reduceOp, output), options.timeout, !options.asyncOp};
  return reduce_scatter(call, std::move(parts), result, output.scalar_type(), options.reduceOp, inputs[0], outputs, std::move(held));
}

WorkPtr SoapBackend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) {
  TensorList outputs{output}, inputs{input};
  if (runner_ == nullptr) return fallback_->_reduce_scatter_base(output, input, options);
  return reduce_scatter_tensor_coalesced(outputs, inputs, options);
}

WorkPtr SoapBackend::reduce_scatter_tensor_coalesced(TensorList& outputs, TensorList& inputs, const c10d::ReduceScatterOptions& options) {
  if (runner_ == nullptr) return fallback_->reduce_scatter_tensor_coalesced(outputs, inputs, options);
  constexpr const char* kCall = "reduce_scatter_tensor";
  check_tensors(kCall, outputs);
  check_tensors(kCall, inputs);
  c10d::assertInputOutputTensorListsSameSize(invalid(kCall), inputs.size(), outputs.size());
  Tensors held;
  std::vector<Memory> parts(size_);
  Memory result;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].scalar_type() != outputs[0].scalar_type() || outputs[i].scalar_type() != outputs[0].scalar_type()) {
      invalid(kCall)("input and output tensors must all have the same type");
    }
    if (inputs[i].numel() != outputs[i].numel() * size_) {
      invalid(kCall)(fmt::format("input tensor must be the same size as output size times world size: {} elements, {} times {}", inputs[i].numel(),
                                 outputs[i].numel(), size_));
    }
    const Memory whole = held.input(inputs[i]), own = held.output(outputs[i]);
    own.for_each(0, own.num_bytes(), [&](std::byte* data, uint64_t, uint64_t bytes) { result.add(data, bytes); });
    for (int r = 0; r < size_; ++r) {
      const Memory part = part_of(whole, r, size_);
      part.for_each(0, part.num_bytes(), [&](std::byte* data, uint64_t, uint64_t bytes) { parts[r].add(data, bytes); });
    }
  }
  const Call call{OpType::_REDUCE_SCATTER_BASE, "reduce_scatter", kCall + of_dtype(options.reduceOp, outputs[0]), options.timeout, !options.asyncOp};
  return reduce_scatter(call, std::move(parts), result, outputs[0].scalar_type(), options.reduceOp, inputs, outputs, std::move(held));
}

WorkPtr SoapBackend::alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits, std::vector<int64_t>& input_splits,
                                   const c10d::AllToAllOptions& options) {
  if (runner_ == nullptr) return fallback_->alltoall_base(output, input, output_splits, input_splits, options);
  check_tensors("all_to_all_single", {output, input});
  if (output.scalar_type() != input.scalar_type()) invalid("all_to_all_single")("input and output tensors must have the same type");
  c10d::checkSplitSizes(input_splits, input, size_);
  c10d::checkSplitSizes(output_splits, output, size_);
  Tensors held;
  const auto cut = [&](const Memory& whole, const at::Tensor& tensor, const std::vector<int64_t>& splits) {
    std::vector<Memory> parts(size_);
    uint64_t begin = 0;
    for (int r = 0; r < size_; ++r) {
      const int64_t rows = splits.empty() ? tensor.size(0) / size_ : splits[r];
      const uint64_t num_bytes = rows * row_elements(tensor) * tensor.element_size();
      whole.for_each(begin, num_bytes, [&](std::byte* data, uint64_t, uint64_t bytes) { parts[r].add(data, bytes); });
      begin += num_bytes;
    }
    return parts;
  };
  auto incoming = cut(held.output(output), output, output_splits);
  auto outgoing = cut(held.input(input), input, input_splits);
  const Call call{OpType::ALLTOALL_BASE, "all_to_all", "all_to_all_single", options.timeout, !options.asyncOp};
  return exchange(call, std::move(outgoing), std::move(incoming), std::vector<bool>(size_, true), {input}, {output}, std::move(held));
}

WorkPtr SoapBackend::alltoall(TensorList& outputs, TensorList& inputs, const c10d::AllToAllOptions& options) {
  if (runner_ == nullptr) return fallback_->alltoall(outputs, inputs, options);
  c10d::assertAllToAllTensorListSizes(invalid("all_to_all"), outputs.size(), inputs.size(), size_);
  check_tensors("all_to_all", outputs);
  check_tensors("all_to_all", inputs);
  Tensors held;
  std::vector<Memory> outgoing, incoming;
  for (const at::Tensor& output : outputs) incoming.push_back(held.output(output));
  for (const at::Tensor& input : inputs) outgoing.push_back(held.input(input));
  const Call call{OpType::ALLTOALL, "all_to_all", "all_to_all", options.timeout, !options.asyncOp};
  return exchange(call, std::move(outgoing), std::move(incoming), std::vector<bool>(size_, true), inputs, outputs, std::move(held));
}

WorkPtr SoapBackend::barrier(const c10d::BarrierOptions& options) {
  if (runner_ == nullptr) return fallback_->barrier(options);
  const Call call{OpType::BARRIER, "barrier", "barrier", options.timeout, !options.asyncOp};
  return exchange(call, {Memory()}, std::vector<Memory>(size_), std::vector<bool>(size_), {}, {}, {});
}

}  // namespace soap::backend
