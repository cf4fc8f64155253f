#include "sim/local_work.h"

#include <algorithm>
#include <map>

namespace soap {
namespace {

constexpr int kLocalCalls = 2;
constexpr int64_t kShortestRow = 64;  // bytes; as csrc/movement/strided.cpp has it

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

// Whether what follows each other in memory, of `part` within `whole`, is long enough to move by itself.
bool has_rows(const Box& part, const Box& whole, int64_t element_bytes) {
  int64_t bytes = element_bytes;
  for (size_t d = whole.size(); d-- > 0;) {
    if (!part[d].is_interval()) return false;
    bytes *= part[d].size();
    if (part[d].size() != whole[d].size()) break;
  }
  return bytes >= kShortestRow;
}

struct Arrivals {
  int pieces = 0, own = 0, landed = 0;  // all, this device's own, and others' that come right into their place
  int64_t elements = 0, landed_elements = 0;
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
    Arrivals& here = arrivals[{x.dst, x.to}];
    ++here.pieces;
    here.elements += x.elements;
    if (x.from == x.to) {
      ++here.own;
      continue;
    }
    const Box part = intersect(source, destination);
    if (x.elements < volume(source) && !lies_together(part, source) && !has_rows(part, source, element_bytes)) {
      elements[x.from] += 2 * x.elements;
      ++handled[x.from];
    }
    if (has_rows(part, destination, element_bytes)) {
      ++here.landed;
      here.landed_elements += x.elements;
    }
  }
  for (const auto& [where, here] : arrivals) {
    const int64_t all = volume(destinations.coords[where.first].box);
    if (here.elements == here.pieces * all) {  // sums of wholes, of which the first stays where it is; what comes is added as it comes
      const bool as_it_comes = here.own == 1 && here.pieces > 1;
      elements[where.second] += as_it_comes ? all : 3 * (here.pieces - 1) * all;
      handled[where.second] += as_it_comes ? 1 : here.pieces - 1;
    } else if (here.elements == all) {
      elements[where.second] += 2 * (all - here.landed_elements);
      handled[where.second] += here.pieces - here.landed;
    } else {
      elements[where.second] += all + 3 * here.elements;
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
