#pragma once

#include "program/program.h"
#include "reshard/flows.h"

namespace soap {

// As item_pieces and item_movement (program/program.h) of one item, without the boxes.
Flows item_flows(const Program& program, StepKind kind, const StepItem& item);

}  // namespace soap
