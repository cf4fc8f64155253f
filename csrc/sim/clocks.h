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

// clock[d] += spent[d]
void advance(int64_t* clock, const int64_t* spent, size_t devices);
// clock[d] = max(begin[d], clock[d]) + spent[d] where anything is spent
void advance_from(int64_t* clock, const int64_t* begin, const int64_t* spent, size_t devices);
// The latest clock of the set; 0 for an empty one.
int64_t latest(const int64_t* clock, const DeviceSet& set);
// clock[d] = max(clock[d], at) on the set
void raise(int64_t* clock, const DeviceSet& set, int64_t at);
// clock[d] = max(clock[d], at[d]) on the set
void raise(int64_t* clock, const DeviceSet& set, const int64_t* at);
// clock[d] = at on the set
void assign(int64_t* clock, const DeviceSet& set, int64_t at);

}  // namespace soap
