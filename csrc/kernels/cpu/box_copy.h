// Copies of boxes between strided memory, which packing and unpacking a movement is made of.
//
// A box is a product of lists of runs, one list per dim, and so are the places that it is read from and written to. Where runs follow each other
// at one distance they are one more loop, so that a box is nearly always one nest of loops (a Block); several where they don't. The strides of
// memory are known when it is there: with them loops are merged, and the innermost becomes a row, copied as a whole. Includes nothing of torch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/index_set.h"

namespace soap::kernels::cpu {

using Runs = std::vector<Run>;  // in the order in which the box has them

struct Axis {
  int dim = 0;
  int64_t extent = 0;                  // more than 1
  int64_t src_step = 1, dst_step = 1;  // in positions of the dim
};

struct Block {
  std::vector<int64_t> src_begin, dst_begin;  // positions by dim
  std::vector<Axis> axes;                     // outermost first
};

// How the box at `src` comes to `dst`. Throws InternalError where they aren't of one shape. No elements: no blocks.
std::vector<Block> blocks_of(const std::vector<Runs>& src, const std::vector<Runs>& dst);

struct Loop {
  int64_t extent = 0;
  int64_t src_stride = 0, dst_stride = 0;  // elements
  bool operator==(const Loop&) const = default;
};

struct Nest {
  int64_t src_offset = 0, dst_offset = 0;  // elements
  std::vector<Loop> loops;                 // outermost first; the innermost is the row where both strides are 1

  bool has_rows() const { return !loops.empty() && loops.back().src_stride == 1 && loops.back().dst_stride == 1; }
  int64_t elements() const;
  // Inside of those that are there: merged with the innermost where it can be.
  void add(Loop inner);
};

// The block as loops over memory with these strides (elements, by dim), as few as there can be without changing their order. `nest` is written anew: its
// memory is used again.
void lay_out(const Block& block, std::span<const int64_t> src_strides, std::span<const int64_t> dst_strides, Nest& nest);

// visit(src, dst), offsets in elements, for the places at which each row, or each element where `loops` are all of a nest, begins.
template <class Visit>
void for_each_row(std::span<const Loop> loops, int64_t src, int64_t dst, Visit& visit) {
  if (loops.empty()) {
    visit(src, dst);
    return;
  }
  const Loop loop = loops.front();
  if (loops.size() == 1) {
    for (int64_t i = 0; i < loop.extent; ++i, src += loop.src_stride, dst += loop.dst_stride) visit(src, dst);
    return;
  }
  for (int64_t i = 0; i < loop.extent; ++i, src += loop.src_stride, dst += loop.dst_stride) for_each_row(loops.subspan(1), src, dst, visit);
}

// Elements of `item_size` bytes; the two may not overlap. Pointers need no alignment.
void copy(char* dst, const char* src, const Nest& nest, int64_t item_size);

// dst += src, in the type of dst, to which src is converted.
template <class To, class From>
void add(To* dst, const From* src, const Nest& nest) {
  const std::span<const Loop> loops = nest.loops;
  const Loop row = loops.empty() ? Loop{1, 1, 1} : loops.back();
  const bool dense = row.src_stride == 1 && row.dst_stride == 1;
  auto visit = [&](int64_t from, int64_t to) {
    const From* in = src + from;
    To* out = dst + to;
    if (dense) {
      for (int64_t i = 0; i < row.extent; ++i) out[i] += static_cast<To>(in[i]);
    } else {
      for (int64_t i = 0; i < row.extent; ++i) out[i * row.dst_stride] += static_cast<To>(in[i * row.src_stride]);
    }
  };
  for_each_row(loops.first(loops.empty() ? 0 : loops.size() - 1), nest.src_offset, nest.dst_offset, visit);
}

}  // namespace soap::kernels::cpu
