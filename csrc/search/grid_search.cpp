#include "search/grid_search.h"

#include <algorithm>
#include <set>

#include "base/error.h"

namespace soap {
namespace {

constexpr int kLargestGroup = 64;    // ranks; lowering names every pair of a group
constexpr int kMicroBatches = 1024;  // more only add launches
constexpr int64_t kMib = 1 << 20;

// "layers.3.ffn.up" -> "layers.#.ffn.up": what repeated blocks have in common.
std::string pattern_of(const Node& n) {
  std::string out;
  for (size_t begin = 0; begin <= n.name.size();) {
    const size_t end = std::min(n.name.find_first_of("./", begin), n.name.size());
    const std::string part = n.name.substr(begin, end - begin);
    const bool number =
        !part.empty() && part.find_first_not_of("0123456789") == std::string::npos && begin > 0 && n.name[begin - 1] == '.' && n.name.find('/') >= begin;
    out += number ? "#" : part;
    if (end < n.name.size()) out += n.name[end];
    begin = end + 1;
  }
  return out + " " + n.target;
}

struct Searcher {
  const OpGraph& graph;
  int world = 1;
  const CostModel& cost;
  const GridSearchOptions& options;
  ManualPlanner planner{graph, world};
  GridPricer pricer{graph, planner, cost};
  GridSearchResult result = {};
  std::vector<std::string> refused = {};

  int64_t limit() const { return options.memory_limit_bytes.value_or(cost.machine().memory_bytes); }

  static bool better(const GridCandidate& a, const GridCandidate& b) {
    if (a.fits != b.fits) return a.fits;
    return a.fits ? a.price.step_ns < b.price.step_ns : a.price.memory_bytes < b.price.memory_bytes;
  }

  // Whether it is legal and fits.
  bool add(const ManualOptions& o) {
    ++result.simulations;
    try {
      GridCandidate c{.name = grid_name(o), .options = o, .price = pricer.price(o)};
      c.fits = c.price.memory_bytes <= limit();
      result.candidates.push_back(std::move(c));
      return result.candidates.back().fits;
    } catch (const std::invalid_argument& e) {  // a degree that this model doesn't allow: a proposal, not a mistake
      refused.emplace_back(e.what());
      return false;
    }
  }

  // Replicas that share parts: none, all, those of a host.
  std::vector<std::pair<int, int>> storages(const ManualOptions& o) const {
    std::vector<std::pair<int, int>> out{{0, 0}};
    if (o.dp == 1) return out;
    for (const int zero : {1, 3}) out.emplace_back(zero, 0);
    const auto& hosts = cost.machine().host_of;
    const int local = static_cast<int>(std::count(hosts.begin(), hosts.end(), hosts[0])) / o.tp;  // replicas on a host
    for (const int zero : {1, 3}) {
      if (local > 1 && local < o.dp && o.dp % local == 0) out.emplace_back(zero, local);
    }
    return out;
  }

  void add_grids() {
    for (int tp = 1; tp <= std::min(world, kLargestGroup); ++tp) {
      if (world % tp) continue;
      for (int pp = 1; pp <= std::min(world / tp, planner.has_loss() ? planner.num_layers() : 1); ++pp) {
        if (world / tp % pp) continue;
        const int dp = world / tp / pp;
        if (planner.rows() % dp) continue;
        for (int64_t rows = 1; rows <= planner.rows() / dp; rows *= 2) {
          if (planner.rows() / dp % rows) break;
          ManualOptions o{.dp = dp, .tp = tp, .pp = pp, .micro_batches = static_cast<int>(planner.rows() / dp / rows)};
          if (o.micro_batches > kMicroBatches || (o.micro_batches > 1 && !planner.has_loss())) continue;
          if (o.micro_batches > 1) o.order = Order::kInterleaved;
          if (!add_variants(o)) break;  // more rows at once need more memory
        }
      }
    }
  }

  // Storage, sequence parallelism, recomputation: less memory each; what needs none of it isn't tried with more. Whether anything fitted.
  bool add_variants(ManualOptions o) {
    bool any = false;
    for (const bool recompute : {false, true}) {
      for (const bool sequence : {false, true}) {
        if (sequence && o.tp == 1) continue;
        for (const auto& [zero, group] : storages(o)) {
          o.zero = zero;
          o.zero_group = group;
          o.sequence = sequence;
          o.recompute = recompute;
          const bool fits = add(o);
          any = any || fits;
          if (fits && zero == 1) break;
        }
      }
      if (any) break;
    }
    return any;
  }

  std::vector<std::vector<NodeId>> folded() const {
    std::map<std::string, std::vector<NodeId>> classes;
    for (const Node& n : graph.nodes) {
      if (n.kind == NodeKind::kOp && !planner.rule(n).view) classes[pattern_of(n)].push_back(n.id);
    }
    std::vector<std::pair<double, std::vector<NodeId>>> sized;
    for (auto& [name, nodes] : classes) {
      double work = static_cast<double>(nodes.size());
      for (const Factor& f : planner.rule(graph.nodes[nodes.front()]).factors) work *= static_cast<double>(std::max<int64_t>(f.size, 1));
      sized.emplace_back(work, std::move(nodes));
    }
    std::stable_sort(sized.begin(), sized.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
    std::vector<std::vector<NodeId>> out;
    for (auto& [work, nodes] : sized) out.push_back(std::move(nodes));
    return out;
  }

  GridCandidate descend(GridCandidate best, const std::vector<std::vector<NodeId>>& classes) {
    const int ranks = best.options.tp;
    int left = options.descent_simulations;
    for (bool improved = ranks > 1; improved;) {
      improved = false;
      for (const auto& nodes : classes) {
        const Node& like = graph.nodes[nodes.front()];
        std::vector<std::optional<OpConfig>> tried{std::nullopt, OpConfig{.replicas = ranks}};
        for (const Factor& f : planner.rule(like).factors) {
          const bool samples = f.name == planner.sample_factor(like);
          if (!samples && f.cut != Cuttable::kWhole && f.size / f.unit >= ranks) tried.push_back(OpConfig{.cuts = {{f.name, {.tiles = ranks}}}});
        }
        for (const auto& config : tried) {
          if (left-- <= 0) return best;
          GridCandidate c = best;
          for (NodeId n : nodes) c.configs[n] = config;
          ++result.simulations;
          try {
            c.price = pricer.price(c.options, c.configs, false);
            // A tie is no reason to leave what a person would write.
            if (c.price.step_ns >= best.price.step_ns - best.price.step_ns / 500) continue;
            c.price = pricer.price(c.options, c.configs);
          } catch (const std::invalid_argument&) {  // a proposal, not a mistake
            continue;
          }
          c.fits = c.price.memory_bytes <= limit();
          if (!c.fits) continue;
          best = std::move(c);
          improved = true;
        }
      }
    }
    return best;
  }

  [[noreturn]] void nothing_fits() const {
    const auto least = std::min_element(result.candidates.begin(), result.candidates.end(),
                                        [](const auto& a, const auto& b) { return a.price.memory_bytes < b.price.memory_bytes; });
    if (least == result.candidates.end()) user_error("[plan] no grid of {} devices is legal: {}", world, refused.empty() ? "no rows" : refused.front());
    user_error(
        "[plan] nothing fits: the smallest plan found ({}) needs {} MiB on a device, the limit is {} MiB; give more devices, a smaller batch or a higher "
        "memory_limit",
        least->name, least->price.memory_bytes / kMib, limit() / kMib);
  }

  void run() {
    if (planner.couples_samples()) user_error("[plan] the model has statistics over samples (BatchNorm): its replicas can't be planned as one");
    if (planner.rows() == 0) user_error("[plan] the batch has no rows to share");
    add_grids();
    std::stable_sort(result.candidates.begin(), result.candidates.end(), better);
    if (result.candidates.empty() || !result.candidates.front().fits) nothing_fits();
    const auto classes = folded();
    std::vector<GridCandidate> found;
    std::set<std::tuple<int, int, int>> begun;
    for (const GridCandidate& c : result.candidates) {
      if (static_cast<int>(begun.size()) == options.descents || !c.fits) break;
      if (!begun.insert({c.options.dp, c.options.tp, c.options.pp}).second) continue;
      GridCandidate d = descend(c, classes);
      if (!d.configs.empty()) {
        d.name = "descent from " + c.name;
        found.push_back(std::move(d));
      }
    }
    for (GridCandidate& d : found) result.candidates.push_back(std::move(d));
    std::stable_sort(result.candidates.begin(), result.candidates.end(), better);
    result.strategy = planner.make(result.candidates.front().options, result.candidates.front().configs);
  }
};

}  // namespace

std::string grid_name(const ManualOptions& o) {
  std::string out;
  for (const auto& [name, degree] : std::initializer_list<std::pair<const char*, int>>{{"dp", o.dp}, {"tp", o.tp}, {"pp", o.pp}}) {
    if (degree > 1) out += fmt::format("{}{} {}", out.empty() ? "" : " x ", name, degree);
  }
  if (out.empty()) out = "one device";
  if (o.micro_batches > 1) out += fmt::format(", {} micro-batches", o.micro_batches);
  if (o.zero > 0) out += fmt::format(", zero-{}{}", o.zero, o.zero_group > 0 ? fmt::format(" by {}", o.zero_group) : "");
  if (o.sequence) out += ", sequence";
  if (o.recompute) out += ", recompute";
  return out;
}

GridSearchResult search_grids(const OpGraph& graph, int world_size, const CostModel& cost, const GridSearchOptions& options) {
  Searcher s{.graph = graph, .world = world_size, .cost = cost, .options = options};
  s.run();
  return std::move(s.result);
}

}  // namespace soap
