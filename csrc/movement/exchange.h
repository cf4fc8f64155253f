// Movements between ranks that share memory: from where each piece is to where it stays, through shared slots, without packing where pieces have rows.
#pragma once

#include <optional>
#include <vector>

#include "backend/soap_backend.h"
#include "movement/movement.h"

namespace soap::movement {

class Exchange {
 public:
  // This rank's part. `to` and `from`: the ranks, counted in the group, of the packing's peers and of the assembly's messages.
  Exchange(Packing packing, std::vector<int> to, Assembly assembly, std::vector<int> from, int rank, int num_ranks);

  // The results of the assembly. `outgoing` are the packing's sources, `own` the assembly's, `places` as in Assembly::unpack. Collective over the group;
  // throws what the backend's operations throw.
  std::vector<at::Tensor> run(backend::SoapBackend& backend, const std::vector<at::Tensor>& outgoing, const std::vector<at::Tensor>& own,
                              const std::vector<std::optional<at::Tensor>>& places) const;

 private:
  Packing packing_;
  Assembly assembly_;
  std::vector<int> to_, from_;
  int rank_ = 0, num_ranks_ = 0;
  bool sums_ = false;  // it is a reduce-scatter to this rank
};

// The sums (or maxima) over all ranks of tensors of one type, dense, in one operation. Collective over the group.
std::vector<at::Tensor> all_reduce(backend::SoapBackend& backend, const std::vector<at::Tensor>& tensors, bool maximum);

}  // namespace soap::movement
