// The transport of the backend soap, with threads as ranks: all sums and movements against what must come out, under random delays.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <numeric>
#include <random>
#include <thread>

#include "transport/collectives.h"
#include "transport/group.h"
#include "transport_values.h"

namespace soap::transport {
namespace {

Floats folded(int num_ranks, std::size_t count) {
  Floats out = values(0, count);
  for (int r = 1; r < num_ranks; ++r) {
    const Floats other = values(r, count);
    for (std::size_t i = 0; i < count; ++i) out[i] = fold(out[i], other[i]);
  }
  return out;
}

void on_ranks(int num_ranks, std::chrono::microseconds delay, const std::function<void(Group&)>& run) {
  const auto segment = std::shared_ptr<Segment>(Segment::anonymous(layout_for(num_ranks)));
  std::vector<std::thread> threads;
  for (int r = 0; r < num_ranks; ++r) {
    threads.emplace_back([&, r] {
      GroupOptions options;
      options.timeout = std::chrono::seconds(30);
      options.patience = Patience::of(num_ranks, 2);
      options.random_delay = delay;
      Group group(segment, r, options);
      run(group);
      // A rank that leaves early may be one that others still wait for.
      auto barrier = std::make_shared<Exchange>(r, num_ranks, std::vector<Memory>(1), std::vector<Memory>(num_ranks), std::vector<bool>(num_ranks));
      barrier->call = "barrier";
      group.submit(barrier, {}, true);
    });
  }
  for (std::thread& thread : threads) thread.join();
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
std::shared_ptr<Op> begin(Group& group, bool blocking, const char* call, Args&&... args) {
  auto operation = std::make_shared<Op>(group.rank(), group.num_ranks(), std::forward<Args>(args)...);
  operation->call = call;
  group.submit(operation, {}, blocking);
  return operation;
}

class Transport : public testing::TestWithParam<int> {};

TEST_P(Transport, Sums) {
  const int num_ranks = GetParam();
  for (const int delay_us : {0, 200}) {
    on_ranks(num_ranks, std::chrono::microseconds(delay_us), [&](Group& group) {
      for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{1000}, std::size_t{5000}, std::size_t{200'003}}) {
        Floats mine = values(group.rank(), count);
        begin<AllReduce>(group, true, "all_reduce", memory_of(mine), reducer());
        EXPECT_EQ(mine, folded(num_ranks, count));

        const int root = static_cast<int>(count % num_ranks);
        mine = values(group.rank(), count);
        begin<Reduce>(group, true, "reduce", root, memory_of(mine), reducer());
        EXPECT_EQ(mine, group.rank() == root ? folded(num_ranks, count) : values(group.rank(), count));

        // Every rank's part for rank s is `count + s` long.
        std::vector<Floats> parts;
        std::vector<Memory> input;
        for (int s = 0; s < num_ranks; ++s) parts.push_back(values(group.rank(), count + s));
        for (Floats& part : parts) input.push_back(memory_of(part));
        Floats out(count + group.rank());
        begin<ReduceScatter>(group, true, "reduce_scatter", input, memory_of(out), reducer());
        EXPECT_EQ(out, folded(num_ranks, count + group.rank()));
      }
    });
  }
}

// `count` columns of a matrix as memory: a row of each line.
Memory columns(Floats& matrix, std::size_t width, std::size_t begin, std::size_t count) {
  Memory out;
  out.add(matrix.data() + begin, count * sizeof(float), {{matrix.size() / width, static_cast<int64_t>(width * sizeof(float))}});
  return out;
}

TEST_P(Transport, ColumnsGoFromWhereTheyAreToWhereTheyStay) {
  const int num_ranks = GetParam();
  constexpr std::size_t kRows = 3000, kColumns = 37;  // more than a slot holds, cut within rows
  const std::size_t width = num_ranks * kColumns;
  on_ranks(num_ranks, std::chrono::microseconds(100), [&](Group& group) {
    const int me = group.rank();
    Floats matrix = values(me, kRows * width), got(kRows * width, -1);
    std::vector<Memory> outgoing, incoming;
    for (int r = 0; r < num_ranks; ++r) {
      outgoing.push_back(columns(matrix, width, r * kColumns, kColumns));
      incoming.push_back(columns(got, width, r * kColumns, kColumns));
    }
    begin<Exchange>(group, true, "exchange", outgoing, incoming, std::vector<bool>(num_ranks, true));
    for (int from = 0; from < num_ranks; ++from) {
      const Floats theirs = values(from, kRows * width);
      for (std::size_t i = 0; i < kRows * kColumns; ++i) {
        const std::size_t line = i / kColumns * width, column = i % kColumns;
        ASSERT_EQ(got[line + from * kColumns + column], theirs[line + me * kColumns + column]) << i;
      }
    }
    Floats sum(kRows * width);
    begin<AllReduce>(group, true, "all_reduce", memory_of(matrix), memory_of(sum), reducer());
    EXPECT_EQ(sum, folded(num_ranks, kRows * width));
    EXPECT_EQ(matrix, values(me, kRows * width));
  });
}

// What one rank adds up as it comes the others exchange.
TEST_P(Transport, OneRankSumsWhatOthersExchange) {
  const int num_ranks = GetParam();
  constexpr std::size_t kCount = 200'003;
  on_ranks(num_ranks, std::chrono::microseconds(100), [&](Group& group) {
    Floats mine = values(group.rank(), kCount), got(kCount);
    std::vector<Memory> outgoing(num_ranks), incoming(num_ranks);
    outgoing[0] = memory_of(mine);
    if (group.rank() == 0) {
      begin<ReduceScatter>(group, true, "exchange", outgoing, memory_of(got), reducer());
      EXPECT_EQ(got, folded(num_ranks, kCount));
    } else {
      begin<Exchange>(group, true, "exchange", outgoing, incoming, std::vector<bool>(num_ranks, true));
    }
  });
}

TEST_P(Transport, UnevenExchangesInFlight) {
  const int num_ranks = GetParam();
  const auto length = [](int from, int to, int round) -> std::size_t { return (from * 31 + to * 17 + round * 7) % 5 * 40'000 + to; };
  on_ranks(num_ranks, std::chrono::microseconds(100), [&](Group& group) {
    const int me = group.rank();
    struct Round {
      std::vector<Floats> sent, received;
      std::shared_ptr<Exchange> operation;
    };
    std::vector<Round> rounds(4);
    for (int k = 0; k < 4; ++k) {
      std::vector<Memory> outgoing, incoming;
      for (int r = 0; r < num_ranks; ++r) {
        rounds[k].sent.push_back(values(me * 100 + r, length(me, r, k)));
        rounds[k].received.emplace_back(length(r, me, k));
      }
      for (int r = 0; r < num_ranks; ++r) {
        outgoing.push_back(memory_of(rounds[k].sent[r]));
        incoming.push_back(memory_of(rounds[k].received[r]));
      }
      rounds[k].operation = begin<Exchange>(group, k == 2, "exchange", outgoing, incoming, std::vector<bool>(num_ranks, true));
    }
    for (int k = 3; k >= 0; --k) {
      group.wait(*rounds[k].operation);
      EXPECT_EQ(error_of(*rounds[k].operation), "");
      for (int r = 0; r < num_ranks; ++r) EXPECT_EQ(rounds[k].received[r], values(r * 100 + me, length(r, me, k)));
    }
  });
}

TEST_P(Transport, MessagesByTag) {
  const int num_ranks = GetParam();
  on_ranks(num_ranks, std::chrono::microseconds(0), [&](Group& group) {
    const int me = group.rank(), next = (me + 1) % num_ranks, last = (me + num_ranks - 1) % num_ranks;
    // Two of each tag: they must not overtake each other. The order of the receives is drawn.
    std::vector<std::size_t> counts = {0, 3, 150'000, 10, 70'000, 1};
    std::vector<Floats> sent, received;
    std::vector<MessagePtr> pending;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      sent.push_back(values(me * 10 + static_cast<int>(i), counts[i]));
      received.emplace_back(counts[i]);
    }
    const auto post = [&](std::size_t i, bool sends) {
      auto message = std::make_shared<Message>();
      message->peer = sends ? next : last;
      message->tag = static_cast<int>(i % 3);
      message->memory = memory_of(sends ? sent[i] : received[i]);
      sends ? group.send(message, {}) : group.receive(message, {});
      pending.push_back(message);
    };
    for (std::size_t i = 0; i < counts.size(); ++i) post(i, true);
    std::vector<std::size_t> tags = {0, 1, 2};
    std::shuffle(tags.begin(), tags.end(), std::mt19937(me));
    for (const std::size_t tag : tags) {
      post(tag, false);
      post(tag + 3, false);
    }
    for (const MessagePtr& message : pending) {
      group.wait(*message);
      EXPECT_EQ(error_of(*message), "");
    }
    for (std::size_t i = 0; i < counts.size(); ++i) EXPECT_EQ(received[i], values(last * 10 + static_cast<int>(i), counts[i]));
  });
}

// One thread plays both sides, so that a receive is posted while the message before is half way.
TEST(TransportMessages, DoNotOvertakeOnePutAside) {
  const auto segment = Segment::anonymous(layout_for(2));
  Messages sender(*segment, 0), receiver(*segment, 1);
  std::vector<std::shared_ptr<Operation>> ended;
  const auto make = [](int peer, int tag, Floats& data) {
    auto message = std::make_shared<Message>();
    message->peer = peer;
    message->tag = tag;
    message->memory = memory_of(data);
    return message;
  };
  Floats first = values(1, 100'000), second = values(2, 100'000), other = values(3, 10);  // a ring has room for 65,536
  for (const MessagePtr& message : {make(1, 7, first), make(1, 7, second), make(1, 8, other)}) sender.send(message);
  Floats into_other(10), into_first(100'000), into_second(100'000);
  receiver.receive(make(0, 8, into_other));
  sender.advance(ended);
  receiver.advance(ended);
  sender.advance(ended);
  receiver.receive(make(0, 7, into_first));
  receiver.receive(make(0, 7, into_second));
  while (sender.advance(ended) || receiver.advance(ended)) {
  }
  EXPECT_TRUE(sender.empty() && receiver.empty());
  EXPECT_EQ(into_first, first);
  EXPECT_EQ(into_second, second);
  EXPECT_EQ(into_other, other);
}

// Who doesn't ring leaves others asleep until they look themselves, 50 ms later. Each test has so many rounds in which a rank must be asleep that it takes more
// than a second then, and some 60 ms otherwise.
constexpr int kRounds = 20;
constexpr auto kAsleep = std::chrono::milliseconds(2);  // the others have stopped looking by then
constexpr auto kWoken = std::chrono::milliseconds(700);

TEST(TransportBell, SleepersAreWoken) {
  const auto begin_at = Clock::now();
  on_ranks(2, std::chrono::microseconds(0), [](Group& group) {
    for (int round = 0; round < kRounds; ++round) {
      if (group.rank() == round % 2) std::this_thread::sleep_for(kAsleep);
      Floats mine = values(group.rank(), 10);
      begin<AllReduce>(group, true, "all_reduce", memory_of(mine), reducer());
    }
  });
  EXPECT_LT(Clock::now() - begin_at, kWoken);
}

MessagePtr message_of(int peer, Floats& data) {
  auto message = std::make_shared<Message>();
  message->peer = peer;
  message->tag = 1;
  message->memory = memory_of(data);
  return message;
}

// A rank sends `count` elements; the other, which receives them, comes when it sleeps.
void pass_messages(std::size_t count) {
  on_ranks(2, std::chrono::microseconds(0), [&](Group& group) {
    const bool sends = group.rank() == 0;
    for (int round = 0; round < kRounds; ++round) {
      Floats data = values(sends ? round : -1, count);
      if (!sends) std::this_thread::sleep_for(kAsleep);
      const MessagePtr message = message_of(1 - group.rank(), data);
      sends ? group.send(message, {}) : group.receive(message, {});
      group.wait(*message);
      EXPECT_EQ(error_of(*message), "");
      EXPECT_EQ(data, values(round, count));
    }
  });
}

// More than a ring holds: the sender sleeps until there is room again.
TEST(TransportBell, WhoReceivesWakesWhoSends) {
  const auto begin_at = Clock::now();
  pass_messages(layout_for(2).ring_bytes / sizeof(float) + 1000);
  EXPECT_LT(Clock::now() - begin_at, kWoken);
}

// In turns, since sends don't wait: without the sender's ring each answer waits for the receiver's 50 ms to pass.
TEST(TransportBell, WhoSendsWakesWhoReceives) {
  const auto begin_at = Clock::now();
  on_ranks(2, std::chrono::microseconds(0), [](Group& group) {
    for (int round = 0; round < kRounds; ++round) {
      for (const int sender : {0, 1}) {
        const bool sends = group.rank() == sender;
        Floats data = values(sends ? round : -1, 10);
        if (sends && sender == 0) std::this_thread::sleep_for(kAsleep);
        const MessagePtr message = message_of(1 - group.rank(), data);
        sends ? group.send(message, {}) : group.receive(message, {});
        group.wait(*message);
        EXPECT_EQ(data, values(round, 10));
      }
    }
  });
  EXPECT_LT(Clock::now() - begin_at, kWoken);
}

INSTANTIATE_TEST_SUITE_P(Ranks, Transport, testing::Values(1, 2, 3, 5));

TEST(TransportErrors, AllSeeThatCallsDiffer) {
  on_ranks(3, std::chrono::microseconds(50), [](Group& group) {
    Floats mine(group.rank() == 2 ? 7 : 8);
    EXPECT_NE(error_of(*begin<AllReduce>(group, true, "all_reduce", memory_of(mine), reducer())).find("28 bytes on rank 2, 32 on rank 0"), std::string::npos);
    EXPECT_NE(
        error_of(*begin<AllReduce>(group, true, group.rank() == 1 ? "other" : "same", memory_of(mine), reducer())).find("rank 1 calls other, rank 0 same"),
        std::string::npos);
    Floats fine = values(group.rank(), 9000);
    EXPECT_EQ(error_of(*begin<AllReduce>(group, true, "all_reduce", memory_of(fine), reducer())), "");
    EXPECT_EQ(fine, folded(3, 9000));
  });
}

TEST(TransportErrors, ARankAloneThatExpectsAnotherSizeOfItself) {
  on_ranks(1, {}, [](Group& group) {
    Floats mine = values(0, 8);
    Floats few(7);
    const auto wrong = begin<Exchange>(group, true, "exchange", std::vector{memory_of(mine)}, std::vector{memory_of(few)}, std::vector{true});
    EXPECT_NE(error_of(*wrong).find("rank 0 sends 32 bytes to rank 0, which expects 28"), std::string::npos);
    const auto sum = begin<ReduceScatter>(group, true, "reduce_scatter", std::vector{memory_of(mine)}, memory_of(few), reducer());
    EXPECT_NE(error_of(*sum).find("rank 0 has 32 bytes for rank 0, which expects 28"), std::string::npos);
    EXPECT_EQ(few, Floats(7));
    Floats all(8);
    EXPECT_EQ(error_of(*begin<Exchange>(group, true, "exchange", std::vector{memory_of(mine)}, std::vector{memory_of(all)}, std::vector{true})), "");
    EXPECT_EQ(all, mine);
  });
}

TEST(TransportErrors, WhoDoesNotComeIsNamed) {
  const auto segment = std::shared_ptr<Segment>(Segment::anonymous(layout_for(2)));
  GroupOptions options;
  options.timeout = std::chrono::milliseconds(200);
  Group group(segment, 0, options);
  Floats mine(4);
  const std::string error = error_of(*begin<AllReduce>(group, true, "all_reduce", memory_of(mine), reducer()));
  EXPECT_NE(error.find("the timeout of 0.2 s passed: rank 1 did not come"), std::string::npos) << error;
  EXPECT_NE(error_of(*begin<AllReduce>(group, true, "all_reduce", memory_of(mine), reducer())).find("the group has ended"), std::string::npos);
}

TEST(TransportProcess, AZombieHasEnded) {
  const ProcessIdentity self = this_process("");
  EXPECT_EQ(process_from_text(to_text(self)), self);
  EXPECT_FALSE(has_ended(self, self));
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    const std::string own = to_text(this_process(""));
    _exit(write(ends[1], own.data(), own.size()) == static_cast<ssize_t>(own.size()) ? 0 : 1);
  }
  char text[4096] = {};
  ASSERT_GT(read(ends[0], text, sizeof(text) - 1), 0);
  ProcessIdentity other = process_from_text(text);
  EXPECT_EQ(other.pid, child);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, child, &info, WEXITED | WNOWAIT), 0);
  EXPECT_TRUE(has_ended(other, self));
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(has_ended(other, self));
  close(ends[0]);
  close(ends[1]);
  other = self;
  other.start_ticks += 1;  // another process with this pid
  EXPECT_TRUE(has_ended(other, self));
  other.pid_namespace = "elsewhere";
  EXPECT_FALSE(has_ended(other, self));
  EXPECT_THROW(process_from_text("host"), std::invalid_argument);
}

TEST(TransportLayout, SharesFitAndSlotsAreBounded) {
  for (const int num_ranks : {1, 2, 3, 8, 64, 500, 2000}) {
    const Layout layout = layout_for(num_ranks);
    EXPECT_GE(layout.share_bytes(), kLine);
    EXPECT_LE(layout.share_bytes() * (num_ranks < 2 ? 1 : num_ranks - 1), layout.slot_bytes);
    EXPECT_GE(layout.header_bytes, offsetof(Header, counts) + 8 * num_ranks);
    EXPECT_EQ(layout.ring_bytes & (layout.ring_bytes - 1), 0);
  }
  EXPECT_LE(layout_for(64).needed_bytes(), 40ULL << 20);
}

}  // namespace
}  // namespace soap::transport
