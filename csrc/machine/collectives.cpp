#include "machine/collectives.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

namespace soap {
namespace {

// Ranks of a group on each host.
std::map<int, int> per_host(const Machine& machine, const std::vector<int>& ranks) {
  std::map<int, int> out;
  for (int r : ranks) ++out[machine.host_of.at(r)];
  return out;
}

// The rate of each of `senders` devices of a host that use this link at once.
double rate(const Link& link, int senders) {
  return link.bytes_per_s * (link.per_host == 0 ? 1.0 : std::min(1.0, static_cast<double>(link.per_host) / static_cast<double>(senders)));
}

int64_t most(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  int64_t out = 0;
  for (size_t i = 0; i < a.size(); ++i) out = std::max({out, a[i], b[i]});
  return out;
}

// Of an exchange, by what the busiest device and host have to move; 0 where nothing moves.
double link_ns(const Link& link, int64_t device, int64_t host) {
  if (device == 0) return 0;
  const double busiest = std::max(static_cast<double>(device), link.per_host == 0 ? 0.0 : static_cast<double>(host) / static_cast<double>(link.per_host));
  return link.latency_ns + busiest / link.bytes_per_s * 1e9;
}

}  // namespace

double ring_ns(double latency_ns, double bytes_per_s, int ranks, double bytes) {
  const double n = ranks;
  return 2 * (n - 1) * latency_ns + 2 * (n - 1) / n * bytes / bytes_per_s * 1e9;
}

double tree_ns(double latency_ns, double bytes_per_s, int ranks, double bytes) {
  return 2 * std::ceil(std::log2(static_cast<double>(ranks))) * latency_ns + 2 * bytes / bytes_per_s * 1e9;
}

double flat_all_reduce_ns(const Machine& machine, const std::vector<int>& ranks, double bytes, int at_once) {
  const auto hosts = per_host(machine, ranks);
  int local = 0;
  for (const auto& [host, count] : hosts) local = std::max(local, count);
  double latency = 0, bandwidth = std::numeric_limits<double>::max();
  if (local > 1) {
    latency = machine.intra.latency_ns;
    bandwidth = rate(machine.intra, local);
  }
  if (hosts.size() > 1) {  // ranks in the order of hosts: one of a host sends to the next
    latency = std::max(latency, machine.inter.latency_ns);
    bandwidth = std::min(bandwidth, rate(machine.inter, at_once));
  }
  const auto n = static_cast<int>(ranks.size());
  return std::min(ring_ns(latency, bandwidth, n, bytes), tree_ns(latency, bandwidth, n, bytes));
}

double hierarchical_all_reduce_ns(const Machine& machine, const std::vector<int>& ranks, double bytes, int at_once) {
  const auto hosts = per_host(machine, ranks);
  int largest = 0, smallest = std::numeric_limits<int>::max();
  for (const auto& [host, count] : hosts) {
    largest = std::max(largest, count);
    smallest = std::min(smallest, count);
  }
  const double within = largest == 1 ? 0 : ring_ns(machine.intra.latency_ns, rate(machine.intra, largest), largest, bytes);
  if (hosts.size() == 1) return within;
  const double nic = rate(machine.inter, smallest * at_once), part = bytes / smallest;
  const auto h = static_cast<int>(hosts.size());
  return within + std::min(ring_ns(machine.inter.latency_ns, nic, h, part), tree_ns(machine.inter.latency_ns, nic, h, part));
}

double all_reduce_ns(const Machine& machine, const std::vector<int>& ranks, double bytes, int at_once) {
  if (ranks.size() < 2) return 0;
  return std::min(flat_all_reduce_ns(machine, ranks, bytes, at_once), hierarchical_all_reduce_ns(machine, ranks, bytes, at_once));
}

double gather_ns(const Machine& machine, const std::vector<int>& ranks, double bytes, int at_once) {
  if (ranks.size() < 2) return 0;
  const auto hosts = per_host(machine, ranks);
  int largest = 0, smallest = std::numeric_limits<int>::max();
  for (const auto& [host, count] : hosts) {
    largest = std::max(largest, count);
    smallest = std::min(smallest, count);
  }
  const auto n = static_cast<double>(ranks.size()), h = static_cast<double>(hosts.size());
  const double within = largest == 1 ? 0 : (n - 1) / n * bytes / rate(machine.intra, largest);
  const double between = (h - 1) / h * bytes / (smallest * rate(machine.inter, smallest * at_once));
  return (h - 1) * machine.inter.latency_ns + (n - h) * machine.intra.latency_ns + std::max(within, between) * 1e9;
}

int groups_at_once(const Machine& machine, const std::vector<std::vector<int>>& groups) {
  std::map<int, int> leaving;
  int out = 1;
  for (const auto& ranks : groups) {
    const auto hosts = per_host(machine, ranks);
    if (hosts.size() < 2) continue;
    for (const auto& [host, count] : hosts) out = std::max(out, ++leaving[host]);
  }
  return out;
}

Traffic::Traffic(const Machine& machine) : machine_(machine) {
  const int hosts = machine.host_of.empty() ? 0 : *std::max_element(machine.host_of.begin(), machine.host_of.end()) + 1;
  for (Load* load : {&within_, &between_}) {
    load->out.resize(machine.host_of.size());
    load->in.resize(machine.host_of.size());
    load->host_out.resize(hosts);
    load->host_in.resize(hosts);
  }
}

void Traffic::clear() {
  if (empty()) return;
  for (Load* load : {&within_, &between_}) {
    for (auto* sums : {&load->out, &load->in, &load->host_out, &load->host_in}) std::fill(sums->begin(), sums->end(), 0);
  }
  any_ = false;
}

void Traffic::add(int from, int to, int64_t bytes) {
  if (from == to || bytes == 0) return;
  const int source = machine_.host_of[from], target = machine_.host_of[to];
  Load& load = source == target ? within_ : between_;
  load.out[from] += bytes;
  load.in[to] += bytes;
  load.host_out[source] += bytes;
  load.host_in[target] += bytes;
  any_ = true;
}

void Traffic::add(const Traffic& other) {
  const auto sum = [](std::vector<int64_t>& to, const std::vector<int64_t>& from) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  };
  for (const auto& [to, from] : {std::pair{&within_, &other.within_}, {&between_, &other.between_}}) {
    sum(to->out, from->out);
    sum(to->in, from->in);
    sum(to->host_out, from->host_out);
    sum(to->host_in, from->host_in);
  }
  any_ = any_ || other.any_;
}

ExchangeLoad Traffic::load(int at_once) const {
  int64_t copied = 0;
  for (size_t d = 0; d < within_.out.size(); ++d) copied = std::max(copied, (within_.out[d] + within_.in[d] + 1) / 2);
  return {.within = most(within_.out, within_.in),
          .within_host = most(within_.host_out, within_.host_in) * at_once,
          .between = most(between_.out, between_.in),
          .between_host = most(between_.host_out, between_.host_in) * at_once,
          .copied = copied};
}

ExchangeLoad& ExchangeLoad::operator+=(const ExchangeLoad& other) {
  within += other.within;
  within_host += other.within_host;
  between += other.between;
  between_host += other.between_host;
  copied += other.copied;
  return *this;
}

double Traffic::Load::ns(const Link& link) const {
  return link_ns(link, most(out, in), most(host_out, host_in));
}

int64_t exchange_ns(const Machine& machine, const ExchangeLoad& load) {
  return static_cast<int64_t>(std::max(link_ns(machine.intra, load.within, load.within_host), link_ns(machine.inter, load.between, load.between_host)));
}

int64_t Traffic::exchange_ns() const {
  return static_cast<int64_t>(std::max(within_.ns(machine_.intra), between_.ns(machine_.inter)));
}

}  // namespace soap
