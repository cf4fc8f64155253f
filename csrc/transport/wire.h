// Messages between ranks of several hosts, by whatever carries them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "transport/operation.h"

namespace soap::transport {

class Wire {
 public:
  // A message on its way. When it is destroyed nobody reads or writes its memory any more.
  class Transfer {
   public:
    virtual ~Transfer() = default;
    // Until all of it has come, or its memory can be used again; once. Throws a std::exception with the cause if that fails, takes longer than `limit`, or
    // is aborted.
    virtual void wait(Clock::duration limit) = 0;
    // Wakes the thread that waits, or will. Thread-safe.
    virtual void abort() = 0;
  };

  virtual ~Wire() = default;
  // Neither waits. A message comes to the receive with its tag (31 bits); both have the same number of bytes, more than 0.
  virtual std::unique_ptr<Transfer> send(int rank, int tag, std::byte* data, uint64_t num_bytes) = 0;
  virtual std::unique_ptr<Transfer> receive(int rank, int tag, std::byte* data, uint64_t num_bytes) = 0;
};

}  // namespace soap::transport
