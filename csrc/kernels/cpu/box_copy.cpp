#include "kernels/cpu/box_copy.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace soap::kernels::cpu {
namespace {

// `count` stretches of `length` positions, each `src_step` and `dst_step` after the one before.
struct Series {
  int64_t src = 0, dst = 0, length = 0;
  int64_t count = 1, src_step = 0, dst_step = 0;
};

// Stretches that neither end interrupts, those at one distance together.
std::vector<Series> series_of(const Runs& src, const Runs& dst) {
  std::vector<Series> out;
  size_t s = 0, d = 0;
  int64_t src_done = 0, dst_done = 0;  // of the runs s and d
  while (s < src.size() && d < dst.size()) {
    const int64_t from = src[s].begin + src_done, to = dst[d].begin + dst_done;
    const int64_t length = std::min(src[s].end - from, dst[d].end - to);
    if (length > 0) {
      Series* last = out.empty() ? nullptr : &out.back();
      if (last != nullptr && last->length == length && last->count == 1) {
        last->src_step = from - last->src;
        last->dst_step = to - last->dst;
      }
      if (last != nullptr && last->length == length && from == last->src + last->count * last->src_step && to == last->dst + last->count * last->dst_step) {
        ++last->count;
      } else {
        out.push_back({.src = from, .dst = to, .length = length});
      }
    }
    src_done += length;
    dst_done += length;
    if (src[s].begin + src_done == src[s].end) ++s, src_done = 0;
    if (dst[d].begin + dst_done == dst[d].end) ++d, dst_done = 0;
  }
  SOAP_CHECK(s == src.size() && d == dst.size(), "{} and {} runs of another number of positions", src.size(), dst.size());
  return out;
}

template <int64_t kSize>
void copy_rows(char* dst, const char* src, const Nest& nest, std::span<const Loop> loops, int64_t item_size) {
  auto visit = [&](int64_t from, int64_t to) { std::memcpy(dst + to * item_size, src + from * item_size, kSize); };
  for_each_row(loops, nest.src_offset, nest.dst_offset, visit);
}

}  // namespace

std::vector<Block> blocks_of(const std::vector<Runs>& src, const std::vector<Runs>& dst) {
  SOAP_CHECK(src.size() == dst.size(), "a box of {} dims goes to one of {}", src.size(), dst.size());
  std::vector<Block> blocks = {{}};
  for (size_t dim = 0; dim < src.size(); ++dim) {
    std::vector<Block> grown;
    const std::vector<Series> series = series_of(src[dim], dst[dim]);
    for (const Block& outer : blocks) {
      for (const Series& s : series) {
        Block& block = grown.emplace_back(outer);
        block.src_begin.push_back(s.src);
        block.dst_begin.push_back(s.dst);
        if (s.count > 1) block.axes.push_back({.dim = static_cast<int>(dim), .extent = s.count, .src_step = s.src_step, .dst_step = s.dst_step});
        if (s.length > 1) block.axes.push_back({.dim = static_cast<int>(dim), .extent = s.length});
      }
    }
    blocks = std::move(grown);
  }
  return blocks;
}

int64_t Nest::elements() const {
  int64_t out = 1;
  for (const Loop& loop : loops) out *= loop.extent;
  return out;
}

void Nest::add(Loop inner) {
  if (inner.extent == 1) return;
  if (!loops.empty()) {
    Loop& outer = loops.back();
    if (outer.src_stride == inner.extent * inner.src_stride && outer.dst_stride == inner.extent * inner.dst_stride) {
      outer = {outer.extent * inner.extent, inner.src_stride, inner.dst_stride};
      return;
    }
  }
  loops.push_back(inner);
}

void lay_out(const Block& block, std::span<const int64_t> src_strides, std::span<const int64_t> dst_strides, Nest& nest) {
  nest.src_offset = nest.dst_offset = 0;
  for (size_t d = 0; d < block.src_begin.size(); ++d) {
    nest.src_offset += block.src_begin[d] * src_strides[d];
    nest.dst_offset += block.dst_begin[d] * dst_strides[d];
  }
  nest.loops.clear();
  for (const Axis& axis : block.axes) nest.add({axis.extent, axis.src_step * src_strides[axis.dim], axis.dst_step * dst_strides[axis.dim]});
}

void copy(char* dst, const char* src, const Nest& nest, int64_t item_size) {
  std::span<const Loop> loops = nest.loops;
  int64_t row_bytes = item_size;
  if (nest.has_rows()) {
    row_bytes *= loops.back().extent;
    loops = loops.first(loops.size() - 1);
  }
  switch (row_bytes) {  // a call for each of these takes longer than the bytes
    case 1: return copy_rows<1>(dst, src, nest, loops, item_size);
    case 2: return copy_rows<2>(dst, src, nest, loops, item_size);
    case 4: return copy_rows<4>(dst, src, nest, loops, item_size);
    case 8: return copy_rows<8>(dst, src, nest, loops, item_size);
    case 16: return copy_rows<16>(dst, src, nest, loops, item_size);
    default: break;
  }
  auto visit = [&](int64_t from, int64_t to) { std::memcpy(dst + to * item_size, src + from * item_size, row_bytes); };
  for_each_row(loops, nest.src_offset, nest.dst_offset, visit);
}

}  // namespace soap::kernels::cpu
