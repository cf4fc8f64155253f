// The text of a plan: what a person writes and reads (docs/plan-format.md).
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "sharding/rule.h"
#include "sharding/strategy.h"

namespace soap {

inline constexpr const char* kKeepWords[] = {"until_backward", "use", "until_step"};  // of Keep, in its order

// Parses and checks a plan for this graph. Each node takes the first line whose pattern fits its name; nodes without a line follow their
// producer. Throws std::invalid_argument with the line's number and text, the rule it breaks and what would be legal; nothing is half applied.
Strategy parse_plan(const OpGraph& graph, std::string_view text, int world_size);

// The lines of a text as changes of another plan: the configuration that they give each node they fit, nullopt where it follows. A line that
// only says how parameters are stored changes those alone. Throws as parse_plan does; `set`, `edge` and `recompute` lines are errors here.
std::map<std::string, std::optional<OpConfig>> parse_changes(const OpGraph& graph, std::string_view text, int world_size);

// One line per configured node, in graph order; parse_plan gives the same strategy back.
std::string print_plan(const OpGraph& graph, const Strategy& strategy);
std::string print_config(const OpConfig& config);

// One region written as in a `recompute` line ("h.3", "features.0+features.1"), or the regions of a pattern ("h.*").
// Throws std::invalid_argument where nothing fits.
std::vector<Region> parse_regions(const OpGraph& graph, std::string_view word);

}  // namespace soap
