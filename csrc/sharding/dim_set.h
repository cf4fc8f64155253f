// The part of one dim that a tile has; box_of (sharding/tiling.h) is this for every dim.
#pragma once

#include "sharding/rule.h"

namespace soap {

// `sets`: of each factor of the rule. `size`: of the dim.
IndexSet dim_set(const DimExpr& dim, const Rule& rule, int64_t size, const std::vector<IndexSet>& sets);
// Its size: of products of factors known without making them.
int64_t dim_size(const DimExpr& dim, int64_t size, const std::vector<IndexSet>& sets);

}  // namespace soap
