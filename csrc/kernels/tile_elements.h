// The global linear indices of the elements of a tile, as few contiguous pieces.
//
// A tile is a product of one index set per dim; an index set is a list of runs [begin, end), in the order in which the
// tile stores them. The tile is stored row-major. Includes nothing of torch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace soap::kernels {

struct TileElements {
  struct Piece {
    int64_t global_begin;  // in elements: index * stride
    int64_t local_begin;
  };
  struct Dim {
    std::vector<Piece> pieces;  // ascending in local_begin
    int64_t size = 0;           // local, in elements of this dim
    int64_t stride = 1;         // of one local position, in global elements
  };
  std::vector<Dim> dims;  // at least one; whole inner dims are merged into the one outside them
  int64_t count = 1;
};

// `runs` is flat: begin, end, begin, end, ... for dim 0, then dim 1, ...; runs_per_dim[d] counts those of dim d.
// Throws std::invalid_argument where a run leaves [0, global_sizes[d]) or the lists don't fit together.
TileElements tile_elements(const std::vector<int64_t>& global_sizes, const std::vector<int64_t>& runs, const std::vector<int64_t>& runs_per_dim);

// Index of the piece that holds local position `local`.
inline std::size_t piece_at(const TileElements::Dim& dim, int64_t local) {
  std::size_t low = 0, high = dim.pieces.size();
  while (high - low > 1) {
    const std::size_t middle = (low + high) / 2;
    (dim.pieces[middle].local_begin <= local ? low : high) = middle;
  }
  return low;
}

// Calls visit(global_begin, local_begin, count) for each contiguous piece of the local positions [begin, end), in
// ascending order.
template <class Visit>
void for_each_piece(const TileElements& tile, int64_t begin, int64_t end, Visit visit) {
  const auto& inner = tile.dims.back();
  for (int64_t position = begin; position < end;) {
    int64_t outer = position / inner.size;
    int64_t global = 0;
    for (std::size_t d = tile.dims.size() - 1; d-- > 0;) {
      const auto& dim = tile.dims[d];
      const int64_t local = outer % dim.size;
      outer /= dim.size;
      const auto& piece = dim.pieces[piece_at(dim, local)];
      global += piece.global_begin + (local - piece.local_begin) * dim.stride;
    }
    const int64_t column = position % inner.size;
    const std::size_t i = piece_at(inner, column);
    const int64_t piece_end = i + 1 < inner.pieces.size() ? inner.pieces[i + 1].local_begin : inner.size;
    const int64_t count = std::min(piece_end - column, end - position);
    visit(global + inner.pieces[i].global_begin + column - inner.pieces[i].local_begin, position, count);
    position += count;
  }
}

}  // namespace soap::kernels
