#include "sim/local_work.h"

#include <algorithm>
#include <map>

namespace soap {
namespace {

constexpr int kLocalCalls = 2;

// Elements of `part` within `whole` follow each other in memory.
bool lies_together(const Box& part, const Box& whole) {
  bool cut = false;
  for (size_t d = 0; d < whole.size(); ++d) {
    if (part[d].size() == whole[d].size()) continue;
    if (cut || !part[d].is_interval()) return false;
    for (size_t before = 0; before < d; ++before) {
      if (part[before].size() > 1) return false;
    }
    cut = true;
  }
  return true;
}

struct Arrivals {
  int pieces = 0;
  int64_t elements = 0;
};

}  // namespace

std::vector<int64_t> local_work_ns(const Machine& machine, const std::vector<Flow>& pieces, Pattern pattern, const Sharding& sources,
                                   const Sharding& destinations, int64_t element_bytes) {
  if (machine.busy_speed.empty() || pattern == Pattern::kAllReduce) return {};
  std::vector<int64_t> elements(machine.num_devices());  // read or written
  std::vector<int> handled(machine.num_devices());       // pieces
  std::map<std::pair<int, int>, Arrivals> arrivals;      // (destination, device)
  for (const Flow& x : pieces) {
    const Box &source = sources.coords[x.src].box, &destination = destinations.coords[x.dst].box;
    if (x.elements < volume(source) && !lies_together(intersect(source, destination), source)) {
      elements[x.from] += 2 * x.elements;
      ++handled[x.from];
    }
    Arrivals& here = arrivals[{x.dst, x.to}];
    ++here.pieces;
    here.elements += x.elements;
  }
  for (const auto& [where, here] : arrivals) {
    const int64_t all = volume(destinations.coords[where.first].box);
    if (here.elements == here.pieces * all) {  // the first stays where it is
      elements[where.second] += 3 * (here.pieces - 1) * all;
      handled[where.second] += here.pieces - 1;
    } else {
      elements[where.second] += here.elements == all ? 2 * all : all + 3 * here.elements;
      handled[where.second] += here.pieces;
    }
  }
  std::vector<int64_t> out(elements.size());
  bool any = false;
  for (size_t d = 0; d < out.size(); ++d) {
    if (elements[d] == 0) continue;
    const double calls = machine.piece_ns > 0 ? handled[d] * machine.piece_ns : kLocalCalls * machine.op_overhead_ns;
    const double ns = static_cast<double>(elements[d] * element_bytes) / machine.memory_bytes_per_s * 1e9 + calls;
    out[d] = machine.at_speed(static_cast<int>(d), static_cast<int64_t>(ns));
    any = true;
  }
  return any ? out : std::vector<int64_t>();
}

void add_to(std::vector<int64_t>& total, const std::vector<int64_t>& ns) {
  for (size_t d = 0; d < ns.size(); ++d) total[d] += ns[d];
}

}  // namespace soap
