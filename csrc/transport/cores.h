// How far apart two cores of this host are.
#pragma once

#include <cstdint>

namespace soap::transport {

// ns that a cache line takes from one core to another and back, between the first two cores that this process may run on; 0 where it has only one. Cores with a
// cache in common are a few times nearer than others. On bare metal it is always the same; a virtual machine's cores are moved about by its host, within
// seconds or minutes, and everything that shares caches or moves data between cores is faster or slower from then on. Takes a millisecond, also while
// others wait on these cores; the least of many readings.
int64_t core_distance_ns();

}  // namespace soap::transport
