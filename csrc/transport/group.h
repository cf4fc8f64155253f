// One rank's place in a group: its queue of operations, and the threads that advance them.
//
// Whoever holds the lock advances: the thread that issues an operation or waits for one, and a worker thread when operations are
// pending and nobody waits. A blocking call is thus run by its caller alone, without waking a thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "transport/bell.h"
#include "transport/messages.h"
#include "transport/operation.h"
#include "transport/process.h"
#include "transport/runner.h"

namespace soap::transport {

struct GroupOptions {
  Clock::duration timeout = std::chrono::minutes(30);
  Patience patience;
  // Of the ranks of the group, in order; empty: not watched.
  std::vector<ProcessIdentity> processes;
  // What errors call the ranks; empty: their numbers. Of a host's ranks in a larger group (spanning.h): those of that group.
  std::vector<int> labels;
  // For tests: each publishing and reading is delayed by a random time up to this.
  std::chrono::microseconds random_delay{0};
};

class Group final : public Runner {
 public:
  // All ranks attach to one segment.
  Group(std::shared_ptr<Segment> segment, int rank, GroupOptions options);
  ~Group() override;
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int rank() const { return rank_; }
  int num_ranks() const { return num_ranks_; }
  void set_timeout(Clock::duration timeout) override;
  void set_random_delay(std::chrono::microseconds most) override;
  uint64_t num_collectives() const override { return sequence_.load(std::memory_order_relaxed); }

  // Thread-safe. An error is the operation's (`error`, `completed`). `timeout` zero: the group's. With `blocking` the operation has ended on return.
  void submit(std::shared_ptr<Collective> operation, Clock::duration timeout, bool blocking);
  void send(MessagePtr message, Clock::duration timeout);
  void receive(MessagePtr message, Clock::duration timeout);
  bool wait(Operation& operation, std::optional<Clock::duration> limit = std::nullopt) override;
  // Takes back a receive that nothing has come for.
  bool withdraw(const MessagePtr& message);

  void abort(const std::string& why) override { fail(why, label(rank_)); }
  // As abort, because of a rank (its label).
  void fail(const std::string& why, int blamed);
  // The destructor calls it.
  void leave() override;

 private:
  using Ended = std::vector<std::shared_ptr<Operation>>;

  int label(int rank) const { return options_.labels.empty() ? rank : options_.labels[rank]; }
  std::vector<int> labels(std::vector<int> ranks) const;
  bool refuse(Operation& operation, Clock::duration timeout);
  bool step();
  void end_operations(Ended& ended);
  bool advance_collective(Ended& ended);
  void read_headers(Collective& operation);
  void fail(Collective& operation, const std::string& wrong);  // what comes isn't read, the caller gets an error; wrong empty: nothing
  bool all_at_least(std::atomic<uint64_t> RankControl::* counter, uint64_t stage) const;
  void ring_others();
  void rest(Waiting& waiting, const std::atomic<bool>* done);
  void watch();
  std::string failure_of(const std::vector<int>& ranks);
  std::vector<int> blocking_ranks(const Collective& operation) const;
  void break_group(const std::string& why, int blamed, Ended& ended);
  void release_retired();
  void work();
  void wake_worker();
  bool pending() const { return !collectives_.empty() || !messages_.empty(); }
  void check_fork() const;
  void delay();

  const std::shared_ptr<Segment> segment_;
  const Layout layout_;
  const int rank_;
  const int num_ranks_;
  GroupOptions options_;
  RankControl& self_;
  const uint64_t fork_generation_;

  std::mutex mutex_;  // guards what follows
  std::condition_variable worker_wakes_;
  std::deque<std::shared_ptr<Collective>> collectives_;
  Messages messages_;
  uint64_t next_stage_ = 1;
  std::string broken_;  // why, once it is
  bool reserved_ = false;
  bool stopping_ = false;
  bool left_ = false;
  Ended retired_;  // ended by the worker: their tensors are given back by a thread of the caller's (see release_retired)
  Clock::time_point next_look_{};

  std::atomic<uint64_t> sequence_{0};
  std::atomic<int> num_waiting_{0};
  std::atomic<bool> worker_busy_{false};
  std::atomic<Clock::rep> next_watch_{0};
  uint64_t random_ = 0;
  std::unique_ptr<std::thread> worker_;
};

}  // namespace soap::transport
