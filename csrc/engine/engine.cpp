#include "engine/engine.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <chrono>
#include <map>

#include "base/error.h"
#include "fmt/ranges.h"

namespace soap::engine {
namespace {

// Memory of gradients. Autograd keeps what it is given as it is, and each is then changed in place by itself.
class Ranges {
 public:
  // Whether no other has any of its memory.
  bool add(const at::Tensor& tensor) {
    if (tensor.numel() == 0) return true;
    const auto* begin = static_cast<const std::byte*>(tensor.const_data_ptr());
    const auto* end = begin + at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size());
    const auto after = begin_to_end_.upper_bound(begin);
    if (after != begin_to_end_.end() && after->first < end) return false;
    if (after != begin_to_end_.begin() && std::prev(after)->second > begin) return false;
    begin_to_end_.emplace(begin, end);
    return true;
  }

 private:
  std::map<const std::byte*, const std::byte*> begin_to_end_;
};

// Adds what passes until its end to a part of the time.
class Spent {
 public:
  Spent(bool timed, int64_t& ns) : ns_(timed ? &ns : nullptr) {
    if (ns_ != nullptr) begin_ = std::chrono::steady_clock::now();
  }
  ~Spent() {
    if (ns_ != nullptr) *ns_ += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin_).count();
  }
  Spent(const Spent&) = delete;
  Spent& operator=(const Spent&) = delete;

 private:
  int64_t* ns_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace

void Engine::begin(State& state, const std::vector<at::Tensor>& stored) const {
  SOAP_CHECK(stored.size() == stores.size(), "{} tensors for {} stores", stored.size(), stores.size());
  for (size_t i = 0; i < stores.size(); ++i) {
    const Begin& store = stores[i];
    if (store.value < 0) continue;
    if (stored[i].sizes() != at::IntArrayRef(store.shape)) {
      const auto sizes = stored[i].sizes();
      C10_THROW_ERROR(Error, fmt::format("[engine] {} has shape [{}] here, the plan [{}]", store.name, fmt::join(sizes.begin(), sizes.end(), ", "),
                                         fmt::join(store.shape, ", ")));
    }
    state.values.tensors[store.value] = stored[i].detach();
  }
}

void Engine::run(State& state, int begin, int end, bool grad, const Host& host) {
  using Kind = Instruction::Kind;
  moving_ = nullptr;
  const at::AutoGradMode off(false);  // but where a segment's graph is recorded
  const Compute compute = [&](int segment, std::vector<at::Tensor> arguments) {
    const Spent spent(timed, spent_ns[kCompute]);
    return host.compute(segment, std::move(arguments));
  };
  for (int position = begin; position < end; ++position) {
    const Instruction& instruction = instructions[position];
    if (!grad && instruction.is_backward) continue;  // an interleaved program is evaluated
    switch (instruction.kind) {
      case Kind::kSegment: {
        const Segment& segment = segments[instruction.index];
        run_forward(state, segment, instruction.index, grad && segment.differentiable, false, compute);
        break;
      }
      case Kind::kSegmentBackward: {
        const Spent spent(timed, spent_ns[kBackward]);
        run_backward(state, instruction.index);
        break;
      }
      case Kind::kFill: move(state, instruction, false); break;
      case Kind::kGradFill: move(state, instruction, true); break;
      case Kind::kRare: host.rare(position); break;
    }
    for (const int value : instruction.frees) state.values.tensors[value].reset();
    if (!grad) {
      for (const int value : instruction.kept) state.values.tensors[value].reset();
    }
    tidy(state, instruction, grad);
  }
}

void Engine::move(State& state, const Instruction& instruction, bool of_gradients) {
  if (of_gradients && state.deferred && instruction.is_param_fill) return;
  const movement::Step& step = steps[instruction.index];
  const auto read = [&](const movement::Read& wanted) {
    if (!of_gradients) return state.values.tensors[wanted.value];
    const at::Tensor& grad = state.grads.tensors[wanted.value];
    if (!grad.defined()) return at::zeros({}, at::TensorOptions().dtype(wanted.dtype)).expand(shapes[wanted.value]);
    return grad.scalar_type() == wanted.dtype ? grad : grad.to(wanted.dtype);
  };
  const auto put = [&](int value, at::Tensor tensor) {
    if (of_gradients) {
      accumulate(state, value, tensor);
    } else {
      state.values.tensors[value] = std::move(tensor);
    }
  };
  const Spent spent(timed && step.communicates(), spent_ns[kMove]);
  moving_ = &step;
  moved_before_ = counts.exchanges + counts.all_reduces;
  step.run(read, put, counts);
  moving_ = nullptr;
}

std::vector<int> Engine::moving() const {
  if (moving_ == nullptr || moving_->ranks.empty()) return {};
  const auto done = static_cast<size_t>(counts.exchanges + counts.all_reduces - moved_before_);
  return moving_->ranks[std::min(done, moving_->ranks.size() - 1)];
}

void Engine::tidy(State& state, const Instruction& instruction, bool grad) const {
  if (grad) {
    for (const int value : instruction.released) {
      at::Tensor& copy = state.copies.tensors[value] = state.values.take(value);
      at::native::resize_bytes_cpu(copy.storage().unsafeGetStorageImpl(), 0);
    }
  }
  if (state.deferred && instruction.is_param_fill) return;
  for (const int value : instruction.dropped_copies) state.copies.tensors[value].reset();
  for (const int value : instruction.dropped_grads) state.grads.tensors[value].reset();
}

std::vector<at::Tensor> Engine::take_gradients(State& state, const std::vector<int>& values, const std::vector<at::ScalarType>& dtypes) {
  std::vector<at::Tensor> out(values.size());
  Ranges known;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] < 0 || !state.grads.has(values[i])) continue;
    out[i] = state.grads.take(values[i]);
    if (out[i].scalar_type() != dtypes[i]) out[i] = out[i].to(dtypes[i]);
    if (!out[i].is_sparse() && !known.add(out[i])) out[i] = out[i].clone();
  }
  return out;
}

}  // namespace soap::engine
