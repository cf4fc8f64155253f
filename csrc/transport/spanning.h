// A group whose ranks are on several hosts: shared memory among the ranks of each host, messages between hosts.
//
// [Note: spanning operations]
// An operation is a function that runs on one thread from begin to end: it calls collectives of the host's group and sends and receives messages, in an
// order that follows from the arguments alone. All operations of a group run one after another. Whoever submits a blocking operation, or waits for one,
// runs it where nothing else is running; otherwise a thread of the group's does.
//
// The first message from one rank to another in an operation is an *envelope* of fixed size: what the sender is doing, how many bytes, and the first of
// them. So a rank sees that another calls something else, and does not take its bytes for others.
//
// A rank that fails ends its host's group, which the ranks of its host see in their next collective, and destroys its wire, which those of other hosts see in
// the message that they wait for. A rank waits for a message only after it has begun to send its own, so what lives goes on until it
// meets one of the two.
//
// A wire moves messages while its rank waits for one (tcp_wire.h), not while it is in a collective of its host. So that ranks never wait in a circle, an
// operation waits for what it sends where it waits for what comes in exchange for that, or at its end; between the two it waits for nobody who might wait for
// it.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "transport/group.h"
#include "transport/runner.h"
#include "transport/wire.h"

namespace soap::transport {

// Where the ranks of a group are.
struct Hosts {
  std::vector<std::vector<int>> ranks;  // by host, in ascending order; hosts in the order of their first ranks
  std::vector<int> host, place;         // by rank: its host, and its index among that host's ranks

  static Hosts of(const std::vector<std::string>& host_of_rank);
  int num_hosts() const { return static_cast<int>(ranks.size()); }
  int num_ranks() const { return static_cast<int>(host.size()); }
  // Ranks of the host that has fewest.
  int fewest() const;
};

class Relay;

struct Spanning : Operation {
  // Does all of it; throws what goes wrong.
  virtual void run(Relay& relay) = 0;

  uint64_t num_bytes = 0;  // must be equal on all ranks
  uint64_t sequence = 0;   // the group's to set, as are `timeout` and `deadline`
};

class SpanningGroup final : public Runner {
 public:
  // `group` has the ranks of this rank's host. `labels` of its options are the ranks of this group. `patience`: of who waits for messages.
  SpanningGroup(Hosts hosts, int rank, std::shared_ptr<Group> group, std::unique_ptr<Wire> wire, Clock::duration timeout, Patience patience);
  ~SpanningGroup() override;
  SpanningGroup(const SpanningGroup&) = delete;
  SpanningGroup& operator=(const SpanningGroup&) = delete;

  void set_timeout(Clock::duration timeout) override;
  void set_random_delay(std::chrono::microseconds most) override { group_->set_random_delay(most); }
  uint64_t num_collectives() const override { return sequence_.load(std::memory_order_relaxed); }
  // As Group::submit.
  void submit(std::shared_ptr<Spanning> operation, Clock::duration timeout, bool blocking);
  bool wait(Operation& operation, std::optional<Clock::duration> limit) override;
  void abort(const std::string& why) override;
  void leave() override;

 private:
  friend class Relay;
  using Queue = std::deque<std::shared_ptr<Spanning>>;

  void run_front(std::unique_lock<std::mutex>& lock);
  void end(const std::shared_ptr<Spanning>& operation, std::exception_ptr error);
  std::exception_ptr ended_because(const Spanning& operation, const std::string& why) const;
  void release_retired();
  void work();
  void check_fork() const;

  const Hosts hosts_;
  const int rank_;
  const std::shared_ptr<Group> group_;
  const uint64_t fork_generation_;
  const Patience patience_;

  std::mutex mutex_;                  // guards what follows
  std::condition_variable changed_;   // for who waits: operations ended, or the next can run
  std::condition_variable has_work_;  // for the thread; in a row of blocking operations, each run by its caller, it sleeps
  std::unique_ptr<Wire> wire_;        // the running operation's; gone when the group has ended
  Clock::duration timeout_;
  Queue queue_;
  bool running_ = false;  // the front
  bool stopping_ = false, left_ = false;
  std::string broken_;   // why, once it is
  std::string aborted_;  // why the running operation is to end
  std::set<Wire::Transfer*> in_flight_;
  Queue retired_;  // ended by the thread: see Group::release_retired

  std::atomic<uint64_t> sequence_{0};
  std::unique_ptr<std::thread> worker_;
};

// What a running operation has of its group.
class Relay {
 public:
  Relay(SpanningGroup& group, Spanning& operation);
  ~Relay();
  Relay(const Relay&) = delete;
  Relay& operator=(const Relay&) = delete;

  const Hosts& hosts;
  const int rank, host, place;
  const int num_local;  // ranks of this host

  // A collective of this host's ranks.
  void local(std::shared_ptr<Collective> collective);
  // Begins a message; returns its number. The memory must stay as it is until it has been waited for.
  std::size_t send(int to, const Memory& memory);
  std::size_t receive(int from, const Memory& memory);
  // Where it is done already, does nothing.
  void wait(std::size_t number);
  void wait(const std::vector<std::size_t>& numbers);
  void wait_all();
  // Memory of messages: it lives until none is on its way any more, also where the operation fails.
  void keep(std::shared_ptr<void> memory) { kept_.push_back(std::move(memory)); }

  int blamed() const { return blamed_; }

 private:
  struct Message {
    bool sends = false, done = false;
    int peer = 0;
    Memory memory;
    std::vector<std::byte> envelope, staging;  // staging: where memory is in pieces
    std::unique_ptr<Wire::Transfer> first, rest;
  };

  std::size_t post(int peer, const Memory& memory, bool sends);
  std::unique_ptr<Wire::Transfer> begin(const Message& message, int index, std::byte* data, uint64_t num_bytes);
  void finish(const Message& message, std::unique_ptr<Wire::Transfer>& transfer);
  void drop(std::unique_ptr<Wire::Transfer>& transfer);
  void open(Message& message);
  [[noreturn]] void fail(int blamed, const std::string& why);
  Clock::duration time_left() const;

  SpanningGroup& group_;
  Spanning& operation_;
  std::vector<std::shared_ptr<void>> kept_;
  std::vector<std::unique_ptr<Message>> messages_;
  std::vector<int> num_sent_, num_received_;  // by rank: messages begun
  int blamed_;
};

}  // namespace soap::transport
