// Regions: parts of a graph whose activations aren't kept for backward but computed again when it comes (Chen et al. 2016, "Training Deep Nets
// with Sublinear Memory Cost").
//
// A region is named by modules and operators: `h.3` is every operator of that module and of those in it, `h.3/add` one operator with what it
// is expanded into. Operators are taken by name, so that those which follow, and have no configuration, belong to it too.
//
// [Note: what is computed again] What a region's operators make is gone when forward has read it, except what leaves the region. Kept are what
// enters it and the copies that movements inside it bring: nothing moves twice. Backward computes the operators again on what was kept, with
// the same random numbers, just before it first needs them. Never computed again are operators without a backward step (masks, indices)
// and opaque ones, whose code may have effects: what these make is kept as elsewhere.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "graph/op_graph.h"
#include "sharding/strategy.h"

namespace soap {

// Whether the operator `name` is `member`, is in the module `member`, or was expanded from it.
bool belongs(std::string_view name, std::string_view member);

// Its code has no effects of its own: not opaque.
bool may_compute_again(const Node& node);

// Per node of the graph or of its expansion the index of the region that names it, -1 for none. Throws std::invalid_argument where two do.
std::vector<int> named_regions(const OpGraph& graph, const std::vector<Region>& regions);

// The module of an operator's name: "h.3/add" and "h.3" are of h.3; "" is the root.
std::string_view module_path(std::string_view name);

// Modules and operators that fit a pattern: without a slash, modules with as many parts as it has, each fitting its own (`h.*` is h.0, h.1, ... and
// not h.0.attn); with one, operators as a whole. In the graph's order.
std::vector<std::string> members_matching(const OpGraph& graph, std::string_view pattern);

// A region for each repeated block: the children of a container (names that are numbers) of which at least two are made of the same
// operators; the outermost containers.
std::vector<Region> repeated_blocks(const OpGraph& graph);

// Where nothing repeats: about `count` regions of consecutive modules, of like bytes of results.
std::vector<Region> consecutive_regions(const OpGraph& graph, int count);

std::string to_string(const Region& region);  // "features.0+features.1"

}  // namespace soap
