#include "transport/spanning.h"

#include <algorithm>
#include <map>

#include "base/error.h"

namespace soap::transport {
namespace {

constexpr uint64_t kEnvelopeBytes = 4 << 10;
constexpr auto kGrace = std::chrono::milliseconds(500);  // so that who waits for another host, and knows for whom, is the first to see that time is over

// Of the group's thread in messages: it shares its core with what its rank computes, and a large message comes in many parts.
constexpr Patience kNone{std::chrono::microseconds(0), 0};

thread_local bool is_worker = false;

struct Label {  // begins an envelope
  char call[96] = {};
  uint64_t num_bytes = 0;      // of the operation
  uint64_t message_bytes = 0;  // of this message
};

constexpr uint64_t kInside = kEnvelopeBytes - sizeof(Label);  // bytes of the message that travel in its envelope

// Of message `index` between two ranks in an operation. Messages that differ in their bytes never meet.
int tag_of(uint64_t sequence, int index, uint64_t num_bytes) {
  uint64_t x = sequence * 0x9e3779b97f4a7c15ULL + static_cast<uint64_t>(index) * 0xbf58476d1ce4e5b9ULL + num_bytes * 0x94d049bb133111ebULL;
  x ^= x >> 31, x *= 0xd6e8feb86659fd93ULL, x ^= x >> 32;
  return static_cast<int>(x & 0x7fffffff);
}

// The memory as one piece, or null.
std::byte* in_one(const Memory& memory) {
  std::byte* out = nullptr;
  int count = 0;
  memory.for_each(0, memory.num_bytes(), [&](std::byte* data, uint64_t, uint64_t) { out = data, ++count; });
  return count == 1 ? out : nullptr;
}

}  // namespace

Hosts Hosts::of(const std::vector<std::string>& host_of_rank) {
  Hosts out;
  std::map<std::string, int> known;
  for (int r = 0; r < static_cast<int>(host_of_rank.size()); ++r) {
    const auto [at, is_new] = known.try_emplace(host_of_rank[r], out.num_hosts());
    if (is_new) out.ranks.emplace_back();
    out.host.push_back(at->second);
    out.place.push_back(static_cast<int>(out.ranks[at->second].size()));
    out.ranks[at->second].push_back(r);
  }
  return out;
}

int Hosts::fewest() const {
  std::size_t out = host.size();
  for (const auto& of_host : ranks) out = std::min(out, of_host.size());
  return static_cast<int>(out);
}

SpanningGroup::SpanningGroup(Hosts hosts, int rank, std::shared_ptr<Group> group, std::unique_ptr<Wire> wire, Clock::duration timeout, Patience patience)
    : hosts_(std::move(hosts)),
      rank_(rank),
      group_(std::move(group)),
      fork_generation_(transport::fork_generation()),
      patience_(patience),
      wire_(std::move(wire)),
      timeout_(timeout),
      worker_(std::make_unique<std::thread>([this] { work(); })) {}

SpanningGroup::~SpanningGroup() {
  if (fork_generation_ != transport::fork_generation()) {  // thread and connections are the parent's
    worker_.release();
    wire_.release();
    return;
  }
  leave();
}

void SpanningGroup::check_fork() const {
  if (fork_generation_ != transport::fork_generation()) {
    throw TransportError("[soap] this process was forked from the one that made the process group: make one of its own");
  }
}

void SpanningGroup::set_timeout(Clock::duration timeout) {
  const std::lock_guard lock(mutex_);
  timeout_ = timeout;
}

void SpanningGroup::submit(std::shared_ptr<Spanning> operation, Clock::duration timeout, bool blocking) {
  check_fork();
  std::string refused;
  {
    const std::lock_guard lock(mutex_);
    operation->sequence = sequence_.fetch_add(1, std::memory_order_relaxed) + 1;
    operation->timeout = timeout > Clock::duration::zero() ? timeout : timeout_;
    operation->deadline = Clock::now() + operation->timeout;
    refused = broken_;
    if (refused.empty()) queue_.push_back(operation);
  }
  if (!refused.empty()) {
    end(operation, ended_because(*operation, refused));
  } else if (blocking) {
    wait(*operation, std::nullopt);
  } else {
    has_work_.notify_one();
  }
  release_retired();
}

bool SpanningGroup::wait(Operation& operation, std::optional<Clock::duration> limit) {
  if (operation.done.load(std::memory_order_acquire)) return true;
  check_fork();
  const auto has_ended = [&] { return operation.done.load(std::memory_order_acquire); };
  const auto is_next = [&] { return !running_ && !queue_.empty() && queue_.front().get() == &operation; };
  bool ended = false;
  {
    std::unique_lock lock(mutex_);
    if (limit) {
      has_work_.notify_one();  // the thread runs it: who has a limit must be able to give up
      ended = changed_.wait_for(lock, *limit, has_ended);
    } else {
      while (!has_ended()) {
        changed_.wait(lock, [&] { return has_ended() || is_next(); });
        if (!has_ended()) run_front(lock);
      }
      ended = true;
    }
  }
  release_retired();
  return ended;
}

// Runs the first operation of the queue, without the lock.
void SpanningGroup::run_front(std::unique_lock<std::mutex>& lock) {
  const std::shared_ptr<Spanning> operation = queue_.front();
  running_ = true;
  lock.unlock();
  std::exception_ptr error;
  std::string why;
  int blamed = rank_;
  {
    Relay relay(*this, *operation);
    try {
      operation->run(relay);
      relay.wait_all();
    } catch (const std::exception& failure) {
      error = std::current_exception();
      why = failure.what();
      blamed = relay.blamed();
    }
  }
  if (error != nullptr) group_->fail(why, blamed);
  Queue others;
  std::unique_ptr<Wire> wire;
  lock.lock();
  queue_.pop_front();
  running_ = false;
  if (error != nullptr || !aborted_.empty()) {
    broken_ = aborted_.empty() ? why : aborted_;
    others.swap(queue_);
    wire = std::move(wire_);
  }
  const std::string broken = broken_;
  if (!queue_.empty()) has_work_.notify_one();  // the next operation doesn't wait for what the end of this one calls
  lock.unlock();
  changed_.notify_all();
  wire.reset();
  end(operation, error);
  for (const auto& other : others) end(other, ended_because(*other, broken));
  lock.lock();
  changed_.notify_all();
}

std::exception_ptr SpanningGroup::ended_because(const Spanning& operation, const std::string& why) const {
  return std::make_exception_ptr(TransportError(fmt::format("[soap] {} on rank {}: the group has ended: {}", operation.call, rank_, why)));
}

void SpanningGroup::end(const std::shared_ptr<Spanning>& operation, std::exception_ptr error) {
  operation->error = error;
  if (operation->completed) operation->completed(error);
  {
    const std::lock_guard lock(mutex_);
    operation->done.store(true, std::memory_order_release);
    if (is_worker) retired_.push_back(operation);
  }
  if (!is_worker) operation->completed = nullptr;
  changed_.notify_all();
}

void SpanningGroup::release_retired() {
  Queue retired;
  {
    const std::lock_guard lock(mutex_);
    retired.swap(retired_);
  }
  for (const auto& operation : retired) operation->completed = nullptr;
}

void SpanningGroup::abort(const std::string& why) {
  check_fork();
  Queue pending;
  std::unique_ptr<Wire> wire;
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.empty()) return;
    aborted_ = why;
    if (!running_) {
      broken_ = why;
      pending.swap(queue_);
      wire = std::move(wire_);
    }
    for (Wire::Transfer* transfer : in_flight_) transfer->abort();
  }
  group_->fail(why, rank_);  // wakes the running operation where it is in a collective
  wire.reset();
  for (const auto& operation : pending) end(operation, ended_because(*operation, why));
}

void SpanningGroup::leave() {
  if (fork_generation_ != transport::fork_generation()) return;  // the parent is still there
  bool pending = false;
  {
    const std::lock_guard lock(mutex_);
    if (left_) return;
    left_ = true;
    pending = running_ || !queue_.empty();
  }
  if (pending) abort("the process group was destroyed while operations were pending");
  {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    has_work_.notify_one();
    changed_.wait(lock, [&] { return !running_; });
    if (broken_.empty()) broken_ = "the process group was destroyed";
  }
  if (worker_->joinable()) worker_->join();
  group_->leave();
  std::unique_ptr<Wire> wire;
  {
    const std::lock_guard lock(mutex_);
    wire = std::move(wire_);
  }
  wire.reset();
  release_retired();
}

void SpanningGroup::work() {
  is_worker = true;
  std::unique_lock lock(mutex_);
  while (true) {
    has_work_.wait(lock, [&] { return stopping_ || (!running_ && !queue_.empty()); });
    if (stopping_) return;
    run_front(lock);
  }
}

Relay::Relay(SpanningGroup& group, Spanning& operation)
    : hosts(group.hosts_),
      rank(group.rank_),
      host(group.hosts_.host[group.rank_]),
      place(group.hosts_.place[group.rank_]),
      num_local(static_cast<int>(group.hosts_.ranks[host].size())),
      group_(group),
      operation_(operation),
      num_sent_(group.hosts_.num_ranks()),
      num_received_(group.hosts_.num_ranks()),
      blamed_(group.rank_) {}

Relay::~Relay() {
  for (const auto& message : messages_) {
    drop(message->first);
    drop(message->rest);
  }
}

Clock::duration Relay::time_left() const {
  return std::max<Clock::duration>(operation_.deadline - Clock::now(), std::chrono::milliseconds(1));
}

void Relay::fail(int blamed, const std::string& why) {
  blamed_ = blamed;
  throw TransportError(fmt::format("[soap] {} on rank {}: {}", operation_.call, rank, why));
}

void Relay::local(std::shared_ptr<Collective> collective) {
  collective->call = operation_.call;
  collective->num_bytes_of_whole = operation_.num_bytes;
  group_.group_->submit(collective, time_left() + kGrace, true);
  if (collective->error != nullptr) std::rethrow_exception(collective->error);
}

std::size_t Relay::send(int to, const Memory& memory) {
  return post(to, memory, true);
}

std::size_t Relay::receive(int from, const Memory& memory) {
  return post(from, memory, false);
}

std::size_t Relay::post(int peer, const Memory& memory, bool sends) {
  // Among the messages before anything of it begins: where its second part fails to, its first is dropped with them.
  Message* const message = messages_.emplace_back(std::make_unique<Message>()).get();
  message->sends = sends;
  message->peer = peer;
  message->memory = memory;
  const int index = (sends ? num_sent_ : num_received_)[peer]++;
  const uint64_t inside = index == 0 ? std::min(kInside, memory.num_bytes()) : 0;
  if (index == 0) {
    message->envelope.resize(kEnvelopeBytes);
    if (sends) {
      Label label;
      operation_.call.copy(label.call, sizeof(label.call) - 1);
      label.num_bytes = operation_.num_bytes;
      label.message_bytes = memory.num_bytes();
      std::memcpy(message->envelope.data(), &label, sizeof(label));
      memory.read(0, inside, message->envelope.data() + sizeof(label));
    }
    message->first = begin(*message, 0, message->envelope.data(), kEnvelopeBytes);
  }
  const Memory beyond = memory.cut(inside, memory.num_bytes() - inside);
  if (beyond.num_bytes() > 0) {
    std::byte* data = in_one(beyond);
    if (data == nullptr) {
      message->staging.resize(beyond.num_bytes());
      data = message->staging.data();
      if (sends) beyond.read(0, beyond.num_bytes(), data);
    }
    message->rest = begin(*message, 2 * index + 1, data, beyond.num_bytes());
  }
  return messages_.size() - 1;
}

std::unique_ptr<Wire::Transfer> Relay::begin(const Message& message, int index, std::byte* data, uint64_t num_bytes) {
  std::unique_ptr<Wire::Transfer> out;
  const int tag = tag_of(operation_.sequence, index, num_bytes);
  try {
    out = message.sends ? group_.wire_->send(message.peer, tag, data, num_bytes) : group_.wire_->receive(message.peer, tag, data, num_bytes);
  } catch (const std::exception& error) {
    fail(message.peer, fmt::format("rank {}, on another host, has ended or failed ({})", message.peer, error.what()));
  }
  const std::lock_guard lock(group_.mutex_);
  group_.in_flight_.insert(out.get());
  if (!group_.aborted_.empty()) out->abort();
  return out;
}

void Relay::drop(std::unique_ptr<Wire::Transfer>& transfer) {
  if (transfer == nullptr) return;
  {
    const std::lock_guard lock(group_.mutex_);
    group_.in_flight_.erase(transfer.get());
  }
  transfer.reset();
}

void Relay::finish(const Message& message, std::unique_ptr<Wire::Transfer>& transfer) {
  if (transfer == nullptr) return;
  try {
    transfer->wait(time_left(), is_worker ? kNone : group_.patience_);
  } catch (const std::exception& error) {
    std::string aborted;
    {
      const std::lock_guard lock(group_.mutex_);
      aborted = group_.aborted_;
    }
    if (!aborted.empty()) fail(rank, aborted);
    if (Clock::now() >= operation_.deadline) {
      fail(message.peer, fmt::format("the timeout of {:.3g} s passed: rank {}, on another host, did not come",
                                     std::chrono::duration<double>(operation_.timeout).count(), message.peer));
    }
    fail(message.peer, fmt::format("rank {}, on another host, has ended or failed ({})", message.peer, error.what()));
  }
  drop(transfer);
}

// Looks at what came in an envelope.
void Relay::open(Message& message) {
  Label label;
  std::memcpy(&label, message.envelope.data(), sizeof(label));
  Label own;
  operation_.call.copy(own.call, sizeof(own.call) - 1);
  const int peer = message.peer;
  if (std::string_view(label.call) != own.call) fail(peer, fmt::format("rank {} calls {}, rank {} {}", peer, label.call, rank, own.call));
  if (label.num_bytes != operation_.num_bytes) {
    fail(peer, fmt::format("{} has {} bytes on rank {}, {} on rank {}", own.call, label.num_bytes, peer, operation_.num_bytes, rank));
  }
  if (label.message_bytes != message.memory.num_bytes()) {
    fail(peer, fmt::format("rank {} sends {} bytes to rank {}, which expects {}", peer, label.message_bytes, rank, message.memory.num_bytes()));
  }
  message.memory.write(0, std::min(kInside, message.memory.num_bytes()), message.envelope.data() + sizeof(label));
}

void Relay::wait(std::size_t number) {
  Message& message = *messages_[number];
  if (message.done) return;
  message.done = true;
  finish(message, message.first);
  if (!message.sends && !message.envelope.empty()) open(message);
  finish(message, message.rest);
  if (!message.sends && !message.staging.empty()) {
    const uint64_t inside = message.memory.num_bytes() - message.staging.size();
    message.memory.write(inside, message.staging.size(), message.staging.data());
  }
  message.envelope = {};
  message.staging = {};
}

void Relay::wait(const std::vector<std::size_t>& numbers) {
  for (const std::size_t number : numbers) wait(number);
}

void Relay::wait_all() {
  for (std::size_t i = 0; i < messages_.size(); ++i) wait(i);
}

}  // namespace soap::transport
