// What c10d's callers must hand over; c10::ValueError otherwise.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

namespace soap::backend {

// For c10d's own checks, which call this with what is wrong.
std::function<void(const std::string&)> invalid(const char* call);

// Dense, on the CPU.
void check_tensor(const char* call, const at::Tensor& tensor);
void check_tensors(const char* call, const std::vector<at::Tensor>& tensors);
// The one tensor of a list.
const at::Tensor& only(const char* call, const std::vector<at::Tensor>& tensors);
// A list with a tensor for each rank, of the dtype of `like`.
void check_parts(const char* call, const std::vector<at::Tensor>& parts, int num_ranks, const at::Tensor& like);
void check_root(const char* call, int64_t root, int num_ranks);

}  // namespace soap::backend
