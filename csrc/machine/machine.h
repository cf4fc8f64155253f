// Machine: devices, hosts, links, and what was measured on them. One process drives one device; rank i is device i.
//
// A machine that runs the job carries measured tables. One that isn't there is a model of its published rates, and nothing else: what a field
// means is said beside it, where presets take theirs from in machine/presets.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace soap {

// One direction of a full-duplex link. `per_host` of them serve the devices of a host, each device at most one at a time; 0: every device has its own.
// NVLink through a switch and one NIC for each device have 0, a PCIe root or one NIC for the whole host 1.
struct Link {
  double latency_ns = 20e3;
  double bytes_per_s = 1e9;
  int per_host = 0;
  bool operator==(const Link&) const = default;
};

// Measured (bytes, ns) points of one kind of movement, rising in bytes.
using SizeTable = std::vector<std::pair<int64_t, int64_t>>;

// What part of the rates operators reach by their size (csrc/cost/work.h says of what): (size, forward, backward), rising in size. Backward counts as twice
// the work of forward.
using EfficiencyCurve = std::vector<std::array<double, 3>>;

// Families of operators that reach about the same part of a device's rates (csrc/cost/work.h says which operator belongs where).
inline constexpr std::array<std::string_view, 8> kOpFamilies{"convolution", "matmul",    "attention", "normalization",
                                                             "pointwise",   "embedding", "recurrent", "other"};

struct Machine {
  std::string name = "host";
  std::vector<int> host_of;  // per device
  // Per device: those with the same number share what computes (cores, memory), be it as several hosts, such as containers of one machine. Empty: host_of.
  std::vector<int> cores_of;
  std::vector<double> speed;                     // per device, relative to the rates below: 0.5 takes twice as long; empty: all 1
  double flops_per_s = 50e9;                     // of a contraction, per device, all devices busy; for types that flops_by_dtype lacks
  std::map<std::string, double> flops_by_dtype;  // by torch's name of the type ("bfloat16"), and "tf32"
  bool tf32 = false;                             // float32 matrix products at the tf32 rate too; convolutions and RNNs always are, as in torch
  double memory_bytes_per_s = 8e9;               // that elementwise work reaches, per device, all devices busy
  double op_overhead_ns = 15e3;                  // of one operator on the device: the call, or where the host launches (`launch`) its kernel's begin and end
  std::map<std::string, double> efficiency;      // by family: the part of these rates that it reaches; absent: 1
  // By "<family>/<type>" or, where the part depends on that too, "<family>/<type>/<width>"; goes before `efficiency`.
  std::map<std::string, EfficiencyCurve> curves;
  // What a device's host, which waits for nothing, takes to queue work, (forward, backward) in ns: of an operator by name, or "view", or by family; "update":
  // of the optimizer's step, and of each parameter; "collective": of a movement, either way the first. Absent: nothing. Zeros: it comes within another
  // operator's call, and has no op_overhead_ns. Empty: a device and its host are one (CPUs).
  std::map<std::string, std::array<double, 2>> launch;
  int64_t memory_bytes = 8LL << 30;  // per device
  bool overlap = false;              // communication runs beside compute
  double step_overhead_ns = 0;       // once in a step: ranks agree, the loop around the model
  double segment_overhead_ns = 0;    // of the call that computes all operators between two movements; with busy_speed
  // How fast a device computes while k of the devices that share its cores do, in times of the rates here, by k - 1; beyond the last as the last. Empty:
  // always 1.
  std::vector<double> busy_speed;
  std::vector<double> update_speed;  // the same of the optimizer's update, which takes the memory more than anything else; empty: as busy_speed
  double jitter = 0;                 // standard deviation of what a computation takes, in parts of it: ranks that meet wait for the slowest; with busy_speed
  double cold_ns = 0;  // of a movement after a millisecond or more of computation, which has taken the cache; after less in proportion; with busy_speed
  // Of a movement of devices all of which have computed for a millisecond or more, where more want a core than there are; after less by its root, the mean
  // over them; with busy_speed.
  double turn_ns = 0;
  double piece_ns = 0;  // of a piece of a movement's tensor that is packed, put in its place or added, beside its bytes; with busy_speed
  // That a device loses which computes while what it sent to another host is on its way, or what comes from there; with busy_speed.
  double send_ns_per_byte = 0, receive_ns_per_byte = 0;
  // Whether what moves is packed before it is sent, and held as it came until it is put together. Ranks that share memory move it from where it lies to where
  // it stays; only what is summed from some of them is held.
  bool packs = true;
  SizeTable update;                             // measured (bytes, ns) of the optimizer's update of one parameter; empty: by memory_bytes_per_s
  Link intra{20e3, 2e9}, inter{100e3, 1e9, 1};  // within a host, between hosts
  // By "<kind>/<ranks>/<hosts>", kind exchange (bytes that each rank sends, as much to each other one, and receives) or all_reduce (bytes of the tensor); all
  // groups that there is room for at once.
  std::map<std::string, SizeTable> tables;

  int num_devices() const { return static_cast<int>(host_of.size()); }
  const std::vector<int>& sharing() const { return cores_of.empty() ? host_of : cores_of; }
  int num_hosts(const std::vector<int>& ranks) const;
  // Time on a device of what takes `ns` at speed 1.
  int64_t at_speed(int device, int64_t ns) const { return speed.empty() ? ns : static_cast<int64_t>(static_cast<double>(ns) / speed[device]); }
  // Of a contraction of this family and type, at full efficiency.
  double flops_of(std::string_view family, const std::string& dtype) const;
  double efficiency_of(std::string_view family) const;
  // Of forward and backward, by the curve of this family, type and the nearest width: linear in the logarithm of the size between its points, level beyond
  // them. Where there is none, or the size is 0 (it has none), both efficiency_of(family).
  std::array<double, 2> parts_of(std::string_view family, std::string_view dtype, double size, double width) const;
  int64_t launch_ns(const std::string& key, bool backward = false) const {
    const auto it = launch.find(key);
    return it == launch.end() ? 0 : static_cast<int64_t>(it->second[backward ? 1 : 0]);
  }
  double busy_speed_of(int num_busy, bool updates = false) const {
    const std::vector<double>& speeds = updates && !update_speed.empty() ? update_speed : busy_speed;
    return speeds.empty() || num_busy < 1 ? 1.0 : speeds[std::min(static_cast<size_t>(num_busy), speeds.size()) - 1];
  }
  bool operator==(const Machine&) const = default;
};

// Devices spread evenly over hosts.
Machine make_machine(int num_devices, int num_hosts);

// Throws std::invalid_argument that names the field, its value and what would be legal.
void check(const Machine& machine);

// Time of one movement among `ranks`: from the measured table of as many ranks within a host, or over hosts (log-linear between points, by
// bandwidth beyond), or of the nearest number of them: an exchange takes as long, an all-reduce by what a ring sends. Without a table, the
// models of machine/collectives.h; an exchange then sends `bytes` from each rank, spread evenly over the others.
// `at_once`: how many such groups move at the same time at each host, sharing its links: of all-reduces those that leave it, of an exchange all that
// take part in it.
int64_t movement_ns(const Machine& machine, const std::string& kind, const std::vector<int>& ranks, int64_t bytes, int at_once = 1);
// By a measured table: log-linear between points, by bandwidth beyond the last.
int64_t interpolate(const SizeTable& table, int64_t bytes);

}  // namespace soap
