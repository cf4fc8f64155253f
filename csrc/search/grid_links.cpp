#include "search/grid_links.h"

#include <algorithm>

namespace soap {

GridLinks::GridLinks(const Machine& machine, const ManualOptions& o, int stage) : machine_(machine), dp_(o.dp), tp_(o.tp), first_(stage * o.dp * o.tp) {
  const int host = machine.host_of[first_];
  int before = -1, group_here = 0;
  all_ = hosts_ = replicas_here_ = 0;
  for (int d = first_; d < first_ + dp_ * tp_; ++d) {
    if (machine.host_of[d] != before) ++hosts_;
    before = machine.host_of[d];
    if (before != host) continue;
    ++all_;
    if (d < first_ + tp_) ++group_here;
    if ((d - first_) % tp_ == 0) ++replicas_here_;
  }
  groups_ = std::max(all_ / group_here, 1);
}

int64_t GridLinks::within_groups(const GroupMove& move) const {
  if (!move.exchange) return move.price_ns;
  ExchangeLoad all = move.load;
  all.within_host *= groups_;
  all.between_host *= groups_;
  return exchange(all);
}

int64_t GridLinks::fills(const std::vector<GroupMove>& moves, bool merged, bool fed) const {
  int64_t out = 0;
  GroupMove together;
  for (const GroupMove& m : moves) {
    if (m.fed && !fed) continue;
    if (merged && m.joins && m.exchange && together.exchange) {
      together.load += m.load;
      continue;
    }
    out += within_groups(together);
    together = m;
  }
  return out + within_groups(together);
}

int64_t GridLinks::gradients(const std::vector<GroupMove>& moves) const {
  int64_t out = 0;
  for (const GroupMove& m : moves) out += within_groups(m);
  return out;
}

ExchangeLoad GridLinks::to_each(int64_t bytes, int64_t ranks, int64_t here, int64_t all) {
  ExchangeLoad out{.within = bytes * (here - 1), .between = bytes * (ranks - here)};
  out.within_host = out.within * all;
  out.between_host = out.between * all;
  out.copied = out.within;
  return out;
}

ExchangeLoad GridLinks::gather(int64_t bytes, int group) const {
  return to_each(bytes / group, group, std::min(group, replicas_here_), all_);
}

ExchangeLoad GridLinks::scatter(int64_t bytes, int group, bool alike) const {
  return alike ? to_each(bytes / group, int64_t{dp_} * tp_, all_, all_) : to_each(bytes / group, dp_, replicas_here_, all_);
}

int64_t GridLinks::exchange(const ExchangeLoad& load, int other) const {
  if (load.empty()) return 0;
  const int size = dp_ * tp_;
  std::vector<int> devices;
  for (int first : {first_, other * size}) {
    for (int d = 0; d < size; ++d) devices.push_back(first + d);
  }
  return exchange_ns(machine_, 2 * size, machine_.num_hosts(devices), load);
}

// Each part comes from the first that stores it.
ExchangeLoad GridLinks::share(int64_t bytes, int group, bool alike, int other) const {
  Traffic traffic(machine_);
  for (int d = 0; d < dp_ * tp_; ++d) {
    for (int part = 0; part < group; ++part) traffic.add(first_ + part * tp_ + (alike ? 0 : d % tp_), other * dp_ * tp_ + d, bytes / group);
  }
  return traffic.load(1);
}

// Each replica of the other stage (`alike`: each rank) to each of this one.
ExchangeLoad GridLinks::share_gradient(int64_t bytes, int group, bool alike, int other) const {
  std::map<int, int64_t> receiving, sending, ranks;  // by host: those that one rank sends to or has from, and all
  const int size = dp_ * tp_, step = alike ? 1 : tp_;
  for (int d = 0; d < size; ++d) {
    ++ranks[machine_.host_of[other * size + d]];
    if (d % step != 0) continue;
    ++sending[machine_.host_of[other * size + d]];
    ++receiving[machine_.host_of[first_ + d]];
  }
  const int64_t part = bytes / group, peers = size / step;
  ExchangeLoad out;
  for (const auto& [host, count] : sending) {
    const int64_t near = receiving.contains(host) ? receiving[host] : 0, far = peers - near;
    out.within = std::max(out.within, part * near);
    out.between = std::max(out.between, part * far);
    out.within_host = std::max(out.within_host, part * near * ranks[host]);
    out.between_host = std::max(out.between_host, part * far * ranks[host]);
  }
  out.copied = (out.within + 1) / 2;
  return out;
}

int64_t GridLinks::all_reduce(int64_t bytes, bool alike, bool both) {
  const int ranks = alike ? dp_ * tp_ : dp_, stride = alike ? 1 : tp_;
  if (ranks < 2 || bytes == 0) return 0;
  const auto [it, fresh] = reduced_.emplace(std::tuple(bytes, alike, both), 0);
  if (fresh) {
    std::vector<int> list;
    for (int r = 0; r < ranks; ++r) list.push_back(first_ + r * stride);
    // Those of either kind that leave the first one's host.
    const int replicas = replicas_here_ < dp_ ? std::max(all_ / replicas_here_, 1) : 0, all = all_ < dp_ * tp_ ? 1 : 0;
    const int at_once = (alike ? all : replicas) + (both ? (alike ? replicas : all) : 0);
    it->second = movement_ns(machine_, "all_reduce", list, bytes, std::max(at_once, 1));
  }
  return it->second;
}

int64_t GridLinks::meet(int64_t bytes, int micro_batches) {
  if (dp_ == 1) return 0;
  return micro_batches == 1 ? all_reduce(bytes, false) : exchange(scatter(bytes * micro_batches, 1, false));
}

}  // namespace soap
