// A strategy on the graph after rewrites.
#pragma once

#include "substitution/match.h"

namespace soap {

// The strategy of `before`, for the graph `after` that these rewrites (the last of strategy.rewrites afterwards) make of it: operators that are there by
// name keep their configuration; one that is made like others takes theirs, a factor that is as long as all of theirs together cut within
// each one's share; a concatenation of parameters is computed where its reader needs it, and as it needs it. The rest follows.
Strategy transferred(const OpGraph& before, const Strategy& strategy, const std::vector<Rewrite>& rewrites, const OpGraph& after);

}  // namespace soap
