#include "transport/sockets.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <sstream>

#include "base/error.h"
#include "fmt/ranges.h"

namespace soap::transport {
namespace {

constexpr std::size_t kWordBytes = 32;

struct Hello {  // what who connects says first
  char word[kWordBytes] = {};
  int32_t rank = -1;
};

struct Caller {  // has connected and not said its hello yet
  Descriptor socket;
  Hello hello;
  std::size_t num_bytes = 0;  // of it, so far
};

std::string last_error() {
  return std::strerror(errno);
}

using Addresses = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

// Empty where there is none.
Addresses resolve(const std::string& host, int port, int type, int flags) {
  addrinfo hints{};
  hints.ai_socktype = type;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found) != 0) found = nullptr;
  return {found, &freeaddrinfo};
}

// Empty: none that other hosts could use.
std::string text_of(const sockaddr* address) {
  char text[INET6_ADDRSTRLEN] = {};
  if (address->sa_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in*>(address)->sin_addr;
    if ((ntohl(v4.s_addr) >> 24) == 127) return "";
    inet_ntop(AF_INET, &v4, text, sizeof(text));
  } else if (address->sa_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr;
    if (IN6_IS_ADDR_LOOPBACK(&v6) || IN6_IS_ADDR_LINKLOCAL(&v6)) return "";
    inet_ntop(AF_INET6, &v6, text, sizeof(text));
  }
  return text;
}

// Of interfaces that are up, IPv4 first. `name` empty: any.
std::string address_of_interface(const std::string& name) {
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return "";
  std::string v4, v6;
  for (const ifaddrs* at = all; at != nullptr; at = at->ifa_next) {
    if (at->ifa_addr == nullptr || (at->ifa_flags & IFF_UP) == 0 || (!name.empty() && name != at->ifa_name)) continue;
    std::string text = text_of(at->ifa_addr);
    if (text.empty() && !name.empty() && at->ifa_addr->sa_family == AF_INET) text = "127.0.0.1";  // it is what was asked for
    std::string& out = at->ifa_addr->sa_family == AF_INET ? v4 : v6;
    if (out.empty()) out = text;
  }
  freeifaddrs(all);
  return v4.empty() ? v6 : v4;
}

// Nothing is sent.
std::string address_towards(const std::string& host) {
  const Addresses found = resolve(host, 9, SOCK_DGRAM, 0);
  for (const addrinfo* at = found.get(); at != nullptr; at = at->ai_next) {
    const Descriptor socket(::socket(at->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    sockaddr_storage own{};
    socklen_t size = sizeof(own);
    if (!socket.is_open() || ::connect(socket.fd(), at->ai_addr, at->ai_addrlen) != 0) continue;
    if (getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&own), &size) != 0) continue;
    std::string text = text_of(reinterpret_cast<const sockaddr*>(&own));
    if (!text.empty()) return text;
  }
  return "";
}

std::string random_word() {
  std::random_device random;
  std::string out;
  while (out.size() < kWordBytes) out += fmt::format("{:08x}", random());
  return out;
}

void set_option(const Descriptor& socket, int level, int option) {
  const int on = 1;
  setsockopt(socket.fd(), level, option, &on, sizeof(on));  // it works without, more slowly
}

// Until poll() sees the event, false where time is over.
bool wait_for(const Descriptor& socket, short event, Clock::time_point deadline) {
  pollfd entry{socket.fd(), event, 0};
  int ready = 0;
  do {
    ready = poll(&entry, 1, poll_ms(deadline));
  } while ((ready < 0 && errno == EINTR) || (ready == 0 && Clock::now() < deadline));
  return ready > 0;
}

struct Contact {
  std::string address, word;
  int port = 0;
};

Contact contact_of(const std::string& text) {
  std::istringstream fields(text);
  Contact out;
  if (!(fields >> out.address >> out.port >> out.word) || out.word.size() != kWordBytes) user_error("'{}' is not the text of a contact", text);
  return out;
}

Descriptor call(int rank, int peer, const Contact& contact, Clock::time_point deadline) {
  std::string why = "no such address";
  const Addresses found = resolve(contact.address, contact.port, SOCK_STREAM, AI_NUMERICHOST);
  for (const addrinfo* at = found.get(); at != nullptr; at = at->ai_next) {
    Descriptor socket(::socket(at->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    int error = 0;
    socklen_t size = sizeof(error);
    if (!socket.is_open()) {
      why = last_error();
    } else if (::connect(socket.fd(), at->ai_addr, at->ai_addrlen) != 0 && errno != EINPROGRESS) {
      why = last_error();
    } else if (!wait_for(socket, POLLOUT, deadline)) {
      why = "the timeout passed";
    } else if (getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0) {
      why = std::strerror(error);
    } else {
      Hello hello;
      contact.word.copy(hello.word, kWordBytes);
      hello.rank = rank;
      if (send(socket.fd(), &hello, sizeof(hello), MSG_NOSIGNAL) == sizeof(hello)) return socket;  // the first bytes of a connection find room
      why = last_error();
    }
  }
  throw TransportError(
      fmt::format("[soap] rank {} can't reach rank {} at {}, port {}: {}. GLOO_SOCKET_IFNAME names the network interface that a rank is reached by", rank, peer,
                  contact.address, contact.port, why));
}

}  // namespace

Descriptor::~Descriptor() {
  if (fd_ >= 0) close(fd_);
}

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) close(fd_);
    fd_ = other.release();
  }
  return *this;
}

int Descriptor::release() {
  return std::exchange(fd_, -1);
}

int poll_ms(Clock::time_point deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 3'600'000));
}

std::string own_address(const std::string& interface, const std::string& towards) {
  const std::string name = interface.substr(0, interface.find(','));
  if (!name.empty()) {
    const std::string out = address_of_interface(name);
    if (out.empty()) throw TransportError(fmt::format("[soap] there is no network interface '{}' with an address (GLOO_SOCKET_IFNAME)", name));
    return out;
  }
  std::string out = towards.empty() ? "" : address_towards(towards);
  if (out.empty()) out = address_of_interface("");
  return out.empty() ? "127.0.0.1" : out;
}

Listener::Listener(const std::string& address, int num_ranks) : address_(address), word_(random_word()) {
  const Addresses found = resolve(address, 0, SOCK_STREAM, AI_NUMERICHOST | AI_PASSIVE);
  if (found == nullptr) throw TransportError(fmt::format("[soap] '{}' is no address", address));
  socket_ = Descriptor(::socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  sockaddr_storage own{};
  socklen_t size = sizeof(own);
  if (!socket_.is_open() || bind(socket_.fd(), found->ai_addr, found->ai_addrlen) != 0 || listen(socket_.fd(), std::max(num_ranks, 16)) != 0 ||
      getsockname(socket_.fd(), reinterpret_cast<sockaddr*>(&own), &size) != 0) {
    throw TransportError(fmt::format("[soap] can't listen at {}: {}", address, last_error()));
  }
  port_ = ntohs(own.ss_family == AF_INET ? reinterpret_cast<const sockaddr_in&>(own).sin_port : reinterpret_cast<const sockaddr_in6&>(own).sin6_port);
}

std::string Listener::contact() const {
  return fmt::format("{} {} {}", address_, port_, word_);
}

// A connection is made by the kernel before anybody accepts it: no rank waits for one that waits for another.
std::vector<Descriptor> Listener::connect(int rank, const std::vector<std::string>& contacts, Clock::time_point deadline) const {
  std::vector<Descriptor> out(contacts.size());
  for (int peer = 0; peer < rank; ++peer) {
    if (!contacts[peer].empty()) out[peer] = call(rank, peer, contact_of(contacts[peer]), deadline);
  }
  accept(out, rank, contacts, deadline);
  for (const Descriptor& socket : out) {
    if (!socket.is_open()) continue;
    set_option(socket, IPPROTO_TCP, TCP_NODELAY);
    set_option(socket, SOL_SOCKET, SO_KEEPALIVE);
  }
  return out;
}

void Listener::accept(std::vector<Descriptor>& of_rank, int rank, const std::vector<std::string>& contacts, Clock::time_point deadline) const {
  const int num_ranks = static_cast<int>(contacts.size());
  std::vector<Caller> callers;
  const auto absent = [&] {
    std::vector<int> out;
    for (int peer = rank + 1; peer < num_ranks; ++peer) {
      if (!contacts[peer].empty() && !of_rank[peer].is_open()) out.push_back(peer);
    }
    return out;
  };
  const auto missing = [&] { return !absent().empty(); };
  while (missing()) {
    std::vector<pollfd> entries{{socket_.fd(), POLLIN, 0}};
    for (const Caller& caller : callers) entries.push_back({caller.socket.fd(), POLLIN, 0});
    const int ready = poll(entries.data(), entries.size(), poll_ms(deadline));
    if (ready < 0 && errno != EINTR) throw TransportError(fmt::format("[soap] rank {} can't wait for connections: {}", rank, last_error()));
    if (ready <= 0) {
      if (Clock::now() < deadline) continue;
      throw TransportError(
          fmt::format("[soap] making a process group: to rank {}, of ranks on other hosts {} did not connect in time", rank, fmt::join(absent(), ", ")));
    }
    for (std::size_t i = 0; i < callers.size(); ++i) {
      Caller& caller = callers[i];
      if (entries[i + 1].revents == 0) continue;
      const ssize_t got = recv(caller.socket.fd(), reinterpret_cast<char*>(&caller.hello) + caller.num_bytes, sizeof(Hello) - caller.num_bytes, 0);
      if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
      caller.num_bytes += std::max<ssize_t>(got, 0);
      if (got > 0 && caller.num_bytes < sizeof(Hello)) continue;
      const int peer = caller.hello.rank;
      const bool known = got > 0 && std::string_view(caller.hello.word, kWordBytes) == word_ && peer > rank && peer < num_ranks && !contacts[peer].empty();
      if (known && !of_rank[peer].is_open()) of_rank[peer] = std::move(caller.socket);
      caller.socket = Descriptor();  // a stranger
    }
    std::erase_if(callers, [](const Caller& caller) { return !caller.socket.is_open(); });
    if (entries[0].revents != 0) {
      Descriptor socket(accept4(socket_.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (socket.is_open()) callers.push_back({std::move(socket), {}, 0});
    }
  }
}

}  // namespace soap::transport
