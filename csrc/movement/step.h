// The movements of one step on one rank whose ranks share memory, or that stays within the rank: carried out in one call.
#pragma once

#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "movement/exchange.h"

namespace soap::movement {

// A local value, in this type.
struct Read {
  int value = -1;
  at::ScalarType dtype = at::kFloat;
};

struct Counts {
  int64_t exchanges = 0, exchanged_bytes = 0, all_reduces = 0, reduced_bytes = 0;
};

using BackendPtr = c10::intrusive_ptr<backend::SoapBackend>;

struct Step {
  // A step that is only that: the result is the source as it is.
  struct Same {
    Read source;
    int result = -1;
  };
  // What is made of pieces, this rank's own and, where there is a backend, other ranks'.
  struct Pieces {
    std::vector<Read> outgoing, own;
    std::vector<int> results;
    std::optional<Exchange> exchange;
    std::optional<Assembly> assembly;  // where there is no exchange
    BackendPtr backend;
    int64_t num_bytes = 0;  // sent
  };
  // All-reduces among the same ranks.
  struct Bucket {
    BackendPtr backend;
    bool maximum = false;
    std::vector<Read> sources;
    std::vector<std::vector<int>> reached;                    // by source: values that are the sum
    std::vector<std::pair<int, std::vector<int64_t>>> empty;  // copies without elements, and their shapes
  };

  std::optional<Same> same;
  std::optional<Pieces> pieces;
  std::vector<Bucket> buckets;
  std::vector<std::vector<int>> ranks;  // among whom it communicates, in order: the exchange's, the buckets'

  bool communicates() const { return !ranks.empty(); }
  // Gives `put` the completed destinations, transfer by transfer: a gradient may be completed by several. Without Python's lock where it communicates.
  void run(const std::function<at::Tensor(const Read&)>& read, const std::function<void(int, at::Tensor)>& put, Counts& counts) const;
};

}  // namespace soap::movement
