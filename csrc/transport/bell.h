// Sleeping until another rank did something, and waking it. See [Note: stages, slots, rings] in segment.h.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>

#include "transport/segment.h"

namespace soap::transport {

// Wakes the threads of that rank that sleep, or are about to. To be called after the counter was stored.
void ring_bell(RankControl& rank);

// Sleeps until the bell rings, at most `limit`, unless `has_news()` is true after this thread was counted among the sleepers.
// Returns whether the limit passed.
bool sleep_on_bell(RankControl& self, std::chrono::microseconds limit, const std::function<bool()>& has_news);

// How long a waiting thread looks before it sleeps. A sleeper costs its waker a system call and itself tens of microseconds, a thread that looks
// costs another one the core where there are fewer cores than ranks. Yielding to whoever wants the core, a rank that has nothing else to do looks for
// about a millisecond: what a rank computes after it slept takes a tenth of a millisecond longer besides. The thread that gets on while its rank computes
// (`behind`) doesn't.
struct Patience {
  std::chrono::microseconds spin{40};
  int num_yields = 2000;

  static Patience of(int num_ranks, int num_cores) { return num_ranks <= num_cores ? Patience{} : Patience{std::chrono::microseconds(2), 32}; }
  Patience behind() const { return {spin, std::min(num_yields, 16)}; }
};

// One wait: idle() spins, then yields; it returns true when it is time to sleep.
class Waiting {
 public:
  explicit Waiting(const Patience& patience) : patience_(patience) {}
  void restart();
  bool idle();

 private:
  Patience patience_;
  int num_idle_ = 0;
  int num_yields_ = 0;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace soap::transport
