// Text made from a plan's data: returned, never printed.
#pragma once

#include <string>

#include "search/search.h"

namespace soap {

// A line for each operator: degrees by SOAP letter, devices, predicted time, bytes moved; then time and memory of each device.
std::string explain(const Program& program, const Simulation& simulation);

// What backward computes again: how much memory that saves and how much time it takes, in all and without each of the first regions; "" where nothing is.
std::string explain_recompute(const OpGraph& graph, const Strategy& strategy, const FedRows& rows, const CostModel& cost, int64_t memory_limit_bytes);

// The seeds and what the search found, with time and memory.
std::string candidates_table(const std::vector<Candidate>& candidates);

}  // namespace soap
