// Layouts: shardings as small numbers, so that a table of many thousand reshards is priced in little time. Equal shardings are one layout,
// equal index sets one number, and the size of an intersection is looked up. Prices are those of reshard/reshard.h and the simulator
// without overlap: an exchange takes what its busiest sender takes, an all-reduce what the machine's table says.
//
// For plans without chunks in time, on up to 64 devices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory_resource>
#include <span>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "machine/collectives.h"
#include "reshard/reshard.h"

namespace soap {

constexpr int kLargestLayoutWorld = 64;

// What it lists is the Layouts' memory.
struct Layout {
  struct Part {
    std::span<const int> sets;  // per dim: number of an index set
    std::span<const int> devices;
    int64_t volume = 0;
    uint64_t mask = 0;  // of devices
  };
  Reduce partial = Reduce::kNone;
  std::span<const Part> parts;  // without the empty ones
  std::span<const int> alike;   // per dim: the set that all parts have, -1 where they differ
  bool single = true;           // each part is on one device
};

// Numbers by numbers, in one stretch of memory.
class NumberMap {
 public:
  // Where the key's value is, and whether it is new. Not ~0.
  std::pair<int64_t*, bool> at(uint64_t key) {
    if (2 * (used_ + 1) > entries_.size()) grow();
    Entry& e = find(entries_, key);
    const bool fresh = e.key != key;
    if (fresh) e = {key, 0}, ++used_;
    return {&e.value, fresh};
  }

 private:
  struct Entry {
    uint64_t key = kNone;
    int64_t value = 0;
  };
  static constexpr uint64_t kNone = ~uint64_t{0};
  static Entry& find(std::vector<Entry>& in, uint64_t key) {
    const uint64_t h = key * 0x9e3779b97f4a7c15ULL;
    size_t i = (h ^ h >> 32) & (in.size() - 1);
    while (in[i].key != key && in[i].key != kNone) i = (i + 1) & (in.size() - 1);
    return in[i];
  }
  void grow() {
    std::vector<Entry> more(std::max<size_t>(1024, entries_.size() * 4));
    for (const Entry& e : entries_) {
      if (e.key != kNone) find(more, e.key) = e;
    }
    entries_ = std::move(more);
  }
  std::vector<Entry> entries_;
  size_t used_ = 0;
};

class Layouts {
 public:
  // each_way: what goes there and back is priced as two movements, which is slower and the same (tests).
  explicit Layouts(const Machine& machine, bool each_way = false);

  int add(const Sharding& sharding);
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
    return gradient ? there_and_back_ns(tiles, copies, tensor) : fill_ns(tiles, copies, tensor);
  }

 private:
  // The layout that `key_` says: the kind of partial values, dims, and for each part its sets, the number of its devices, and these.
  int add_key(size_t dims);
  Layout parsed(std::span<const int> key, size_t dims);
  // Elements of both sets.
  int64_t common(int a, int b) {
    const KnownSet &x = sets_[a], &y = sets_[b];
    if (x.begin >= 0 && y.begin >= 0) return std::max<int64_t>(std::min(x.end, y.end) - std::max(x.begin, y.begin), 0);
    return a == b ? x.size : common_of_many(a, b);
  }
  int64_t common_of_many(int a, int b);
  // Elements of both parts in the dims that differ.
  int64_t common_of_differing(const Layout::Part& a, const Layout::Part& b) {
    int64_t n = 1;
    for (const int d : differing_) {
      n *= common(a.sets[d], b.sets[d]);
      if (n == 0) break;
    }
    return n;
  }
  int64_t there_and_back_ns(int tiles, int copies, const Tensor& tensor);
  // Finds the dims in which one of them is cut, `differing_`; elements that both have in the others.
  int64_t alike_in(const Layout& from, const Layout& to);
  // Of layouts whose parts are on one device each, where nothing is summed: what the exchange takes, and whether each piece is all of its
  // source and of its copy.
  std::pair<int64_t, bool> exchange(const Layout& from, const Layout& to, int64_t element_bytes);
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
  bool each_way_, several_hosts_;
  Traffic traffic_;                                      // of the exchange that is being priced
  std::pmr::monotonic_buffer_resource memory_{1 << 14};  // of what layouts list
  struct Known {
    uint64_t hash = 0;
    std::span<const int> key;
  };
  std::vector<Layout> layouts_;
  std::vector<Known> known_;  // per layout: everything in it
  std::vector<int> slots_;    // of a hash table: layouts, -1 for none
  struct SetHash {
    size_t operator()(const IndexSet& set) const {
      const std::span<const Run> runs = set.runs();
      uint64_t h = runs.size() ^ static_cast<uint64_t>(set.end()) << 20;  // of sets with thousands of runs the first few tell enough
      for (const Run& r : runs.first(std::min<size_t>(runs.size(), 4))) {
        h = (h ^ static_cast<uint64_t>(r.begin)) * 0x9e3779b97f4a7c15ULL;
        h = (h ^ static_cast<uint64_t>(r.end) ^ h >> 29) * 0x9e3779b97f4a7c15ULL;
      }
      return h ^ h >> 32;
    }
  };
  std::unordered_map<IndexSet, int, SetHash> known_sets_;
  struct KnownSet {
    int64_t begin = -1, end = 0;  // of an interval, begin -1 of anything else
    int64_t size = 0;
    const IndexSet* set = nullptr;
  };
  std::vector<KnownSet> sets_;
  std::vector<int> storage_;                                           // per layout of copies, whose sets say the shape; -1 for not known
  NumberMap common_;                                                   // of (a, b), b <= a, where one of them isn't an interval
  NumberMap prices_;                                                   // of (tiles, copies, Way, element)
  std::map<std::tuple<uint64_t, int64_t, int>, int64_t> all_reduces_;  // (ranks, bytes, at once) -> ns
  struct Group {                                                       // an all-reduce
    uint64_t ranks = 0;
    size_t pieces = 0;
    std::span<const int> sets;
  };
  std::vector<Group> groups_;                 // of the movement that is being priced
  std::vector<Piece> pieces_;                 // of it, too
  std::vector<int> key_, ranks_, differing_;  // of what is looked up or priced
  std::vector<Layout::Part> parts_;
};

}  // namespace soap
