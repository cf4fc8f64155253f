#include "search/manual.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "fmt/ranges.h"
#include "search/hand_factors.h"
#include "sharding/expand.h"
#include "sharding/region.h"

namespace soap {
namespace {

bool has(const std::vector<DimExpr>& dims, int factor) {
  return std::any_of(dims.begin(), dims.end(), [&](const DimExpr& d) { return std::count(d.factors.begin(), d.factors.end(), factor) > 0; });
}

// Statistics and recurrences couple all indices of a factor: nobody cuts those by hand.
bool by_hand(const Rule& rule, const std::string& factor) {
  const int f = rule.factor(factor);
  return f >= 0 && (rule.factors[f].cut == Cuttable::kAny || rule.factors[f].cut == Cuttable::kInterval);
}

// k where the result is read only as k equal parts of its last dim (queries, keys and values of one linear), else 1.
int64_t fused_parts(const OpGraph& graph, const Node& node) {
  const Tensor& y = graph.output(node, 0);
  if (y.shape.empty()) return 1;
  const auto last = static_cast<int64_t>(y.shape.size()) - 1;
  int64_t length = 0;
  for (auto reader = static_cast<size_t>(node.id) + 1; reader < graph.nodes.size(); ++reader) {  // the first one mostly says no, and is near
    const Node& n = graph.nodes[reader];
    if (!std::count(n.inputs.begin(), n.inputs.end(), y.id)) continue;
    if (n.target != "narrow") return 1;
    const auto& part = graph.output(n, 0).shape;
    if (part.size() != y.shape.size() || part.back() == y.shape.back() || n.attr<int64_t>("step", 1) != 1) return 1;
    const int64_t dim = n.attr<int64_t>("dim", 0);
    if ((dim < 0 ? dim + last + 1 : dim) != last || (length != 0 && part.back() != length) || n.attr<int64_t>("start", 0) % part.back() != 0) return 1;
    length = part.back();
  }
  return length > 0 && y.shape.back() % length == 0 ? y.shape.back() / length : 1;
}

std::vector<int64_t> divisors(int64_t n) {
  std::vector<int64_t> out;
  for (int64_t d = 1; d <= n; ++d) {
    if (n % d == 0) out.push_back(d);
  }
  return out;
}

// The main input as following chooses it: the largest that isn't stored; -1 when there is none.
TensorId main_input(const OpGraph& graph, const Node& node) {
  TensorId main = -1;
  for (TensorId t : node.inputs) {
    if (is_store(graph.nodes[graph.tensors[t].producer])) continue;
    if (main < 0 || numel(graph.tensors[t].shape) > numel(graph.tensors[main].shape)) main = t;
  }
  return main;
}

// Devices 0, 1, 2, ... need no list.
void drop_plain(OpConfig& c) {
  std::vector<int> plain(c.devices.size());
  std::iota(plain.begin(), plain.end(), 0);
  if (c.devices == plain) c.devices.clear();
}

// One manual plan in the making.
struct Maker {
  const OpGraph& graph;
  const std::vector<std::shared_ptr<const Rule>>& rules;
  const std::vector<std::string>& sample;
  const std::vector<HandFactors>& hand;  // per node, of operators
  const ManualOptions& o;
  const GroupConfigs& configs;
  const std::vector<int>& stage;
  Strategy s;
  std::vector<char> split;       // per tensor: comes cut over the ranks of a tensor group
  std::vector<int64_t> fused;    // per tensor: parts that lie in it one after another, each cut over the ranks
  std::vector<char> configured;  // per parameter node: its storage is decided

  bool only_data() const { return o.tp == 1 && o.pp == 1; }
  int device(int stage_, int replica, int rank) const { return (stage_ * o.dp + replica) * o.tp + rank; }

  // A grid configuration: samples over replicas, `factor` (if any) over the ranks of a group.
  OpConfig grid(const Node& n, const std::string& factor, int64_t parts) const {
    const std::string& samples = sample[n.id];
    OpConfig c;
    const bool cut_samples = !samples.empty() && samples != factor;
    if (cut_samples && o.dp * o.micro_batches > 1) c.cuts.push_back({samples, {.tiles = o.dp, .chunks = o.micro_batches}});
    if (!factor.empty()) {
      Cut cut{.tiles = o.tp};
      if (parts > 1) cut.radix = {parts, rules[n.id]->factors[rules[n.id]->factor(factor)].size / parts, 1};
      c.cuts.push_back({factor, cut});
    }
    c.replicas = (cut_samples ? 1 : o.dp) * (factor.empty() ? o.tp : 1);
    if (!factor.empty() && !cut_samples) {  // ranks slowest, replicas alike
      for (int t = 0; t < o.tp; ++t) {
        for (int d = 0; d < o.dp; ++d) c.devices.push_back(device(stage[n.id], d, t));
      }
    } else {
      c.devices.resize(size_t(o.dp) * o.tp);
      std::iota(c.devices.begin(), c.devices.end(), device(stage[n.id], 0, 0));
    }
    drop_plain(c);
    return c;
  }

  // What the ranks of a group do, done by each replica with its samples.
  OpConfig over_replicas(const Node& n, OpConfig c) const {
    const std::string& samples = sample[n.id];
    const int inner = c.num_tiles() * c.replicas;
    std::vector<int> ranks = c.devices;
    if (ranks.empty()) {
      ranks.resize(inner);
      std::iota(ranks.begin(), ranks.end(), 0);
    }
    c.devices.clear();
    const auto own = std::find_if(c.cuts.begin(), c.cuts.end(), [&](const FactorCut& f) { return f.factor == samples; });
    if (samples.empty()) {  // done alike: tiles slowest, replicas of all groups fastest
      for (int t = 0; t < c.num_tiles(); ++t) {
        for (int d = 0; d < o.dp; ++d) {
          for (int r = 0; r < c.replicas; ++r) c.devices.push_back(device(stage[n.id], d, ranks[t * c.replicas + r]));
        }
      }
      c.replicas *= o.dp;
    } else {
      if (own != c.cuts.end()) {
        if (own != c.cuts.begin()) user_error("[grid] {}: a group's configuration cuts samples first", n.name);
        own->cut.tiles *= o.dp;
        own->cut.chunks = o.micro_batches;
      } else if (o.dp * o.micro_batches > 1) {
        c.cuts.insert(c.cuts.begin(), {samples, {.tiles = o.dp, .chunks = o.micro_batches}});
      }
      for (int d = 0; d < o.dp; ++d) {
        for (int rank : ranks) c.devices.push_back(device(stage[n.id], d, rank));
      }
    }
    drop_plain(c);
    return c;
  }

  // An operator with a configuration of its own.
  void place_configured(const Node& n, const std::optional<OpConfig>& config) {
    const TensorId main = main_input(graph, n);
    const bool follows = !config && main >= 0 && stage[graph.tensors[main].producer] == stage[n.id];
    if (config)
      s.nodes[n.name] = over_replicas(n, *config);
    else if (!follows)
      s.nodes[n.name] = grid(n, "", 1);
    for (size_t r = 0; r < n.outputs.size(); ++r) {
      const auto& dims = rules[n.id]->results[r].dims;
      split[n.outputs[r]] = follows && split[main];
      fused[n.outputs[r]] = follows ? fused[main] : 1;
      for (const FactorCut& f : config ? config->cuts : std::vector<FactorCut>{}) {
        if (f.factor != sample[n.id] && has(dims, rules[n.id]->factor(f.factor))) split[n.outputs[r]] = 1;
      }
    }
  }

  [[noreturn]] void refuse(const Node& n, const std::string& factor, const std::vector<int64_t>& legal) const {
    const Rule& rule = *rules[n.id];
    user_error("[manual_plan] tp={}: {} ({}) has {}={}, which can't be cut in {} {}parts; legal here: tp={}", o.tp, n.name, n.target, factor,
               rule.factors[rule.factor(factor)].size, o.tp, hand[n.id].parallel == factor ? "equal " : "", fmt::join(legal, ", "));
  }

  // The factor that the group cuts of an operator that reads parameters or has heads; "" when it is done alike.
  std::string tensor_factor(const Node& n, bool input_split) const {
    const Rule& rule = *rules[n.id];
    const HandFactors& own = hand[n.id];
    if (own.first_parameter < 0) {
      if (n.target == "ce_rows" && input_split && can_cut(rule, "v", o.tp)) return "v";
      const std::string& heads = own.parallel;
      if (heads.empty() || !by_hand(rule, heads)) return "";
      const int64_t size = rule.factors[rule.factor(heads)].size;
      if (o.strict && size % o.tp != 0) refuse(n, heads, divisors(size));
      return can_cut(rule, heads, o.tp) ? heads : "";
    }
    const std::string *wanted = &own.outputs, *other = &own.inputs;
    if (input_split || n.target == "embedding") std::swap(wanted, other);
    std::string largest;
    for (const std::string* candidate : {wanted, other}) {
      const std::string& factor = *candidate;
      if (!by_hand(rule, factor)) continue;
      if (can_cut(rule, factor, o.tp)) return factor;
      if (largest.empty() || rule.factors[rule.factor(factor)].size > rule.factors[rule.factor(largest)].size) largest = factor;
    }
    if (o.strict && !largest.empty()) {
      const Factor& f = rule.factors[rule.factor(largest)];
      std::vector<int64_t> legal(f.size / f.unit);
      std::iota(legal.begin(), legal.end(), 1);
      refuse(n, largest, legal);
    }
    return "";
  }

  // The factor of dim 1 of [samples, sequence, ..]; "" where there is none to cut by hand or a parameter lies in it.
  std::string sequence_factor(const Node& n) const {
    const Rule& rule = *rules[n.id];
    if (!o.sequence || o.tp == 1 || n.outputs.size() != 1 || graph.output(n, 0).shape.size() < 3) return "";
    const DimExpr& dim = rule.results[0].dims[1];
    if (dim.factors.size() != 1 || dim.map) return "";
    const Factor& f = rule.factors[dim.factors[0]];
    for (size_t i = 0; i < n.inputs.size(); ++i) {
      if (graph.nodes[graph.tensors[n.inputs[i]].producer].kind == NodeKind::kParam && has(rule.operands[i].dims, dim.factors[0])) return "";
    }
    return f.name != sample[n.id] && by_hand(rule, f.name) && f.size % o.tp == 0 ? f.name : "";
  }

  void place(const Node& n) {
    if (only_data() || n.id < o.tensor_from) {
      s.nodes[n.name] = {.cuts = {{"n", {.tiles = s.world_size, .chunks = o.micro_batches, .fed = true}}}};
      return;
    }
    if (const auto own = configs.find(n.id); own != configs.end()) {
      place_configured(n, own->second);
      return;
    }
    const TensorId main = main_input(graph, n);
    const bool input_split = main >= 0 && split[main];
    const int64_t input_parts = input_split ? fused[main] : 1;
    std::string factor = o.tp > 1 ? tensor_factor(n, input_split) : "";
    int64_t parts = 1;
    if (!factor.empty() && n.target == "linear" && factor == "o") {
      const int64_t k = fused_parts(graph, n);
      if (rules[n.id]->factors[rules[n.id]->factor("o")].size / k >= o.tp) parts = k;
    }
    const bool narrows = factor.empty() && input_parts > 1;  // takes one of the parts: its share lies where it is
    if (narrows) factor = fmt::format("d{}", graph.output(n, 0).shape.size() - 1);
    // A normalisation over channels needs them all; one that keeps channels apart (BatchNorm) follows.
    const bool needs_whole = hand[n.id].first_parameter >= 0 && factor.empty() && !hand[n.id].inputs.empty();
    const bool follows = factor.empty() && input_split && !needs_whole && stage[graph.tensors[main].producer] == stage[n.id];
    if (!follows) s.nodes[n.name] = grid(n, factor.empty() ? sequence_factor(n) : factor, parts);
    for (size_t r = 0; r < n.outputs.size(); ++r) {
      const bool cut = follows || (!factor.empty() && has(rules[n.id]->results[r].dims, rules[n.id]->factor(factor)));
      split[n.outputs[r]] = cut;
      fused[n.outputs[r]] = cut ? parts : 1;
    }
  }

  // Storage in parts over groups of replicas, finer than the cut by which the first reader uses it.
  void store(const Node& param) {
    const auto& shape = graph.output(param, 0).shape;
    const Node* reader = nullptr;
    size_t operand = 0;
    for (const Node& n : graph.nodes) {
      const auto at = std::find(n.inputs.begin(), n.inputs.end(), param.outputs[0]);
      if (n.kind != NodeKind::kOp || at == n.inputs.end()) continue;
      reader = &n;
      operand = at - n.inputs.begin();
      break;
    }
    if (reader == nullptr) return;
    const int group = o.zero_group > 0 ? o.zero_group : o.dp;
    const Rule& rule = *rules[reader->id];
    int tensor_dim = -1;
    Cut tensor_cut{.tiles = 1};
    const auto it = s.nodes.find(reader->name);
    if (o.tp > 1 && it != s.nodes.end()) {
      for (const FactorCut& c : it->second.cuts) {
        if (c.factor == sample[reader->id]) continue;
        for (size_t d = 0; d < shape.size(); ++d) {
          const DimExpr& e = rule.operands[operand].dims[d];
          if (e.factors.size() != 1 || e.map || rule.factors[e.factors[0]].name != c.factor) continue;
          tensor_dim = static_cast<int>(d);
          tensor_cut = c.cut;
        }
      }
    }
    const int ranks = tensor_dim < 0 ? 1 : o.tp;
    const auto indices = [&](size_t d) {  // that the parts may share
      return static_cast<int>(d) != tensor_dim ? shape[d] : (tensor_cut.radix.empty() ? shape[d] : tensor_cut.radix[1]) / ranks;
    };
    size_t dim = 0;
    while (dim < shape.size() && indices(dim) < group) ++dim;
    if (dim == shape.size()) return;
    OpConfig c{.keep = o.zero == 3 ? Keep::kUse : o.zero == 2 ? Keep::kUntilBackward : Keep::kUntilStep};
    const bool nested = static_cast<int>(dim) == tensor_dim;  // a rank's part is cut further
    if (nested) {
      tensor_cut.tiles = ranks * group;
      c.cuts.push_back({fmt::format("d{}", dim), tensor_cut});
    } else {
      c.cuts.push_back({fmt::format("d{}", dim), {.tiles = group}});
      if (tensor_dim >= 0) c.cuts.push_back({fmt::format("d{}", tensor_dim), tensor_cut});
    }
    c.replicas = o.dp / group * (tensor_dim < 0 ? o.tp : 1);
    const int at = stage[reader->id];
    const auto alike = [&](int part, int rank) {  // the same part in the other groups, and on the ranks that use it whole
      for (int g = 0; g < o.dp / group; ++g) {
        if (tensor_dim >= 0) c.devices.push_back(device(at, g * group + part, rank));
        for (int t = 0; tensor_dim < 0 && t < o.tp; ++t) c.devices.push_back(device(at, g * group + part, t));
      }
    };
    for (int outer = 0; outer < (nested ? ranks : group); ++outer) {
      for (int inner = 0; inner < (nested ? group : ranks); ++inner) nested ? alike(inner, outer) : alike(outer, inner);
    }
    drop_plain(c);
    s.nodes[param.name] = std::move(c);
  }
};

}  // namespace

Strategy everywhere_fed(const OpGraph& graph, int world_size) {
  Strategy s{.world_size = world_size};
  for (const Node& n : graph.nodes) {
    if (n.kind == NodeKind::kOp) s.nodes[n.name] = {.cuts = {{"n", {.tiles = world_size, .fed = true}}}};
  }
  return s;
}

bool can_cut(const Rule& rule, const std::string& factor, int degree) {
  const int f = rule.factor(factor);
  return f >= 0 && rule.factors[f].cut != Cuttable::kWhole && rule.factors[f].size / rule.factors[f].unit >= degree;
}

int64_t parameter_bytes(const OpGraph& graph, const Node& node) {
  int64_t bytes = 0;
  for (TensorId t : node.inputs) {
    if (graph.nodes[graph.tensors[t].producer].kind == NodeKind::kParam) bytes += numel(graph.tensors[t].shape) * graph.tensors[t].element_bytes;
  }
  return bytes;
}

ManualPlanner::ManualPlanner(const OpGraph& graph, int world_size) : graph_(graph), world_(world_size), sample_(graph.nodes.size()) {
  bool has_weight = true;  // the layer that began last; a normalisation belongs to what comes after it
  for (const Node& n : graph.nodes) {
    rules_.push_back(std::make_shared<Rule>(make_rule(graph, n, world_size)));
    double product = n.kind == NodeKind::kOp ? 1 : 0;
    if (n.kind == NodeKind::kOp) {
      for (const Factor& f : rules_.back()->factors) product *= static_cast<double>(std::max<int64_t>(f.size, 1));
      if (const int at = first_parameter(graph, n); at >= 0) {
        const bool weight = graph.input(n, at).shape.size() > 1;
        if (has_weight) layers_.push_back(n.id);
        has_weight = weight;
      }
    }
    work_.push_back(product);
    if (n.kind == NodeKind::kFeed && n.sample_dim >= 0 && rows_ == 0) rows_ = graph.output(n, 0).shape[n.sample_dim];
    has_loss_ =
        has_loss_ || (n.kind == NodeKind::kReturn && n.target != "buffer_write" && graph.input(n, 0).requires_grad && numel(graph.input(n, 0).shape) == 1);
  }
  hand_ = all_hand_factors();
  // Where the rows go: follow them through data parallelism. Two processes show it as well as thousands.
  const int probe = std::min(world_size, 2);
  FedRows rows(probe);
  for (int r = 0; r < probe; ++r) rows[r] = rows_ / probe + (r < rows_ % probe);
  Resolved resolved;
  try {
    resolved = resolve(graph, everywhere_fed(graph, probe), rows);
  } catch (const std::invalid_argument&) {  // data parallelism isn't legal here: by name alone
    resolved = {};
  }
  for (const Node& n : graph.nodes) {
    const auto id = resolved.graph.find(n.name);
    if (!id) {  // not resolved, or expanded: statistics over samples
      couples_samples_ = couples_samples_ || n.kind == NodeKind::kOp;
      sample_[n.id] = rules_[n.id]->factor("n") >= 0 ? "n" : "";
      continue;
    }
    const FedFactor& fed = resolved.fed[*id];
    const bool parts = std::all_of(fed.parts.begin(), fed.parts.end(), [](const IndexSet& s) { return s.empty() || s.is_interval(); });
    if (fed.factor >= 0 && parts) sample_[n.id] = resolved.rules[*id].factors[fed.factor].name;
  }
  for (const Node& n : graph.nodes) {
    const bool scalar = n.kind == NodeKind::kReturn && n.target != "buffer_write" && graph.input(n, 0).requires_grad && numel(graph.input(n, 0).shape) == 1;
    if (scalar) loss_is_sum_ = !sample_[graph.input(n, 0).producer].empty();
  }
}

std::shared_ptr<const std::vector<HandFactors>> ManualPlanner::all_hand_factors() const {
  std::vector<HandFactors> out(graph_.nodes.size());
  for (const Node& n : graph_.nodes) {
    if (n.kind == NodeKind::kOp) out[n.id] = hand_factors(graph_, n, *rules_[n.id]);
  }
  return std::make_shared<const std::vector<HandFactors>>(std::move(out));
}

ManualPlanner::ManualPlanner(const OpGraph& graph, int world_size, const ManualPlanner& like)
    : graph_(graph),
      world_(world_size),
      rows_(like.rows_),
      has_loss_(like.has_loss_),
      loss_is_sum_(like.loss_is_sum_),
      couples_samples_(like.couples_samples_),
      sample_(like.sample_),
      layers_(like.layers_),
      work_(like.work_) {
  for (const Node& n : graph.nodes) {
    const bool known = &graph == &like.graph_ && n.kind != NodeKind::kReturn;  // a return's rule depends on the world
    rules_.push_back(known ? like.rules_[n.id] : std::make_shared<Rule>(make_rule(graph, n, world_size)));
  }
  hand_ = &graph == &like.graph_ ? like.hand_ : all_hand_factors();
  for (const Node& n : graph.nodes) {
    if (n.kind == NodeKind::kFeed && n.sample_dim >= 0) rows_ = graph.output(n, 0).shape[n.sample_dim];
  }
}

// Contiguous stages of one layer or more such that the busiest has as little work as can be (by bisection). What precedes the first layer belongs
// to it, what follows a layer too.
std::vector<int> ManualPlanner::stages(int count) const {
  std::vector<int> out(graph_.nodes.size());
  if (count == 1) return out;
  std::vector<double> work(layers_.size());
  size_t layer = 0;
  std::vector<size_t> layer_of(graph_.nodes.size());
  for (const Node& n : graph_.nodes) {
    while (layer + 1 < layers_.size() && layers_[layer + 1] <= n.id) ++layer;
    layer_of[n.id] = layer;
    work[layer] += work_[n.id];
  }
  const auto filled = [&](double limit) {
    std::vector<int> stage(work.size());
    int now = 0;
    double sum = 0;
    for (size_t l = 0; l < work.size(); ++l) {
      const bool must = work.size() - l < static_cast<size_t>(count - now);  // as many layers as stages are left
      if (l > 0 && (sum + work[l] > limit || must)) {
        ++now;
        sum = 0;
      }
      sum += work[l];
      stage[l] = now;
    }
    return stage;
  };
  double low = *std::max_element(work.begin(), work.end()), high = std::accumulate(work.begin(), work.end(), 0.0);
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (filled(middle).back() < count ? high : low) = middle;
  }
  const std::vector<int> stage = filled(high);
  for (const Node& n : graph_.nodes) out[n.id] = std::min(stage[layer_of[n.id]], count - 1);
  return out;
}

void ManualPlanner::check(const ManualOptions& o) const {
  if (o.dp < 1 || o.tp < 1 || o.pp < 1 || o.micro_batches < 1) {
    user_error("[manual_plan] dp={} tp={} pp={} micro_batches={}: degrees are 1 or more", o.dp, o.tp, o.pp, o.micro_batches);
  }
  if (int64_t{o.dp} * o.tp * o.pp != world_) {
    user_error("[manual_plan] dp={} x tp={} x pp={} are {} devices, there are {}", o.dp, o.tp, o.pp, int64_t{o.dp} * o.tp * o.pp, world_);
  }
  if (o.zero < 0 || o.zero > 3) user_error("[manual_plan] zero={}: it is 0, 1, 2 or 3", o.zero);
  if (o.zero > 0 && o.dp == 1) user_error("[manual_plan] zero={} stores parameters in parts over the replicas, and dp is 1", o.zero);
  if (o.zero_group < 0 || (o.zero_group > 0 && o.dp % o.zero_group != 0)) {
    user_error("[manual_plan] zero_group={} doesn't divide dp={}; legal: {}", o.zero_group, o.dp, fmt::join(divisors(o.dp), ", "));
  }
  if (o.pp > num_layers()) {
    user_error("[manual_plan] pp={}: a stage needs a layer (an operator with weights, and normalisations before it), and there are {}{}; legal: pp=1 to {}",
               o.pp, num_layers(), layers_.empty() ? "" : fmt::format(", the last begins at {}", graph_.nodes[layers_.back()].name), std::max(num_layers(), 1));
  }
  if (rows_ > 0 && rows_ < int64_t{o.dp} * o.micro_batches) {
    user_error("[manual_plan] the batch has {} rows, dp={} x micro_batches={} need {}; legal with this dp: micro_batches=1 to {}", rows_, o.dp, o.micro_batches,
               int64_t{o.dp} * o.micro_batches, rows_ / o.dp);
  }
  if (o.order == Order::kInterleaved && o.micro_batches > 1 && !has_loss_) {
    user_error("[manual_plan] schedule 1f1b needs the loss in the plan (loss=), backward begins before the forward has returned; or schedule gpipe");
  }
}

Strategy ManualPlanner::make(const ManualOptions& options, const GroupConfigs& configs) const {
  check(options);
  const std::vector<int> stage = stages(options.pp);
  Maker m{.graph = graph_, .rules = rules_, .sample = sample_, .hand = *hand_, .o = options, .configs = configs, .stage = stage, .s = {.world_size = world_}};
  m.split.resize(graph_.tensors.size());
  m.fused.assign(graph_.tensors.size(), 1);
  if (options.micro_batches > 1) m.s.order = options.order;
  for (const Node& n : graph_.nodes) {
    if (n.kind == NodeKind::kOp) m.place(n);
  }
  for (const Node& n : graph_.nodes) {
    if (n.kind == NodeKind::kParam && options.zero > 0) m.store(n);
  }
  if (options.recompute) m.s.recompute = repeated_blocks(graph_);
  return std::move(m.s);
}

Strategy manual_strategy(const OpGraph& graph, int world_size, const ManualOptions& options) {
  return ManualPlanner(graph, world_size).make(options);
}

}  // namespace soap
