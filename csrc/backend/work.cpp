#include "backend/work.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include "fmt/format.h"

namespace soap::backend {
namespace {

using transport::Memory;

bool is_plain(const at::Tensor& tensor) {
  return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
}

Memory memory_of(const at::Tensor& tensor) {
  return Memory(const_cast<void*>(tensor.const_data_ptr()), tensor.nbytes());
}

}  // namespace

Memory Tensors::input(const at::Tensor& tensor) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  held_.push_back(is_plain(tensor) ? tensor : tensor.resolve_conj().resolve_neg().contiguous());
  return memory_of(held_.back());
}

Memory Tensors::output(const at::Tensor& tensor) {
  if (is_plain(tensor)) {
    held_.push_back(tensor);
    return memory_of(tensor);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  copies_.emplace_back(tensor, tensor.resolve_conj().resolve_neg().clone(at::MemoryFormat::Contiguous));
  return memory_of(copies_.back().second);
}

Memory Tensors::copy(const at::Tensor& tensor) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  held_.push_back(tensor.resolve_conj().resolve_neg().clone(at::MemoryFormat::Contiguous));
  return memory_of(held_.back());
}

Memory Tensors::in_place(const at::Tensor& tensor) {
  return output(tensor);
}

void Tensors::write_back() {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  for (const auto& [tensor, copy] : copies_) tensor.copy_(copy);
}

Memory part_of(const Memory& memory, int index, int count) {
  const uint64_t num_bytes = memory.num_bytes() / count;
  return memory.cut(index * num_bytes, num_bytes);
}

SoapWork::SoapWork(std::shared_ptr<transport::Runner> group, int rank, c10d::OpType type, uint64_t sequence, const char* title, std::vector<at::Tensor> inputs,
                   std::vector<at::Tensor> outputs, Tensors tensors)
    : Work(rank, type, title, std::move(inputs)), group_(std::move(group)), sequence_(sequence), outputs_(std::move(outputs)), tensors_(std::move(tensors)) {}

void SoapWork::attach(std::shared_ptr<transport::Operation> operation) {
  operation_ = std::move(operation);
  operation_->completed = [self = c10::intrusive_ptr<SoapWork>::reclaim_copy(this)](std::exception_ptr error) { self->ended(error); };
}

void SoapWork::ended(std::exception_ptr error) {
  if (error != nullptr) {
    try {
      std::rethrow_exception(error);
    } catch (const transport::TransportError& ours) {
      const std::string what = ours.what();
      error = std::make_exception_ptr(c10::DistBackendError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, what));
    } catch (...) {
      error = std::current_exception();
    }
  } else {
    try {
      tensors_.write_back();
    } catch (...) {
      error = std::current_exception();
    }
  }
  bool has_future = false;
  {
    const std::lock_guard lock(mutex_of_end_);
    ended_ = true;
    error_ = error;
    has_future = future_ != nullptr;
  }
  finish(error);
  if (has_future) complete_future();  // without the lock: callbacks may ask this work
}

void SoapWork::complete_future() {
  if (error_ != nullptr) {
    future_->setError(error_);
  } else {
    future_->markCompleted(c10::IValue(outputs_));
  }
}

bool SoapWork::isCompleted() {
  const std::lock_guard lock(mutex_of_end_);
  return ended_;
}

bool SoapWork::isSuccess() const {
  const std::lock_guard lock(mutex_of_end_);
  return ended_ && error_ == nullptr;
}

std::exception_ptr SoapWork::exception() const {
  const std::lock_guard lock(mutex_of_end_);
  return error_;
}

int SoapWork::sourceRank() const {
  const auto* message = dynamic_cast<const transport::Message*>(operation_.get());
  TORCH_CHECK(message != nullptr, "[soap] sourceRank() may only be called on work of a receive");
  return message->peer;
}

bool SoapWork::wait(std::chrono::milliseconds timeout) {
  std::optional<transport::Clock::duration> limit;
  if (timeout > std::chrono::milliseconds::zero()) limit = timeout;
  if (!group_->wait(*operation_, limit)) {
    C10_THROW_ERROR(DistBackendError,
                    fmt::format("[soap] {} on rank {}: Operation timed out! It did not end within {} ms of a wait", operation_->call, rank_, timeout.count()));
  }
  if (const std::exception_ptr error = exception(); error != nullptr) std::rethrow_exception(error);
  return true;
}

void SoapWork::abort() {
  group_->abort(fmt::format("{} was aborted", operation_->call));
}

c10::intrusive_ptr<c10::ivalue::Future> SoapWork::getFuture() {
  bool late = false;
  {
    const std::lock_guard lock(mutex_of_end_);
    if (future_ == nullptr) {
      future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
      late = ended_;
    }
  }
  if (late) complete_future();
  return future_;
}

std::chrono::milliseconds SoapWork::getTimeout() const {
  return std::chrono::duration_cast<std::chrono::milliseconds>(operation_->timeout);
}

}  // namespace soap::backend
