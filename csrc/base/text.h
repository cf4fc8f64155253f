// Names and patterns.
#pragma once

#include <string_view>

namespace soap {

// `*` and `?` as in a shell.
bool matches(std::string_view pattern, std::string_view name);

}  // namespace soap
