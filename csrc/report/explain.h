// Text made from a plan's data: returned, never printed.
#pragma once

#include <string>

#include "search/search.h"

namespace soap {

// A line for each operator: degrees by SOAP letter, devices, predicted time, bytes moved; then time and memory of each device.
std::string explain(const Program& program, const Simulation& simulation);

// The seeds and what the search found, with time and memory.
std::string candidates_table(const std::vector<Candidate>& candidates);

}  // namespace soap
