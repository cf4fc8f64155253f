#include "base/index_set.h"

#include <algorithm>

#include "base/error.h"

namespace soap {

IndexSet IndexSet::interval(int64_t begin, int64_t end) {
  IndexSet set;
  if (begin < end) set.first_ = {begin, end};
  return set;
}

namespace {

// As IndexSet keeps them.
bool in_order(const std::vector<Run>& runs) {
  for (size_t i = 0; i < runs.size(); ++i) {
    if (runs[i].begin >= runs[i].end || (i > 0 && runs[i].begin <= runs[i - 1].end)) return false;
  }
  return true;
}

}  // namespace

IndexSet IndexSet::from_runs(std::vector<Run> runs) {
  if (!in_order(runs)) {
    std::erase_if(runs, [](const Run& r) { return r.begin >= r.end; });
    if (!std::is_sorted(runs.begin(), runs.end())) std::sort(runs.begin(), runs.end());
    size_t last = 0;
    for (size_t i = 1; i < runs.size(); ++i) {
      if (runs[i].begin <= runs[last].end) {
        runs[last].end = std::max(runs[last].end, runs[i].end);
      } else {
        runs[++last] = runs[i];
      }
    }
    runs.resize(std::min(runs.size(), last + 1));
  }
  if (runs.empty()) return {};
  IndexSet set;
  set.first_ = runs.front();
  if (runs.size() > 1) set.more_ = std::move(runs);
  return set;
}

int64_t IndexSet::size() const {
  if (is_interval()) return first_.end - first_.begin;
  int64_t n = 0;
  for (const Run& r : more_) n += r.end - r.begin;
  return n;
}

bool IndexSet::contains(int64_t index) const {
  const auto all = runs();
  return std::any_of(all.begin(), all.end(), [&](const Run& r) { return r.begin <= index && index < r.end; });
}

IndexSet intersect(const IndexSet& a, const IndexSet& b) {
  if (a.is_interval() && b.is_interval()) return IndexSet::interval(std::max(a.begin(), b.begin()), std::min(a.end(), b.end()));
  std::vector<Run> out;
  for (size_t i = 0, j = 0; i < a.runs().size() && j < b.runs().size();) {
    const Run &x = a.runs()[i], &y = b.runs()[j];
    const int64_t begin = std::max(x.begin, y.begin), end = std::min(x.end, y.end);
    if (begin < end) out.push_back({begin, end});
    (x.end < y.end ? i : j)++;
  }
  return IndexSet::from_runs(std::move(out));
}

int64_t size_of_common(const IndexSet& a, const IndexSet& b) {
  const std::span<const Run> first = a.runs(), second = b.runs();
  int64_t n = 0;
  for (size_t i = 0, j = 0; i < first.size() && j < second.size();) {
    const Run &x = first[i], &y = second[j];
    n += std::max<int64_t>(std::min(x.end, y.end) - std::max(x.begin, y.begin), 0);
    (x.end < y.end ? i : j)++;
  }
  return n;
}

IndexSet unite(const IndexSet& a, const IndexSet& b) {
  std::vector<Run> runs(a.runs().size() + b.runs().size());
  std::merge(a.runs().begin(), a.runs().end(), b.runs().begin(), b.runs().end(), runs.begin());
  return IndexSet::from_runs(std::move(runs));
}

IndexSet shift(const IndexSet& set, int64_t offset, int64_t size) {
  if (set.is_interval()) return IndexSet::interval(std::max<int64_t>(set.begin() + offset, 0), std::min(set.end() + offset, size));
  std::vector<Run> runs;
  for (const Run& r : set.runs()) {
    runs.push_back({std::max<int64_t>(r.begin + offset, 0), std::min(r.end + offset, size)});
  }
  return IndexSet::from_runs(std::move(runs));
}

IndexSet product(const IndexSet& outer, const IndexSet& inner, int64_t inner_size) {
  std::vector<Run> runs;
  if (inner.is_all(inner_size)) {
    if (outer.is_interval()) return IndexSet::interval(outer.begin() * inner_size, outer.end() * inner_size);
    for (const Run& r : outer.runs()) runs.push_back({r.begin * inner_size, r.end * inner_size});
    return IndexSet::from_runs(std::move(runs));
  }
  runs.reserve(static_cast<size_t>(outer.size()) * inner.runs().size());
  for (const Run& o : outer.runs()) {
    for (int64_t i = o.begin; i < o.end; ++i) {
      for (const Run& r : inner.runs()) runs.push_back({i * inner_size + r.begin, i * inner_size + r.end});
    }
  }
  return IndexSet::from_runs(std::move(runs));
}

IndexSet digit(const IndexSet& set, int64_t inner_size, int64_t digit_size) {
  if (set.is_interval() && inner_size == 1 && set.end() <= digit_size) return set;
  std::vector<Run> runs;
  for (const Run& r : set.runs()) {
    const int64_t first = r.begin / inner_size, last = (r.end - 1) / inner_size;
    if (last - first + 1 >= digit_size) return IndexSet::all(digit_size);
    const int64_t a = first % digit_size, b = last % digit_size;
    if (a <= b) {
      runs.push_back({a, b + 1});
    } else {
      runs.push_back({a, digit_size});
      runs.push_back({0, b + 1});
    }
  }
  return IndexSet::from_runs(std::move(runs));
}

IndexSet positions(const IndexSet& sub, const IndexSet& set) {
  std::vector<Run> out;
  int64_t before = 0;
  size_t j = 0;
  for (const Run& s : set.runs()) {
    while (j < sub.runs().size() && sub.runs()[j].begin < s.end) {
      const Run& r = sub.runs()[j];
      SOAP_CHECK(s.begin <= r.begin && r.end <= s.end, "{} is not part of {}", to_string(sub), to_string(set));
      out.push_back({before + r.begin - s.begin, before + r.end - s.begin});
      ++j;
    }
    before += s.end - s.begin;
  }
  SOAP_CHECK(j == sub.runs().size(), "{} is not part of {}", to_string(sub), to_string(set));
  return IndexSet::from_runs(std::move(out));
}

IndexSet slice(const IndexSet& set, int64_t begin, int64_t end) {
  if (set.is_interval()) return IndexSet::interval(set.begin() + std::max<int64_t>(begin, 0), std::min(set.begin() + end, set.end()));
  std::vector<Run> out;
  int64_t before = 0;
  for (const Run& r : set.runs()) {
    const int64_t length = r.end - r.begin;
    const int64_t lo = std::clamp<int64_t>(begin - before, 0, length), hi = std::clamp<int64_t>(end - before, 0, length);
    if (lo < hi) out.push_back({r.begin + lo, r.begin + hi});
    before += length;
  }
  return IndexSet::from_runs(std::move(out));
}

std::string to_string(const IndexSet& set) {
  if (set.empty()) return "[]";
  std::string out;
  for (const Run& r : set.runs()) out += fmt::format("{}[{},{})", out.empty() ? "" : "+", r.begin, r.end);
  return out;
}

int64_t volume(const Box& box) {
  int64_t n = 1;
  for (const IndexSet& set : box) n *= set.size();
  return n;
}

std::vector<int64_t> shape(const Box& box) {
  std::vector<int64_t> out;
  for (const IndexSet& set : box) out.push_back(set.size());
  return out;
}

Box whole_box(const std::vector<int64_t>& shape) {
  Box box;
  for (int64_t size : shape) box.push_back(IndexSet::all(size));
  return box;
}

Box intersect(const Box& a, const Box& b) {
  SOAP_CHECK(a.size() == b.size(), "boxes of {} and {} dims", a.size(), b.size());
  Box out;
  for (size_t d = 0; d < a.size(); ++d) out.push_back(intersect(a[d], b[d]));
  return out;
}

Box positions(const Box& sub, const Box& box) {
  SOAP_CHECK(sub.size() == box.size(), "boxes of {} and {} dims", sub.size(), box.size());
  Box out;
  for (size_t d = 0; d < sub.size(); ++d) out.push_back(positions(sub[d], box[d]));
  return out;
}

std::string to_string(const Box& box) {
  std::string out = "(";
  for (size_t d = 0; d < box.size(); ++d) out += (d ? ", " : "") + to_string(box[d]);
  return out + ")";
}

}  // namespace soap
