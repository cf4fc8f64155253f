// What moves among the ranks of a grid's stage, by the size of the groups that do alike at once. All hosts are taken to have as many of the stage's devices as
// the first one's.
#pragma once

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "search/group_cost.h"

namespace soap {

class GridLinks {
 public:
  // The machine outlives it.
  GridLinks(const Machine& machine, const ManualOptions& options, int stage);

  // Within each tensor parallel group, all of them at once.
  int64_t within_groups(const GroupMove& move) const;
  // The same, of what an operator waits for; `merged`: what joins travels together. Without feeds where `fed` is false.
  int64_t fills(const std::vector<GroupMove>& moves, bool merged, bool fed) const;
  int64_t gradients(const std::vector<GroupMove>& moves) const;

  // An exchange in which all ranks of the stage take part, or of this one and another.
  int64_t exchange(const ExchangeLoad& load) const { return exchange_ns(machine_, std::max(dp_ * tp_, 2), hosts_, load); }
  int64_t exchange(const ExchangeLoad& load, int other) const;
  // Every one of `group` neighbouring replicas sends its part of `bytes` to the others.
  ExchangeLoad gather(int64_t bytes, int group) const;
  // Every replica sends to every other the part that it stores; `alike`: every rank of the stage to every other.
  ExchangeLoad scatter(int64_t bytes, int group, bool alike) const;
  // A parameter of this stage, stored in parts by `group` replicas, to all ranks of the other; and its gradient from them.
  ExchangeLoad share(int64_t bytes, int group, bool alike, int other) const;
  ExchangeLoad share_gradient(int64_t bytes, int group, bool alike, int other) const;
  // The sum over all replicas, each with `bytes`; `alike`: over all ranks of the stage; `both`: beside one of the other kind.
  int64_t all_reduce(int64_t bytes, bool alike, bool both = false);
  // Where samples meet (GroupMeeting): each replica has the sums of so many micro-batches, of `bytes` each.
  int64_t meet(int64_t bytes, int micro_batches);

 private:
  // Of `ranks` each sending `bytes` to each other one, `here` of them on a host that has `all` such ranks.
  static ExchangeLoad to_each(int64_t bytes, int64_t ranks, int64_t here, int64_t all);

  const Machine& machine_;
  int dp_ = 1, tp_ = 1, first_ = 0;
  int hosts_ = 1;          // of the stage
  int all_ = 1;            // devices of the stage on the first one's host
  int replicas_here_ = 1;  // on that host, of those of one rank of a group
  int groups_ = 1;         // groups at once on that host
  std::map<std::tuple<int64_t, bool, bool>, int64_t> reduced_;
};

}  // namespace soap
