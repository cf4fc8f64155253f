// Layouts: shardings as small numbers, so that a table of many thousand reshards is priced in little time. Equal shardings are one layout,
// equal index sets one number, and the size of an intersection is looked up. Prices are those of reshard/reshard.h and the simulator
// without overlap: an exchange takes what its busiest sender takes, an all-reduce what the machine's table says.
//
// For plans without chunks in time, on up to 64 devices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "machine/collectives.h"
#include "reshard/reshard.h"

namespace soap {

constexpr int kLargestLayoutWorld = 64;

struct Layout {
  struct Part {
    std::vector<int> sets;  // per dim: number of an index set
    int64_t volume = 0;
    uint64_t mask = 0;  // of devices
    std::vector<int> devices;
  };
  Reduce partial = Reduce::kNone;
  std::vector<Part> parts;  // without the empty ones
};

class Layouts {
 public:
  explicit Layouts(const Machine& machine) : machine_(machine), traffic_(machine) {}

  int add(const Sharding& sharding);
  int add(Layout layout);  // volumes and masks filled in here; parts may be empty
  // The same from arrays: tile t has the sets [t * dims, (t + 1) * dims) and the devices [t * replicas, (t + 1) * replicas); only tiles with here[t].
  struct Tiles {
    size_t count = 0, dims = 0, replicas = 0;
    const int* sets = nullptr;
    const int* devices = nullptr;
    const char* here = nullptr;
  };
  int add(Reduce partial, const Tiles& tiles);
  int set(const IndexSet& set);
  int64_t size(int set) const { return sets_[set].size; }
  const Layout& operator[](int layout) const { return layouts_[layout]; }

  // Where a parameter is stored that is read so and has no configuration: as lowering derives it (program/lower.cpp).
  int storage(int copies, const std::vector<int64_t>& shape, int world_size);

  // Time in which copies are assembled from tiles, and in which their gradients come back.
  int64_t fill_ns(int tiles, int copies, const Tensor& tensor);
  int64_t gradient_ns(int tiles, int copies, const Tensor& tensor);
  int64_t reshard_ns(int tiles, int copies, const Tensor& tensor, bool gradient) {
    return fill_ns(tiles, copies, tensor) + (gradient ? gradient_ns(tiles, copies, tensor) : 0);
  }

 private:
  // Elements of both sets.
  int64_t common(int a, int b) {
    const KnownSet &x = sets_[a], &y = sets_[b];
    if (x.interval && y.interval) return std::max<int64_t>(std::min(x.end, y.end) - std::max(x.begin, y.begin), 0);
    return a == b ? x.size : common_of_many(a, b);
  }
  int64_t common_of_many(int a, int b);
  int64_t price(const Layout& from, const Layout& to, Reduce reduce, int64_t element_bytes, int64_t reduced_bytes);
  struct Piece {
    int source = 0, copy = 0;  // indices of parts
    int from = 0, to = 0;
    int64_t volume = 0;
  };
  // The all-reduces that the pieces are (reshard/reshard.h): -1 when they aren't.
  int64_t all_reduce(const std::vector<Piece>& pieces, const Layout& to, int64_t element_bytes);
  int64_t all_reduce(uint64_t ranks, int64_t bytes, int at_once);

  const Machine& machine_;
  Traffic traffic_;  // of the exchange that is being priced
  std::vector<Layout> layouts_;
  struct Hash {
    size_t operator()(const std::vector<int>& v) const {
      uint64_t h = v.size();
      for (int x : v) h = (h ^ static_cast<uint64_t>(x)) * 0x9e3779b97f4a7c15ULL, h ^= h >> 29;
      return h;
    }
  };
  std::unordered_map<std::vector<int>, int, Hash> known_;  // by everything in it
  struct SetHash {
    size_t operator()(const IndexSet& set) const {
      uint64_t h = 0;
      for (const Run& r : set.runs()) {
        h = (h ^ static_cast<uint64_t>(r.begin)) * 0x9e3779b97f4a7c15ULL;
        h = (h ^ static_cast<uint64_t>(r.end) ^ h >> 29) * 0x9e3779b97f4a7c15ULL;
      }
      return h ^ h >> 32;
    }
  };
  std::unordered_map<IndexSet, int, SetHash> known_sets_;
  struct KnownSet {
    int64_t begin = 0, end = 0, size = 0;
    bool interval = false;
    const IndexSet* set = nullptr;
  };
  std::vector<KnownSet> sets_;
  std::unordered_map<int, int> storage_;                               // by copies: their sets say the shape
  std::unordered_map<uint64_t, int64_t> common_;                       // of (a, b), b <= a, where one of them isn't an interval
  std::unordered_map<uint64_t, int64_t> prices_;                       // of (tiles, copies, way, element)
  std::map<std::tuple<uint64_t, int64_t, int>, int64_t> all_reduces_;  // (ranks, bytes, at once) -> ns
  std::vector<Piece> pieces_;                                          // of the movement that is being priced
  std::vector<int> key_, ranks_;                                       // of what is looked up or priced
};

}  // namespace soap
