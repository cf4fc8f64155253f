#include "kernels/tile_elements.h"

#include "base/error.h"

namespace soap::kernels {

TileElements tile_elements(const std::vector<int64_t>& global_sizes, const std::vector<int64_t>& runs, const std::vector<int64_t>& runs_per_dim) {
  if (runs_per_dim.size() != global_sizes.size()) {
    user_error("a tile of {} dims can't lie in a tensor of {} dims", runs_per_dim.size(), global_sizes.size());
  }
  int64_t num_runs = 0;
  for (const int64_t n : runs_per_dim) num_runs += n;
  if (static_cast<int64_t>(runs.size()) != 2 * num_runs) {
    user_error("{} runs need {} bounds, got {}", num_runs, 2 * num_runs, runs.size());
  }

  TileElements tile;
  std::size_t next = 0;
  for (std::size_t d = 0; d < global_sizes.size(); ++d) {
    TileElements::Dim dim;
    for (int64_t r = 0; r < runs_per_dim[d]; ++r, next += 2) {
      const int64_t begin = runs[next], end = runs[next + 1];
      if (begin < 0 || end < begin || end > global_sizes[d]) {
        user_error("run [{},{}) of dim {} leaves [0,{})", begin, end, d, global_sizes[d]);
      }
      if (begin == end) continue;
      dim.pieces.push_back({begin, dim.size});
      dim.size += end - begin;
    }
    tile.count *= dim.size;
    const bool whole = dim.pieces.size() == 1 && dim.size == global_sizes[d];
    // One local position of the dim outside then is global_sizes[d] contiguous elements.
    if (whole && !tile.dims.empty()) {
      auto& outer = tile.dims.back();
      for (auto& piece : outer.pieces) {
        piece.global_begin *= dim.size;
        piece.local_begin *= dim.size;
      }
      outer.size *= dim.size;
      for (std::size_t o = 0; o + 1 < tile.dims.size(); ++o) {
        tile.dims[o].stride *= dim.size;
        for (auto& piece : tile.dims[o].pieces) piece.global_begin *= dim.size;
      }
      continue;
    }
    for (auto& outer : tile.dims) {
      outer.stride *= global_sizes[d];
      for (auto& piece : outer.pieces) piece.global_begin *= global_sizes[d];
    }
    tile.dims.push_back(std::move(dim));
  }
  if (tile.dims.empty()) tile.dims.push_back({{{0, 0}}, 1, 1});
  return tile;
}

}  // namespace soap::kernels
