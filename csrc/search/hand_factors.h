// Which factors a person cuts of an operator: those that its parameters show.
#pragma once

#include <string>

#include "sharding/rule.h"

namespace soap {

// Index of the first operand that is a parameter, -1 when none is.
int first_parameter(const OpGraph& graph, const Node& node);

// What a tensor parallel group may cut of an operator, by what its rule says of the factors; "" where there is none.
struct HandFactors {
  int first_parameter = -1;     // operand, -1 when none is a parameter
  std::string outputs, inputs;  // channels, of that parameter
  std::string parallel;         // that every operand has
};

HandFactors hand_factors(const OpGraph& graph, const Node& node, const Rule& rule);

}  // namespace soap
