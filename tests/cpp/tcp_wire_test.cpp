// Messages over connections: streams in both directions, what ends them, and how ranks find each other.
#include "transport/tcp_wire.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <numeric>
#include <thread>

namespace soap::transport {
namespace {

using namespace std::chrono_literals;
using Bytes = std::vector<std::byte>;

constexpr Patience kPatience{std::chrono::microseconds(5), 20};

// Two ranks.
std::array<std::unique_ptr<TcpWire>, 2> pair_of_wires() {
  std::array<int, 2> ends{};
  EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()), 0);
  std::array<std::unique_ptr<TcpWire>, 2> out;
  for (int r = 0; r < 2; ++r) {
    std::vector<Descriptor> of_rank(2);
    of_rank[1 - r] = Descriptor(ends[r]);
    out[r] = std::make_unique<TcpWire>(std::move(of_rank));
  }
  return out;
}

Bytes bytes(int seed, std::size_t count) {
  Bytes out(count);
  for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<std::byte>(i * 31 + i / 251 + seed);
  return out;
}

std::string error_of(Wire::Transfer& transfer, Clock::duration limit = 20s) {
  try {
    transfer.wait(limit, kPatience);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Messages from a few bytes to more than any socket holds, both ways at once, waited for in another order than they were begun in.
TEST(TcpWire, StreamsBothWays) {
  auto wires = pair_of_wires();
  const std::vector<std::size_t> sizes{1, 4096, 5'000'003, 17, 3'000'000, 1};
  const auto run = [&](int me) {
    std::vector<Bytes> sent, received;
    std::vector<std::unique_ptr<Wire::Transfer>> out, in;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      sent.push_back(bytes(me + 2 * static_cast<int>(i), sizes[i]));
      received.emplace_back(sizes[i]);
    }
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      out.push_back(wires[me]->send(1 - me, static_cast<int>(i), sent[i].data(), sizes[i]));
      in.push_back(wires[me]->receive(1 - me, static_cast<int>(i), received[i].data(), sizes[i]));
    }
    for (std::size_t i = sizes.size(); i-- > 0;) {
      EXPECT_EQ(error_of(*in[i]), "");
      EXPECT_EQ(received[i], bytes(1 - me + 2 * static_cast<int>(i), sizes[i])) << i;
    }
    for (auto& transfer : out) EXPECT_EQ(error_of(*transfer), "");
  };
  std::thread other(run, 1);
  run(0);
  other.join();
}

// Many small ones arrive while nobody waits, those of a later time too.
TEST(TcpWire, WhatComesEarlyWaits) {
  auto wires = pair_of_wires();
  std::vector<Bytes> sent, received(100, Bytes(24));
  std::vector<std::unique_ptr<Wire::Transfer>> out;
  for (int i = 0; i < 100; ++i) sent.push_back(bytes(i, 24));
  for (int i = 0; i < 100; ++i) out.push_back(wires[0]->send(1, i, sent[i].data(), 24));
  for (int i = 0; i < 100; ++i) {
    const auto in = wires[1]->receive(0, i, received[i].data(), 24);
    EXPECT_EQ(error_of(*in), "");
    EXPECT_EQ(received[i], sent[i]);
  }
}

TEST(TcpWire, AMessageOfAnotherOperationIsAnError) {
  for (const auto& [tag, count] : {std::pair<int, std::size_t>{8, 4}, {7, 5}}) {
    auto wires = pair_of_wires();
    Bytes sent = bytes(0, count), received(4);
    const auto out = wires[0]->send(1, tag, sent.data(), count);
    const auto in = wires[1]->receive(0, 7, received.data(), 4);
    EXPECT_EQ(error_of(*in), "it sends a message of another operation");
    EXPECT_THROW(wires[1]->receive(0, 7, received.data(), 4), TransportError);
  }
}

// What was sent before the end still comes; what wasn't is an error at once.
TEST(TcpWire, TheEndOfAPeerIsSeen) {
  auto wires = pair_of_wires();
  Bytes sent = bytes(0, 100), received(100), more(100);
  EXPECT_EQ(error_of(*wires[0]->send(1, 1, sent.data(), 100)), "");
  const auto first = wires[1]->receive(0, 1, received.data(), 100), second = wires[1]->receive(0, 2, more.data(), 100);
  std::thread ends([&] {
    std::this_thread::sleep_for(50ms);
    wires[0].reset();
  });
  EXPECT_EQ(error_of(*first), "");
  EXPECT_EQ(received, sent);
  const auto begin = Clock::now();
  EXPECT_EQ(error_of(*second), "it has closed the connection");
  EXPECT_LT(Clock::now() - begin, 5s);
  ends.join();
}

TEST(TcpWire, TheEndIsSeenThoughAChildHoldsTheConnection) {
  std::array<int, 2> ends{};
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends.data()), 0);
  const Descriptor of_child(dup(ends[0]));
  std::vector<Descriptor> of_rank;
  of_rank.emplace_back(ends[0]);
  std::make_unique<TcpWire>(std::move(of_rank)).reset();
  std::vector<Descriptor> of_other;
  of_other.emplace_back(ends[1]);
  TcpWire wire(std::move(of_other));
  Bytes received(8);
  EXPECT_EQ(error_of(*wire.receive(0, 1, received.data(), 8)), "it has closed the connection");
}

TEST(TcpWire, AbortWakesWhoWaits) {
  auto wires = pair_of_wires();
  Bytes received(8);
  const auto in = wires[0]->receive(1, 1, received.data(), 8);
  std::thread aborts([&] {
    std::this_thread::sleep_for(50ms);
    in->abort();
  });
  const auto begin = Clock::now();
  EXPECT_EQ(error_of(*in), "aborted");
  EXPECT_LT(Clock::now() - begin, 5s);
  aborts.join();
}

TEST(TcpWire, LimitsAreKept) {
  auto wires = pair_of_wires();
  Bytes received(8), large = bytes(0, 20'000'000);
  const auto in = wires[0]->receive(1, 1, received.data(), 8);
  EXPECT_EQ(error_of(*in, 30ms), "time is over");
  const auto out = wires[0]->send(1, 1, large.data(), large.size());  // nobody reads it
  EXPECT_EQ(error_of(*out, 30ms), "time is over");
}

TEST(TcpWire, AMessageThatIsGivenUpEndsTheConnection) {
  auto wires = pair_of_wires();
  Bytes large = bytes(0, 20'000'000);
  wires[0]->send(1, 1, large.data(), large.size()).reset();
  EXPECT_THROW(wires[0]->send(1, 2, large.data(), 4), TransportError);
}

// Ranks 0 and 3 on one host, 1 and 2 on others; a stranger calls, and one that knows no word.
TEST(Sockets, RanksConnect) {
  const int num_ranks = 4;
  const auto same_host = [](int a, int b) { return a == b || (a == 0 && b == 3) || (a == 3 && b == 0); };
  std::vector<Listener> listeners;
  std::vector<std::string> contacts;
  for (int r = 0; r < num_ranks; ++r) {
    listeners.emplace_back("127.0.0.1", num_ranks);
    contacts.push_back(listeners.back().contact());
  }
  const std::string wrong = contacts[0].substr(0, contacts[0].size() - 1) + (contacts[0].back() == '0' ? "1" : "0");
  std::vector<std::string> no_word{wrong, ""};
  const auto stranger = listeners[1].connect(1, no_word, Clock::now() + 10s);  // nobody answers it, nor does rank 0 take it for rank 1
  std::vector<std::vector<Descriptor>> sockets(num_ranks);
  std::vector<std::thread> threads;
  for (int r = 0; r < num_ranks; ++r) {
    threads.emplace_back([&, r] {
      std::vector<std::string> others = contacts;
      for (int s = 0; s < num_ranks; ++s) {
        if (same_host(r, s)) others[s].clear();
      }
      sockets[r] = listeners[r].connect(r, others, Clock::now() + 20s);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int r = 0; r < num_ranks; ++r) {
    for (int s = 0; s < num_ranks; ++s) {
      ASSERT_EQ(sockets[r][s].is_open(), !same_host(r, s)) << r << " " << s;
      if (same_host(r, s)) continue;
      const char mine = static_cast<char>(10 * r + s);
      ASSERT_EQ(send(sockets[r][s].fd(), &mine, 1, 0), 1);
    }
  }
  for (int r = 0; r < num_ranks; ++r) {
    for (int s = 0; s < num_ranks; ++s) {
      if (same_host(r, s)) continue;
      char theirs = 0;
      ssize_t got = -1;
      for (int i = 0; i < 1000 && got < 0; ++i, std::this_thread::sleep_for(1ms)) got = recv(sockets[r][s].fd(), &theirs, 1, 0);
      EXPECT_EQ(theirs, 10 * s + r);
    }
  }
}

TEST(Sockets, WhoDoesNotComeIsNamed) {
  const Listener listener("127.0.0.1", 3);
  const std::vector<std::string> contacts{"", listener.contact(), listener.contact()};
  try {
    listener.connect(0, contacts, Clock::now() + 50ms);
    FAIL();
  } catch (const TransportError& error) {
    EXPECT_NE(std::string(error.what()).find("1, 2 did not connect in time"), std::string::npos) << error.what();
  }
}

TEST(Sockets, WhoCannotBeReachedIsNamed) {
  std::string gone;
  {
    const Listener listener("127.0.0.1", 2);
    gone = listener.contact();
  }
  const Listener own("127.0.0.1", 2);
  try {
    own.connect(1, {gone, ""}, Clock::now() + 5s);
    FAIL();
  } catch (const TransportError& error) {
    EXPECT_NE(std::string(error.what()).find("rank 1 can't reach rank 0 at 127.0.0.1"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("GLOO_SOCKET_IFNAME"), std::string::npos);
  }
}

TEST(Sockets, OwnAddress) {
  EXPECT_EQ(own_address("lo", ""), "127.0.0.1");
  EXPECT_FALSE(own_address("", "").empty());
  EXPECT_THROW(own_address("no_such_interface", ""), TransportError);
}

}  // namespace
}  // namespace soap::transport
