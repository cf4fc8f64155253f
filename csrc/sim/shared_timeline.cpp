#include "sim/shared_timeline.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <utility>

#include "base/error.h"

namespace soap {
namespace {

constexpr double kSame = 1 + 1e-12;  // ends that are equal but for rounding come together

// The later of two normal variables, as one: (mean, variance) of the first, how much later the second's mean is, and its variance.
std::pair<double, double> later(double mean, double variance, double by, double other_variance) {
  const double spread = std::sqrt(variance + other_variance);
  if (spread == 0) return {mean + std::max(by, 0.0), by > 0 ? other_variance : variance};
  const double x = -by / spread;  // in deviations, how much later the first is
  const double first = 0.5 * std::erfc(-x / std::numbers::sqrt2), density = std::exp(-0.5 * x * x) / std::sqrt(2 * std::numbers::pi);
  const double after = by * (1 - first) + spread * density;  // the first's mean
  const double second_moment = variance * first + (by * by + other_variance) * (1 - first) + by * spread * density;
  return {mean + after, std::max(second_moment - after * after, 0.0)};
}

}  // namespace

void SharedTimeline::move(const std::vector<int>& ranks, int64_t price_ns, int tag) {
  for (int r : ranks) queues_[r].push_back({.move = static_cast<int>(moves_.size()), .tag = tag});
  Move move{.num_ranks = ranks.size(), .price_ns = price_ns};
  // Among ranks that share memory it takes their cores, timed with all of a host at it.
  if (!machine_.packs && !machine_.busy_speed.empty() && machine_.num_hosts(ranks) == 1) std::swap(move.price_ns, move.taken_ns);
  moves_.push_back(move);
}

void SharedTimeline::send(const OneWay& exchange, int64_t price_ns, int tag) {
  const int move = static_cast<int>(moves_.size());
  for (int r : exchange.senders) queues_[r].push_back({.move = move, .tag = tag, .sends = true});
  for (int r : exchange.receivers) queues_[r].push_back({.move = move, .tag = tag, .receives = true});
  moves_.push_back({.num_ranks = exchange.senders.size(), .price_ns = price_ns, .way = exchange.times, .num_receivers = exchange.receivers.size()});
}

void SharedTimeline::Move::arrive() {
  if (arrived < num_ranks || (waits() && received < num_receivers)) return;
  const auto price = static_cast<double>(price_ns);
  end_ns = begin + price;
  if (waits()) end_ns = std::max(end_ns, received_at + price - static_cast<double>(way.ahead_ns));
}

double SharedTimeline::Move::sender_end(double own) const {
  if (way.senders_meet) own = sent_at;
  if ((way.senders_meet && arrived < num_ranks) || (waits() && end_ns < 0)) return -1;
  const double end = std::max(own, end_ns - static_cast<double>(way.buffer_ns));
  return waits() ? std::max(end, received_at) : end;
}

double SharedTimeline::Move::receiver_end(double own) const {
  if (way.receivers_meet) own = received_at;
  if (end_ns < 0 || (way.receivers_meet && received < num_receivers)) return -1;
  return std::max(end_ns, own);
}

double SharedTimeline::Move::busy_ns(bool sends, double own, double end) const {
  if (way.senders_meet && sends) own = sent_at;
  if (way.receivers_meet && !sends) own = received_at;
  return std::max(own + static_cast<double>(std::min(sends ? way.send_ns : way.receive_ns, price_ns)) - end, 0.0);
}

std::vector<int64_t> SharedTimeline::run(std::vector<Span>* spans) {
  struct Device {
    size_t next = 0;     // task that it does or waits with
    bool begun = false;  // that task
    bool moved = false;  // nothing of a movement is left to wait for, but what keeps the device busy
    double left = 0, begin = 0;
    double worked = 0;   // since its last movement
    int last_sent = -1;  // of its movements one way
    bool computes(const Task& task) const { return task.move < 0 || moved; }
  };
  std::vector<Device> devices(queues_.size());
  std::vector<int64_t> done(queues_.size());
  const std::vector<int>& sharing = machine_.sharing();
  std::vector<int> busy(queues_.size());        // per number in `sharing`
  std::vector<int> met, crowd(queues_.size());  // movements to which the last of their ranks has come; per number in `sharing`
  // What devices that share with a movement's, and these, lose by turns, in parts of what all lose.
  const auto crowding = [&](int m) {
    crowd = busy;
    double slowest = 1;
    for (size_t d = 0; d < devices.size(); ++d) {
      if (devices[d].next == queues_[d].size() || queues_[d][devices[d].next].move != m) continue;
      slowest = std::min(slowest, machine_.busy_speed_of(++crowd[sharing[d]]));
    }
    const double all = std::min(machine_.busy_speed_of(std::numeric_limits<int>::max()), 1.0);
    return all < 1 ? (1 - slowest) / (1 - all) : 0.0;
  };
  double now = 0;
  while (true) {
    std::fill(busy.begin(), busy.end(), 0);
    met.clear();
    bool waiting = false;
    for (size_t d = 0; d < devices.size(); ++d) {
      Device& device = devices[d];
      if (device.next == queues_[d].size()) continue;
      const Task& task = queues_[d][device.next];
      if (!device.begun) {
        device.begun = true;
        device.begin = now;
        device.left = static_cast<double>(task.work_ns);
        if (task.sends || task.receives) {
          Move& move = moves_[task.move];
          if (task.sends) {
            move.begin = std::max({move.begin, now, device.last_sent < 0 ? 0.0 : moves_[device.last_sent].end_ns});
            ++move.arrived;
            move.sent_at = now;
            device.last_sent = task.move;
          } else {
            ++move.received;
            move.received_at = now;
          }
          move.arrive();
        } else if (task.move >= 0) {
          Move& move = moves_[task.move];
          const double deviation = machine_.jitter * device.worked;
          const auto [begin, variance] =
              move.arrived == 0 ? std::pair{now, deviation * deviation} : later(move.begin, move.variance, now - move.begin, deviation * deviation);
          move.begin = begin;
          move.variance = variance;
          move.worked = std::max(move.worked, device.worked);
          move.turns += std::sqrt(std::min(device.worked / kCold, 1.0));
          if (++move.arrived == move.num_ranks) {
            move.price_ns += static_cast<int64_t>(machine_.cold_ns * std::min(move.worked / kCold, 1.0));
            if (machine_.turn_ns > 0) met.push_back(task.move);
            move.end_ns = std::max(begin, now) + static_cast<double>(move.price_ns);
          }
        }
      }
      if (device.computes(task)) ++busy[sharing[d]];
      waiting = true;
    }
    if (!waiting) break;
    for (int m : met) {
      const auto turns = static_cast<int64_t>(machine_.turn_ns * moves_[m].turns / static_cast<double>(moves_[m].num_ranks) * crowding(m));
      moves_[m].price_ns += turns;
      moves_[m].end_ns += static_cast<double>(turns);
    }
    const auto end_of = [&](size_t d) {  // of a movement; negative: not known yet
      const Task& task = queues_[d][devices[d].next];
      const Move& move = moves_[task.move];
      return task.sends ? move.sender_end(devices[d].begin) : task.receives ? move.receiver_end(devices[d].begin) : move.end_ns;
    };
    const auto rate = [&](size_t d) {
      const Task& task = queues_[d][devices[d].next];
      return task.meets() ? 1.0 : machine_.busy_speed_of(busy[sharing[d]], task.updates);
    };
    double next = std::numeric_limits<double>::infinity();
    for (size_t d = 0; d < devices.size(); ++d) {
      if (devices[d].next == queues_[d].size()) continue;
      const Task& task = queues_[d][devices[d].next];
      if (devices[d].computes(task))
        next = std::min(next, now + devices[d].left / rate(d));
      else if (end_of(d) >= 0)
        next = std::min(next, end_of(d));
    }
    SOAP_CHECK(std::isfinite(next), "[simulate] devices wait for each other: a movement's ranks come to it in different orders");
    for (size_t d = 0; d < devices.size(); ++d) {
      Device& device = devices[d];
      if (device.next == queues_[d].size()) continue;
      const Task& task = queues_[d][device.next];
      const bool computes = device.computes(task);
      const double speed = computes ? rate(d) : 0;
      const double end = computes ? now + device.left / speed : end_of(d);
      if (end < 0 || end > next * kSame) {
        device.left -= (next - now) * speed;
        continue;
      }
      if (!computes) {
        device.left = task.meets() ? moves_[task.move].taken_ns : moves_[task.move].busy_ns(task.sends, device.begin, next);
        device.moved = device.left > 0;
        if (device.moved) continue;
      }
      done[d] = static_cast<int64_t>(next);
      if (spans) {
        const double begin =
            task.move < 0 || task.sends ? device.begin : (task.meets() ? moves_[task.move].end_ns : end) - static_cast<double>(moves_[task.move].price_ns);
        spans->push_back({task.tag, static_cast<int>(d), task.move >= 0, static_cast<int64_t>(begin), done[d]});
      }
      device.worked = task.move < 0 ? device.worked + static_cast<double>(task.work_ns) : 0;
      ++device.next;
      device.begun = device.moved = false;
    }
    now = next;
  }
  for (auto& queue : queues_) queue.clear();
  moves_.clear();
  return done;
}

}  // namespace soap
