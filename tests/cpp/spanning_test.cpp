// Collectives over several hosts, with threads as ranks and sockets between them: every layout of ranks on hosts, under random delays.
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <functional>
#include <thread>

#include "transport/spanning_collectives.h"
#include "transport/tcp_wire.h"
#include "transport_values.h"

namespace soap::transport {
namespace {

Reducers reducers() {
  return {reducer(), reducer(), true};
}

Floats folded(const std::vector<Floats>& parts) {
  Floats out = parts[0];
  for (std::size_t p = 1; p < parts.size(); ++p) {
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = fold(out[i], parts[p][i]);
  }
  return out;
}

// Over the ranks of each host, then over hosts.
Floats folded(const Hosts& hosts, std::size_t count) {
  std::vector<Floats> of_hosts;
  for (const auto& ranks : hosts.ranks) {
    std::vector<Floats> parts;
    for (const int r : ranks) parts.push_back(values(r, count));
    of_hosts.push_back(folded(parts));
  }
  return folded(of_hosts);
}

// By rank, the connections to ranks of other hosts.
std::vector<std::vector<Descriptor>> connections(const Hosts& hosts) {
  std::vector<std::vector<Descriptor>> out(hosts.num_ranks());
  for (auto& of_rank : out) of_rank.resize(hosts.num_ranks());
  for (int r = 0; r < hosts.num_ranks(); ++r) {
    for (int s = 0; s < r; ++s) {
      std::array<int, 2> pair{};
      if (hosts.host[r] == hosts.host[s] || socketpair(AF_UNIX, SOCK_STREAM, 0, pair.data()) != 0) continue;
      out[r][s] = Descriptor(pair[0]);
      out[s][r] = Descriptor(pair[1]);
    }
  }
  return out;
}

std::string error_of(const Operation& operation) {
  if (operation.error == nullptr) return "";
  try {
    std::rethrow_exception(operation.error);
  } catch (const TransportError& error) {
    return error.what();
  }
}

template <class Op, class... Args>
std::shared_ptr<Op> begin(SpanningGroup& group, bool blocking, const char* call, Args&&... args) {
  auto operation = std::make_shared<Op>(std::forward<Args>(args)...);
  operation->call = call;
  group.submit(operation, {}, blocking);
  return operation;
}

void on_ranks(const Hosts& hosts, Clock::duration timeout, std::chrono::microseconds delay, const std::function<void(SpanningGroup&, int)>& run) {
  auto sockets = connections(hosts);
  std::vector<std::shared_ptr<Segment>> segments;
  for (const auto& ranks : hosts.ranks) segments.push_back(Segment::anonymous(layout_for(static_cast<int>(ranks.size()))));
  std::vector<std::thread> threads;
  for (int r = 0; r < hosts.num_ranks(); ++r) {
    threads.emplace_back([&, r] {
      GroupOptions options;
      options.timeout = timeout;
      options.patience = Patience::of(hosts.num_ranks(), 2);
      options.random_delay = delay;
      options.labels = hosts.ranks[hosts.host[r]];
      auto local = std::make_shared<Group>(segments[hosts.host[r]], hosts.place[r], options);
      SpanningGroup group(hosts, r, local, std::make_unique<TcpWire>(std::move(sockets[r])), timeout, options.patience);
      run(group, r);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

class SpanningOn : public testing::TestWithParam<std::vector<std::string>> {};

TEST_P(SpanningOn, Collectives) {
  const Hosts hosts = Hosts::of(GetParam());
  const int num_ranks = hosts.num_ranks();
  on_ranks(hosts, std::chrono::seconds(30), std::chrono::microseconds(20), [&](SpanningGroup& group, int me) {
    for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{1000}, std::size_t{70'003}, std::size_t{600'003}}) {
      Floats mine = values(me, count);
      EXPECT_EQ(error_of(*begin<SpanningAllReduce>(group, true, "all_reduce", memory_of(mine), reducers())), "");
      EXPECT_EQ(mine, folded(hosts, count));

      // Every rank's part for rank s is `count + s` long.
      std::vector<Floats> parts, gathered;
      std::vector<Memory> input, output;
      for (int s = 0; s < num_ranks; ++s) parts.push_back(values(me, count + s)), gathered.emplace_back(count + s);
      for (Floats& part : parts) input.push_back(memory_of(part));
      for (Floats& part : gathered) output.push_back(memory_of(part));
      Floats out(count + me), brought = values(me, count + me);
      const auto scattered = begin<SpanningReduceScatter>(group, false, "reduce_scatter", input, memory_of(out), reducers());
      const auto all = begin<SpanningAllGather>(group, false, "all_gather", memory_of(brought), output);
      const int root = static_cast<int>(count % num_ranks);
      Floats from_root = me == root ? values(root, count) : Floats(count);
      begin<SpanningBroadcast>(group, true, "broadcast", root, memory_of(from_root));
      group.wait(*all, std::nullopt);
      EXPECT_EQ(error_of(*scattered) + error_of(*all), "");
      EXPECT_EQ(out, folded(hosts, count + me));
      for (int r = 0; r < num_ranks; ++r) EXPECT_EQ(gathered[r], values(r, count + r));
      EXPECT_EQ(from_root, values(root, count));

      const auto length = [&](int from, int to) { return (from * 31 + to * 17) % 5 * (count / 4) + to; };
      std::vector<Floats> sent, received;
      std::vector<Memory> outgoing, incoming;
      for (int r = 0; r < num_ranks; ++r) sent.push_back(values(me * 100 + r, length(me, r))), received.emplace_back(length(r, me));
      for (int r = 0; r < num_ranks; ++r) outgoing.push_back(memory_of(sent[r])), incoming.push_back(memory_of(received[r]));
      const std::vector<bool> everyone(num_ranks, true);
      EXPECT_EQ(error_of(*begin<SpanningExchange>(group, true, "all_to_all", outgoing, everyone, incoming, everyone)), "");
      for (int r = 0; r < num_ranks; ++r) EXPECT_EQ(received[r], values(r * 100 + me, length(r, me)));
    }
    EXPECT_EQ(error_of(*begin<SpanningBarrier>(group, true, "barrier")), "");
  });
}

// Ranks of one host next to each other and not; hosts with different numbers of ranks.
INSTANTIATE_TEST_SUITE_P(Layouts, SpanningOn,
                         testing::Values(std::vector<std::string>{"a", "b"}, std::vector<std::string>{"a", "a", "b", "b"},
                                         std::vector<std::string>{"a", "b", "a"}, std::vector<std::string>{"a", "b", "c", "a", "b", "c"},
                                         std::vector<std::string>{"a", "b", "b", "c", "b"}));

// The receiver comes when the sender is done.
TEST(Spanning, WhoOnlySendsWaitsForNobody) {
  const Hosts hosts = Hosts::of({"a", "b"});
  std::atomic<bool> sent{false};
  on_ranks(hosts, std::chrono::seconds(20), std::chrono::microseconds(0), [&](SpanningGroup& group, int me) {
    Floats numbers = me == 0 ? values(0, 1000) : Floats(1000);
    const std::vector<Memory> nothing(2);
    std::vector<Memory> memory(2);
    memory[1 - me] = memory_of(numbers);
    const std::vector<bool> nobody(2), other{me == 1, me == 0};
    if (me == 0) {
      EXPECT_EQ(error_of(*begin<SpanningExchange>(group, true, "exchange", memory, other, nothing, nobody)), "");
      sent = true;
    } else {
      const auto deadline = Clock::now() + std::chrono::seconds(10);
      while (!sent && Clock::now() < deadline) std::this_thread::yield();
      EXPECT_TRUE(sent);
      EXPECT_EQ(error_of(*begin<SpanningExchange>(group, true, "exchange", nothing, nobody, memory, other)), "");
      EXPECT_EQ(numbers, values(0, 1000));
    }
  });
}

TEST(SpanningErrors, OtherCallsAreSeenByAll) {
  const Hosts hosts = Hosts::of({"a", "a", "b", "b"});
  std::array<std::string, 4> errors;
  on_ranks(hosts, std::chrono::seconds(20), std::chrono::microseconds(0), [&](SpanningGroup& group, int me) {
    Floats mine(me == 3 ? 7 : 8);
    errors[me] = error_of(*begin<SpanningAllReduce>(group, true, "all_reduce", memory_of(mine), reducers()));
    EXPECT_NE(error_of(*begin<SpanningBarrier>(group, true, "barrier")).find("the group has ended"), std::string::npos);
  });
  EXPECT_NE(errors[2].find("28 bytes on rank 3, 32 on rank 2"), std::string::npos) << errors[2];
  for (const int r : {0, 1})
    EXPECT_TRUE(errors[r].find("has ended or failed") != std::string::npos || errors[r].find("has failed") != std::string::npos) << errors[r];
}

TEST(SpanningErrors, WhoDoesNotComeIsNamed) {
  const Hosts hosts = Hosts::of({"a", "a", "b"});
  std::array<std::string, 3> errors;
  on_ranks(hosts, std::chrono::milliseconds(300), std::chrono::microseconds(0), [&](SpanningGroup& group, int me) {
    if (me == 2) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1500));
      return;
    }
    Floats mine(4);
    errors[me] = error_of(*begin<SpanningAllReduce>(group, me == 0, "all_reduce", memory_of(mine), reducers()));
    if (me == 1) errors[1] = error_of(*begin<SpanningBarrier>(group, true, "barrier"));
  });
  EXPECT_NE(errors[0].find("the timeout of 0.3 s passed: rank 2, on another host, did not come"), std::string::npos) << errors[0];
  EXPECT_NE(errors[1].find("because of rank 2"), std::string::npos) << errors[1];
}

TEST(SpanningErrors, LeavingEndsWhatIsPending) {
  const Hosts hosts = Hosts::of({"a", "b"});
  const auto begin_at = Clock::now();
  on_ranks(hosts, std::chrono::seconds(30), std::chrono::microseconds(0), [&](SpanningGroup& group, int me) {
    Floats mine(4);
    const auto pending = me == 0 ? begin<SpanningAllReduce>(group, false, "all_reduce", memory_of(mine), reducers()) : nullptr;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    group.leave();
    if (me == 0) EXPECT_NE(error_of(*pending), "");
  });
  EXPECT_LT(Clock::now() - begin_at, std::chrono::seconds(5));
}

}  // namespace
}  // namespace soap::transport
