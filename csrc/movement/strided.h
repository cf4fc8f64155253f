// Boxes of tensors, copied and combined: rows by the kernels; what is large and has no rows, or may be shared among threads, by torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "kernels/cpu/box_copy.h"
#include "movement/movement.h"
#include "transport/memory.h"

namespace soap::movement {

std::vector<int64_t> dense_strides(at::IntArrayRef shape);
// Elements follow each other in memory, whatever the strides of dims of size 1.
bool is_dense(at::IntArrayRef shape, at::IntArrayRef strides);

struct Source {
  const char* data = nullptr;
  at::ScalarType dtype = at::kFloat;
  at::IntArrayRef strides;
};

// Combines a nest of elements, or a piece, with what is at `dst`. Memory is aligned to its type. `nest` is memory for the loops of the piece.
void combine(char* dst, at::ScalarType dtype, const Source& src, const kernels::cpu::Nest& nest, Combine how);
void combine(char* dst, at::ScalarType dtype, at::IntArrayRef dst_strides, const Source& src, const std::vector<kernels::cpu::Block>& blocks, Combine how,
             kernels::cpu::Nest& nest);

// Adds what a nest reads from (or writes to) `data` as rows, in its order. False, and nothing is added, where rows are so short that a copy of them all to one
// stretch takes less time.
bool add_rows(transport::Memory& memory, char* data, const kernels::cpu::Nest& nest, bool of_source, int64_t item_bytes);

}  // namespace soap::movement
