// What operations are given to: a group on one host (group.h), or one on several (spanning.h).
#pragma once

#include <optional>
#include <string>

#include "transport/operation.h"

namespace soap::transport {

class Runner {
 public:
  virtual ~Runner() = default;

  // For operations from now on.
  virtual void set_timeout(Clock::duration timeout) = 0;
  virtual void set_random_delay(std::chrono::microseconds most) = 0;
  virtual uint64_t num_collectives() const = 0;
  // Until the operation has ended, at most `limit` (none: its own timeout ends it). Returns whether it has.
  virtual bool wait(Operation& operation, std::optional<Clock::duration> limit) = 0;
  // Ends all pending operations with an error, here and, as they depend on this rank, on the others.
  virtual void abort(const std::string& why) = 0;
  // Leaves the group: others that still need this rank get an error. Idempotent.
  virtual void leave() = 0;
};

}  // namespace soap::transport
