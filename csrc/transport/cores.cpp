#include "transport/cores.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "transport/process.h"

namespace soap::transport {
namespace {

using std::chrono::steady_clock;

constexpr int kReadings = 32, kRoundTrips = 64, kPatience = 10'000;
constexpr std::chrono::milliseconds kMost{100};  // for all readings; others may want the cores

struct alignas(64) Line {
  std::atomic<int> turn{0};  // even: the first core's
  std::atomic<bool> stopped{false};

  // Whether it has come to that.
  bool comes_to(int value, steady_clock::time_point until) {
    for (int spins = 1; turn.load(std::memory_order_acquire) != value; ++spins) {
      if (spins % kPatience != 0) continue;
      if (stopped.load(std::memory_order_relaxed) || steady_clock::now() > until) return false;
      sched_yield();
    }
    return true;
  }
};

bool stay_on(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  return pthread_setaffinity_np(pthread_self(), sizeof(cores), &cores) == 0;
}

}  // namespace

int64_t core_distance_ns() {
  const std::vector<int> cores = this_process("").cores;
  if (cores.size() < 2) return 0;
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  const auto until = steady_clock::now() + kMost;
  Line line;
  int64_t least = kNone;
  try {
    // Joined in the reverse order, the first before what it writes is read.
    const std::jthread second([&, core = cores[1]] {
      if (!stay_on(core)) line.stopped = true;
      for (int turn = 1; line.comes_to(turn, until); turn += 2) line.turn.store(turn + 1, std::memory_order_release);
    });
    const std::jthread first([&, core = cores[0]] {
      if (!stay_on(core)) line.stopped = true;
      int turn = 0;
      bool comes = true;
      for (int reading = 0; reading < kReadings && comes; ++reading) {
        const auto begin = steady_clock::now();
        for (int i = 0; i < kRoundTrips && comes; ++i, turn += 2) {
          line.turn.store(turn + 1, std::memory_order_release);
          comes = line.comes_to(turn + 2, until);
        }
        const auto taken = std::chrono::duration_cast<std::chrono::nanoseconds>(steady_clock::now() - begin);
        if (comes) least = std::min<int64_t>(least, taken.count() / kRoundTrips);
      }
      line.stopped = true;
    });
  } catch (const std::system_error&) {  // no thread to be had; one that began gives up by itself
    return 0;
  }
  return least == kNone ? 0 : least;
}

}  // namespace soap::transport
