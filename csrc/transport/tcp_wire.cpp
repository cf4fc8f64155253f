#include "transport/tcp_wire.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace soap::transport {
namespace {

constexpr std::size_t kAtOnce = 8;  // messages of one write

bool try_later() {
  return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

}  // namespace

class TcpWire::Message final : public Transfer {
 public:
  Message(TcpWire& wire, Peer& peer, bool sends, Header header, std::byte* data)
      : wire(wire), peer(peer), sends(sends), header(header), expected(header), data(data) {}
  ~Message() override { wire.forget(*this); }
  void wait(Clock::duration limit, const Patience& patience) override { wire.wait(*this, limit, patience); }
  void abort() override { wire.abort(); }

  bool done() const { return moved == sizeof(Header) + expected.num_bytes; }
  // What is left of it, as one or two pieces; returns their number.
  std::size_t rest(iovec* pieces) {
    const uint64_t of_data = moved - std::min(moved, sizeof(Header));
    std::size_t count = 0;
    if (moved < sizeof(Header)) pieces[count++] = {reinterpret_cast<std::byte*>(&header) + moved, sizeof(Header) - moved};
    pieces[count++] = {data + of_data, expected.num_bytes - of_data};
    return count;
  }

  TcpWire& wire;
  Peer& peer;
  const bool sends;
  Header header;  // as it goes or comes
  const Header expected;
  std::byte* const data;
  std::size_t moved = 0;  // of header and data
};

TcpWire::TcpWire(std::vector<Descriptor> of_rank) : peers_(of_rank.size()), woken_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!woken_.is_open()) throw TransportError(fmt::format("[soap] no eventfd: {}", std::strerror(errno)));
  for (std::size_t r = 0; r < of_rank.size(); ++r) {
    if (!of_rank[r].is_open()) peers_[r].broken = "there is no connection";
    peers_[r].socket = std::move(of_rank[r]);
  }
}

// Children that this process has forked (a DataLoader's) may hold the connections too, which end all the same.
TcpWire::~TcpWire() {
  for (const Peer& peer : peers_) {
    if (peer.socket.is_open()) shutdown(peer.socket.fd(), SHUT_RDWR);
  }
}

std::unique_ptr<Wire::Transfer> TcpWire::send(int rank, int tag, std::byte* data, uint64_t num_bytes) {
  auto out = begin(rank, true, tag, data, num_bytes);
  write(peers_[rank]);
  return out;
}

std::unique_ptr<Wire::Transfer> TcpWire::receive(int rank, int tag, std::byte* data, uint64_t num_bytes) {
  return begin(rank, false, tag, data, num_bytes);
}

std::unique_ptr<Wire::Transfer> TcpWire::begin(int rank, bool sends, int tag, std::byte* data, uint64_t num_bytes) {
  Peer& peer = peers_[rank];
  if (!peer.broken.empty()) throw TransportError(peer.broken);
  auto out = std::make_unique<Message>(*this, peer, sends, Header{static_cast<uint64_t>(tag), num_bytes}, data);
  (sends ? peer.outgoing : peer.incoming).push_back(out.get());
  return out;
}

// What the connection takes now. Returns whether it took something, or failed.
bool TcpWire::write(Peer& peer) {
  if (peer.outgoing.empty() || !peer.broken.empty()) return false;
  iovec pieces[2 * kAtOnce];
  std::size_t count = 0;
  for (std::size_t m = 0; m < std::min(kAtOnce, peer.outgoing.size()); ++m) count += peer.outgoing[m]->rest(pieces + count);
  msghdr message{};
  message.msg_iov = pieces;
  message.msg_iovlen = count;
  const ssize_t written = sendmsg(peer.socket.fd(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (written < 0) {
    if (try_later()) return false;
    peer.broken = std::strerror(errno);
    return true;
  }
  for (auto left = static_cast<std::size_t>(written); left > 0;) {
    Message& front = *peer.outgoing.front();
    const std::size_t taken = std::min<std::size_t>(left, sizeof(Header) + front.expected.num_bytes - front.moved);
    front.moved += taken;
    left -= taken;
    if (front.done()) peer.outgoing.pop_front();
  }
  return written > 0;
}

// What has come for the first message that is waited for. Returns whether something has, or the connection failed.
bool TcpWire::read(Peer& peer) {
  if (peer.incoming.empty() || !peer.broken.empty()) return false;
  Message& front = *peer.incoming.front();
  iovec pieces[2];
  msghdr message{};
  message.msg_iov = pieces;
  message.msg_iovlen = front.rest(pieces);
  const ssize_t got = recvmsg(peer.socket.fd(), &message, MSG_DONTWAIT);
  if (got < 0 && try_later()) return false;
  if (got <= 0) {
    peer.broken = got == 0 ? "it has closed the connection" : std::strerror(errno);
    return true;
  }
  const bool had_header = front.moved >= sizeof(Header);
  front.moved += static_cast<std::size_t>(got);
  if (!had_header && front.moved >= sizeof(Header) && (front.header.tag != front.expected.tag || front.header.num_bytes != front.expected.num_bytes)) {
    peer.broken = "it sends a message of another operation";
    front.moved = 0;  // what came isn't it
    return true;
  }
  if (front.done()) peer.incoming.pop_front();
  return true;
}

bool TcpWire::move_all() {
  bool moved = false;
  for (Peer& peer : peers_) {
    moved |= read(peer);
    moved |= write(peer);
  }
  return moved;
}

void TcpWire::wait(const Message& message, Clock::duration limit, const Patience& patience) {
  const Clock::time_point deadline = Clock::now() + limit;
  Waiting waiting(patience);
  while (!message.done()) {
    if (aborted_.load(std::memory_order_acquire)) throw TransportError("aborted");
    if (!message.peer.broken.empty()) throw TransportError(message.peer.broken);
    if (move_all()) {
      waiting.restart();
    } else if (waiting.idle()) {
      if (Clock::now() >= deadline) throw TransportError("time is over");
      sleep(deadline);
    }
  }
}

// Until a connection has news.
void TcpWire::sleep(Clock::time_point deadline) {
  std::vector<pollfd> entries{{woken_.fd(), POLLIN, 0}};
  for (const Peer& peer : peers_) {
    if (!peer.broken.empty() || (peer.outgoing.empty() && peer.incoming.empty())) continue;
    const int events = (peer.outgoing.empty() ? 0 : POLLOUT) | (peer.incoming.empty() ? 0 : POLLIN);
    entries.push_back({peer.socket.fd(), static_cast<short>(events), 0});
  }
  poll(entries.data(), entries.size(), poll_ms(deadline));
}

void TcpWire::abort() {
  aborted_.store(true, std::memory_order_release);
  const uint64_t one = 1;
  if (::write(woken_.fd(), &one, sizeof(one)) < 0 && errno != EAGAIN) throw TransportError(fmt::format("[soap] eventfd: {}", std::strerror(errno)));
}

// A message that is given up on its way leaves the connection in the middle of it.
void TcpWire::forget(Message& message) {
  if (message.done()) return;
  std::erase(message.sends ? message.peer.outgoing : message.peer.incoming, &message);
  if (message.peer.broken.empty()) message.peer.broken = "a message was given up";
}

}  // namespace soap::transport
