#include "search/proposals.h"

#include <algorithm>
#include <array>
#include <numeric>

namespace soap {
namespace {

constexpr int64_t kChunkedWork = 100;  // nodes x devices: what is cut in time is lowered whole, so on larger graphs only the seeds are
constexpr std::array<int64_t, 5> kBuckets{1 << 20, 5 << 20, 25 << 20, 100 << 20, 400 << 20};

// The standard's distributions differ between libraries; the same seed must give the same plan everywhere.
template <class T>
T below(T n, std::mt19937_64& random) {
  return static_cast<T>(random() % static_cast<uint64_t>(n));
}

void shuffle(std::vector<int>& values, std::mt19937_64& random) {
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i, random)]);
}

}  // namespace

Proposals::Proposals(const LayoutCache& cache) : graph_(cache.graph()), world_(static_cast<int>(cache.rows().size())), rules_(cache.classes()) {
  const OpGraph& graph = graph_;
  std::vector<std::pair<int64_t, const Node*>> sized;
  std::vector<char> known(rules_.size());
  for (const Node& n : graph.nodes) {
    const int c = cache.class_of(n.id);
    cache_class_.push_back(c);
    if (n.kind == NodeKind::kParam && !graph.output(n, 0).shape.empty()) parameters_.push_back(&n);
    if (n.kind != NodeKind::kOp) continue;
    if (!known[c]) rules_[c] = make_rule(graph, n, world_);
    known[c] = 1;
    if (rules_[c].view) continue;
    int64_t parameters = 0, activations = 0;
    for (TensorId t : n.inputs) {
      const int64_t bytes = numel(graph.tensors[t].shape) * graph.tensors[t].element_bytes;
      (graph.nodes[graph.tensors[t].producer].kind == NodeKind::kParam ? parameters : activations) += bytes;
    }
    sized.emplace_back(parameters * 4 + activations, &n);
  }
  std::stable_sort(sized.begin(), sized.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const auto& [bytes, node] : sized) operators_.push_back(node);
}

std::vector<std::optional<OpConfig>> Proposals::usual_configs(const Node& n) const {
  std::vector<std::optional<OpConfig>> out{std::nullopt, OpConfig{.cuts = {{"n", {.tiles = world_, .fed = true}}}}};
  for (const Factor& f : rule_of(n).factors) {
    if (f.cut != Cuttable::kWhole && f.size / f.unit >= world_) out.push_back(OpConfig{.cuts = {{f.name, {.tiles = world_}}}});
  }
  return out;
}

// Any legal configuration: up to two factors, degrees up to the world, sometimes chunks, uneven parts, any devices.
OpConfig Proposals::random_config(const Node& n, std::mt19937_64& random) const {
  OpConfig c;
  std::vector<const Factor*> factors;
  for (const Factor& f : rule_of(n).factors) {
    if (f.cut != Cuttable::kWhole && f.size >= 2) factors.push_back(&f);
  }
  const bool may_chunk = static_cast<int64_t>(graph_.nodes.size()) * world_ <= kChunkedWork;
  int tiles = 1;
  for (int cuts = 1 + below(4, random) / 3; cuts > 0 && !factors.empty(); --cuts) {
    const size_t at = below(factors.size(), random);
    const Factor& f = *factors[at];
    factors.erase(factors.begin() + static_cast<int64_t>(at));
    const int degree = std::min<int>(world_ / tiles, static_cast<int>(f.size / f.unit));
    if (degree < 2) continue;
    Cut cut{.tiles = 2 + below(degree - 1, random)};
    if (below(2, random) == 0) {  // degrees that divide the world are what pays most often
      while (world_ % (tiles * cut.tiles) != 0 && cut.tiles > 2) --cut.tiles;
    }
    if (below(16, random) == 0 && f.size / f.unit >= cut.tiles * 2 && may_chunk) cut.chunks = 2;
    if (below(8, random) == 0 && cut.tiles == 2 && f.size > 2 && f.unit == 1) cut.bounds = {0, 1 + below(f.size - 1, random), f.size};
    tiles *= cut.tiles;
    c.cuts.push_back({f.name, cut});
  }
  if (below(4, random) == 0 && world_ / tiles >= 2) c.replicas = world_ / tiles;
  c.devices.resize(world_);
  std::iota(c.devices.begin(), c.devices.end(), 0);
  const int list = below(8, random);
  if (list == 0) shuffle(c.devices, random);
  if (list == 1) std::rotate(c.devices.begin(), c.devices.begin() + below(world_, random), c.devices.end());  // neighbours stay neighbours
  c.devices.resize(static_cast<size_t>(tiles) * c.replicas);
  return c;
}

// All parameters stored in parts, or all where they are used.
Proposal Proposals::all_in_parts(const Strategy& from) const {
  const bool in_parts = std::none_of(parameters_.begin(), parameters_.end(), [&](const Node* p) { return from.nodes.count(p->name) > 0; });
  Proposal out;
  for (const Node* p : parameters_) {
    if (!in_parts && from.nodes.count(p->name) == 0) continue;
    out.changes.push_back({p->id, in_parts ? std::optional(OpConfig{.cuts = {{"d0", {.tiles = world_}}}}) : std::nullopt});
  }
  return out;
}

std::optional<Proposal> Proposals::opening(size_t index, const Strategy& from) const {
  if (index < kBuckets.size()) return Proposal{.bucket_bytes = kBuckets[index]};
  if (index == kBuckets.size()) return all_in_parts(from);
  return std::nullopt;
}

Proposal Proposals::draw(const Strategy& from, std::mt19937_64& random) const {
  if (below(64, random) == 0) return {.bucket_bytes = kBuckets[below(kBuckets.size(), random)]};
  if (below(64, random) == 0) return all_in_parts(from);
  const Node& n = *operators_[below(std::min<size_t>(operators_.size(), 8 + operators_.size() / 2), random)];
  switch (below(8, random)) {
    case 0: return {{{n.id, std::nullopt}}};
    case 1: return {{{n.id, OpConfig{.cuts = {{"n", {.tiles = world_, .fed = true}}}}}}};
    case 2: {  // an operator's parameters stored in parts, or where they are used
      Proposal out;
      for (TensorId t : n.inputs) {
        const Node& producer = graph_.nodes[graph_.tensors[t].producer];
        if (producer.kind != NodeKind::kParam || graph_.tensors[t].shape.empty()) continue;
        if (from.nodes.count(producer.name)) {
          out.changes.push_back({producer.id, std::nullopt});
        } else {
          const Keep keep = below(2, random) ? Keep::kUse : Keep::kUntilBackward;
          out.changes.push_back({producer.id, OpConfig{.cuts = {{"d0", {.tiles = world_}}}, .keep = keep}});
        }
      }
      return out;
    }
    case 3: {
      const auto usual = usual_configs(n);
      return {{{n.id, usual[below(usual.size(), random)]}}};
    }
    default: return {{{n.id, random_config(n, random)}}};
  }
}

}  // namespace soap
