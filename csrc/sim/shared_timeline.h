// SharedTimeline: a step on devices that share what computes (cores, memory bandwidth; Machine::sharing): a device is the faster the fewer of those that it
// shares with compute at that moment. Processor sharing, by events:
//
//   work left of d falls at rate busy_speed[k - 1], k: devices that share with d, and d, that compute now (Machine::busy_speed); of the update at
//   update_speed[k - 1]. A movement begins when all its ranks have come to it, and takes its price. Among ranks that share memory, where nothing is
//   packed, they take their cores for that long, and slow others: it is timed with all of a host at it
//
// Where computations take now longer, now shorter (Machine::jitter), ranks that meet wait for the slowest: with each having computed w_i since its last
// movement, the movement begins at the expected latest of normal variables with mean t_i, when it comes, and deviation jitter w_i, two at a time by
// Clark's formulas (Operations Research 9, 1961). Where the one of them that computed most has done so for kCold, the movement takes Machine::cold_ns
// longer, less in proportion: nothing that it needs is in the cores' own caches. Where devices take turns on cores, Machine::turn_ns takes the place of both:
// all of it where as many compute or meet at that moment as there are, nothing where each has a core.
//
// Of an exchange one way between hosts (OneWay) the senders go on while the last of it is on its way, and the receivers wait for its arrival alone: it leaves
// when all senders have come and what they sent before has left; most of what no buffer holds once all receivers have come, too. What the kernel works for
// it counts as computed by either end.
//
// Each device does what it was given, in order. Nothing else overlaps on a device.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "machine/collectives.h"
#include "machine/machine.h"

namespace soap {

class SharedTimeline {
 public:
  static constexpr double kCold = 1e6;  // ns
  struct Span {
    int tag = -1;
    int device = 0;
    bool communication = false;
    int64_t begin_ns = 0, end_ns = 0;
  };

  explicit SharedTimeline(const Machine& machine) : machine_(machine), queues_(machine.host_of.size()) {}  // the machine must outlive it
  explicit SharedTimeline(Machine&&) = delete;

  // Where it begins a segment (the first with, or without, a backward after a movement: program/project.h) the call comes on top,
  // Machine::segment_overhead_ns.
  void compute(int device, int64_t work_ns, int tag = -1, bool differentiable = true) {
    if (work_ns <= 0) return;
    auto& queue = queues_[device];
    Task task{.work_ns = work_ns, .tag = tag};
    if (!queue.empty() && queue.back().move < 0) task.begun = queue.back().begun;
    if (!task.begun[differentiable]) task.work_ns += static_cast<int64_t>(machine_.segment_overhead_ns);
    task.begun[differentiable] = true;
    queue.push_back(task);
  }
  void update(int device, int64_t work_ns) {
    if (work_ns <= 0) return;
    compute(device, work_ns);
    queues_[device].back().updates = true;
  }
  // What a device does by itself for a movement (sim/local_work.h): it ends a segment, as the movement does.
  void local_work(int device, int64_t work_ns, int tag = -1) {
    if (work_ns > 0) queues_[device].push_back({.work_ns = work_ns, .tag = tag});
  }
  void move(const std::vector<int>& ranks, int64_t price_ns, int tag = -1);
  void send(const OneWay& exchange, int64_t price_ns, int tag = -1);
  // When each device is done, of what was added since the last run. `spans`: what ran when, in the order of ends.
  std::vector<int64_t> run(std::vector<Span>* spans = nullptr);

 private:
  struct Task {
    int64_t work_ns = 0;
    int move = -1;  // index in moves_
    int tag = -1;
    bool sends = false, receives = false;  // one way
    bool updates = false;
    std::array<bool, 2> begun = {};  // segments since the last movement: without and with a backward

    bool meets() const { return move >= 0 && !sends && !receives; }
  };
  struct Move {
    size_t num_ranks = 0, arrived = 0;
    int64_t price_ns = 0;
    int64_t taken_ns = 0;            // of each rank's core, once they have met
    double begin = 0, variance = 0;  // of the latest of those that have come
    double worked = 0;               // by the one that computed most
    double turns = 0;                // sum over those that have come, of turn_ns
    double end_ns = -1;              // known once all have come; one way, all whom it waits for
    // One way.
    OneWay::Times way;
    size_t num_receivers = 0, received = 0;
    double sent_at = 0, received_at = 0;  // when the last of each came

    // Of what no buffer holds most waits for the receivers.
    bool waits() const { return price_ns > way.buffer_ns; }
    void arrive();  // one of them has come
    // When for a sender and a receiver that came at `own` nothing is left to wait for; negative: not known yet.
    double sender_end(double own) const;
    double receiver_end(double own) const;
    // How long the movement keeps it busy after that.
    double busy_ns(bool sends, double own, double end) const;
  };
  const Machine& machine_;
  std::vector<std::vector<Task>> queues_;  // per device
  std::vector<Move> moves_;
};

}  // namespace soap
