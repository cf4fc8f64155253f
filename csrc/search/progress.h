// Progress: what a search tells while it runs, and how it hears that it should end with the best plan so far.
//
// Thread safety: the thread that made a ProgressWatch counts, records and asks the observer; other threads of the search may only read `stopped`, and
// count with `simulated`, which asks nobody there.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace soap {

struct Progress {
  std::string phase;     // "seeds", "optcnn", "descent", "mcmc"
  int simulations = 0;   // so far
  int budget = 0;        // at most
  int64_t best_ns = -1;  // step time of the best plan that fits; -1: none yet
};

// Called between simulations. false: end with the best plan so far. What it throws ends the search without one.
using Observer = std::function<bool(const Progress&)>;

class ProgressWatch {
 public:
  explicit ProgressWatch(Observer observer) : observer_(std::move(observer)) {}

  void set_budget(int simulations) { now_.budget = simulations; }
  void enter(std::string phase);
  // One more simulation.
  void simulated();
  // A plan that fits was priced; recorded where it is the fastest so far.
  void priced(int64_t step_ns);
  bool stopped() const { return stopped_.load(std::memory_order_relaxed); }
  int simulations() const { return simulations_.load(std::memory_order_relaxed); }
  // Where the best step time or the phase changed, and the end: at most kMostPoints + 1, thinned evenly.
  std::vector<Progress> points() const;

  static constexpr size_t kMostPoints = 256;

 private:
  Observer observer_;
  std::thread::id owner_ = std::this_thread::get_id();
  std::atomic<int> simulations_ = 0;
  std::atomic<bool> stopped_ = false;
  Progress now_;
  std::vector<Progress> points_;
};

}  // namespace soap
