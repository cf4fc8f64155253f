#include "program/order.h"

#include <algorithm>
#include <queue>
#include <set>
#include <tuple>

#include "base/error.h"

namespace soap {
namespace {

struct Dependencies {
  std::vector<int> missing;
  std::vector<std::vector<int>> next;
};

Dependencies dependencies(const std::vector<Task>& tasks) {
  Dependencies d{.missing = std::vector<int>(tasks.size()), .next = std::vector<std::vector<int>>(tasks.size())};
  for (size_t i = 0; i < tasks.size(); ++i) {
    std::set<int> after(tasks[i].after.begin(), tasks[i].after.end());
    d.missing[i] = static_cast<int>(after.size());
    for (int a : after) d.next[a].push_back(static_cast<int>(i));
  }
  return d;
}

}  // namespace

std::vector<int> sort_by_priority(const std::vector<Task>& tasks) {
  Dependencies d = dependencies(tasks);
  using Key = std::tuple<double, int64_t, int>;
  std::priority_queue<Key, std::vector<Key>, std::greater<>> ready;
  const auto push = [&](int i) { ready.emplace(tasks[i].phase, tasks[i].rank, i); };
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (d.missing[i] == 0) push(static_cast<int>(i));
  }
  std::vector<int> order;
  while (!ready.empty()) {
    const int i = std::get<2>(ready.top());
    ready.pop();
    order.push_back(i);
    for (int n : d.next[i]) {
      if (--d.missing[n] == 0) push(n);
    }
  }
  SOAP_CHECK(order.size() == tasks.size(), "[order] {} of {} steps can be ordered: there is a cycle", order.size(), tasks.size());
  return order;
}

std::vector<int> sort_interleaved(const std::vector<Task>& tasks, int num_devices) {
  Dependencies d = dependencies(tasks);
  std::vector<double> ready_at(tasks.size()), clock(num_devices);
  std::vector<int> ready, order;
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (d.missing[i] == 0) ready.push_back(static_cast<int>(i));
  }
  while (!ready.empty()) {
    using Key = std::tuple<double, bool, double, int64_t, int>;
    Key best{};
    size_t at = 0;
    for (size_t k = 0; k < ready.size(); ++k) {
      const Task& t = tasks[ready[k]];
      double start = ready_at[ready[k]];
      // What moves comes as soon as it is there: were it to wait for a device that is busy, the stage that needs it would idle meanwhile.
      for (size_t i = 0; i < t.devices.size() && t.work > 0; ++i) start = std::max(start, clock[t.devices[i]]);
      const Key key{start, !t.backward, t.phase, t.rank, ready[k]};
      if (k == 0 || key < best) {
        best = key;
        at = k;
      }
    }
    const int i = ready[at];
    ready.erase(ready.begin() + static_cast<int64_t>(at));
    order.push_back(i);
    const double end = std::get<0>(best) + tasks[i].work;
    for (size_t k = 0; k < tasks[i].devices.size() && tasks[i].work > 0; ++k) clock[tasks[i].devices[k]] = end;
    for (int n : d.next[i]) {
      ready_at[n] = std::max(ready_at[n], end);
      if (--d.missing[n] == 0) ready.push_back(n);
    }
  }
  return order;
}

}  // namespace soap
