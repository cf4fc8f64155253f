// The local part of movements: what a rank sends in a step is packed, and what comes is put together, in one call each. The plan is compiled when these
// objects are made; a call walks over it without an object for each piece.
//
// [Note: pieces] A piece is a box of one tensor and goes to a box of another, of one shape. Within a result pieces are combined in the order given, so
// that replicas of a result, whose pieces are the same in the same order, stay bitwise equal:
//   replaced  a piece overwrites what is there;
//   added     begins with the identity; values of half precision are added up in float32 and rounded once, at the end;
//   maximum   begins with the identity.
// A first piece that is the whole result begins it instead, and isn't copied before another one follows.
//
// Results are dense, row-major also along dims of size 1, and begin where fresh memory would (kAlignment): kernels choose by both how they sum.
// All tensors are on the CPU. Shapes that aren't the planned ones are an InternalError. Nothing records gradients. Objects don't change once they are made.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>

#include <optional>
#include <utility>
#include <vector>

#include "kernels/cpu/box_copy.h"
#include "transport/memory.h"

namespace soap::movement {

struct Source;

inline constexpr std::size_t kAlignment = 64;  // bytes, of torch's allocator

using Index = std::vector<std::pair<int, std::vector<std::pair<int64_t, int64_t>>>>;  // (dim, runs) for the dims that aren't taken whole

// A box within a tensor.
struct Part {
  std::vector<int64_t> shape;            // of the box
  std::vector<kernels::cpu::Runs> runs;  // by dim
  std::vector<bool> whole;               // dims that the tensor has whole
  int64_t elements = 1;
  bool interval = true;  // one run in each dim: a view of the tensor

  Part() = default;
  Part(std::vector<int64_t> box_shape, const Index& index);
  // Throws InternalError unless the box lies in a tensor of these sizes.
  void check(at::IntArrayRef sizes) const;
  bool is_whole() const;
};

// A part of a source goes to a peer.
struct Sent {
  int peer = 0;    // counted among the peers that something goes to
  int source = 0;  // counted among the sources
  at::ScalarType dtype = at::kFloat;
  Part part;
};

class Packing {
 public:
  Packing(std::vector<Sent> parts, int num_peers);

  // What goes to each peer, as bytes: a view of a source where that is one stretch of its memory and all that goes to that peer, for all peers alike; else
  // parts of one new tensor, peer after peer, in the order of the parts.
  std::vector<at::Tensor> pack(const std::vector<at::Tensor>& sources) const;
  // The same as memory where it lies, not packed but for parts without rows. `held` gets the tensors that have it.
  std::vector<transport::Memory> memory(const std::vector<at::Tensor>& sources, std::vector<at::Tensor>& held) const;
  int num_peers() const { return static_cast<int>(peer_bytes_.size()); }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  struct Item {
    Sent sent;
    int64_t begin = 0;             // in the message, bytes
    std::vector<int64_t> strides;  // of the part, dense
    std::vector<kernels::cpu::Block> blocks;
  };
  std::vector<Item> items_;
  std::vector<int64_t> peer_bytes_;
  int64_t num_bytes_ = 0;
  bool one_each_ = false;  // one part for each peer
};

enum class Combine { kReplace, kAdd, kMaximum };

struct Arriving {
  int source = -1;    // counted among the sources, or
  int message = -1;   // among the messages,
  int64_t begin = 0;  // from this byte on
  Part from;          // of the source; of a message: whole
  Part to;            // of the result
};

struct Result {
  std::vector<int64_t> shape;
  at::ScalarType dtype = at::kFloat;
  at::ScalarType sums = at::kFloat;  // what is combined in
  Combine combine = Combine::kReplace;
  c10::Scalar identity = 0;
  std::vector<Arriving> pieces;
};

class Assembly {
 public:
  explicit Assembly(std::vector<Result> results);

  // The results in order. `places` is empty, or has for each of placed() memory that becomes the result (dense, of its shape and type) or null.
  std::vector<at::Tensor> unpack(const std::vector<at::Tensor>& sources, const std::vector<at::Tensor>& messages,
                                 const std::vector<std::optional<at::Tensor>>& places) const;
  // As unpack, with messages that come after `land` and before `finish`, to landing.incoming.
  struct Landing {
    std::vector<transport::Memory> incoming;    // by message
    std::vector<at::Tensor> results;            // those that what comes is written into; what this rank has itself is there
    std::vector<at::Tensor> messages;           // memory for the rest of a message, where there is a rest
    std::vector<std::pair<int, int>> unplaced;  // (result, piece) of `results`, not of rows: it comes to its message
  };
  Landing land(const std::vector<at::Tensor>& sources, const std::vector<std::optional<at::Tensor>>& places) const;
  std::vector<at::Tensor> finish(Landing landing, const std::vector<at::Tensor>& sources) const;

  // Whether everything is a sum of whole pieces of all of these ranks, in their order: message m, with all that it has, comes from rank from[m].
  bool sums_all(int rank, int num_ranks, const std::vector<int>& from) const;
  // Where sums_all: the sums' memory, one result after the other, and this rank's addends.
  struct Sums {
    std::vector<at::Tensor> results, held;
    transport::Memory memory, own;
    at::ScalarType dtype = at::kFloat;
  };
  Sums sums(const std::vector<at::Tensor>& sources) const;

  // Results that are copied together from parts, so that they can be written to given memory.
  const std::vector<int>& placed() const { return placed_; }
  int num_messages() const { return static_cast<int>(arrivals_.size()); }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  struct Piece {
    Arriving arriving;
    std::vector<int64_t> strides;  // of a message's part
    std::vector<kernels::cpu::Block> blocks;
    bool whole = false;  // it is all of the result
  };
  struct Plan {
    Result result;  // its pieces are those below
    std::vector<Piece> pieces;
  };
  at::Tensor assemble(const Plan& plan, const std::vector<at::Tensor>& sources, const std::vector<at::Tensor>& messages,
                      const std::optional<at::Tensor>& place) const;
  static Source source_of(const Piece& piece, at::ScalarType dtype, const std::vector<at::Tensor>& sources, const std::vector<at::Tensor>& messages,
                          at::Tensor& buffer);
  static at::Tensor memory_for(const Result& result, const std::optional<at::Tensor>& place);

  std::vector<Plan> plans_;
  std::vector<int> placed_;
  std::vector<std::vector<std::pair<int, int>>> arrivals_;  // of each message (result, piece), in its order
  int64_t num_bytes_ = 0;
};

// The elements of all tensors, one after the other, as one new tensor of that type; and views of such a tensor in the shapes of others.
at::Tensor flatten(const std::vector<at::Tensor>& tensors, at::ScalarType dtype);
std::vector<at::Tensor> unflatten(const at::Tensor& flat, const std::vector<at::Tensor>& like);

}  // namespace soap::movement
