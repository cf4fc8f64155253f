#include "search/group_cost.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"
#include "sim/arrivals.h"
#include "sim/simulate.h"

namespace soap {
namespace {

struct Builder {
  LayoutCache& cache;
  const ManualPlanner& planner;
  const Strategy& strategy;
  const OpGraph& graph = cache.graph();
  int ranks = strategy.world_size;
  std::vector<const Fragment*> fragments = {};
  GroupCost out = {};

  int64_t fullest(const Tensor& t, LayoutId layout) {
    if (layout >= static_cast<LayoutId>(fullest_elements.size())) fullest_elements.resize(layout + 64, -1);
    int64_t& elements = fullest_elements[layout];
    if (elements < 0) {
      held.assign(ranks, 0);
      for (const Coord& c : cache.layout(layout).coords) {
        const int64_t of_part = volume(c.box);
        for (int d : c.devices) held[d] += of_part;
      }
      elements = *std::max_element(held.begin(), held.end());
    }
    return elements * t.element_bytes;
  }
  std::vector<int64_t> fullest_elements = {}, held = {};  // by layout, -1 where nobody has asked; of each rank

  void resolve() {
    fragments.resize(graph.nodes.size());
    std::vector<int> placed, shadow;
    for (const Node& n : graph.nodes) {
      placed.clear();
      shadow.clear();
      for (TensorId t : cache.distinct_inputs(n.id)) {
        const Tensor& tensor = graph.tensors[t];
        placed.push_back(fragments[tensor.producer]->placed[tensor.result]);
        shadow.push_back(fragments[tensor.producer]->shadow[tensor.result]);
      }
      fragments[n.id] = cache.fragment(n.id, strategy, placed, shadow);
      if (fragments[n.id]->chunked) user_error("[plan] {} is cut in time within a group", n.name);
    }
  }

  // Where a read tensor is from: tiles and, for a result of an operator, its node.
  struct Source {
    const Tensor* tensor = nullptr;
    LayoutId tiles = -1;
    bool moves = false;  // an operator's result or an input: what has been priced by store_parameters doesn't
  };
  Source source(const Node& n, const FragmentTensor& t) const {
    const Fragment& f = *fragments[n.id];
    if (t.kind == FragmentTensor::Kind::kInner) return {&f.graph.tensors[f.inner[t.index].tensor], f.inner[t.index].tiles, true};
    const TensorId id = t.kind == FragmentTensor::Kind::kResult ? n.outputs[t.index] : cache.distinct_inputs(n.id)[t.index];
    const Tensor& tensor = graph.tensors[id];
    const Node& producer = graph.nodes[tensor.producer];
    if (is_store(producer)) return {&tensor, -1, false};
    return {&tensor, fragments[producer.id]->tiles[tensor.result], true};
  }

  // Each distinct copy of a tensor is made once, by its first reader.
  void add_moves(const Node& n) {
    const Fragment& f = *fragments[n.id];
    GroupNode& cost = out.nodes[n.id];
    for (const FragmentOp& op : f.ops) {
      int before = -1;  // the ranks of the movement just before
      for (const FragmentRead& read : op.reads) {
        const Source from = source(n, read.tensor);
        if (!from.moves) before = -1;
        if (!from.moves || cache.layout(read.copies).coords.empty()) continue;
        const bool fed = read.tensor.kind == FragmentTensor::Kind::kOperand && graph.nodes[from.tensor->producer].kind == NodeKind::kFeed;
        if (fed) out.feeds.push_back({from.tensor->id, read.copies, n.id, fullest(*from.tensor, read.copies)});
        const auto key = std::pair(from.tensor, read.copies);
        Copy& copy = copies[key];
        if (!copy.known) {
          copy.known = true;
          const EdgeMove* fill = cache.edge(*from.tensor, from.tiles, read.copies, false);
          const bool moves = fill->pattern != Pattern::kLocal;
          if (moves) {
            cost.fill_ns += fill->price_ns;
            cost.fills.push_back(move_of(*fill));
            cost.fills.back().joins = before == fill->ranks;
            cost.fills.back().fed = fed;
          }
          before = moves ? fill->ranks : -1;
        }
        if (read.differentiable && from.tensor->requires_grad && !copy.gradient) {
          copy.gradient = true;
          const EdgeMove* back = cache.edge(*from.tensor, from.tiles, read.copies, true);
          if (back->pattern != Pattern::kLocal) {
            cost.gradient_ns += back->price_ns;
            cost.gradients.push_back(move_of(*back));
          }
        }
      }
    }
  }
  GroupMove move_of(const EdgeMove& m) {
    GroupMove out{.price_ns = m.price_ns, .exchange = m.pattern == Pattern::kExchange};
    if (!out.exchange) return out;
    const auto [load, fresh] = loads.emplace(&m, ExchangeLoad{});
    if (fresh) load->second = m.traffic->load(1);
    out.load = load->second;
    return out;
  }
  std::map<const EdgeMove*, ExchangeLoad> loads = {};
  struct Copy {
    bool known = false, gradient = false;
  };
  std::map<std::pair<const Tensor*, LayoutId>, Copy> copies = {};

  void add_computes(const Node& n) {
    const Fragment& f = *fragments[n.id];
    GroupNode& cost = out.nodes[n.id];
    cost.work = planner.sample_factor(n).empty() ? 0 : 1;  // done once, not by each micro-batch
    for (const Factor& factor : planner.rule(n).factors) cost.work *= static_cast<double>(std::max<int64_t>(factor.size, 1));
    if (const auto own = strategy.nodes.find(n.name); own != strategy.nodes.end()) cost.work /= own->second.num_tiles();
    if (!f.launches.empty()) {
      cost.launch_ns = *std::max_element(f.launches.begin(), f.launches.end());
      cost.launch_again_ns = *std::max_element(f.launches_again.begin(), f.launches_again.end());
    }
    for (const FragmentOp& op : f.ops) {
      if (!op.computes) continue;
      cost.forward.resize(ranks);
      cost.backward.resize(ranks);
      for (int d = 0; d < ranks; ++d) {
        cost.forward[d] += op.forward[d];
        cost.backward[d] += op.backward[d];
      }
    }
  }

  // -- what is held ----
  // Whether every device's copy is one stretch of a tile that it has.
  bool is_part(LayoutId tiles, LayoutId copies) const {
    const auto holds = [&](const Coord& copy, int d) {
      return std::any_of(cache.layout(tiles).coords.begin(), cache.layout(tiles).coords.end(), [&](const Coord& tile) {
        return std::count(tile.devices.begin(), tile.devices.end(), d) > 0 && covers(tile.box, copy.box) && is_stretch(copy.box, tile.box);
      });
    };
    return std::all_of(cache.layout(copies).coords.begin(), cache.layout(copies).coords.end(),
                       [&](const Coord& c) { return std::all_of(c.devices.begin(), c.devices.end(), [&](int d) { return holds(c, d); }); });
  }
  static bool covers(const Box& box, const Box& part) { return volume(intersect(box, part)) == volume(part); }

  // Of the tile `index` what a reader is given: itself, or a copy.
  int held_copy(int index, const Tensor& tensor, LayoutId tiles, LayoutId copies, const GroupRead& read) {
    const auto [it, fresh] = held_copies.emplace(std::pair(index, copies), index);
    if (!fresh || copies == tiles || cache.layout(copies).coords.empty()) return it->second;
    const bool moves = cache.edge(tensor, tiles, copies, false)->pattern != Pattern::kLocal;
    if (!moves && is_part(tiles, copies)) return index;
    GroupTensor copy{.node = read.node, .position = read.position, .bytes = fullest(tensor, copies), .source = index, .moved = moves};
    copy.returns = !moves || cache.edge(tensor, tiles, copies, true)->pattern != Pattern::kLocal;
    it->second = copy.root = static_cast<int>(out.tensors.size());
    out.tensors.push_back(std::move(copy));
    keep(index, {.node = read.node, .position = read.position, .moves = true});
    return it->second;
  }

  void keep(int index, GroupRead read) {
    const int root = out.tensors[index].root;
    out.tensors[index].reads.push_back(read);
    read.gradient = false;
    read.backward_bytes = 0;
    if (root >= 0 && root != index) out.tensors[root].reads.push_back(read);
  }

  void add_fed(const Node& n) {
    const Tensor& t = graph.output(n, 0);
    tile_of[&t] = static_cast<int>(out.tensors.size());
    out.tensors.push_back({.node = n.id, .bytes = fullest(t, fragments[n.id]->tiles[0]), .root = tile_of[&t], .fed = true});
  }

  void add_held(const Node& n) {
    const Fragment& f = *fragments[n.id];
    const int first_op = static_cast<int>(f.graph.nodes.size() - f.ops.size());
    out.nodes[n.id].position = out.positions;
    std::vector<int> inner(f.inner.size(), -1);
    for (size_t k = 0; k < f.ops.size(); ++k) {
      const FragmentOp& op = f.ops[k];
      const Node& made = f.ops.size() == 1 ? n : f.graph.nodes[first_op + k];
      const Rule own = f.ops.size() == 1 ? Rule{} : make_rule(f.graph, made, ranks);
      const Rule& rule = f.ops.size() == 1 ? planner.rule(n) : own;
      const int position = out.positions++;
      int viewed = -1;
      for (size_t i = 0; i < op.reads.size(); ++i) {
        const FragmentRead& read = op.reads[i];
        const Source from = source(n, read.tensor);
        const bool saved = op.differentiable && rule.operands[i].saved;
        out.nodes[n.id].keeps_operand = out.nodes[n.id].keeps_operand || saved;
        if (saved && !from.moves) saved_stores.insert(from.tensor);
        if (!from.moves) continue;
        int index = -1;
        if (read.tensor.kind == FragmentTensor::Kind::kInner)
          index = inner[read.tensor.index];
        else if (const auto it = tile_of.find(from.tensor); it != tile_of.end())
          index = it->second;
        if (index < 0) continue;  // a view of a parameter's
        GroupRead what{.node = n.id, .position = position, .saved = saved, .view = rule.view};
        what.gradient = read.differentiable && from.tensor->requires_grad;
        if (op.differentiable) what.backward_bytes = fullest(*from.tensor, read.copies) / from.tensor->element_bytes * rule.operands[i].backward_bytes_more;
        index = held_copy(index, *from.tensor, from.tiles, read.copies, what);
        keep(index, what);
        if (i == 0) viewed = out.tensors[index].root;
      }
      for (size_t r = 0; r < op.writes.size(); ++r) {
        const Source to = source(n, op.writes[r]);
        const int index = static_cast<int>(out.tensors.size());
        GroupTensor t{.node = n.id, .position = position, .bytes = fullest(*to.tensor, to.tiles), .root = rule.view && r == 0 ? viewed : index};
        if (op.differentiable) t.bytes_more = t.bytes / to.tensor->element_bytes * rule.results[r].saved_bytes_more;
        t.saved = op.differentiable && rule.results[r].saved && to.tensor->requires_grad;
        out.nodes[n.id].keeps_result = out.nodes[n.id].keeps_result || (op.differentiable && rule.results[r].saved);
        if (t.saved && t.root >= 0 && t.root != index) out.tensors[t.root].reads.push_back({.node = n.id, .position = position, .saved = true});
        out.tensors.push_back(std::move(t));
        if (op.writes[r].kind == FragmentTensor::Kind::kInner)
          inner[op.writes[r].index] = index;
        else
          tile_of[to.tensor] = index;
      }
    }
  }
  std::map<const Tensor*, int> tile_of = {};
  std::set<const Tensor*> saved_stores = {};
  std::map<std::pair<int, LayoutId>, int> held_copies = {};

  // visit(node, read, tensor) for every read of a tensor of the graph, in order.
  template <class Visit>
  void for_reads(const Visit& visit) const {
    for (const Node& n : graph.nodes) {
      for (const FragmentOp& op : fragments[n.id]->ops) {
        for (const FragmentRead& read : op.reads) {
          if (read.tensor.kind == FragmentTensor::Kind::kOperand) visit(n, read, graph.tensors[cache.distinct_inputs(n.id)[read.tensor.index]]);
        }
      }
    }
  }

  void add_parameters() {
    std::map<TensorId, size_t> index;
    for_reads([&](const Node& n, const FragmentRead& read, const Tensor& t) {
      const Node& store = graph.nodes[t.producer];
      if (!is_store(store)) return;
      const LayoutId tiles = cache.derived(store.id, read.copies);
      const auto [it, fresh] = index.emplace(t.id, out.parameters.size());
      if (fresh) {
        const auto& coords = cache.layout(tiles).coords;
        GroupParameter p{.node = store.id, .whole_bytes = numel(t.shape) * t.element_bytes, .element_bytes = t.element_bytes};
        p.reduced_element_bytes = reduced_element_bytes(t, Reduce::kSum);
        p.trained = store.kind == NodeKind::kParam && t.requires_grad;
        p.shape = coords.empty() ? t.shape : shape(coords.front().box);
        p.bytes = fullest(t, tiles);
        p.saved = saved_stores.count(&t) > 0;
        out.parameters.push_back(std::move(p));
      }
      GroupParameter& p = out.parameters[it->second];
      if (p.readers.empty() || p.readers.back() != n.id) p.readers.push_back(n.id);
      if (!p.trained || !read.differentiable) return;
      if (p.last < 0) p.last = n.id;
      p.alike = p.alike || cache.edge(t, tiles, read.copies, true)->pattern == Pattern::kAllReduce;
    });
  }

  // The samples' share of a replica's micro-batch is summed here; the sum over all is what the reader needs.
  void add_meetings() {
    for (const Node& n : graph.nodes) {
      const bool returns = n.kind == NodeKind::kReturn && n.target != "buffer_write" && n.sample_dim < 0;
      if (!returns && (n.kind != NodeKind::kOp || !planner.sample_factor(n).empty())) continue;
      for (TensorId t : cache.distinct_inputs(n.id)) {
        const Tensor& tensor = graph.tensors[t];
        const Node& producer = graph.nodes[tensor.producer];
        if (producer.kind != NodeKind::kOp || planner.sample_factor(producer).empty()) continue;
        out.meetings.push_back({producer.id, n.id, numel(tensor.shape) * tensor.element_bytes, returns && tensor.requires_grad});
      }
    }
    std::set<std::pair<TensorId, LayoutId>> spread;
    for_reads([&](const Node& n, const FragmentRead& read, const Tensor& t) {
      const Node& producer = graph.nodes[t.producer];
      if (producer.kind != NodeKind::kOp || !planner.sample_factor(producer).empty() || planner.sample_factor(n).empty()) return;
      if (!read.differentiable || !t.requires_grad || !spread.insert({t.id, read.copies}).second) return;
      out.meetings.push_back({producer.id, n.id, fullest(t, read.copies) / t.element_bytes * reduced_element_bytes(t, Reduce::kSum), true, true});
    });
  }

  void add_edges() {
    for_reads([&](const Node& n, const FragmentRead& read, const Tensor& t) {
      if (graph.nodes[t.producer].kind != NodeKind::kOp) return;
      const Sharding& tiles = cache.layout(fragments[t.producer]->tiles[t.result]);
      int64_t bytes = fullest(t, read.copies);
      if (tiles.partial != Reduce::kNone) bytes *= static_cast<int64_t>(tiles.coords.size());
      out.edges.push_back({t.id, t.producer, n.id, bytes, read.differentiable && t.requires_grad});
    });
  }
};

}  // namespace

GroupCost group_cost(LayoutCache& cache, const ManualPlanner& planner, const Strategy& strategy, bool held) {
  Builder b{.cache = cache, .planner = planner, .strategy = strategy};
  b.out.ranks = b.ranks;
  b.out.nodes.resize(b.graph.nodes.size());
  b.resolve();
  for (const Node& n : b.graph.nodes) {
    if (n.kind == NodeKind::kOp) b.add_computes(n);
    if (n.kind == NodeKind::kOp || n.kind == NodeKind::kReturn) b.add_moves(n);
    if (held && n.kind == NodeKind::kOp) b.add_held(n);
    if (held && n.kind == NodeKind::kFeed) b.add_fed(n);
  }
  b.add_parameters();
  b.add_edges();
  b.add_meetings();
  return std::move(b.out);
}

}  // namespace soap
