#include "machine/machine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <set>

#include "base/error.h"

namespace soap {

int Machine::num_hosts(const std::vector<int>& ranks) const {
  std::set<int> hosts;
  for (int r : ranks) hosts.insert(host_of.at(r));
  return static_cast<int>(hosts.size());
}

Machine make_machine(int num_devices, int num_hosts) {
  if (num_devices < 1 || num_hosts < 1 || num_devices % num_hosts != 0) {
    user_error("[machine] {} devices don't spread evenly over {} hosts", num_devices, num_hosts);
  }
  Machine m;
  for (int d = 0; d < num_devices; ++d) m.host_of.push_back(d / (num_devices / num_hosts));
  return m;
}

namespace {

int64_t interpolate(const SizeTable& t, int64_t bytes) {
  if (bytes <= t.front().first) return t.front().second;
  size_t i = 1;
  while (i + 1 < t.size() && bytes > t[i].first) ++i;
  const auto [b0, n0] = t[i - 1];
  const auto [b1, n1] = t[i];
  if (bytes >= b1) {  // beyond the last point: by its bandwidth
    return n1 + static_cast<int64_t>(static_cast<double>(bytes - b1) * static_cast<double>(std::max<int64_t>(n1 - n0, 1)) / static_cast<double>(b1 - b0));
  }
  const double x =
      (std::log(static_cast<double>(bytes)) - std::log(static_cast<double>(b0))) / (std::log(static_cast<double>(b1)) - std::log(static_cast<double>(b0)));
  return static_cast<int64_t>(std::exp((1 - x) * std::log(static_cast<double>(n0)) + x * std::log(static_cast<double>(n1))));
}

// The measured table whose ranks are most like these: within a host, or over hosts, as they are; then of the nearest number of ranks.
struct Measured {
  const SizeTable* table = nullptr;
  int ranks = 0;
};
Measured nearest(const Machine& machine, const std::string& kind, int ranks, int hosts) {
  Measured best;
  int distance = 0;
  for (const auto& [key, table] : machine.tables) {
    const size_t first = key.find('/'), second = key.rfind('/');
    if (key.substr(0, first) != kind || table.size() < 2) continue;
    const int n = std::stoi(key.substr(first + 1, second - first - 1)), h = std::stoi(key.substr(second + 1));
    if ((h > 1) != (hosts > 1)) continue;
    const int away = 1000 * std::abs(n - ranks) + std::abs(h - hosts);
    if (!best.table || away < distance) {
      best = {&table, n};
      distance = away;
    }
  }
  return best;
}

}  // namespace

int64_t movement_ns(const Machine& machine, const std::string& kind, const std::vector<int>& ranks, int64_t bytes) {
  if (ranks.size() < 2) return 0;
  const int hosts = machine.num_hosts(ranks);
  const Measured measured = nearest(machine, kind, static_cast<int>(ranks.size()), hosts);
  if (measured.table) {
    if (kind != "all_reduce") return interpolate(*measured.table, bytes);
    // A ring of n sends 2 (n-1)/n of the tensor: as long as a tensor that much smaller or larger takes the ranks of the table.
    const auto share = [](size_t n) { return static_cast<double>(n - 1) / static_cast<double>(n); };
    return interpolate(*measured.table, static_cast<int64_t>(static_cast<double>(bytes) * share(ranks.size()) / share(measured.ranks)));
  }
  const Link& link = hosts > 1 ? machine.inter : machine.intra;
  const auto n = static_cast<double>(ranks.size());
  const double moved = kind == "all_reduce" ? 2.0 * (n - 1) / n * static_cast<double>(bytes) : static_cast<double>(bytes);
  const double latency = link.latency_ns * (kind == "all_reduce" ? 2 * (n - 1) : 1);
  return static_cast<int64_t>(latency + moved / link.bytes_per_s * 1e9);
}

}  // namespace soap
