// Machines that one doesn't have, from published figures.
#pragma once

#include <string>
#include <vector>

#include "machine/machine.h"

namespace soap {

// Sorted.
std::vector<std::string> preset_names();
// `hosts` of `devices_per_host` devices each. Throws std::invalid_argument for an unknown name (listing those there are) or a number below 1.
Machine preset(const std::string& name, int hosts, int devices_per_host);

}  // namespace soap
