// What a group does on behalf of a caller: a collective, or a message.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "transport/memory.h"
#include "transport/segment.h"

namespace soap::transport {

using Clock = std::chrono::steady_clock;

// Ranks that ended, did not come in time, or called something else.
class TransportError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Operation {
  virtual ~Operation() = default;

  std::string call;  // as in error messages: "all_reduce(sum, float32)"
  Clock::duration timeout{};
  Clock::time_point deadline{};
  std::exception_ptr error;
  // Called once by the thread that ends the operation, without locks, before `done`.
  std::function<void(std::exception_ptr)> completed;
  std::atomic<bool> done{false};
};

// What a rank says at the first step of a collective; all ranks read all of them.
struct Header {
  char call[96] = {};      // must be equal on all ranks
  uint64_t num_bytes = 0;  // must be equal
  uint64_t num_steps = 0;  // the largest counts
  uint64_t counts[1];      // bytes for each rank; as many as there are ranks
};

// One rank's part of a collective, as steps (see [Note: stages, slots, rings]). Steps are published in order, each step is
// consumed after it was published, and no step but the first is published before the first was consumed.
class Collective : public Operation {
 public:
  Collective(int rank, int num_ranks) : rank(rank), num_ranks(num_ranks) {}

  // For a group of one, whose header was checked: does all of it.
  virtual void alone() = 0;
  // Fills num_bytes, num_steps (>= 1) and counts of this rank's header.
  virtual void describe(const Layout& layout, Header& header) const = 0;
  // The headers of all ranks, which agree. Returns what is wrong with them for this rank alone, or nothing; the steps are then run
  // without reading what comes.
  virtual std::string check(const std::vector<const Header*>& headers) {
    (void)headers;
    return {};
  }
  // Whether this step's data is there, `num_consumed` steps having been consumed.
  virtual bool may_publish(uint64_t step, uint64_t num_consumed) const {
    (void)step, (void)num_consumed;
    return true;
  }
  // Writes this rank's data of a step.
  virtual void publish(const Layout& layout, uint64_t step, std::byte* data) = 0;
  // Reads the data of all ranks.
  virtual void consume(const Layout& layout, uint64_t step, const std::vector<const std::byte*>& data) = 0;

  const int rank;
  const int num_ranks;

  // Of a part of a larger operation: its num_bytes for the header.
  uint64_t num_bytes_of_whole = 0;
  // What errors call the ranks, where it isn't their numbers; the group's.
  const std::vector<int>* labels = nullptr;
  int label(int of) const { return labels == nullptr || labels->empty() ? of : (*labels)[of]; }

  // How far it is; the group's alone to change.
  bool begun = false;
  uint64_t first_stage = 0;  // that of step 0
  uint64_t num_steps = 1;
  uint64_t num_published = 0;
  uint64_t num_consumed = 0;
  bool skipped = false;  // an error of this rank: what comes is not read
};

// A message to or from one rank. Messages of one pair with one tag arrive in the order in which they were sent.
struct Message : Operation {
  int peer = -1;  // of a receive, -1: any
  int tag = 0;
  Memory memory;
  uint64_t moved = 0;
  bool begun = false;
};

}  // namespace soap::transport
