#include "search/progress.h"

#include <algorithm>

namespace soap {

void ProgressWatch::simulated() {
  const int count = simulations_.fetch_add(1, std::memory_order_relaxed) + 1;
  if (std::this_thread::get_id() != owner_) return;
  now_.simulations = count;
  if (!observer_ || stopped()) return;
  try {
    if (!observer_(now_)) stopped_ = true;
  } catch (...) {
    stopped_ = true;  // for the other threads
    throw;
  }
}

void ProgressWatch::enter(std::string phase) {
  now_.phase = std::move(phase);
  now_.simulations = simulations();
  if (now_.best_ns >= 0) points_.push_back(now_);
}

void ProgressWatch::priced(int64_t step_ns) {
  if (now_.best_ns >= 0 && step_ns >= now_.best_ns) return;
  now_.best_ns = step_ns;
  now_.simulations = simulations();
  points_.push_back(now_);
}

std::vector<Progress> ProgressWatch::points() const {
  std::vector<Progress> out;
  const size_t count = points_.size(), kept = std::min(count, kMostPoints);
  for (size_t i = 0; i < kept; ++i) out.push_back(points_[kept == 1 ? 0 : i * (count - 1) / (kept - 1)]);
  if (!out.empty()) {
    Progress end = now_;
    end.simulations = simulations();
    if (end.simulations != out.back().simulations) out.push_back(std::move(end));
  }
  return out;
}

}  // namespace soap
