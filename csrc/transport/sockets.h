// TCP connections between ranks of different hosts.
#pragma once

#include <string>
#include <vector>

#include "transport/operation.h"

namespace soap::transport {

// Owns a file descriptor.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor();
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;

  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  int release();

 private:
  int fd_;
};

// The address by which other hosts reach this one: that of the named network interface (the first of several, with commas between them); where none is named,
// the one from which packets go to `towards` (a name or an address; may be empty), or else that of the first interface that isn't the loopback. Throws
// TransportError where the named interface has none.
std::string own_address(const std::string& interface, const std::string& towards);

// Waits for the connections of other ranks.
class Listener {
 public:
  // Throws TransportError where it can't listen there.
  Listener(const std::string& address, int num_ranks);

  // For the others: address, port, and a random word that who connects must know.
  std::string contact() const;

  // Collective over ranks of several hosts: a connection to each rank that has a contact here (empty: none), which has one to this rank. Throws TransportError
  // that names a rank that can't be reached, or didn't come in time.
  std::vector<Descriptor> connect(int rank, const std::vector<std::string>& contacts, Clock::time_point deadline) const;

 private:
  void accept(std::vector<Descriptor>& of_rank, int rank, const std::vector<std::string>& contacts, Clock::time_point deadline) const;

  Descriptor socket_;
  std::string address_, word_;
  int port_ = 0;
};

// In milliseconds as poll() takes them: at least 0, rounded up.
int poll_ms(Clock::time_point deadline);

}  // namespace soap::transport
