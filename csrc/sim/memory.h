// Memory: the peak of what each device holds while a Program runs.
//
//   held(d, step) = stored(d) + tiles + copies + gradients that live at that step + what its movement packs (Machine::packs)
//
//   stored      parts of parameters with optimizer state, buffers, constants, inputs: always. The gradients of the last step until backward
//               begins (a loop that calls zero_grad between the two; one that accumulates holds one more set)
//   tile        from the step that computes it to the last that reads it; to its backward where a rule says that backward reads it
//   copy        assembled by a fill, from it to the last reader; to the readers' backward where that reads it. Nothing where it is part of a tile that is
//               there. What comes in one piece lives in what its exchange brought (sim/arrivals.h), and that as long as any copy in it. Keep::kUse: given
//               back after its last use in forward, and there again from the refill on
//   gradient    of a copy from its first reader's backward until it is brought to the tiles, and as long as a tile's that is one stretch of it; of another
//               tile from then until its producer's backward, of a parameter to the end. Where a reader adds to it, the addend is there besides, the first
//               time a new sum too
//
// Tiles that backward computes again (Program::regions): to the last that reads them in forward, and from the first backward step that needs them to
// where the above ends. Copies that enter a region, or come by a movement within it, are kept until it is computed again.
//
// Views of tensors (Rule::view) are nothing, and keep what they are views of. What an operator needs only while it runs is counted where a rule says so
// (Operand::backward_bytes_more). Inputs that convolutions and max pools pad by themselves, and those that linear and recurrent layers bring in order, are
// copies in their stead.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "machine/machine.h"
#include "program/item_flows.h"

namespace soap {

constexpr int64_t kOptimizerCopies = 2;  // AdamW's two moments

struct MovedItem {
  std::vector<Flow> pieces;
  Movement movement;
};
// Of each item of each step, empty for computing ones.
using StepPieces = std::vector<std::vector<MovedItem>>;
StepPieces step_pieces(const Program& program);

// Bytes per device.
std::vector<int64_t> peak_memory(const Program& program, const StepPieces& pieces, const Machine& machine);

// The terms of `held`; kept parts count as stored, what a movement packs as moving.
enum class Held { kStored, kTiles, kCopies, kGradients, kMoving };
constexpr int kHeldKinds = 5;
// Bytes per device and step (the last is the update), by kind; the sum's peak is `peak_memory`.
using MemoryCurve = std::vector<std::array<int64_t, kHeldKinds>>;
std::vector<MemoryCurve> memory_curves(const Program& program, const StepPieces& pieces, const Machine& machine);

}  // namespace soap
