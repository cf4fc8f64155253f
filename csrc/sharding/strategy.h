// Strategy: a configuration for each node. The text that a person writes for it is in plan/plan_text.h (docs/plan-format.md).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/index_set.h"

namespace soap {

// How one factor is cut in space (tiles, on devices) and in time (chunks, one after another on the same device).
// Tiles first, each tile then split into chunks: `n=2x3t` is tiles {0..2}, {3..5} of six even parts.
struct Cut {
  int tiles = 1;
  int chunks = 1;
  // Cut points of the tiles, tiles + 1 values from 0 to the size they were written for; rescaled at another size. Empty: even parts.
  std::vector<int64_t> bounds;
  // The tiles are the processes, each with the rows that it feeds. `tiles` is the world size.
  bool fed = false;
  // Tile t of T takes parts t and 2T-1-t of 2T: balances causal attention.
  bool zigzag = false;
  // {outer, middle, inner}: the factor is read in mixed radix and the middle digit is cut. Empty: the factor itself.
  std::vector<int64_t> radix;
  bool operator==(const Cut&) const = default;
};

struct FactorCut {
  std::string factor;
  Cut cut;
  bool operator==(const FactorCut&) const = default;
};

// How long a gathered copy of a parameter lives.
enum class Keep { kUntilBackward, kUse, kUntilStep };

struct OpConfig {
  std::vector<FactorCut> cuts;
  // Device of (tile, replica), row-major with the tiles of cuts[0] slowest and replicas fastest. Empty: 0, 1, 2, ...
  std::vector<int> devices;
  int replicas = 1;
  Keep keep = Keep::kUntilBackward;  // parameters
  bool operator==(const OpConfig&) const = default;

  int num_tiles() const;
  int num_chunks() const;
};

enum class Order {
  kForwardThenBackward,  // GPipe: every forward chunk, then every backward chunk
  kInterleaved,          // 1F1B: a chunk's backward as soon as it can; needs the loss inside
};

// The path of a reshard.
enum class Via {
  kAuto,      // the recognised collective, else one exchange
  kExchange,  // always one grouped exchange: each reader gets the pieces that it needs and sums them itself
};

// A part of a parameter and the devices that store it.
struct StoredPart {
  Box box;
  std::vector<int> devices;
  bool operator==(const StoredPart&) const = default;
};

// Modules and operators, by name, that backward computes again together: sharding/region.h.
using Region = std::vector<std::string>;

// A substitution of the graph (substitution/table.h) at one place: its name there and the operators that it is anchored at.
struct Rewrite {
  std::string substitution;
  std::vector<std::string> anchors;
  bool operator==(const Rewrite&) const = default;
  auto operator<=>(const Rewrite&) const = default;
};

// Nodes without an entry follow the producer of their main operand; parameters are stored where they are used.
struct Strategy {
  int world_size = 1;
  // Done to the graph in this order before anything else; everything below is about what they leave.
  std::vector<Rewrite> rewrites;
  std::map<std::string, OpConfig, std::less<>> nodes;
  // Where parameters already are (by node name), when a model that runs is lowered again for another batch size or mode. Overrides what
  // their configuration or use says. Not part of a plan's text.
  std::map<std::string, std::vector<StoredPart>, std::less<>> stored;
  // How the tensor from a producer reaches a consumer, {producer, consumer}; default kAuto.
  std::map<std::pair<std::string, std::string>, Via> edges;
  std::vector<Region> recompute;  // their activations aren't kept for backward but computed again
  Order order = Order::kForwardThenBackward;
  int64_t bucket_bytes = 25 << 20;  // gradients of parameters travel together up to this size
  bool operator==(const Strategy&) const = default;
};

}  // namespace soap
