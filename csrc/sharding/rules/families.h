// The families of operators that have rules, one file each.
#pragma once

#include "sharding/expand.h"
#include "sharding/rule.h"

namespace soap {

void register_pointwise(RuleRegistry& rules);
void register_matmul(RuleRegistry& rules);
void register_view(RuleRegistry& rules);

}  // namespace soap
