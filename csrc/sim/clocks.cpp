#include "sim/clocks.h"

#include <algorithm>

// Maxima of 64-bit integers take one instruction for four or eight devices where the processor has it; the results are the same everywhere.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SOAP_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SOAP_WIDE
#endif

namespace soap {
namespace {

SOAP_WIDE int64_t latest_of(const int64_t* clock, size_t n) {
  int64_t out = 0;
  for (size_t i = 0; i < n; ++i) out = clock[i] > out ? clock[i] : out;
  return out;
}

SOAP_WIDE void raise_all(int64_t* clock, int64_t at, size_t n) {
  for (size_t i = 0; i < n; ++i) clock[i] = clock[i] > at ? clock[i] : at;
}

SOAP_WIDE void raise_each(int64_t* __restrict clock, const int64_t* __restrict at, size_t n) {
  for (size_t i = 0; i < n; ++i) clock[i] = clock[i] > at[i] ? clock[i] : at[i];
}

}  // namespace

DeviceSet::DeviceSet(std::vector<int> sorted) : devices(std::move(sorted)), count(static_cast<int>(devices.size())) {
  if (devices.empty()) return;
  first = devices.front();
  stretch = devices.back() - first + 1 == count;
}

Spent::Spent(const std::vector<int64_t>& per_device) {
  const auto spends = [](int64_t ns) { return ns != 0; };
  const auto begin = std::find_if(per_device.begin(), per_device.end(), spends);
  const auto end = std::find_if(per_device.rbegin(), std::reverse_iterator(begin), spends).base();
  if (begin == end) return;
  first = static_cast<int>(begin - per_device.begin());
  count = static_cast<int>(end - begin);
  each = *begin;
  if (!std::all_of(begin, end, [&](int64_t ns) { return ns == each; })) on = per_device;
}

SOAP_WIDE void advance(int64_t* clock, int64_t each, size_t devices) {
  for (size_t d = 0; d < devices; ++d) clock[d] += each;
}

SOAP_WIDE void advance(int64_t* __restrict clock, const int64_t* __restrict spent, size_t devices) {
  for (size_t d = 0; d < devices; ++d) clock[d] += spent[d];
}

SOAP_WIDE void advance_from(int64_t* __restrict clock, const int64_t* __restrict begin, const int64_t* __restrict spent, size_t devices) {
  for (size_t d = 0; d < devices; ++d) {
    const int64_t from = begin[d] > clock[d] ? begin[d] : clock[d];
    clock[d] = spent[d] != 0 ? from + spent[d] : clock[d];
  }
}

int64_t latest(const int64_t* clock, const DeviceSet& set) {
  if (set.stretch) return latest_of(clock + set.first, set.count);
  int64_t out = 0;
  for (int d : set.devices) out = std::max(out, clock[d]);
  return out;
}

void raise(int64_t* clock, const DeviceSet& set, int64_t at) {
  if (set.stretch) return raise_all(clock + set.first, at, set.count);
  for (int d : set.devices) clock[d] = std::max(clock[d], at);
}

void raise_within(int64_t* clock, const DeviceSet& set, int64_t at, int first, int count) {
  const int end = first + count;
  if (set.stretch) {
    const int from = std::max(first, set.first), to = std::min(end, set.first + set.count);
    if (from < to) raise_all(clock + from, at, to - from);
    return;
  }
  for (int d : set.devices) {
    if (d >= first && d < end) clock[d] = std::max(clock[d], at);
  }
}

void raise(int64_t* clock, const DeviceSet& set, const int64_t* at) {
  if (set.stretch) return raise_each(clock + set.first, at + set.first, set.count);
  for (int d : set.devices) clock[d] = std::max(clock[d], at[d]);
}

void assign(int64_t* clock, const DeviceSet& set, int64_t at) {
  if (set.stretch) {
    std::fill_n(clock + set.first, set.count, at);
    return;
  }
  for (int d : set.devices) clock[d] = at;
}

}  // namespace soap
