// What `project` asks of a Program before it makes a rank's part of it.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "program/program.h"

namespace soap {

bool holds(const Coord& c, int rank);

// Copy coord -> tile coord where every copy of the group on this rank is one whole tile here, and no tile here gets gradients from elsewhere. Replicas of
// a tile add their gradients in the same order, and those of a copy see the same strides: they must agree, aliases on all of their devices or on none.
std::optional<std::map<int, int>> agreed_aliases(const Program& p, const CopyGroup& group, int rank);

// Per node: nothing but buffers' new values is made of it, and it has no gradient.
std::vector<char> only_written(const Program& p);

}  // namespace soap
