#include "transport/messages.h"

#include "base/error.h"
#include "transport/bell.h"

namespace soap::transport {
namespace {

// Before the bytes of a message. Messages begin at multiples of its size.
struct Frame {
  uint64_t num_bytes = 0;
  int64_t tag = 0;
};

uint64_t padded(uint64_t num_bytes) {
  return (num_bytes + sizeof(Frame) - 1) / sizeof(Frame) * sizeof(Frame);
}

}  // namespace

Messages::Messages(Segment& segment, int rank)
    : segment_(segment),
      rank_(rank),
      sends_(segment.layout().num_ranks),
      incoming_(segment.layout().num_ranks),
      aside_(segment.layout().num_ranks),
      reserved_(segment.layout().num_ranks) {}

void Messages::send(MessagePtr message) {
  const int peer = message->peer;
  if (!reserved_[peer]) {
    segment_.reserve_ring(rank_, peer);
    reserved_[peer] = true;
  }
  sends_[peer].push_back(std::move(message));
  ++num_pending_;
}

void Messages::receive(MessagePtr message) {
  receives_.push_back(std::move(message));
  ++num_pending_;
}

bool Messages::withdraw(const MessagePtr& message) {
  if (message->begun) return false;
  for (auto it = receives_.begin(); it != receives_.end(); ++it) {
    if (*it != message) continue;
    receives_.erase(it);
    --num_pending_;
    return true;
  }
  return false;
}

void Messages::end(const MessagePtr& message, std::vector<std::shared_ptr<Operation>>& ended) {
  ended.push_back(message);
  --num_pending_;
}

bool Messages::write(int destination, std::vector<std::shared_ptr<Operation>>& ended) {
  RingControl& control = segment_.ring(rank_, destination);
  std::byte* ring = segment_.ring_data(rank_, destination);
  const uint64_t size = segment_.layout().ring_bytes;
  bool moved = false;
  while (!sends_[destination].empty()) {
    const MessagePtr message = sends_[destination].front();
    const uint64_t num_bytes = message->memory.num_bytes();
    uint64_t written = control.written.load(std::memory_order_relaxed);
    const uint64_t room = size - (written - control.read.load(std::memory_order_acquire));
    if (!message->begun) {
      if (room < sizeof(Frame)) break;
      const Frame frame{num_bytes, message->tag};
      std::memcpy(ring + written % size, &frame, sizeof(frame));
      message->begun = true;
      written += sizeof(Frame);
    } else if (room == 0) {
      break;
    }
    // At most a quarter of the ring at once, so that the other reads while this one writes.
    const uint64_t left = size - (written - control.read.load(std::memory_order_acquire));
    uint64_t now = std::min({num_bytes - message->moved, left, size / 4});
    for (uint64_t done = 0; done < now;) {
      const uint64_t at = (written + done) % size, run = std::min(now - done, size - at);
      message->memory.read(message->moved + done, run, ring + at);
      done += run;
    }
    message->moved += now;
    written += now;
    const bool whole = message->moved == num_bytes;
    if (whole) written = padded(written);  // room is a multiple of a frame whenever no message is under way
    control.written.store(written, std::memory_order_release);
    ring_bell(segment_.control(destination));
    moved = true;
    if (whole) {
      sends_[destination].pop_front();
      end(message, ended);
    }
  }
  return moved;
}

bool Messages::begin_message(int source, std::vector<std::shared_ptr<Operation>>& ended) {
  RingControl& control = segment_.ring(source, rank_);
  const uint64_t at = control.read.load(std::memory_order_relaxed);
  if (control.written.load(std::memory_order_acquire) - at < sizeof(Frame)) return false;
  Frame frame;
  std::memcpy(&frame, segment_.ring_data(source, rank_) + at % segment_.layout().ring_bytes, sizeof(frame));
  Incoming next{true, static_cast<int>(frame.tag), frame.num_bytes, 0, nullptr, nullptr};
  bool waits_behind = false;
  for (auto it = receives_.begin(); it != receives_.end(); ++it) {
    const MessagePtr& message = *it;
    if (message->peer != source && message->peer != -1) continue;
    if (message->tag != next.tag) {
      waits_behind = true;
      continue;
    }
    next.target = message;
    receives_.erase(it);
    break;
  }
  if (next.target != nullptr) {
    next.target->begun = true;
    next.target->peer = source;
    if (next.target->memory.num_bytes() != next.num_bytes) {
      next.target->error = std::make_exception_ptr(TransportError(fmt::format("[soap] rank {} sent {} bytes with tag {}, rank {} expects {}", source,
                                                                              next.num_bytes, next.tag, rank_, next.target->memory.num_bytes())));
      end(next.target, ended);
      next.target = nullptr;  // its bytes are dropped
    }
  } else if (waits_behind) {
    aside_[source].push_back({next.tag, {}, false});
    next.aside = &aside_[source].back();
    next.aside->data.resize(next.num_bytes);
  } else {
    return false;
  }
  incoming_[source] = next;
  control.read.store(at + sizeof(Frame), std::memory_order_release);
  return true;
}

bool Messages::read(int source, std::vector<std::shared_ptr<Operation>>& ended) {
  RingControl& control = segment_.ring(source, rank_);
  const std::byte* ring = segment_.ring_data(source, rank_);
  const uint64_t size = segment_.layout().ring_bytes;
  bool moved = false;
  for (;;) {
    Incoming& now = incoming_[source];
    if (!now.active && !begin_message(source, ended)) break;
    const uint64_t at = control.read.load(std::memory_order_relaxed);
    const uint64_t there = control.written.load(std::memory_order_acquire) - at;
    const uint64_t num_bytes = std::min({now.num_bytes - now.num_read, there, size / 4});
    for (uint64_t done = 0; done < num_bytes;) {
      const uint64_t from = (at + done) % size, run = std::min(num_bytes - done, size - from);
      if (now.target != nullptr) now.target->memory.write(now.num_read + done, run, ring + from);
      if (now.aside != nullptr) std::memcpy(now.aside->data.data() + now.num_read + done, ring + from, run);
      done += run;
    }
    now.num_read += num_bytes;
    const bool whole = now.num_read == now.num_bytes;
    // The padding comes with the last bytes.
    control.read.store(whole ? padded(at + num_bytes) : at + num_bytes, std::memory_order_release);
    ring_bell(segment_.control(source));
    if (num_bytes > 0 || whole) moved = true;
    if (!whole) {
      if (num_bytes == 0) break;
      continue;
    }
    if (now.target != nullptr) end(now.target, ended);
    const bool was_aside = now.aside != nullptr;
    if (was_aside) now.aside->whole = true;
    now = Incoming{};
    if (was_aside) break;  // a receive may wait for it: a later message with its tag must not overtake it
  }
  return moved;
}

bool Messages::take_aside(std::vector<std::shared_ptr<Operation>>& ended) {
  bool moved = false;
  for (auto it = receives_.begin(); it != receives_.end();) {
    const MessagePtr message = *it;
    bool taken = false;
    for (int source = 0; source < segment_.layout().num_ranks && !taken; ++source) {
      if (message->peer != source && message->peer != -1) continue;
      for (auto kept = aside_[source].begin(); kept != aside_[source].end(); ++kept) {
        if (kept->tag != message->tag) continue;
        if (!kept->whole) break;  // the rest of it is still to come
        message->begun = taken = true;
        message->peer = source;
        if (kept->data.size() == message->memory.num_bytes()) {
          message->memory.write(0, kept->data.size(), kept->data.data());
        } else {
          message->error = std::make_exception_ptr(TransportError(fmt::format("[soap] rank {} sent {} bytes with tag {}, rank {} expects {}", source,
                                                                              kept->data.size(), kept->tag, rank_, message->memory.num_bytes())));
        }
        aside_[source].erase(kept);
        break;
      }
    }
    if (taken) {
      it = receives_.erase(it);
      end(message, ended);
      moved = true;
    } else {
      ++it;
    }
  }
  return moved;
}

bool Messages::advance(std::vector<std::shared_ptr<Operation>>& ended) {
  if (num_pending_ == 0) return false;
  bool moved = false;
  const int num_ranks = segment_.layout().num_ranks;
  bool any_aside = false;
  for (int r = 0; r < num_ranks; ++r) {
    moved |= write(r, ended);
    any_aside |= !aside_[r].empty();
  }
  if (any_aside) moved |= take_aside(ended);
  for (int r = 0; r < num_ranks; ++r) {
    bool expected = incoming_[r].active;
    for (const MessagePtr& message : receives_) expected |= message->peer == r || message->peer == -1;
    if (expected) moved |= read(r, ended);
  }
  return moved;
}

std::vector<MessagePtr> Messages::pending() const {
  std::vector<MessagePtr> out(receives_.begin(), receives_.end());
  for (const auto& queue : sends_) out.insert(out.end(), queue.begin(), queue.end());
  for (const Incoming& now : incoming_) {
    if (now.active && now.target != nullptr) out.push_back(now.target);
  }
  return out;
}

void Messages::fail(const std::function<std::exception_ptr(const Message&)>& failed, std::vector<std::shared_ptr<Operation>>& ended) {
  const auto give_up = [&](const MessagePtr& message) {
    message->error = failed(*message);
    if (message->error == nullptr) return false;
    end(message, ended);
    return true;
  };
  receives_.remove_if(give_up);
  for (auto& queue : sends_) std::erase_if(queue, give_up);
  for (Incoming& now : incoming_) {
    if (now.active && now.target != nullptr && give_up(now.target)) now.target = nullptr;
  }
}

}  // namespace soap::transport
