#include "transport/bell.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <ctime>

namespace soap::transport {
namespace {

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* limit) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, limit, nullptr, 0);
}

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void ring_bell(RankControl& rank) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (rank.sleepers.load(std::memory_order_relaxed) == 0) return;
  rank.bell.fetch_add(1, std::memory_order_release);
  futex(rank.bell, FUTEX_WAKE, INT_MAX, nullptr);
}

bool sleep_on_bell(RankControl& self, std::chrono::microseconds limit, const std::function<bool()>& has_news) {
  const uint32_t seen = self.bell.load(std::memory_order_acquire);
  self.sleepers.fetch_add(1, std::memory_order_seq_cst);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  bool passed = false;
  if (!has_news()) {
    const timespec relative{static_cast<time_t>(limit.count() / 1000000), static_cast<long>(limit.count() % 1000000 * 1000)};
    passed = futex(self.bell, FUTEX_WAIT, seen, &relative) != 0 && errno == ETIMEDOUT;
  }
  self.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  return passed;
}

void Waiting::restart() {
  num_idle_ = num_yields_ = 0;
}

bool Waiting::idle() {
  if (num_idle_++ == 0) begin_ = std::chrono::steady_clock::now();
  if (num_yields_ == 0 && (num_idle_ % 8 != 0 || std::chrono::steady_clock::now() - begin_ < patience_.spin)) {
    pause_core();
    return false;
  }
  if (num_yields_++ < patience_.num_yields) {
    sched_yield();
    return false;
  }
  return true;
}

}  // namespace soap::transport
