// Reshard: the one way in which data moves. A copy of a part of a tensor is assembled from the tiles that cover it:
//
//   copy[e] = sum (or max) over source coords k with e in box_k of  tile_k[e],   each read from one replica
//
// and the gradient flows by the same definition with source and destination exchanged:
//
//   grad(tile_k)[e] = sum over copies j with e in box_j of  grad(copy_j)[e]
//
// Forward partial sums, halos' overlapping gradients, tied uses and factors that a tensor lacks are all this sum
// (docs/concept.md; rule 4 of the algebra). Replicas of a destination sum the same sources in the same order, so they stay bitwise equal.
#pragma once

#include <string>
#include <vector>

#include "sharding/tiling.h"

namespace soap {

// Elements of `box` (global indices) go from coord `src` on device `from` to coord `dst` on device `to`.
struct Piece {
  int src = -1, from = -1;
  int dst = -1, to = -1;
  Box box;
};

// Pieces that assemble the copies whose chunk tag is `chunk`, ordered by (dst, to, src). Throws InternalError unless every element of a
// copy of a complete (not partial) tensor is covered exactly once.
std::vector<Piece> fill_pieces(const Sharding& tiles, const Sharding& copies, int chunk);
// Pieces that bring the copies' gradients to the tiles that chunk `chunk` of the producer made, ordered by (dst, to, src): here src is a
// copy and dst a tile.
std::vector<Piece> grad_pieces(const Sharding& tiles, const Sharding& copies, int chunk);

enum class Pattern {
  kLocal,      // nothing crosses devices
  kAllReduce,  // in groups: every participant holds one whole addend of its group and needs the whole sum
  kExchange,   // anything else: one grouped exchange among the participants
};

// Ranks that reduce one addend each.
struct ReduceGroup {
  std::vector<int> ranks;  // sorted
  int64_t elements = 0;    // of an addend
  bool operator==(const ReduceGroup&) const = default;
};

struct Movement {
  Pattern pattern = Pattern::kLocal;
  std::vector<int> ranks;           // participants, sorted; empty for kLocal
  int64_t elements = 0;             // elements that cross devices by the exchange; for kAllReduce the elements reduced, of all groups
  std::vector<ReduceGroup> groups;  // kAllReduce: disjoint, by first rank; replicas of a sum are groups that add in the same order

  // The group that a rank reduces in; null when it doesn't.
  const ReduceGroup* group_of(int rank) const;
};
Movement recognise(const std::vector<Piece>& pieces, const Sharding& src, const Sharding& dst, Reduce reduce);

}  // namespace soap
