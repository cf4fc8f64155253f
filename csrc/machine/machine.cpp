#include "machine/machine.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "base/error.h"
#include "fmt/ranges.h"
#include "machine/collectives.h"

namespace soap {

int Machine::num_hosts(const std::vector<int>& ranks) const {
  if (std::all_of(ranks.begin(), ranks.end(), [&](int r) { return host_of.at(r) == host_of.at(ranks[0]); })) return ranks.empty() ? 0 : 1;
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

double Machine::flops_of(std::string_view family, const std::string& dtype) const {
  const bool short_products = dtype == "float32" && (tf32 || family == "convolution" || family == "recurrent");
  auto it = short_products ? flops_by_dtype.find("tf32") : flops_by_dtype.end();
  if (it == flops_by_dtype.end()) it = flops_by_dtype.find(dtype);
  return it == flops_by_dtype.end() ? flops_per_s : it->second;
}

double Machine::efficiency_of(std::string_view family) const {
  const auto it = efficiency.find(std::string(family));
  return it == efficiency.end() ? 1.0 : it->second;
}

namespace {

// Bytes of a connection that the kernels of both hosts take at once, or nearly, and what of these the receiver's.
constexpr int64_t kBuffered = 1 << 20, kAhead = 512 << 10;

// "<family>/<type>" or "<family>/<type>/<width>"; `width` 0 where there is none, below 0 where the key is neither.
struct CurveKey {
  std::string_view family, dtype;
  double width = -1;
};
CurveKey curve_key(std::string_view key) {
  const size_t first = key.find('/'), second = first == std::string_view::npos ? first : key.find('/', first + 1);
  CurveKey out{key.substr(0, first)};
  if (first == std::string_view::npos) return out;
  out.dtype = key.substr(first + 1, second == std::string_view::npos ? second : second - first - 1);
  if (second == std::string_view::npos) {
    out.width = 0;
  } else {
    const std::string text(key.substr(second + 1));
    char* end = nullptr;
    const double width = std::strtod(text.c_str(), &end);
    out.width = end != text.c_str() && *end == '\0' && width > 0 ? width : -1;
  }
  return out;
}

}  // namespace

std::array<double, 2> Machine::parts_of(std::string_view family, std::string_view dtype, double size, double width) const {
  const EfficiencyCurve* curve = nullptr;
  double distance = 0;
  for (const auto& [key, points] : curves) {
    const CurveKey k = curve_key(key);
    if (size <= 0 || k.family != family || k.dtype != dtype || points.empty()) continue;
    const double away = k.width > 0 && width > 0 ? std::abs(std::log(k.width / width)) : 0.0;
    if (curve == nullptr || away < distance) {
      curve = &points;
      distance = away;
    }
  }
  if (curve == nullptr) {
    const double part = efficiency_of(family);
    return {part, part};
  }
  const auto above = std::find_if(curve->begin(), curve->end(), [&](const auto& point) { return point[0] >= size; });
  if (above == curve->begin() || above == curve->end()) {
    const auto& end = above == curve->end() ? curve->back() : curve->front();
    return {end[1], end[2]};
  }
  const auto& [low, high] = std::pair(*(above - 1), *above);
  const double x = std::log(size / low[0]) / std::log(high[0] / low[0]);
  return {low[1] + x * (high[1] - low[1]), low[2] + x * (high[2] - low[2])};
}

void check(const Machine& m) {
  const auto positive = [](std::string_view field, double value) {
    if (!(value > 0) || !std::isfinite(value)) user_error("[machine] {} is {}, it must be a positive number", field, value);
  };
  const auto not_negative = [](std::string_view field, double value) {
    if (!(value >= 0) || !std::isfinite(value)) user_error("[machine] {} is {}, it must be a number from 0 up", field, value);
  };
  if (m.host_of.empty()) user_error("[machine] host_of is empty: it holds the host of each device");
  const auto counted = [&](std::string_view field, const std::vector<int>& of_device) {
    for (size_t d = 0; d < of_device.size(); ++d) {
      if (of_device[d] >= 0 && of_device[d] < m.num_devices()) continue;
      user_error("[machine] {}[{}] is {}, hosts are counted from 0 and there are no more than devices ({})", field, d, of_device[d], m.num_devices());
    }
  };
  counted("host_of", m.host_of);
  counted("cores_of", m.cores_of);
  if (!m.cores_of.empty() && m.cores_of.size() != m.host_of.size()) {
    user_error("[machine] cores_of has {} entries for {} devices; it is empty or has one for each", m.cores_of.size(), m.num_devices());
  }
  if (!m.speed.empty() && m.speed.size() != m.host_of.size()) {
    user_error("[machine] speed has {} entries for {} devices; it is empty or has one for each", m.speed.size(), m.num_devices());
  }
  for (size_t d = 0; d < m.speed.size(); ++d) positive(fmt::format("speed[{}]", d), m.speed[d]);
  positive("flops_per_s", m.flops_per_s);
  for (const auto& [dtype, rate] : m.flops_by_dtype) positive("flops_by_dtype[" + dtype + "]", rate);
  positive("memory_bytes_per_s", m.memory_bytes_per_s);
  not_negative("op_overhead_ns", m.op_overhead_ns);
  if (m.memory_bytes <= 0) user_error("[machine] memory_bytes is {}, it must be positive", m.memory_bytes);
  for (const auto& [family, part] : m.efficiency) {
    if (std::find(kOpFamilies.begin(), kOpFamilies.end(), family) == kOpFamilies.end()) {
      user_error("[machine] efficiency has \"{}\", the families are {}", family, fmt::join(kOpFamilies, ", "));
    }
    positive("efficiency[" + family + "]", part);
  }
  for (const auto& [key, times] : m.launch) {
    for (const double ns : times) not_negative("launch[" + key + "]", ns);
  }
  if (!m.launch.empty() && !m.busy_speed.empty()) {
    user_error("[machine] busy_speed has {} entries and launch {}: a device either computes on its host's cores or is told by it what to do",
               m.busy_speed.size(), m.launch.size());
  }
  for (const auto& [key, points] : m.curves) {
    const CurveKey k = curve_key(key);
    if (k.width < 0 || k.dtype.empty() || std::find(kOpFamilies.begin(), kOpFamilies.end(), k.family) == kOpFamilies.end()) {
      user_error("[machine] curves has \"{}\", a key is <family>/<type> or <family>/<type>/<width>, such as attention/bfloat16/64", key);
    }
    for (size_t i = 0; i < points.size(); ++i) {
      for (const double value : points[i]) positive(fmt::format("curves[{}]", key), value);
      if (i > 0 && points[i][0] <= points[i - 1][0]) user_error("[machine] curves[{}] must rise in size: {} follows {}", key, points[i][0], points[i - 1][0]);
    }
  }
  for (const auto& [field, link] : {std::pair{"intra", &m.intra}, std::pair{"inter", &m.inter}}) {
    positive(fmt::format("{}.bytes_per_s", field), link->bytes_per_s);
    not_negative(fmt::format("{}.latency_ns", field), link->latency_ns);
    if (link->per_host < 0) user_error("[machine] {}.per_host is {}, it must be 0 (one for each device) or their number", field, link->per_host);
  }
  not_negative("step_overhead_ns", m.step_overhead_ns);
  not_negative("segment_overhead_ns", m.segment_overhead_ns);
  not_negative("jitter", m.jitter);
  not_negative("cold_ns", m.cold_ns);
  not_negative("turn_ns", m.turn_ns);
  not_negative("piece_ns", m.piece_ns);
  not_negative("send_ns_per_byte", m.send_ns_per_byte);
  not_negative("receive_ns_per_byte", m.receive_ns_per_byte);
  for (size_t k = 0; k < m.busy_speed.size(); ++k) positive(fmt::format("busy_speed[{}]", k), m.busy_speed[k]);
  for (size_t k = 0; k < m.update_speed.size(); ++k) positive(fmt::format("update_speed[{}]", k), m.update_speed[k]);
  if (m.overlap && !m.busy_speed.empty()) user_error("[machine] overlap and busy_speed don't go together: devices that share a host's cores don't overlap");
  const auto rising = [](std::string_view field, const SizeTable& table) {
    for (size_t i = 1; i < table.size(); ++i) {
      if (table[i].first <= table[i - 1].first) user_error("[machine] {} must rise in bytes: {} follows {}", field, table[i].first, table[i - 1].first);
    }
  };
  if (m.update.size() == 1) user_error("[machine] update has one point; it is empty or has two or more");
  rising("update", m.update);
  for (const auto& [key, table] : m.tables) {
    int ranks = 0, hosts = 0, read = 0;
    const size_t slash = key.find('/');
    const std::string kind = key.substr(0, slash);
    const bool numbers = slash != std::string::npos && std::sscanf(key.c_str() + slash, "/%d/%d%n", &ranks, &hosts, &read) == 2 && !key[slash + read];
    if (!numbers || (kind != "exchange" && kind != "all_reduce") || ranks < 2 || hosts < 1) {
      user_error("[machine] tables has \"{}\", a key is exchange or all_reduce/<ranks>/<hosts>, such as all_reduce/4/2", key);
    }
    rising("tables[" + key + "]", table);
  }
}

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

namespace {

// The measured table whose ranks are most like these: within a host, or over hosts, as they are; then of the nearest number of ranks.
struct Measured {
  const SizeTable* table = nullptr;
  int ranks = 0, hosts = 0;
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
      best = {&table, n, h};
      distance = away;
    }
  }
  return best;
}

// How many groups of a table's ranks shared each host's network when it was measured: all that there is room for.
int groups_measured(const Machine& machine, const Measured& measured) {
  if (measured.hosts < 2 || measured.ranks > measured.hosts) return 1;
  std::map<int, int> ranks;
  for (int host : machine.host_of) ++ranks[host];
  int fewest = machine.num_devices();
  for (const auto& [host, count] : ranks) fewest = std::min(fewest, count);
  return fewest;
}

}  // namespace

int64_t movement_ns(const Machine& machine, const std::string& kind, const std::vector<int>& ranks, int64_t bytes, int at_once) {
  if (ranks.size() < 2) return 0;
  const int hosts = machine.num_hosts(ranks);
  const Measured measured = nearest(machine, kind, static_cast<int>(ranks.size()), hosts);
  if (measured.table) {
    if (kind != "all_reduce") return interpolate(*measured.table, bytes);
    // A ring of n sends 2 (n-1)/n of the tensor: as long as a tensor that much smaller or larger takes the ranks of the table.
    const auto share = [](size_t n) { return static_cast<double>(n - 1) / static_cast<double>(n); };
    const double together = hosts > 1 ? static_cast<double>(at_once) / groups_measured(machine, measured) : 1;  // that share a host's network
    return interpolate(*measured.table, static_cast<int64_t>(static_cast<double>(bytes) * together * share(ranks.size()) / share(measured.ranks)));
  }
  if (kind == "all_reduce") return static_cast<int64_t>(all_reduce_ns(machine, ranks, static_cast<double>(bytes), at_once));
  // Spread evenly: every rank sends and receives as much, so the busiest link is that of the host with most to move.
  const auto n = static_cast<double>(ranks.size());
  std::map<int, int> local;
  for (int r : ranks) ++local[machine.host_of[r]];
  double ns = 0;
  const auto load = [&](const Link& link, double device_bytes, int count) {
    if (device_bytes <= 0 && bytes > 0) return;
    const double busiest = std::max(device_bytes, link.per_host == 0 ? 0.0 : device_bytes * count * at_once / link.per_host);
    ns = std::max(ns, link.latency_ns + busiest / link.bytes_per_s * 1e9);
  };
  for (const auto& [host, count] : local) {
    if (count > 1) load(machine.intra, static_cast<double>(bytes) * (count - 1) / (n - 1), count);
    if (local.size() > 1) load(machine.inter, static_cast<double>(bytes) * (n - count) / (n - 1), count);
  }
  return static_cast<int64_t>(ns);
}

int64_t exchange_ns(const Machine& machine, const std::vector<int>& ranks, const Traffic& traffic) {
  return exchange_ns(machine, static_cast<int>(ranks.size()), machine.num_hosts(ranks), traffic.load(1));
}

std::optional<OneWay> one_way(const Machine& machine, const std::vector<int>& ranks, const Traffic& traffic) {
  if (machine.packs || traffic.within_hosts()) return std::nullopt;
  std::map<int, std::array<int64_t, 2>> hosts;  // the most bytes that one of its ranks sends and receives
  for (int r : ranks) {
    auto& [sent, received] = hosts[machine.host_of[r]];
    sent = std::max(sent, traffic.sent(r));
    received = std::max(received, traffic.received(r));
  }
  OneWay out;
  size_t sending = 0;
  int64_t most = 0;
  for (const auto& [host, bytes] : hosts) {
    if ((bytes[0] > 0) == (bytes[1] > 0)) return std::nullopt;
    sending += bytes[0] > 0;
    most = std::max({most, bytes[0], bytes[1]});
  }
  for (int r : ranks) (hosts[machine.host_of[r]][0] > 0 ? out.senders : out.receivers).push_back(r);
  out.times.senders_meet = out.senders.size() > sending;
  out.times.receivers_meet = out.receivers.size() > hosts.size() - sending;
  const int64_t alone_ns = movement_ns(machine, "exchange", ranks, 1);
  out.times.send_ns = alone_ns + static_cast<int64_t>(machine.send_ns_per_byte * static_cast<double>(most));
  out.times.receive_ns = alone_ns + static_cast<int64_t>(machine.receive_ns_per_byte * static_cast<double>(most));
  const auto all_ns = [&](int64_t of_each) {  // of a connection
    const auto at_once = static_cast<int64_t>((out.senders.size() + sending - 1) / sending);
    return exchange_ns(machine, static_cast<int>(ranks.size()), static_cast<int>(hosts.size()), {.between = of_each, .between_host = of_each * at_once});
  };
  out.times.buffer_ns = all_ns(kBuffered);
  out.times.ahead_ns = all_ns(kAhead);
  return out;
}

int64_t exchange_ns(const Machine& machine, int num_ranks, int num_hosts, const ExchangeLoad& load) {
  if (num_ranks < 2 || load.empty()) return 0;
  int64_t out = 0;
  if (load.between > 0) {
    const Measured over = nearest(machine, "exchange", num_ranks, std::max(num_hosts, 2));
    if (!over.table) return exchange_ns(machine, load);
    const double n = over.ranks, each = n / over.hosts;  // ranks of a host, which send so many parts of what they send to others:
    const double leaves = each * (n - each) / (n - 1) * groups_measured(machine, over);
    out = interpolate(*over.table, static_cast<int64_t>(static_cast<double>(load.between_host) / leaves));
  }
  if (load.within > 0) {
    const Measured within = nearest(machine, "exchange", std::max(num_ranks / std::max(num_hosts, 1), 2), 1);
    if (!within.table) return std::max(out, exchange_ns(machine, {.within = load.within, .within_host = load.within_host}));
    out = std::max(out, interpolate(*within.table, load.copied));
  }
  return out;
}

}  // namespace soap
