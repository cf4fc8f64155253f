// Machine: devices, hosts, links, and what was measured on them. One process drives one device; rank i is device i.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace soap {

struct Link {
  double latency_ns = 20e3;
  double bytes_per_s = 1e9;
};

// Measured (bytes, ns) points of one kind of movement, rising in bytes.
using SizeTable = std::vector<std::pair<int64_t, int64_t>>;

struct Machine {
  std::string name = "host";
  std::vector<int> host_of;          // per device
  double flops_per_s = 50e9;         // that a contraction reaches, per device, all devices busy
  double memory_bytes_per_s = 8e9;   // that elementwise work reaches, per device, all devices busy
  double op_overhead_ns = 15e3;      // of one operator
  int64_t memory_bytes = 8LL << 30;  // per device
  bool overlap = false;              // communication runs beside compute
  Link intra{20e3, 2e9}, inter{100e3, 1e9};
  // By "<kind>/<ranks>/<hosts>", kind exchange (bytes that one rank sends) or all_reduce (bytes of the tensor).
  std::map<std::string, SizeTable> tables;

  int num_devices() const { return static_cast<int>(host_of.size()); }
  int num_hosts(const std::vector<int>& ranks) const;
};

// Devices spread evenly over hosts.
Machine make_machine(int num_devices, int num_hosts);

// Time of one movement among `ranks`: from the measured table of as many ranks within a host, or over hosts (log-linear between points, by
// bandwidth beyond), or of the nearest number of them: an exchange takes as long, an all-reduce by what a ring sends. Without a table:
// latency and bandwidth of the slowest link: an exchange sends `bytes` per rank; an all-reduce moves 2 (n-1)/n of them (ring;
// Patarasuk & Yuan 2009).
int64_t movement_ns(const Machine& machine, const std::string& kind, const std::vector<int>& ranks, int64_t bytes);

}  // namespace soap
