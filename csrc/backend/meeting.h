// How the ranks of a group find each other, through the group's Store.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "transport/process.h"
#include "transport/segment.h"
#include "transport/sockets.h"
#include "transport/wire.h"

namespace soap::backend {

struct Meeting {
  std::shared_ptr<transport::Segment> segment;        // of the ranks of this host; null: they don't share memory
  std::vector<transport::ProcessIdentity> processes;  // by rank
  std::vector<std::string> hosts;                     // by rank
  std::string why_not;                                // there is no segment
  bool one_host = false;
  std::unique_ptr<transport::Listener> listener;  // where there are several hosts
  std::vector<std::string> contacts;              // by rank; empty: on this host
};

// Collective over the ranks of a group: all get a segment, one for each host, or none does. `host` as in transport::this_process. The name of the shared memory
// is gone on return. Throws DistBackendError that names the ranks that did not come within the timeout.
Meeting meet(const c10::intrusive_ptr<c10d::Store>& store, int rank, int num_ranks, std::chrono::milliseconds timeout, const std::string& host);

// Collective over ranks that have met, on several hosts with a segment each: connections between those of different hosts. Throws DistBackendError.
std::unique_ptr<transport::Wire> connect(const Meeting& meeting, int rank, std::chrono::milliseconds timeout);

}  // namespace soap::backend
