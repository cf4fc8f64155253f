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

struct Piece {
  std::byte* data = nullptr;
  uint64_t num_bytes = 0;
};

class Memory {
 public:
  Memory() = default;
  Memory(void* data, uint64_t num_bytes) { add(data, num_bytes); }

  void add(void* data, uint64_t num_bytes) {
    if (num_bytes == 0) return;
    pieces_.push_back({static_cast<std::byte*>(data), num_bytes});
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
      if (from < to) visit(piece.data + (from - at), from - begin, to - from);
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
    for (const Piece& piece : other.pieces_) add(piece.data, piece.num_bytes);
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
