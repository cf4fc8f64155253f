// Work: what one tile of one operator has to do, counted from its local shapes; the roofline (cost/cost.h) turns it into time.
//
//   operators                     operations
//   products, convolutions        2 * prod(local factor sizes) * prod(dims of operand 1 that no factor has: the kernel)
//   transposed convolutions       2 * input elements * output channels of a group * kernel
//   attention                     2 * (query, key) pairs that see each other * (width of a key + width of a value)      causal: key <= query
//   LSTM, GRU, RNN layers         2 * steps * rows * elements of the weight matrices
//   grouped products              2 * rows * in * out: each row meets one matrix
//   distances (cdist)             2 * pairs * width
//   embeddings, selections        none: they read as many elements of the table as they give
//   views                         none, and no bytes
//
// The size and width that curves of efficiency go by (machine/machine.h):
//
//   family          size                                                     width
//   matmul          the smallest of rows, columns and contraction
//   attention       keys                                                     of a head
//   normalization   elements of a row (layer and RMS norm, softmax)
//   pointwise       elements of the result
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "program/program.h"

namespace soap {

struct Work {
  std::string_view family;  // one of kOpFamilies
  std::string dtype;        // that it computes in, torch's name
  double flops = 0;         // a multiplication and an addition are two
  double bytes = 0;         // operands read and results written once
  double size = 0;          // 0: it has none
  double width = 0;
  // Backward, where it isn't twice the forward: bytes that it reads and writes.
  std::optional<double> backward_bytes = {};
};

// The family of an operator: by its target, "pointwise" by the graph's own mark, else "other".
std::string_view family_of(const Node& node);
// Forward, of the part that this tile has in this chunk.
Work work_of(const Program& program, NodeId node, int tile, int chunk);
// Whether parts with these sets (factor_sets) are sure to be the same work, by their sizes.
bool same_work(const Program& program, NodeId node, const std::vector<IndexSet>& a, const std::vector<IndexSet>& b);

}  // namespace soap
