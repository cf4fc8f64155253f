// Models of collectives for machines that nobody measured: latency a [ns], bandwidth b [bytes/s], B bytes, n ranks.
//
//   exchange      a + busiest link's bytes / b
//   ring          2 (n-1) a + 2 (n-1)/n B / b                bandwidth-optimal; Patarasuk & Yuan, JPDC 69 (2009)
//   tree          2 ceil(log2 n) a + 2 B / b                 two pipelined binary trees, each with half of the bytes, so that every rank sends as much
//                                                            as it receives: Sanders, Speck & Traeff, Parallel Computing 35 (2009); NCCL has it since 2.4
//   flat          min(ring, tree) over the slower link       the choice by size: Thakur, Rabenseifner & Gropp, IJHPCA 19 (2005)
//   hierarchical  on h hosts with k ranks each:              reduce-scatter within each host, all-reduces of the parts between hosts, all-gather
//                 2 [(k-1) a_intra + (k-1)/k B / b_intra] + flat(h ranks, B / k, b_nic)
//                 uneven hosts: the most ranks of a host within, the fewest between
//   all-reduce    min(flat, hierarchical)
//   gather        (h-1) a_nic + (n-h) a_intra + max((n-1)/n B / b_intra, (h-1)/h B / (k b_nic))         B: of the whole tensor
//                 an all-gather, or a reduce-scatter: k rings over all ranks, in the order of hosts, each entering and leaving a host once by a
//                 NIC of its own, so that what a host lacks enters it once. NCCL's rings; an exchange sends it to each rank of the host
//
// A link that serves several devices of a host (Link::per_host = m) gives each of s that send at once min(1, m / s) of its rate.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "machine/machine.h"

namespace soap {

// What an exchange puts on the busiest device and the busiest host, one way: within hosts and between them. `copied`: half of what the busiest device sends and
// receives within its host, where it copies both by itself. Of exchanges of which all load the same device most, at the same time, it is the sum.
struct ExchangeLoad {
  int64_t within = 0, within_host = 0, between = 0, between_host = 0, copied = 0;
  ExchangeLoad& operator+=(const ExchangeLoad& other);
  bool empty() const { return within == 0 && between == 0; }
  bool operator==(const ExchangeLoad&) const = default;
};

// What an exchange puts on the links of a machine: bytes by device and by host, within and between hosts, both directions.
class Traffic {
 public:
  explicit Traffic(const Machine& machine);  // the machine must outlive it
  explicit Traffic(Machine&&) = delete;
  void clear();  // nothing moves; its memory stays
  void add(int from, int to, int64_t bytes);
  // All of another exchange of this machine, at the same time.
  void add(const Traffic& other);
  bool empty() const { return !any_; }
  // To and from other hosts, in bytes, and whether anything else moves.
  int64_t sent(int device) const { return between_.out[device]; }
  int64_t received(int device) const { return between_.in[device]; }
  bool within_hosts() const { return within_.any(); }
  // Of so many of this exchange at once on each host, by devices of their own.
  ExchangeLoad load(int at_once) const;
  // Latency of the slowest link used and the time of the busiest one.
  int64_t exchange_ns() const;

 private:
  struct Load {
    std::vector<int64_t> out, in;            // per device
    std::vector<int64_t> host_out, host_in;  // per host
    double ns(const Link& link) const;       // 0 where nothing moves
    bool any() const {
      return std::any_of(out.begin(), out.end(), [](int64_t bytes) { return bytes > 0; });
    }
  };
  const Machine& machine_;
  Load within_, between_;
  bool any_ = false;
};

// The time of an exchange: from measured tables if there are any for these ranks, else Traffic's. A table within hosts has it by `copied`; one over hosts, of
// an exchange in which all ranks send each other as much, by what that puts on a host's network: what moves within the hosts goes on meanwhile.
int64_t exchange_ns(const Machine& machine, const std::vector<int>& ranks, const Traffic& traffic);
// The same where the participants aren't named; and by the links alone.
int64_t exchange_ns(const Machine& machine, int num_ranks, int num_hosts, const ExchangeLoad& load);
int64_t exchange_ns(const Machine& machine, const ExchangeLoad& load);

// An exchange in which who sends doesn't wait for who receives, as far as what is sent lies in the kernel's buffers until it has left.
struct OneWay {
  struct Times {
    bool senders_meet = false, receivers_meet = false;  // some share a host: they wait for each other
    int64_t send_ns = 0, receive_ns = 0;                // that it keeps a device busy at either end
    // What the buffers of both ends hold, and the receiver's, take to arrive: with no more than `buffer_ns` left a sender goes on; of what takes longer, all
    // but `ahead_ns` waits for the receivers.
    int64_t buffer_ns = 0, ahead_ns = 0;
  };
  std::vector<int> senders, receivers;
  Times times;
};

// Of an exchange between hosts, all ranks of each of which only send or only receive; otherwise, and where what moves is packed (Machine::packs: another
// transport), nothing: all wait for each other.
std::optional<OneWay> one_way(const Machine& machine, const std::vector<int>& ranks, const Traffic& traffic);

double ring_ns(double latency_ns, double bytes_per_s, int ranks, double bytes);
double tree_ns(double latency_ns, double bytes_per_s, int ranks, double bytes);

// The flat and the hierarchical all-reduce of `bytes` over `ranks`, and the faster of them. `at_once`: see movement_ns.
double flat_all_reduce_ns(const Machine& machine, const std::vector<int>& ranks, double bytes, int at_once = 1);
double hierarchical_all_reduce_ns(const Machine& machine, const std::vector<int>& ranks, double bytes, int at_once = 1);
double all_reduce_ns(const Machine& machine, const std::vector<int>& ranks, double bytes, int at_once = 1);

// An all-gather or a reduce-scatter of a tensor of `bytes` by rings.
double gather_ns(const Machine& machine, const std::vector<int>& ranks, double bytes, int at_once = 1);

// How many of these groups of ranks leave one host, at the host where they are most: they share its NICs.
int groups_at_once(const Machine& machine, const std::vector<std::vector<int>>& groups);

}  // namespace soap
