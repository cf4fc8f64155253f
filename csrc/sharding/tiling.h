// Tiling: an OpConfig made concrete for one node at one batch size: the index set of each cut factor per tile and chunk, and devices.
// Sharding: what that means for one tensor.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sharding/rule.h"
#include "sharding/strategy.h"

namespace soap {

struct FactorParts {
  int factor = -1;
  std::vector<std::vector<IndexSet>> parts;  // [tile][chunk]; together they partition the factor
  int tiles() const { return static_cast<int>(parts.size()); }
  int chunks() const { return static_cast<int>(parts.front().size()); }
  bool operator==(const FactorParts&) const = default;
};

struct Tiling {
  std::vector<FactorParts> cuts;
  int replicas = 1;
  std::vector<int> devices;  // [tile * replicas + replica]

  int tiles() const;
  int chunks() const;
  // The part of a factor that (tile, chunk) works on; nullptr when the factor isn't cut.
  const IndexSet* part(int factor, int tile, int chunk) const;
  std::span<const int> devices_of(int tile) const { return std::span(devices).subspan(size_t(tile) * replicas, replicas); }
};

// One tile's part of a tensor in one chunk, held alike by `devices` (its replicas, bitwise equal).
struct Coord {
  Box box;
  int chunk = 0;  // producer: chunk that makes it; copies: first chunk that needs it
  std::vector<int> devices;
  bool operator==(const Coord&) const = default;
};

// How a tensor is laid out. With partial == kNone the coords of a produced tensor partition it; else the coords that cover an element
// are summed (or maxed).
struct Sharding {
  Reduce partial = Reduce::kNone;
  std::vector<Coord> coords;
  bool operator==(const Sharding&) const = default;
};

// Index set of each factor for (tile, chunk), whole when not cut.
std::vector<IndexSet> factor_sets(const Rule& rule, const Tiling& tiling, int tile, int chunk);
// Of every (tile, chunk): [tile * chunks + chunk].
std::vector<std::vector<IndexSet>> all_factor_sets(const Rule& rule, const Tiling& tiling);
Box box_of(const std::vector<DimExpr>& dims, const Rule& rule, const std::vector<int64_t>& shape, const std::vector<IndexSet>& sets);

// The layout a node gives its result: coord index is tile * chunks + chunk. `sets`: all_factor_sets, where they are known.
Sharding result_sharding(const Rule& rule, const Tiling& tiling, int result, const std::vector<int64_t>& shape);
Sharding result_sharding(const Rule& rule, const Tiling& tiling, int result, const std::vector<int64_t>& shape, const std::vector<std::vector<IndexSet>>& sets);

// The copies that a node's tiles need of an operand: equal (box, devices) are one copy. coord_of[tile * chunks + chunk] is the copy's
// index, -1 where the operand isn't read (anchored elsewhere).
struct OperandCopies {
  Sharding sharding;
  std::vector<int> coord_of;
};
OperandCopies operand_copies(const Rule& rule, const Tiling& tiling, int operand, const std::vector<int64_t>& shape);
OperandCopies operand_copies(const Rule& rule, const Tiling& tiling, int operand, const std::vector<int64_t>& shape,
                             const std::vector<std::vector<IndexSet>>& sets);

// Rows that each process feeds of a batch of sum(rows), in rank order.
using FedRows = std::vector<int64_t>;

// Tiles of a factor that are the processes' own rows: where the sample dim has gone in this node.
struct FedFactor {
  int factor = -1;
  std::vector<IndexSet> parts;  // per process
};

// Makes a configuration concrete. Throws std::invalid_argument naming what would be legal: unknown factor, a degree that can't be cut, a
// device that doesn't exist, a device list of the wrong length.
Tiling make_tiling(const Node& node, const Rule& rule, const OpConfig& config, const std::optional<FedFactor>& fed, int world_size);

// A tiling seen on a tensor: each cut's index sets along one dim. What is not visible there (a factor that the tensor lacks) has become
// replicas.
struct TensorTiling {
  struct DimParts {
    int dim = -1;
    std::vector<std::vector<IndexSet>> parts;  // [tile][chunk]
  };
  std::vector<DimParts> cuts;
  int replicas = 1;
  std::vector<int> devices;
};
TensorTiling tensor_tiling(const Rule& rule, const Tiling& tiling, int result, const std::vector<int64_t>& shape);
// The node's tiling that keeps an operand where it is, as far as its factors allow; cuts that don't fit become replicas.
Tiling follow(const Rule& rule, int operand, const TensorTiling& tensor, const std::vector<int64_t>& shape);

}  // namespace soap
