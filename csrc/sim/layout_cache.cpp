#include "sim/layout_cache.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"
#include "cost/work.h"
#include "reshard/flows.h"
#include "sharding/region.h"
#include "sim/local_work.h"
#include "sim/memory.h"
#include "sim/simulate.h"

namespace soap {
namespace {

constexpr size_t kMostExchanges = 1 << 15;

// Values as bytes, so that equal values have equal keys. In the given string, whose memory is kept.
struct Key {
  std::string& bytes;

  explicit Key(std::string& scratch) : bytes(scratch) { bytes.clear(); }

  Key& add(int64_t v) {
    bytes.append(reinterpret_cast<const char*>(&v), sizeof v);
    return *this;
  }
  Key& add(std::string_view s) {
    add(static_cast<int64_t>(s.size()));
    bytes += s;
    return *this;
  }
  Key& add(const std::string& s) { return add(std::string_view(s)); }
  template <class T>
  Key& list(const std::vector<T>& values) {
    add(static_cast<int64_t>(values.size()));
    for (const T& v : values) add(static_cast<int64_t>(v));
    return *this;
  }
  Key& add(const IndexSet& set) {
    add(static_cast<int64_t>(set.runs().size()));
    for (const Run& r : set.runs()) add(r.begin).add(r.end);
    return *this;
  }
  Key& add(const Attr& attr) {
    add(static_cast<int64_t>(attr.index()));
    std::visit(
        [&](const auto& v) {
          using T = std::decay_t<decltype(v)>;
          if constexpr (std::is_same_v<T, std::string>) {
            add(std::string_view(v));
          } else if constexpr (std::is_same_v<T, std::vector<int64_t>>) {
            list(v);
          } else if constexpr (std::is_same_v<T, std::vector<double>>) {
            add(static_cast<int64_t>(v.size()));
            bytes.append(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(double));
          } else if constexpr (std::is_same_v<T, double>) {
            bytes.append(reinterpret_cast<const char*>(&v), sizeof v);
          } else if constexpr (!std::is_same_v<T, std::monostate>) {
            add(static_cast<int64_t>(v));
          }
        },
        attr);
    return *this;
  }
  Key& add(const Tensor& t) { return list(t.shape).add(t.dtype).add(t.element_bytes).add(int64_t{t.requires_grad}); }
  Key& add(const OpConfig& c) {
    add(static_cast<int64_t>(c.cuts.size()));
    for (const FactorCut& f : c.cuts) {
      add(f.factor)
          .add(int64_t{f.cut.tiles})
          .add(int64_t{f.cut.chunks})
          .list(f.cut.bounds)
          .add(int64_t{f.cut.fed})
          .add(int64_t{f.cut.zigzag})
          .list(f.cut.radix);
    }
    return list(c.devices).add(int64_t{c.replicas}).add(static_cast<int64_t>(c.keep));
  }
};

}  // namespace

LayoutCache::LayoutCache(const OpGraph& graph, const FedRows& rows, const CostModel& cost) : graph_(graph), rows_(rows), cost_(cost) {
  for (const Node& n : graph.nodes) {
    names_.insert(n.name);
    std::vector<TensorId> distinct;
    Key key(scratch_);
    key.add(static_cast<int64_t>(n.kind)).add(n.target).add(n.family).add(int64_t{n.sample_dim}).add(int64_t{n.no_grad});
    for (const auto& [name, attr] : n.attrs) key.add(name).add(attr);
    for (size_t i = 0; i < n.inputs.size(); ++i) {
      const auto seen = std::find(distinct.begin(), distinct.end(), n.inputs[i]);
      key.add(static_cast<int64_t>(seen - distinct.begin()));
      if (seen == distinct.end()) distinct.push_back(n.inputs[i]);
      const Tensor& t = graph.tensors[n.inputs[i]];
      key.add(t).add(static_cast<int64_t>(graph.nodes[t.producer].kind)).add(i < n.operand_names.size() ? n.operand_names[i] : "");
    }
    for (TensorId t : n.outputs) key.add(graph.tensors[t]);
    classes_.push_back(class_ids_.emplace(key.bytes, static_cast<int>(class_ids_.size())).first->second);
    distinct_.push_back(std::move(distinct));
  }
}

int LayoutCache::intern_tiling(const KnownTiling& tiling) {
  if (!tiling) return -1;
  Key key(scratch_);
  for (const auto& cut : tiling->cuts) {
    key.add(int64_t{cut.dim}).add(static_cast<int64_t>(cut.parts.size()));
    for (const auto& tile : cut.parts) {
      key.add(static_cast<int64_t>(tile.size()));
      for (const IndexSet& set : tile) key.add(set);
    }
  }
  key.add(int64_t{tiling->replicas}).list(tiling->devices);
  const auto [it, fresh] = tiling_ids_.try_emplace(key.bytes, static_cast<int>(tilings_.size()));
  if (fresh) tilings_.push_back(tiling);
  return it->second;
}

LayoutId LayoutCache::intern(Sharding layout) {
  Key key(scratch_);
  key.add(static_cast<int64_t>(layout.partial));
  for (const Coord& c : layout.coords) {
    key.add(static_cast<int64_t>(c.box.size()));
    for (const IndexSet& set : c.box) key.add(set);
    key.add(int64_t{c.chunk}).list(c.devices);
  }
  const auto [it, fresh] = layout_ids_.try_emplace(key.bytes, static_cast<int>(layouts_.size()));
  if (fresh) layouts_.push_back(std::make_shared<Sharding>(std::move(layout)));
  return it->second;
}

int LayoutCache::intern_ranks(const std::vector<int>& ranks) {
  Key key(scratch_);
  key.list(ranks);
  const auto [it, fresh] = rank_ids_.try_emplace(key.bytes, static_cast<int>(sets_.size()));
  if (fresh) sets_.push_back(std::make_shared<DeviceSet>(ranks));
  return it->second;
}

const LayoutCache::Exchange& LayoutCache::exchange(int ranks, const std::vector<const EdgeMove*>& moves) {
  Key key(scratch_);
  key.add(int64_t{ranks});
  for (const EdgeMove* m : moves) key.add(reinterpret_cast<intptr_t>(m));
  if (exchange_prices_.size() >= kMostExchanges) exchange_prices_.clear();
  const auto [it, fresh] = exchange_prices_.try_emplace(key.bytes);
  if (fresh) {
    Traffic traffic(cost_.machine());
    for (const EdgeMove* m : moves) traffic.add(*m->traffic);
    const Machine& machine = cost_.machine();
    it->second.price_ns = exchange_ns(machine, this->ranks(ranks), traffic);
    if (!machine.busy_speed.empty()) it->second.one_way = one_way(machine, this->ranks(ranks), traffic);
  }
  return it->second;
}

int64_t LayoutCache::reduce_price(int ranks, int64_t bytes, int at_once) {
  const auto [it, fresh] = reduce_prices_.try_emplace(Numbers{ranks, bytes, at_once, 0}, 0);
  if (fresh) it->second = movement_ns(cost_.machine(), "all_reduce", this->ranks(ranks), bytes, at_once);
  return it->second;
}

int LayoutCache::groups_at_once(const std::vector<int>& rank_sets) {
  Key key(scratch_);
  key.list(rank_sets);
  const auto [it, fresh] = at_once_.try_emplace(key.bytes, 0);
  if (fresh) {
    std::vector<std::vector<int>> groups;
    for (int id : rank_sets) groups.push_back(ranks(id));
    it->second = soap::groups_at_once(cost_.machine(), groups);
  }
  return it->second;
}

const std::vector<int64_t>& LayoutCache::update(const Tensor& tensor, LayoutId tiles) {
  const auto [it, fresh] = updates_.try_emplace(Numbers{tiles, tensor.element_bytes, 0, 0});
  if (fresh) {
    it->second.resize(rows_.size());
    for (const Coord& c : layout(tiles).coords) {
      for (int d : c.devices) it->second[d] += update_ns(cost_.machine(), d, volume(c.box) * tensor.element_bytes);
    }
  }
  return it->second;
}

const std::vector<int64_t>& LayoutCache::update_launches(LayoutId tiles) {
  const auto [it, fresh] = update_launches_.try_emplace(Numbers{tiles, 0, 0, 0});
  if (fresh) {
    it->second.resize(rows_.size());
    for (const Coord& c : layout(tiles).coords) {
      for (int d : c.devices) it->second[d] += update_launch_ns(cost_.machine());
    }
  }
  return it->second;
}

const std::vector<int64_t>& LayoutCache::stored(const Tensor& tensor, LayoutId tiles, bool trained) {
  const auto [it, fresh] = stored_.try_emplace(Numbers{tiles, tensor.element_bytes, int64_t{trained}, 0});
  if (fresh) {
    it->second.resize(rows_.size());
    for (const Coord& c : layout(tiles).coords) {
      for (int d : c.devices) it->second[d] += volume(c.box) * tensor.element_bytes * (trained ? 2 + kOptimizerCopies : 1);
    }
  }
  return it->second;
}

LayoutId LayoutCache::derived(NodeId store, LayoutId copies) {
  const Node& n = graph_.nodes[store];
  const bool used = n.kind == NodeKind::kParam && copies >= 0;
  Key key(scratch_);
  key.add(int64_t{used ? copies : -1}).list(graph_.output(n, 0).shape);
  const auto [it, fresh] = derived_.try_emplace(key.bytes, -1);
  if (fresh) it->second = intern(derived_storage(graph_.output(n, 0), used ? &layout(copies) : nullptr, static_cast<int>(rows_.size())));
  return it->second;
}

const EdgeMove* LayoutCache::edge(const Tensor& t, LayoutId tiles, LayoutId copies, bool gradient) {
  const Sharding &produced = layout(tiles), &read = layout(copies);
  const int64_t reduced = reduced_element_bytes(t, gradient ? Reduce::kSum : produced.partial);
  const auto [it, fresh] = edges_.try_emplace(Numbers{tiles, copies, (t.element_bytes << 1) | int64_t{gradient}, reduced});
  if (!fresh) return it->second.get();
  auto out = std::make_shared<EdgeMove>();
  const Machine& machine = cost_.machine();
  std::vector<char> from(rows_.size()), to(rows_.size()), takes_part(rows_.size());
  std::vector<Flow> list;  // where local work is counted
  Traffic traffic(machine);
  const VisitFlows visit = [&](std::span<const Flow> flows) {
    if (!machine.busy_speed.empty()) list.insert(list.end(), flows.begin(), flows.end());
    for (const Flow& x : flows) {
      from[x.from] = to[x.to] = 1;
      traffic.add(x.from, x.to, x.elements * t.element_bytes);
    }
  };
  const Movement m = gradient ? visit_grad_flows(produced, read, 0, visit) : visit_fill_flows(produced, read, 0, visit);
  out->pattern = m.pattern;
  out->local_ns = local_work_ns(machine, list, m.pattern, gradient ? read : produced, gradient ? produced : read, t.element_bytes);
  if (m.pattern != Pattern::kLocal) {
    for (int r : m.ranks) takes_part[r] = 1;
    const auto both = [&](const std::vector<char>& a, const std::vector<char>& b) {
      std::vector<int> devices;
      for (size_t d = 0; d < a.size(); ++d) {
        if (a[d] && b[d]) devices.push_back(static_cast<int>(d));
      }
      return &set(intern_ranks(devices));
    };
    out->senders = both(from, from);
    out->receivers = both(to, to);
    out->sending = both(from, takes_part);
    out->receiving = both(to, takes_part);
    out->ranks = intern_ranks(m.ranks);
    out->among = &set(out->ranks);
  }
  if (m.pattern == Pattern::kAllReduce) {
    std::vector<int> groups;
    for (const ReduceGroup& g : m.groups) {
      out->reduced.emplace_back(intern_ranks(g.ranks), g.elements * reduced);
      groups.push_back(out->reduced.back().first);
    }
    const int at_once = groups_at_once(groups);
    for (const auto& [ranks, bytes] : out->reduced) out->price_ns = std::max(out->price_ns, reduce_price(ranks, bytes, at_once));
  }
  if (m.pattern == Pattern::kExchange) {
    out->price_ns = exchange_ns(machine, ranks(out->ranks), traffic);
    if (!machine.busy_speed.empty()) out->one_way = one_way(machine, ranks(out->ranks), traffic);
    out->traffic.emplace(std::move(traffic));
  }
  it->second = std::move(out);
  return it->second.get();
}

const Fragment* LayoutCache::fragment(NodeId node, const Strategy& strategy, const std::vector<int>& placed, const std::vector<int>& shadow) {
  const std::string& name = graph_.nodes[node].name;
  Key key(scratch_);
  key.add(int64_t{classes_[node]}).list(placed).list(shadow);
  const auto end = strategy.nodes.end();
  auto sub = strategy.nodes.lower_bound(name);
  if (sub != end && sub->first == name) key.add((sub++)->second);
  inner_name_.assign(name).push_back('/');
  if (sub != end && sub->first < inner_name_) sub = strategy.nodes.lower_bound(inner_name_);
  for (; sub != end && sub->first.starts_with(inner_name_); ++sub) {
    key.add(std::string_view(sub->first).substr(name.size())).add(sub->second);
  }
  const auto it = fragments_.find(key.bytes);
  if (it != fragments_.end()) return it->second.get();
  std::string owned = key.bytes;  // building uses the scratch
  return fragments_.emplace(std::move(owned), build(node, strategy, placed, shadow)).first->second.get();
}

std::unique_ptr<Fragment> LayoutCache::build(NodeId node, const Strategy& strategy, const std::vector<int>& placed, const std::vector<int>& shadow) {
  const Node& source = graph_.nodes[node];
  const auto of = [&](const std::vector<int>& ids) {
    std::vector<KnownTiling> out;
    for (TensorId t : source.inputs) {
      const size_t at = std::find(distinct_[node].begin(), distinct_[node].end(), t) - distinct_[node].begin();
      out.push_back(ids[at] < 0 ? nullptr : tilings_[ids[at]]);
    }
    return out;
  };
  ResolvedNode r = resolve_node(graph_, source, strategy, rows_, of(placed), of(shadow));
  auto out = std::make_unique<Fragment>();
  for (const auto& t : r.placed) out->placed.push_back(intern_tiling(t));
  for (const auto& t : r.shadow) out->shadow.push_back(intern_tiling(t));
  Program p{.graph = std::move(r.inner.graph),
            .world_size = static_cast<int>(rows_.size()),
            .rows = rows_,
            .rules = std::move(r.inner.rules),
            .tilings = std::move(r.inner.tilings)};
  p.differentiable = differentiable_nodes(p.graph, p.rules);
  if (is_store(source)) {
    const auto own = strategy.nodes.find(source.name);
    out->tiles = {-1};
    if (own != strategy.nodes.end()) {
      out->tiles[0] = intern(configured_storage(source, p.rules[r.first], p.tilings[r.first], graph_.output(source, 0)));
      out->used_again = own->second.keep == Keep::kUse;
    }
    out->producers = {0};
    out->ops.push_back({.writes = {{FragmentTensor::Kind::kResult, 0}}});
    out->graph = std::move(p.graph);
    return out;
  }
  std::map<TensorId, FragmentTensor> known;
  for (size_t i = 0; i < source.inputs.size(); ++i) {
    const auto at = std::find(distinct_[node].begin(), distinct_[node].end(), source.inputs[i]) - distinct_[node].begin();
    known[r.operands[i]] = {FragmentTensor::Kind::kOperand, static_cast<int>(at)};
  }
  for (size_t i = 0; i < r.results.size(); ++i) {
    if (!known.emplace(r.results[i], FragmentTensor{FragmentTensor::Kind::kResult, static_cast<int>(i)}).second) {
      throw InternalError(fmt::format("[delta] {} ({}): two results are one tensor", source.name, source.target));
    }
  }
  std::vector<int64_t> forward, backward, again;  // of an operator, per device
  const bool launches = !cost_.machine().launch.empty();
  if (launches) out->launches.resize(rows_.size());
  if (launches) out->launches_again.resize(rows_.size());
  out->tiles.assign(r.results.size(), -1);
  out->producers.assign(r.results.size(), -1);
  for (NodeId id = r.first; id < static_cast<NodeId>(p.graph.nodes.size()); ++id) {
    const Node& n = p.graph.nodes[id];
    const Rule& rule = p.rules[id];
    const Tiling& tiling = p.tilings[id];
    const int index = static_cast<int>(out->ops.size());
    FragmentOp op{.computes = n.kind == NodeKind::kOp, .differentiable = p.differentiable[id] != 0};
    out->chunked = out->chunked || tiling.chunks() > 1;
    const bool writes = n.kind == NodeKind::kReturn && n.target == "buffer_write";
    const std::vector<std::vector<IndexSet>> sets = all_factor_sets(rule, tiling);
    for (size_t i = 0; i < n.inputs.size(); ++i) {
      OperandCopies copies = operand_copies(rule, tiling, static_cast<int>(i), p.graph.input(n, static_cast<int>(i)).shape, sets);
      op.reads.push_back({.tensor = known.at(n.inputs[i]),
                          .copies = intern(std::move(copies.sharding)),
                          .differentiable = rule.operands[i].differentiable && !writes && (n.kind == NodeKind::kReturn || op.differentiable)});
      if (op.reads.back().tensor.kind != FragmentTensor::Kind::kInner) out->operand_uses.emplace_back(index, static_cast<int>(i));
    }
    for (size_t k = 0; k < n.outputs.size(); ++k) {
      const LayoutId tiles = intern(result_sharding(rule, tiling, static_cast<int>(k), p.graph.output(n, static_cast<int>(k)).shape, sets));
      const auto it = known.find(n.outputs[k]);
      if (it == known.end()) {
        known[n.outputs[k]] = {FragmentTensor::Kind::kInner, static_cast<int>(out->inner.size())};
        out->inner.push_back({.tensor = n.outputs[k], .tiles = tiles, .producer = index});
      } else {
        out->tiles[it->second.index] = tiles;
        out->producers[it->second.index] = index;
      }
      op.writes.push_back(known.at(n.outputs[k]));
    }
    if (op.computes) {
      forward.assign(rows_.size(), 0);
      backward.assign(rows_.size(), 0);
      OpTime time;
      for (int tile = 0; tile < tiling.tiles() && !out->chunked; ++tile) {
        if (tile == 0 || !same_work(p, id, sets[tile - 1], sets[tile])) time = cost_.time(p, id, tile, 0);
        for (int d : tiling.devices_of(tile)) {
          forward[d] += cost_.machine().at_speed(d, time.forward_ns);
          backward[d] += cost_.machine().at_speed(d, time.backward_ns);
        }
      }
      const bool repeatable = op.differentiable && may_compute_again(n);
      again = backward;
      for (size_t d = 0; d < rows_.size() && repeatable; ++d) again[d] += forward[d];
      const OpTime queued = cost_.launch(p, id);
      for (int tile = 0; tile < tiling.tiles() && launches; ++tile) {
        for (int d : tiling.devices_of(tile)) {
          out->launches[d] += queued.forward_ns + queued.backward_ns;
          out->launches_again[d] += queued.forward_ns * (repeatable ? 2 : 1) + queued.backward_ns;
        }
      }
      op.forward = Spent(forward);
      op.backward = Spent(backward);
      op.again = Spent(again);
    }
    out->ops.push_back(std::move(op));
  }
  out->graph = std::move(p.graph);
  return out;
}

}  // namespace soap
