#include "backend/checks.h"

#include <c10/util/Exception.h>

#include "fmt/format.h"

namespace soap::backend {

std::function<void(const std::string&)> invalid(const char* call) {
  return [call](const std::string& what) { C10_THROW_ERROR(ValueError, fmt::format("[soap] {}: {}", call, what)); };
}

void check_tensor(const char* call, const at::Tensor& tensor) {
  if (tensor.layout() != at::kStrided) invalid(call)(fmt::format("only dense tensors, got layout {}", c10::str(tensor.layout())));
  if (!tensor.device().is_cpu()) {
    invalid(call)(
        fmt::format("a tensor on {}: this backend serves CPU tensors; init_process_group(\"cpu:soap,cuda:nccl\") serves both", tensor.device().str()));
  }
}

void check_tensors(const char* call, const std::vector<at::Tensor>& tensors) {
  if (tensors.empty()) invalid(call)("requires a non-empty tensor list");
  for (const at::Tensor& tensor : tensors) check_tensor(call, tensor);
}

const at::Tensor& only(const char* call, const std::vector<at::Tensor>& tensors) {
  if (tensors.size() != 1) invalid(call)(fmt::format("requires a single-element tensor list, got {} tensors", tensors.size()));
  check_tensor(call, tensors[0]);
  return tensors[0];
}

void check_parts(const char* call, const std::vector<at::Tensor>& parts, int num_ranks, const at::Tensor& like) {
  if (static_cast<int>(parts.size()) != num_ranks) {
    invalid(call)(fmt::format("a list of {} tensors for {} ranks", parts.size(), num_ranks));
  }
  for (std::size_t i = 0; i < parts.size(); ++i) {
    check_tensor(call, parts[i]);
    if (parts[i].scalar_type() != like.scalar_type()) {
      invalid(call)(
          fmt::format("invalid tensor type at index {} (expected {}, got {})", i, c10::toString(like.scalar_type()), c10::toString(parts[i].scalar_type())));
    }
  }
}

void check_root(const char* call, int64_t root, int num_ranks) {
  if (root < 0 || root >= num_ranks) invalid(call)(fmt::format("invalid root rank: {}", root));
}

}  // namespace soap::backend
