// One use of a substitution by itself, small, to be computed both ways.
#pragma once

#include "substitution/match.h"

namespace soap {

// What a rewrite replaces and what it makes, as graphs of their own: feeds of equal names for what they read, returns for what is read of
// them. Sizes are divided where every size and position of a dim has a common divisor; tensors of floats are float64. Operators keep
// their `origin`.
struct Sample {
  OpGraph source, target;
};
Sample sample_of(const OpGraph& graph, const Rewrite& rewrite, const SubstitutionTable& table = substitutions());

// Equal for rewrites that do the same to equal operators: layers of one kind. Names don't count.
std::string signature(const OpGraph& graph, const Rewrite& rewrite, const SubstitutionTable& table = substitutions());

}  // namespace soap
