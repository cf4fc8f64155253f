#include "search/group_cost.h"

#include <algorithm>
#include <map>

#include "base/error.h"
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

  int64_t fullest(const Tensor& t, LayoutId layout) const {
    std::vector<int64_t> held(ranks);
    for (const Coord& c : cache.layout(layout).coords) {
      for (int d : c.devices) held[d] += volume(c.box) * t.element_bytes;
    }
    return *std::max_element(held.begin(), held.end());
  }

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
      for (const FragmentRead& read : op.reads) {
        const Source from = source(n, read.tensor);
        if (!from.moves || cache.layout(read.copies).coords.empty()) continue;
        const auto key = std::pair(from.tensor, read.copies);
        Copy& copy = copies[key];
        const bool fresh = copy.first < 0;
        if (fresh) {
          copy.first = n.id;
          const EdgeMove* fill = cache.edge(*from.tensor, from.tiles, read.copies, false);
          copy.moved = fill->pattern != Pattern::kLocal;
          if (copy.moved) cost.fill_ns += fill->price_ns;
          copy.bytes = copy.moved ? fullest(*from.tensor, read.copies) : 0;
        }
        if (read.differentiable && from.tensor->requires_grad && !copy.gradient) {
          copy.gradient = true;
          const EdgeMove* back = cache.edge(*from.tensor, from.tiles, read.copies, true);
          if (back->pattern != Pattern::kLocal) cost.gradient_ns += back->price_ns;
        }
      }
    }
  }
  struct Copy {
    NodeId first = -1;
    bool moved = false, gradient = false, saved = false;
    int64_t bytes = 0;
  };
  std::map<std::pair<const Tensor*, LayoutId>, Copy> copies = {};

  void add_computes(const Node& n) {
    const Fragment& f = *fragments[n.id];
    GroupNode& cost = out.nodes[n.id];
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

  // What backward reads or begins its graph with, counted where it was made: a result once, a copy that was moved once. A view is what it is a view of.
  void add_saved() {
    std::vector<char> kept(graph.tensors.size());
    const auto keep = [&](const Node& n, size_t operand) {
      const FragmentOp& op = fragments[n.id]->ops.front();
      if (operand < op.reads.size() && op.reads[operand].tensor.kind == FragmentTensor::Kind::kOperand) {
        const auto copy = copies.find({&graph.tensors[n.inputs[operand]], op.reads[operand].copies});
        if (copy != copies.end() && copy->second.moved) {
          copy->second.saved = true;
          return;
        }
      }
      kept[n.inputs[operand]] = 1;
    };
    for (auto n = graph.nodes.rbegin(); n != graph.nodes.rend(); ++n) {
      if (n->kind != NodeKind::kOp) continue;
      const Fragment& f = *fragments[n->id];
      const Rule& rule = planner.rule(*n);
      GroupNode& cost = out.nodes[n->id];
      const bool differentiable = std::any_of(f.ops.begin(), f.ops.end(), [](const FragmentOp& op) { return op.differentiable; });
      for (size_t r = 0; r < n->outputs.size(); ++r) {
        const Tensor& t = graph.output(*n, static_cast<int>(r));
        if (rule.results[r].saved && differentiable && t.requires_grad) kept[t.id] = 1;
        cost.keeps_result = cost.keeps_result || (rule.results[r].saved && differentiable);
        if (rule.view && r == 0) {
          if (kept[t.id] != 0) keep(*n, 0);
          continue;
        }
        const int64_t bytes = fullest(t, f.tiles[r]);
        cost.result_bytes += bytes;
        if (kept[t.id] != 0) cost.saved_bytes += bytes;
        if (differentiable) cost.saved_bytes += bytes / t.element_bytes * rule.results[r].saved_bytes_more;
      }
      for (const FragmentInner& inner : f.inner) {  // what an expansion computes on the way
        const Tensor& t = f.graph.tensors[inner.tensor];
        if (t.requires_grad) cost.saved_bytes += fullest(t, inner.tiles);
      }
      for (size_t i = 0; i < n->inputs.size() && differentiable; ++i) {
        if (!rule.operands[i].saved) continue;
        keep(*n, i);
        cost.keeps_operand = true;
      }
    }
    for (const auto& [key, copy] : copies) {
      if (copy.moved && copy.saved) out.nodes[copy.first].copied_bytes += copy.bytes;
    }
  }

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
        out.parameters.push_back(std::move(p));
      }
      GroupParameter& p = out.parameters[it->second];
      if (p.readers.empty() || p.readers.back() != n.id) p.readers.push_back(n.id);
      if (!p.trained || !read.differentiable) return;
      if (p.last < 0) p.last = n.id;
      p.alike = p.alike || cache.edge(t, tiles, read.copies, true)->pattern == Pattern::kAllReduce;
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

GroupCost group_cost(LayoutCache& cache, const ManualPlanner& planner, const Strategy& strategy) {
  Builder b{.cache = cache, .planner = planner, .strategy = strategy};
  b.out.ranks = b.ranks;
  b.out.nodes.resize(b.graph.nodes.size());
  b.resolve();
  for (const Node& n : b.graph.nodes) {
    if (n.kind == NodeKind::kOp) b.add_computes(n);
    if (n.kind == NodeKind::kOp || n.kind == NodeKind::kReturn) b.add_moves(n);
  }
  b.add_saved();
  b.add_parameters();
  b.add_edges();
  return std::move(b.out);
}

}  // namespace soap
