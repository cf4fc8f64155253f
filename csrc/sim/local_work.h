// What devices do by themselves for the movement of one tensor, on a machine whose devices share what computes (Machine::busy_speed; elsewhere nothing is
// counted): pieces without rows are packed, copies are put together of several pieces, sums are made. The measured time of a movement (Machine::tables) is that
// of pieces that go from where they are to where they stay, as pieces with rows do between ranks that share memory.
//
//   pack, put a piece in its place    a read and a write of the piece
//   add a piece                       two reads and a write of it; the sum is set to zero first: a write of all of it
//   sum whole pieces of all devices   as they come: a read of the own one
//   a piece that is all of a tile, and becomes all of a copy, on one device: nothing
//
// and Machine::piece_ns for each such piece; where nobody measured that, kLocalCalls calls of an operator on a device where anything is done.
#pragma once

#include <vector>

#include "machine/machine.h"
#include "reshard/flows.h"

namespace soap {

// ns per device; empty where it is nothing. `sources` and `destinations`: of the pieces, tiles and copies, or copies and tiles for a gradient.
std::vector<int64_t> local_work_ns(const Machine& machine, const std::vector<Flow>& pieces, Pattern pattern, const Sharding& sources,
                                   const Sharding& destinations, int64_t element_bytes);

// total[d] += ns[d], which may be empty.
void add_to(std::vector<int64_t>& total, const std::vector<int64_t>& ns);

}  // namespace soap
