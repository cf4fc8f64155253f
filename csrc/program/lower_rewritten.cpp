#include "program/lower_rewritten.h"

#include "substitution/match.h"

namespace soap {

Program lower_rewritten(const OpGraph& graph, const Strategy& strategy, const FedRows& rows) {
  Strategy rest = strategy;
  rest.rewrites.clear();
  return lower(rewritten(graph, strategy.rewrites), rest, rows);
}

}  // namespace soap
