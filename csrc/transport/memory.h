// Pieces of memory that are read or written as if they were one, and how they are summed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

namespace soap::transport {

struct Loop {
  uint64_t extent = 0;
  int64_t stride = 0;  // bytes
};

// Rows of bytes, one or a nest of loops over them.
struct Piece {
  std::byte* data = nullptr;
  uint64_t row_bytes = 0;
  uint64_t num_bytes = 0;   // of all rows
  std::vector<Loop> loops;  // outermost first; none: one row

  // visit(pointer, offset from `begin`, bytes) for the parts of [begin, end) that lie together, in order.
  template <class Visit>
  void for_each(uint64_t begin, uint64_t end, Visit visit) const {
    if (loops.empty()) {
      visit(data + begin, uint64_t{0}, end - begin);
      return;
    }
    const Loop& inner = loops.back();
    uint64_t row = begin / row_bytes, inside = begin % row_bytes, at = begin;
    while (at < end) {
      std::byte* first = data;
      uint64_t index = row / inner.extent;
      for (std::size_t l = loops.size() - 1; l-- > 0;) {
        first += static_cast<int64_t>(index % loops[l].extent) * loops[l].stride;
        index /= loops[l].extent;
      }
      for (uint64_t i = row % inner.extent; i < inner.extent && at < end; ++i, ++row, inside = 0) {
        const uint64_t bytes = std::min(row_bytes - inside, end - at);
        visit(first + static_cast<int64_t>(i) * inner.stride + inside, at - begin, bytes);
        at += bytes;
      }
    }
  }
};

class Memory {
 public:
  Memory() = default;
  Memory(void* data, uint64_t num_bytes) { add(data, num_bytes); }

  void add(void* data, uint64_t num_bytes) { add(data, num_bytes, {}); }
  // Rows of `row_bytes` each.
  void add(void* data, uint64_t row_bytes, std::vector<Loop> loops) {
    uint64_t num_bytes = row_bytes;
    for (const Loop& loop : loops) num_bytes *= loop.extent;
    if (num_bytes == 0) return;
    pieces_.push_back({static_cast<std::byte*>(data), row_bytes, num_bytes, std::move(loops)});
    num_bytes_ += num_bytes;
  }

  uint64_t num_bytes() const { return num_bytes_; }

  // visit(pointer, offset from `begin`, bytes) for the parts of [begin, begin + num_bytes), in order.
  template <class Visit>
  void for_each(uint64_t begin, uint64_t num_bytes, Visit visit) const {
    uint64_t at = 0;
    const uint64_t end = begin + num_bytes;
    for (const Piece& piece : pieces_) {
      const uint64_t from = std::max(at, begin), to = std::min(at + piece.num_bytes, end);
      if (from < to) piece.for_each(from - at, to - at, [&](std::byte* data, uint64_t offset, uint64_t bytes) { visit(data, from - begin + offset, bytes); });
      at += piece.num_bytes;
      if (at >= end) return;
    }
  }

  // What of [begin, begin + num_bytes) there is.
  Memory cut(uint64_t begin, uint64_t num_bytes) const {
    Memory out;
    for_each(begin, num_bytes, [&](std::byte* data, uint64_t, uint64_t bytes) { out.add(data, bytes); });
    return out;
  }

  void add(const Memory& other) {
    pieces_.insert(pieces_.end(), other.pieces_.begin(), other.pieces_.end());
    num_bytes_ += other.num_bytes_;
  }

  void read(uint64_t begin, uint64_t num_bytes, std::byte* to) const {
    for_each(begin, num_bytes, [&](const std::byte* data, uint64_t offset, uint64_t bytes) { std::memcpy(to + offset, data, bytes); });
  }

  void write(uint64_t begin, uint64_t num_bytes, const std::byte* from) const {
    for_each(begin, num_bytes, [&](std::byte* data, uint64_t offset, uint64_t bytes) { std::memcpy(data, from + offset, bytes); });
  }

 private:
  std::vector<Piece> pieces_;
  uint64_t num_bytes_ = 0;
};

// combine(out, sources, number of elements): out[i] = sources[0][i] + sources[1][i] + ..., in this order. `out` may be one of the sources.
struct Reducer {
  uint64_t element_bytes = 1;
  std::function<void(std::byte* out, const std::vector<const std::byte*>& sources, uint64_t num_elements)> combine;
};

}  // namespace soap::transport
