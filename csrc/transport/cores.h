// How far apart two cores of this host are.
#pragma once

#include <cstdint>

namespace soap::transport {

// ns that a cache line takes from one core to another and back, between the first two cores that this process may run on. Cores with a cache in common are a
// few times nearer than others. On bare metal it is always the same; a virtual machine's cores are moved about by its host, within seconds or minutes, and
// everything that shares caches or moves data between cores is faster or slower from then on. The least of many readings: half a millisecond, and a tenth of a
// second at most where others want these cores. 0 where it can't be known: one core, no thread to be had, no reading in that time.
int64_t core_distance_ns();

}  // namespace soap::transport
