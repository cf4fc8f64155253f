#include "transport/cores.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <thread>
#include <vector>

#include "transport/process.h"

namespace soap::transport {
namespace {

constexpr int kReadings = 32, kRoundTrips = 64;

void stay_on(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  pthread_setaffinity_np(pthread_self(), sizeof(cores), &cores);
}

}  // namespace

int64_t core_distance_ns() {
  const std::vector<int> cores = this_process("").cores;
  if (cores.size() < 2) return 0;
  struct alignas(64) Line {
    std::atomic<int> value{0};  // even: the first core's turn
  } line;
  constexpr int kEnd = 2 * kReadings * kRoundTrips;
  int64_t least = std::numeric_limits<int64_t>::max();
  const auto until = [&](int value) {
    for (int spins = 0; line.value.load(std::memory_order_acquire) != value; ++spins) {
      if (spins > 10'000) sched_yield();  // the other waits for its core
    }
  };
  std::thread second([&] {
    stay_on(cores[1]);
    for (int turn = 1; turn < kEnd; turn += 2) {
      until(turn);
      line.value.store(turn + 1, std::memory_order_release);
    }
  });
  std::thread first([&] {
    stay_on(cores[0]);
    int turn = 0;
    for (int reading = 0; reading < kReadings; ++reading) {
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < kRoundTrips; ++i, turn += 2) {
        line.value.store(turn + 1, std::memory_order_release);
        until(turn + 2);
      }
      const auto taken = std::chrono::steady_clock::now() - begin;
      least = std::min<int64_t>(least, std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count() / kRoundTrips);
    }
  });
  first.join();
  second.join();
  return least;
}

}  // namespace soap::transport
