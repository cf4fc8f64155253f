#include "transport/group.h"

#include <new>

#include "base/error.h"
#include "fmt/ranges.h"

namespace soap::transport {
namespace {

constexpr auto kSleep = std::chrono::milliseconds(50);  // at most, before a look at deadlines and at the others
constexpr auto kLook = std::chrono::milliseconds(500);  // between two looks whether processes have ended
constexpr uint64_t kAhead = 3;                          // steps that are published before the first of them is read

// Whether the calling thread is some group's worker.
thread_local bool is_worker = false;

std::string list(const std::vector<int>& ranks) {
  return fmt::format("{} {}", ranks.size() == 1 ? "rank" : "ranks", fmt::join(ranks, ", "));
}

}  // namespace

Group::Group(std::shared_ptr<Segment> segment, int rank, GroupOptions options)
    : segment_(std::move(segment)),
      layout_(segment_->layout()),
      rank_(rank),
      num_ranks_(layout_.num_ranks),
      options_(std::move(options)),
      self_(segment_->control(rank)),
      fork_generation_(transport::fork_generation()),
      messages_(*segment_, rank),
      random_(0x9e3779b97f4a7c15ULL * (rank + 1)) {
  self_.state.store(RankState::kHere, std::memory_order_release);
  worker_ = std::make_unique<std::thread>([this] { work(); });
}

Group::~Group() {
  if (fork_generation_ != transport::fork_generation()) worker_.release();  // the thread is the parent's
  leave();
}

void Group::set_timeout(Clock::duration timeout) {
  const std::lock_guard lock(mutex_);
  options_.timeout = timeout;
}

void Group::set_random_delay(std::chrono::microseconds most) {
  const std::lock_guard lock(mutex_);
  options_.random_delay = most;
}

void Group::check_fork() const {
  if (fork_generation_ != transport::fork_generation()) {
    throw TransportError("[soap] this process was forked from the one that made the process group: make one of its own");
  }
}

void Group::leave() {
  if (fork_generation_ != transport::fork_generation()) return;  // the parent is still there
  {
    const std::lock_guard lock(mutex_);
    if (left_) return;
    left_ = stopping_ = true;
  }
  worker_wakes_.notify_all();
  self_.bell.fetch_add(1, std::memory_order_release);
  ring_bell(self_);
  worker_->join();
  Ended ended;
  {
    const std::lock_guard lock(mutex_);
    if (pending()) break_group("the process group was destroyed while operations were pending", label(rank_), ended);
    RankState here = RankState::kHere;
    self_.state.compare_exchange_strong(here, RankState::kLeft, std::memory_order_acq_rel);
    broken_ = "the process group was destroyed";
  }
  ring_others();
  end_operations(ended);
  release_retired();
}

void Group::fail(const std::string& why, int blamed) {
  check_fork();
  Ended ended;
  {
    const std::lock_guard lock(mutex_);
    break_group(why, blamed, ended);
  }
  end_operations(ended);
}

void Group::break_group(const std::string& why, int blamed, Ended& ended) {
  if (broken_.empty()) {
    broken_ = why;
    self_.blamed.store(blamed, std::memory_order_relaxed);
    self_.state.store(RankState::kFailed, std::memory_order_release);
  }
  for (const auto& operation : collectives_) {
    operation->error = std::make_exception_ptr(TransportError(fmt::format("[soap] {} on rank {}: {}", operation->call, label(rank_), why)));
    ended.push_back(operation);
  }
  collectives_.clear();
  messages_.fail(
      [&](const Message& message) { return std::make_exception_ptr(TransportError(fmt::format("[soap] {} on rank {}: {}", message.call, label(rank_), why))); },
      ended);
  ring_others();
}

bool Group::refuse(Operation& operation, Clock::duration timeout) {
  operation.timeout = timeout > Clock::duration::zero() ? timeout : options_.timeout;
  operation.deadline = Clock::now() + operation.timeout;
  if (broken_.empty()) return false;
  operation.error =
      std::make_exception_ptr(TransportError(fmt::format("[soap] {} on rank {}: the group has ended: {}", operation.call, label(rank_), broken_)));
  return true;
}

void Group::submit(std::shared_ptr<Collective> operation, Clock::duration timeout, bool blocking) {
  check_fork();
  operation->labels = &options_.labels;
  sequence_.fetch_add(1, std::memory_order_relaxed);
  bool refused = false;
  {
    const std::lock_guard lock(mutex_);
    refused = refuse(*operation, timeout);
    if (!refused) collectives_.push_back(operation);
  }
  if (refused) {
    Ended ended{operation};
    end_operations(ended);
    return;
  }
  if (blocking) {
    wait(*operation);
    return;
  }
  step();
  if (!operation->done.load(std::memory_order_acquire)) wake_worker();
  release_retired();
}

void Group::send(MessagePtr message, Clock::duration timeout) {
  check_fork();
  bool refused = false;
  {
    const std::lock_guard lock(mutex_);
    refused = refuse(*message, timeout);
    if (!refused) {
      try {
        messages_.send(message);
      } catch (const std::exception& error) {
        message->error = std::make_exception_ptr(TransportError(error.what()));
        refused = true;
      }
    }
  }
  if (refused) {
    Ended ended{message};
    end_operations(ended);
    return;
  }
  while (step() && !message->done.load(std::memory_order_acquire)) {
  }
  if (!message->done.load(std::memory_order_acquire)) wake_worker();
  release_retired();
}

void Group::receive(MessagePtr message, Clock::duration timeout) {
  check_fork();
  bool refused = false;
  {
    const std::lock_guard lock(mutex_);
    refused = refuse(*message, timeout);
    if (!refused) messages_.receive(message);
  }
  if (refused) {
    Ended ended{message};
    end_operations(ended);
    return;
  }
  step();
  if (!message->done.load(std::memory_order_acquire)) wake_worker();
  release_retired();
}

bool Group::withdraw(const MessagePtr& message) {
  const std::lock_guard lock(mutex_);
  return messages_.withdraw(message);
}

bool Group::wait(Operation& operation, std::optional<Clock::duration> limit) {
  if (operation.done.load(std::memory_order_acquire)) return true;
  check_fork();
  const Clock::time_point until = limit ? Clock::now() + *limit : Clock::time_point::max();
  num_waiting_.fetch_add(1, std::memory_order_seq_cst);
  Waiting waiting(options_.patience);
  bool in_time = true;
  while (!operation.done.load(std::memory_order_acquire)) {
    if (step()) {
      waiting.restart();
      continue;
    }
    if (limit && Clock::now() >= until) {
      in_time = operation.done.load(std::memory_order_acquire);
      break;
    }
    rest(waiting, &operation.done);
  }
  if (num_waiting_.fetch_sub(1, std::memory_order_seq_cst) == 1) {
    bool left_over = false;
    {
      const std::lock_guard lock(mutex_);
      left_over = pending();
    }
    if (left_over) wake_worker();
  }
  release_retired();
  return in_time;
}

// Spins, yields, or sleeps until something may have changed.
void Group::rest(Waiting& waiting, const std::atomic<bool>* done) {
  if (!waiting.idle()) return;
  bool progressed = false;
  const bool passed = sleep_on_bell(self_, kSleep, [&] {
    if (done != nullptr && done->load(std::memory_order_acquire)) return true;
    progressed = step();
    return progressed;
  });
  if (progressed) waiting.restart();
  const auto now = Clock::now().time_since_epoch().count();
  if (passed || now >= next_watch_.load(std::memory_order_relaxed)) {
    next_watch_.store(now + std::chrono::duration_cast<Clock::duration>(kSleep).count(), std::memory_order_relaxed);
    watch();
  }
}

bool Group::step() {
  Ended ended;
  bool progressed = false;
  {
    const std::lock_guard lock(mutex_);
    progressed = advance_collective(ended);
    progressed |= messages_.advance(ended);
  }
  end_operations(ended);
  return progressed;
}

void Group::end_operations(Ended& ended) {
  for (const auto& operation : ended) {
    if (operation->completed) operation->completed(operation->error);
    operation->done.store(true, std::memory_order_release);
    if (!is_worker) operation->completed = nullptr;
  }
  if (ended.empty()) return;
  ring_bell(self_);  // threads of this rank that wait for them
  if (is_worker) {
    const std::lock_guard lock(mutex_);
    retired_.insert(retired_.end(), std::make_move_iterator(ended.begin()), std::make_move_iterator(ended.end()));
  }
  ended.clear();
}

// The last reference to a tensor may need Python's lock, which a thread that outlives the interpreter must not ask for: the worker never drops one.
void Group::release_retired() {
  Ended retired;
  {
    const std::lock_guard lock(mutex_);
    if (retired_.empty()) return;
    retired.swap(retired_);
  }
  for (const auto& operation : retired) operation->completed = nullptr;
}

bool Group::all_at_least(std::atomic<uint64_t> RankControl::* counter, uint64_t stage) const {
  for (int r = 0; r < num_ranks_; ++r) {
    if ((segment_->control(r).*counter).load(std::memory_order_acquire) < stage) return false;
  }
  return true;
}

void Group::ring_others() {
  for (int r = 0; r < num_ranks_; ++r) {
    if (r != rank_) ring_bell(segment_->control(r));
  }
}

void Group::delay() {
  if (options_.random_delay.count() == 0) return;
  random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
  std::this_thread::sleep_for(std::chrono::microseconds(random_ % static_cast<uint64_t>(options_.random_delay.count())));
}

bool Group::advance_collective(Ended& ended) {
  if (collectives_.empty()) return false;
  const std::shared_ptr<Collective> operation = collectives_.front();
  const auto finish = [&] {
    next_stage_ += num_ranks_ == 1 ? 0 : operation->num_steps;
    collectives_.pop_front();
    ended.push_back(operation);
    return true;
  };
  if (num_ranks_ == 1) {
    Header header;
    operation->describe(layout_, header);
    fail(*operation, operation->check({&header}));
    if (!operation->skipped) operation->alone();
    return finish();
  }
  if (!operation->begun) {
    if (!reserved_) {
      try {
        segment_->reserve_slots(rank_);
      } catch (const std::exception& error) {
        break_group(error.what(), label(rank_), ended);
        return true;
      }
      reserved_ = true;
    }
    operation->begun = true;
    operation->first_stage = next_stage_;
  }
  const uint64_t publishing = operation->first_stage + operation->num_published;
  const bool may_go_ahead = operation->num_published == 0 || (operation->num_consumed > 0 && operation->num_published < operation->num_steps &&
                                                              operation->num_published < operation->num_consumed + kAhead &&
                                                              operation->may_publish(operation->num_published, operation->num_consumed));
  if (may_go_ahead && (publishing <= layout_.num_slots || all_at_least(&RankControl::consumed, publishing - layout_.num_slots))) {
    delay();
    std::byte* slot = segment_->slot(rank_, publishing % layout_.num_slots);
    if (operation->num_published == 0) {
      Header& header = *new (slot) Header{};
      operation->call.copy(header.call, sizeof(header.call) - 1);
      std::fill_n(header.counts, num_ranks_, 0);
      operation->describe(layout_, header);
      if (operation->num_bytes_of_whole != 0) header.num_bytes = operation->num_bytes_of_whole;
    }
    operation->publish(layout_, operation->num_published, slot + layout_.header_bytes);
    ++operation->num_published;
    self_.published.store(publishing, std::memory_order_release);
    ring_others();
    return true;
  }
  if (operation->num_consumed == operation->num_published) return false;
  const uint64_t consuming = operation->first_stage + operation->num_consumed;
  if (!all_at_least(&RankControl::published, consuming)) return false;
  delay();
  if (operation->num_consumed == 0) read_headers(*operation);
  if (!operation->skipped) {
    std::vector<const std::byte*> data(num_ranks_);
    for (int r = 0; r < num_ranks_; ++r) data[r] = segment_->slot(r, consuming % layout_.num_slots) + layout_.header_bytes;
    operation->consume(layout_, operation->num_consumed, data);
  }
  ++operation->num_consumed;
  self_.consumed.store(consuming, std::memory_order_release);
  ring_others();
  if (operation->num_consumed == operation->num_steps) finish();
  return true;
}

// Sets the number of steps of a collective whose first stage all have published, and what is wrong with it.
void Group::read_headers(Collective& operation) {
  std::vector<const Header*> headers(num_ranks_);
  uint64_t num_steps = 1;
  std::string wrong;
  for (int r = 0; r < num_ranks_; ++r) {
    headers[r] = reinterpret_cast<const Header*>(segment_->slot(r, operation.first_stage % layout_.num_slots));
    num_steps = std::max(num_steps, headers[r]->num_steps);
  }
  bool differ = false;
  for (int r = 1; r < num_ranks_ && wrong.empty(); ++r) {
    if (std::string_view(headers[r]->call) != headers[0]->call) {
      wrong = fmt::format("rank {} calls {}, rank {} {}", label(r), headers[r]->call, label(0), headers[0]->call);
    } else if (headers[r]->num_bytes != headers[0]->num_bytes) {
      wrong = fmt::format("{} has {} bytes on rank {}, {} on rank {}", headers[r]->call, headers[r]->num_bytes, label(r), headers[0]->num_bytes, label(0));
    }
    differ = !wrong.empty();
  }
  if (wrong.empty()) wrong = operation.check(headers);
  // All ranks see that they differ, and end together; what only this one sees must not keep it from running the steps of the others.
  operation.num_steps = differ ? 1 : num_steps;
  fail(operation, wrong);
}

void Group::fail(Collective& operation, const std::string& wrong) {
  if (wrong.empty()) return;
  operation.skipped = true;
  operation.error = std::make_exception_ptr(TransportError(fmt::format("[soap] {} on rank {}: {}", operation.call, label(rank_), wrong)));
}

std::vector<int> Group::labels(std::vector<int> ranks) const {
  for (int& r : ranks) r = label(r);
  return ranks;
}

std::vector<int> Group::blocking_ranks(const Collective& operation) const {
  std::vector<int> out;
  if (!operation.begun) return out;
  const uint64_t publishing = operation.first_stage + operation.num_published, consuming = operation.first_stage + operation.num_consumed;
  for (int r = 0; r < num_ranks_; ++r) {
    const RankControl& control = segment_->control(r);
    const bool late = operation.num_consumed < operation.num_published
                          ? control.published.load(std::memory_order_acquire) < consuming
                          : publishing > layout_.num_slots && control.consumed.load(std::memory_order_acquire) < publishing - layout_.num_slots;
    if (late && r != rank_) out.push_back(r);
  }
  return out;
}

// Why the first of these that won't come won't, or nothing. Sets `blamed` of this rank.
std::string Group::failure_of(const std::vector<int>& ranks) {
  const bool look = Clock::now() >= next_look_;
  if (look) next_look_ = Clock::now() + kLook;
  for (const int r : ranks) {
    const RankControl& control = segment_->control(r);
    const RankState state = control.state.load(std::memory_order_acquire);
    const int blamed = control.blamed.load(std::memory_order_relaxed);
    if (state == RankState::kLeft) return fmt::format("rank {} has left: it destroyed its process group", label(r));
    if (state == RankState::kFailed) {
      return blamed == label(r) ? fmt::format("rank {} has failed or aborted", blamed)
                                : fmt::format("rank {} has failed, because of rank {}", label(r), blamed);
    }
    if (look && !options_.processes.empty() && has_ended(options_.processes[r], options_.processes[rank_])) {
      return fmt::format("rank {} has ended (process {})", label(r), options_.processes[r].pid);
    }
  }
  return {};
}

// Deadlines, and others that won't come.
void Group::watch() {
  Ended ended;
  {
    const std::lock_guard lock(mutex_);
    const Clock::time_point now = Clock::now();
    std::string why;
    int blamed = label(rank_);
    if (!collectives_.empty()) {
      const Collective& operation = *collectives_.front();
      const std::vector<int> late = blocking_ranks(operation);
      why = failure_of(late);
      if (why.empty() && now >= operation.deadline) {
        why = fmt::format("the timeout of {:.3g} s passed: {} did not come", std::chrono::duration<double>(operation.timeout).count(), list(labels(late)));
      }
      if (!late.empty()) blamed = label(late.front());
    }
    if (!why.empty()) break_group(why, blamed, ended);
    std::vector<std::string> gone(num_ranks_);
    std::vector<int> peers;
    for (const MessagePtr& message : messages_.pending()) {
      if (message->peer >= 0) peers.push_back(message->peer);
    }
    for (const int peer : peers) {
      if (gone[peer].empty()) gone[peer] = failure_of({peer});
    }
    messages_.fail(
        [&](const Message& message) -> std::exception_ptr {
          const std::string peer_gone = message.peer >= 0 ? gone[message.peer] : "";
          const std::string what = !peer_gone.empty() ? peer_gone
                                   : now >= message.deadline
                                       ? fmt::format("the timeout of {:.3g} s passed", std::chrono::duration<double>(message.timeout).count())
                                       : "";
          if (what.empty()) return nullptr;
          return std::make_exception_ptr(TransportError(fmt::format("[soap] {} on rank {}: {}", message.call, label(rank_), what)));
        },
        ended);
  }
  end_operations(ended);
}

void Group::wake_worker() {
  if (worker_busy_.load(std::memory_order_seq_cst)) return;
  {
    const std::lock_guard lock(mutex_);
  }
  worker_wakes_.notify_one();
}

void Group::work() {
  is_worker = true;
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    worker_busy_.store(false, std::memory_order_seq_cst);
    worker_wakes_.wait(lock, [&] { return stopping_ || (pending() && num_waiting_.load(std::memory_order_seq_cst) == 0); });
    worker_busy_.store(true, std::memory_order_seq_cst);
    Waiting waiting(options_.patience.behind());
    while (!stopping_ && pending() && num_waiting_.load(std::memory_order_seq_cst) == 0) {
      lock.unlock();
      if (step()) {
        waiting.restart();
      } else {
        rest(waiting, nullptr);
      }
      lock.lock();
    }
  }
}

}  // namespace soap::transport
