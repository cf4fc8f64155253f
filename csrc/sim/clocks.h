// Clocks of devices: int64_t nanoseconds, one for each device, and sets of devices on which they are read and moved together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace soap {

// Sorted. Most sets are stretches: those are read and written without looking at the list.
struct DeviceSet {
  std::vector<int> devices;
  int first = 0, count = 0;
  bool stretch = false;  // first, first + 1, ...

  explicit DeviceSet(std::vector<int> sorted);
};

// What a computation takes on each device. Most take the same on a stretch of devices and nothing elsewhere: they have no list.
struct Spent {
  int first = 0, count = 0;
  int64_t each = 0;         // on each device of the stretch
  std::vector<int64_t> on;  // per device; empty where that is all

  Spent() = default;
  explicit Spent(const std::vector<int64_t>& per_device);
  bool alike() const { return on.empty(); }
  int64_t operator[](size_t device) const {
    if (!alike()) return on[device];
    return device - static_cast<size_t>(first) < static_cast<size_t>(count) ? each : 0;
  }
};

// clock[d] += spent[d]
void advance(int64_t* clock, const int64_t* spent, size_t devices);
// clock[d] += each on a stretch
void advance(int64_t* clock, int64_t each, size_t devices);
// clock[d] = max(begin[d], clock[d]) + spent[d] where anything is spent
void advance_from(int64_t* clock, const int64_t* begin, const int64_t* spent, size_t devices);
// The latest clock of the set; 0 for an empty one.
int64_t latest(const int64_t* clock, const DeviceSet& set);
// clock[d] = max(clock[d], at) on the set
void raise(int64_t* clock, const DeviceSet& set, int64_t at);
// The same where the set and the stretch [first, first + count) meet.
void raise_within(int64_t* clock, const DeviceSet& set, int64_t at, int first, int count);
// clock[d] = max(clock[d], at[d]) on the set
void raise(int64_t* clock, const DeviceSet& set, const int64_t* at);
// clock[d] = at on the set
void assign(int64_t* clock, const DeviceSet& set, int64_t at);

}  // namespace soap
