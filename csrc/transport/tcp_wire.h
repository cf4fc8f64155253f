// Messages between hosts over a TCP connection for each pair of ranks.
//
// Whoever waits for a message moves all of them: it writes and reads what its connections take and have, looks again for a while (bell.h), and then sleeps
// until one of them has news. No other thread takes part, so a small message wakes nobody but who waits for it, if that.
#pragma once

#include <atomic>
#include <deque>
#include <string>
#include <vector>

#include "transport/sockets.h"
#include "transport/wire.h"

namespace soap::transport {

class TcpWire final : public Wire {
 public:
  // The connections by rank, none to ranks of this host.
  explicit TcpWire(std::vector<Descriptor> of_rank);
  ~TcpWire() override;

  std::unique_ptr<Transfer> send(int rank, int tag, std::byte* data, uint64_t num_bytes) override;
  std::unique_ptr<Transfer> receive(int rank, int tag, std::byte* data, uint64_t num_bytes) override;

 private:
  struct Header {  // goes before a message's bytes
    uint64_t tag = 0;
    uint64_t num_bytes = 0;
  };
  class Message;
  struct Peer {
    Descriptor socket;
    std::deque<Message*> outgoing, incoming;
    std::string broken;  // why, once it is
  };

  std::unique_ptr<Transfer> begin(int rank, bool sends, int tag, std::byte* data, uint64_t num_bytes);
  bool write(Peer& peer);
  bool read(Peer& peer);
  bool move_all();
  void wait(const Message& message, Clock::duration limit, const Patience& patience);
  void sleep(Clock::time_point deadline);
  void abort();
  void forget(Message& message);

  std::vector<Peer> peers_;  // by rank
  Descriptor woken_;         // readable once aborted
  std::atomic<bool> aborted_{false};
};

}  // namespace soap::transport
