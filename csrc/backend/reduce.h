// Sums and the like of tensors' elements, for all dtypes.
#pragma once

#include <string>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include "transport/memory.h"
#include "transport/spanning_collectives.h"

namespace soap::backend {

// "sum", "premul_sum", ...
std::string name_of(const c10d::ReduceOp& reduce);

// Combines elements of `num_ranks` ranks in the order of the ranks. Numbers of 16 bits or fewer are summed in float32 and rounded once, bool is summed as "or".
// The mean of integers is cut towards zero. Minima and maxima are NaN where a source is. Throws c10::ValueError for what a dtype doesn't have.
transport::Reducer make_reducer(at::ScalarType dtype, const c10d::ReduceOp& reduce, int num_ranks);

// The same in two levels: over the ranks of a host, then over hosts.
transport::Reducers make_reducers(at::ScalarType dtype, const c10d::ReduceOp& reduce, int num_ranks);

}  // namespace soap::backend
