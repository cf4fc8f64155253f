// Messages between ranks of several hosts, by whatever carries them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "transport/bell.h"
#include "transport/operation.h"

namespace soap::transport {

class Wire {
 public:
  // A message on its way. When it is destroyed nobody reads or writes its memory any more.
  class Transfer {
   public:
    virtual ~Transfer() = default;
    // Until all of it has come, or its memory can be used again; once. Throws a std::exception with the cause if that fails, takes longer than `limit`, or
    // is aborted. `patience`: of the thread that waits.
    virtual void wait(Clock::duration limit, const Patience& patience) = 0;
    // Wakes the thread that waits, or will. Thread-safe.
    virtual void abort() = 0;
  };

  virtual ~Wire() = default;
  // Neither waits. Messages from one rank to another come in the order in which they were sent, and are received in that order; of both ends' calls tag (31
  // bits) and number of bytes, more than 0, are the same.
  virtual std::unique_ptr<Transfer> send(int rank, int tag, std::byte* data, uint64_t num_bytes) = 0;
  virtual std::unique_ptr<Transfer> receive(int rank, int tag, std::byte* data, uint64_t num_bytes) = 0;
};

}  // namespace soap::transport
