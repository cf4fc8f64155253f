// Constraints: what a person has decided before the search begins.
//
//   pin      the configuration of a node (nullopt: it follows); no proposal changes it.
//   forbid   names of factors that may not be cut for a node, however it comes by its tiling; "devices": it may not have a device list of
//            its own; "chunks": it may not be cut in time.
//
// A pin wins over a forbid of the same node.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>

#include "sharding/rule.h"
#include "sharding/strategy.h"
#include "sharding/tiling.h"

namespace soap {

struct Constraints {
  std::map<std::string, std::optional<OpConfig>, std::less<>> pin;
  std::map<std::string, std::set<std::string>, std::less<>> forbid;

  bool empty() const { return pin.empty() && forbid.empty(); }
  bool pinned(const std::string& node) const { return pin.count(node) > 0; }
};

// The strategy with its pinned nodes overwritten and forbidden cuts taken out: a tile's devices do alike what they shared before. A node that
// follows into a forbidden cut gets a configuration of its own. What no configuration can satisfy stays as it is, and `allowed` says no.
Strategy adapted(const OpGraph& graph, Strategy strategy, const FedRows& rows, const Constraints& constraints);

// Whether a strategy keeps all constraints; one that can't be resolved is left to pricing.
bool allowed(const OpGraph& graph, const Strategy& strategy, const FedRows& rows, const Constraints& constraints);

}  // namespace soap
