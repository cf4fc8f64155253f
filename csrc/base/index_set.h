// Index sets: the part of a dimension that a tile holds.
//
// A tile of a factor is a set of indices, a tile of a tensor a product of one set per dim (a Box). Sets are kept as sorted, disjoint,
// non-touching runs, so equality is structural and every operation is linear in the number of runs. An interval is one run; a cut
// of `(b s)` along `s` has `b` runs; a zigzag tile has two. Nearly all sets are intervals: those own no memory.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace soap {

struct Run {
  int64_t begin = 0;
  int64_t end = 0;  // exclusive
  bool operator==(const Run&) const = default;
  auto operator<=>(const Run&) const = default;
};

class IndexSet {
 public:
  IndexSet() = default;
  static IndexSet interval(int64_t begin, int64_t end);
  static IndexSet all(int64_t size) { return interval(0, size); }
  // Sorts and merges; runs may overlap.
  static IndexSet from_runs(std::vector<Run> runs);

  // Of this set: not to be asked of one that goes away.
  std::span<const Run> runs() const& { return more_.empty() ? std::span(&first_, empty() ? 0 : 1) : std::span(more_); }
  std::span<const Run> runs() const&& = delete;
  int64_t size() const;
  bool empty() const { return first_.begin == first_.end; }
  bool is_interval() const { return more_.empty(); }
  bool is_all(int64_t size) const { return is_interval() && first_ == Run{0, size}; }
  // Smallest index and one past the largest; 0 and 0 when empty.
  int64_t begin() const { return first_.begin; }
  int64_t end() const { return more_.empty() ? first_.end : more_.back().end; }
  bool contains(int64_t index) const;

  bool operator==(const IndexSet&) const = default;
  auto operator<=>(const IndexSet&) const = default;

 private:
  Run first_;              // {0, 0} when there is none
  std::vector<Run> more_;  // all of them, when there are several
};

IndexSet intersect(const IndexSet& a, const IndexSet& b);
// intersect(a, b).size(), without making it.
int64_t size_of_common(const IndexSet& a, const IndexSet& b);
IndexSet unite(const IndexSet& a, const IndexSet& b);
// {i + offset}, clipped to [0, size).
IndexSet shift(const IndexSet& set, int64_t offset, int64_t size);
// Mixed radix: {o * inner_size + i : o in outer, i in inner}.
IndexSet product(const IndexSet& outer, const IndexSet& inner, int64_t inner_size);
// The digit of each index in mixed radix: {(i / inner_size) % digit_size}.
IndexSet digit(const IndexSet& set, int64_t inner_size, int64_t digit_size);
// Where the indices of `sub` stand within `set`, counted in ascending order. Requires sub to be a subset of set.
IndexSet positions(const IndexSet& sub, const IndexSet& set);
// The indices at positions [begin, end) of `set`.
IndexSet slice(const IndexSet& set, int64_t begin, int64_t end);
// "[0,4)+[8,12)", "[]" when empty.
std::string to_string(const IndexSet& set);

// A product of index sets, one per dim. A scalar's box has no dims and holds one element.
using Box = std::vector<IndexSet>;

int64_t volume(const Box& box);
std::vector<int64_t> shape(const Box& box);
Box whole_box(const std::vector<int64_t>& shape);
Box intersect(const Box& a, const Box& b);
Box positions(const Box& sub, const Box& box);
std::string to_string(const Box& box);

}  // namespace soap
