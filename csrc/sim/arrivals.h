// What exchanges hold: the runtime's buffers of one step (torch_soap/runtime/movement.py).
#pragma once

#include <map>
#include <set>
#include <utility>
#include <vector>

#include "machine/machine.h"
#include "sim/memory.h"

namespace soap {

// Of one exchange on one device. All that comes is one stretch of memory, peer after peer; what comes in one piece is a view of it, where it is aligned. Where
// nothing is packed (Machine::packs), nothing is for what is sent, and what comes is where it stays, unless it is combined with something; sums of all ranks
// are made on the way (csrc/movement/landing.cpp).
struct Arrived {
  int64_t bytes = 0;                    // that come
  int64_t sent = 0;                     // packed to be sent; views of sources are nothing
  int64_t made = 0;                     // of what is put together of several pieces, or is brought in order
  int end = -1;                         // last step of the views, for who knows it
  std::set<std::pair<int, int>> views;  // (group, coord)
};

// [step][device]
std::vector<std::map<int, Arrived>> find_arrivals(const Program& program, const StepPieces& pieces, const Machine& machine);

// Whether a part of a box is one stretch of its memory, row-major: dims of one index, then an interval, then whole dims.
bool is_stretch(const Box& part, const Box& box);

}  // namespace soap
