#include "sim/memory.h"

#include <algorithm>
#include <map>
#include <set>

#include "sim/arrivals.h"

namespace soap {
namespace {

using Key = std::pair<int, int>;  // (node, chunk) or (group, tag)

// [Note: two lives] What backward computes again (Program::regions) lives twice: until forward has read it, and from the step that computes it
// again. So does a copy that is filled without a movement from its readers' own region; every other copy is kept.
struct Life {
  int first = -1, second = -1;  // last steps
};

int64_t bytes_of(const Box& box, const Tensor& t) {
  return volume(box) * t.element_bytes;
}

struct Memory {
  const Program& p;
  const StepPieces& pieces;
  std::vector<MemoryCurve>* curves = nullptr;                    // when asked for: changes by kind, [device][step]
  Held kind = Held::kStored;                                     // of what is held from now on
  int end = 0, turn = 0;                                         // number of steps; of those before the first of backward
  std::map<Key, int> compute, compute_back, fill, refill;        // -> step
  std::map<Key, std::pair<int, int>> grad_fill;                  // (group, producer chunk) -> (step, item)
  std::map<Key, int> item_of_fill;                               // -> index in its step
  std::vector<std::vector<int64_t>> changes;                     // [device][step]: bytes that come; those that go, at the step after
  std::map<Key, int> forward_end, backward_end, backward_begin;  // of a copy, by its readers
  std::map<Key, std::set<int>> sums;                             // (group, coord) -> backward steps that add to its gradient
  std::map<Key, std::set<std::pair<int, int>>> views;            // (group, tag) -> (coord, device) that are parts of tiles
  std::map<Key, int> again, filled_again;                        // steps that make (node, chunk), (group, tag) again
  std::vector<std::map<int, Arrived>> arrivals;                  // [step][device]
  std::map<Key, int> again_end;                                  // of a copy that is made again, by its readers

  void hold(int device, int64_t bytes, int from, const Life& until, int again_at) {
    if (again_at > until.first) {
      hold(device, bytes, from, until.first);
      hold(device, bytes, again_at, until.second);
    } else {
      hold(device, bytes, from, std::max(until.first, until.second));
    }
  }

  void hold(int device, int64_t bytes, int from, int to) {
    if (bytes == 0 || to < from) return;
    changes[device][from] += bytes;
    changes[device][to + 1] -= bytes;
    if (!curves) return;
    (*curves)[device][from][static_cast<size_t>(kind)] += bytes;
    (*curves)[device][to + 1][static_cast<size_t>(kind)] -= bytes;
  }

  void index_steps() {
    end = static_cast<int>(p.steps.size());
    changes.assign(p.world_size, std::vector<int64_t>(end + 2));
    if (curves) curves->assign(p.world_size, MemoryCurve(end + 2));
    turn = end;
    for (int s = 0; s < end; ++s) {
      const Step& step = p.steps[s];
      if (step.kind != StepKind::kFill && step.kind != StepKind::kCompute) turn = std::min(turn, s);
      for (size_t i = 0; i < step.items.size(); ++i) {
        const Key key{step.items[i].id, step.items[i].chunk};
        switch (step.kind) {
          case StepKind::kCompute: compute[key] = s; break;
          case StepKind::kComputeBackward: compute_back[key] = s; break;
          case StepKind::kRefill: refill[key] = s; break;
          case StepKind::kGradFill: grad_fill[key] = {s, static_cast<int>(i)}; break;
          case StepKind::kFill:
            fill[key] = s;
            item_of_fill[key] = static_cast<int>(i);
            break;
        }
      }
    }
  }

  void stored() {
    for (const Node& n : p.graph.nodes) {
      if (n.kind == NodeKind::kOp || n.kind == NodeKind::kReturn) continue;
      const Tensor& t = p.graph.output(n, 0);
      const bool trained = n.kind == NodeKind::kParam && t.requires_grad;
      for (const Coord& c : p.tiles[t.id].coords) {
        for (int d : c.devices) {
          hold(d, bytes_of(c.box, t) * (trained ? 1 + kOptimizerCopies : 1), 0, end);
          if (!trained) continue;
          kind = Held::kGradients;
          hold(d, bytes_of(c.box, t), 0, p.interleaved ? end : turn - 1);  // the last step's gradient
          kind = Held::kStored;
        }
      }
    }
  }

  // Readers of copies: their last steps, and the first that makes a gradient. A view that reads lives on in its own readers (see `tiles`).
  void readers() {
    kind = Held::kGradients;
    for (size_t g = 0; g < p.groups.size(); ++g) {
      for (const Use& u : p.groups[g].uses) {
        const Node& n = p.graph.nodes[u.node];
        const Operand& operand = p.rules[u.node].operands[u.operand];
        const int chunks = p.tilings[u.node].chunks();
        for (size_t i = 0; i < u.coord_of.size(); ++i) {
          if (u.coord_of[i] < 0) continue;
          const Key key{static_cast<int>(g), p.groups[g].copies.coords[u.coord_of[i]].chunk};
          const int chunk = static_cast<int>(i) % chunks;
          const auto grow = [&](std::map<Key, int>& m, int step) {
            const auto [it, fresh] = m.emplace(key, step);
            if (!fresh) it->second = std::max(it->second, step);
          };
          grow(forward_end, n.kind == NodeKind::kReturn ? end : compute.at({u.node, chunk}));
          const auto back = compute_back.find({u.node, chunk});
          if (n.kind == NodeKind::kReturn && p.groups[g].grad) backward_begin.emplace(key, fill.at(key) + 1);
          if (back == compute_back.end()) continue;
          for (int d : p.groups[g].copies.coords[u.coord_of[i]].devices) {
            hold(d, volume(p.groups[g].copies.coords[u.coord_of[i]].box) * operand.backward_bytes_more, back->second, back->second);
          }
          const bool inner = is_remade(static_cast<int>(g), u.coord_of[i], u.node);
          if (operand.saved && !keeps_its_own(u, static_cast<int>(i) / chunks, chunk)) grow(inner ? again_end : backward_end, back->second);
          if (p.regions[u.node] >= 0 && !inner) grow(backward_end, again.at({u.node, chunk}));
          if (!p.groups[g].grad) continue;
          sums[{static_cast<int>(g), u.coord_of[i]}].insert(back->second);
          const int begin = back->second + (p.rules[u.node].view ? 1 : 0);  // a view's gradient is a view too
          const auto [it, fresh] = backward_begin.emplace(key, begin);
          if (!fresh) it->second = std::min(it->second, begin);
        }
      }
    }
  }

  void find_views() {
    for (const auto& [key, step] : fill) {
      const CopyGroup& g = p.groups[key.first];
      if (refill.count(key)) continue;  // has memory of its own, to be given back
      std::map<std::pair<int, int>, std::vector<const Flow*>> arriving;
      for (const Flow& x : pieces[step][item_of_fill.at(key)].pieces) arriving[{x.dst, x.to}].push_back(&x);
      for (const auto& [copy, list] : arriving) {
        const Flow& x = *list[0];
        const Box& box = g.copies.coords[x.dst].box;
        if (list.size() > 1 || x.from != x.to || x.elements != volume(box)) continue;
        if (is_stretch(box, p.tiles[g.tensor].coords[x.src].box)) views[key].insert(copy);
      }
    }
  }

  // Whether a copy that `reader` reads is made again together with the reader: of their own region, without a movement.
  bool is_remade(int group, int coord, NodeId reader) const {
    const NodeId producer = p.graph.tensors[p.groups[group].tensor].producer;
    return p.regions[reader] >= 0 && p.regions[producer] == p.regions[reader] && !moves({group, p.groups[group].copies.coords[coord].chunk});
  }

  // Before the first backward step that needs it: its own, or that of a reader of its region. Readers come later in the graph.
  void find_again() {
    for (auto n = p.graph.nodes.rbegin(); n != p.graph.nodes.rend(); ++n) {
      if (p.regions[n->id] < 0) continue;
      for (int c = 0; c < p.tilings[n->id].chunks(); ++c) again[{n->id, c}] = compute_back.at({n->id, c});
      for (TensorId t : n->outputs) {
        for (int g : p.groups_of[t]) {
          for (const Use& u : p.groups[g].uses) {
            const int chunks = p.tilings[u.node].chunks();
            for (size_t i = 0; i < u.coord_of.size(); ++i) {
              const int copy = u.coord_of[i];
              if (copy < 0 || !is_remade(g, copy, u.node)) continue;
              const Key key{g, p.groups[g].copies.coords[copy].chunk};
              const int at = again.at({u.node, static_cast<int>(i) % chunks});
              filled_again[key] = filled_again.count(key) ? std::min(filled_again[key], at) : at;
              for (const Flow& x : pieces[fill.at(key)][item_of_fill.at(key)].pieces) {
                int& mine = again.at({n->id, p.tiles[t].coords[x.src].chunk});
                if (x.dst == copy) mine = std::min(mine, at);
              }
            }
          }
        }
      }
    }
  }

  bool moves(const Key& key) const { return pieces[fill.at(key)][item_of_fill.at(key)].movement.pattern != Pattern::kLocal; }

  static int at(const std::map<Key, int>& m, const Key& key) {
    const auto it = m.find(key);
    return it == m.end() ? -1 : it->second;
  }

  // The input that a tile pads by itself, before a window slides over it; backward reads it in its stead. Torch pads both ends alike, and maxima by zeros
  // would be wrong where a tile ends (torch_soap/rewrite/window.py).
  int64_t padded_bytes(const Node& n, int tile, int chunk) const {
    const bool convolution = n.target == "conv1d" || n.target == "conv2d" || n.target == "conv3d";
    if (!convolution && !n.target.starts_with("max_pool")) return 0;
    const Tensor& x = p.graph.input(n, 0);
    const auto& dims = p.rules[n.id].operands[0].dims;
    const auto sets = factor_sets(p.rules[n.id], p.tilings[n.id], tile, chunk);
    const Box box = box_of(dims, p.rules[n.id], x.shape, sets);
    if (volume(box) == 0) return 0;
    bool pads = false;
    int64_t elements = 1;
    for (size_t d = 0; d < box.size(); ++d) {
      int64_t size = box[d].size();
      if (dims[d].map && dims[d].map->kind == IndexMap::Kind::kWindow) {
        const IndexMap& w = *dims[d].map;
        const IndexSet& out = sets[dims[d].factors[0]];
        const int64_t low = out.runs().front().begin * w.stride - w.pad,
                      high = (out.runs().back().end - 1) * w.stride - w.pad + w.dilation * (w.kernel - 1) + 1;
        const int64_t before = std::min(std::max<int64_t>(-low, 0), high - low), after = high - low - before - size;
        pads = pads || (convolution ? before != after : before + after > 0);
        size = high - low;
      }
      elements *= size;
    }
    return pads ? elements * x.element_bytes : 0;
  }

  // The input that linear and recurrent layers bring in order first, where it comes transposed.
  int64_t ordered_bytes(const Node& n, int tile, int chunk) const {
    if (n.target != "linear" && !n.target.ends_with("_layer")) return 0;
    const Node& producer = p.graph.nodes[p.graph.tensors[n.inputs[0]].producer];
    const Tensor& x = p.graph.input(n, 0);
    if (producer.target != "permute" || x.shape.size() < 3) return 0;
    return bytes_of(box_of(p.rules[n.id].operands[0].dims, p.rules[n.id], x.shape, factor_sets(p.rules[n.id], p.tilings[n.id], tile, chunk)), x);
  }

  // Whether a tile makes a copy of operand 0 by itself, which backward reads in its stead.
  bool keeps_its_own(const Use& use, int tile, int chunk) const {
    const Node& n = p.graph.nodes[use.node];
    return use.operand == 0 && (padded_bytes(n, tile, chunk) > 0 || ordered_bytes(n, tile, chunk) > 0);
  }

  void own_copies() {
    kind = Held::kCopies;
    for (const auto& [key, back] : compute_back) {
      const Tiling& tiling = p.tilings[key.first];
      for (int tile = 0; tile < tiling.tiles(); ++tile) {
        const Node& n = p.graph.nodes[key.first];
        const int64_t bytes = padded_bytes(n, tile, key.second) + ordered_bytes(n, tile, key.second);
        for (int d : tiling.devices_of(tile)) hold(d, bytes, compute.at(key), Life{compute.at(key), back}, at(again, key));
      }
    }
  }

  // From the last node to the first, so that all readers of a tensor are known before it.
  void values() {
    kind = Held::kTiles;
    std::map<Key, Life> lives;  // of copies
    for (const auto& [key, step] : fill) lives[key] = {std::max({step, at(forward_end, key), at(backward_end, key)}), at(again_end, key)};
    for (auto n = p.graph.nodes.rbegin(); n != p.graph.nodes.rend(); ++n) {
      const Rule& rule = p.rules[n->id];
      for (size_t r = 0; r < n->outputs.size(); ++r) {
        const Tensor& t = p.graph.tensors[n->outputs[r]];
        std::map<int, Life> last;  // by chunk
        for (int g : p.groups_of[t.id]) {
          for (auto f = fill.lower_bound({g, 0}); f != fill.end() && f->first.first == g; ++f) {
            for (const Flow& x : pieces[f->second][item_of_fill.at(f->first)].pieces) {
              Life& until = last[p.tiles[t.id].coords[x.src].chunk];
              until.first = std::max(until.first, f->second);
              const auto v = views.find(f->first);
              if (v == views.end() || !v->second.count({x.dst, x.to})) continue;
              const Life& life = lives.at(f->first);
              until.first = std::max(until.first, life.first);
              until.second = std::max(until.second, life.second);
            }
          }
        }
        if (n->kind != NodeKind::kOp) continue;
        for (const Coord& c : p.tiles[t.id].coords) {
          const int made = compute.at({n->id, c.chunk}), back = at(compute_back, {n->id, c.chunk});
          const int again_at = at(again, {n->id, c.chunk});
          Life until = last.count(c.chunk) ? last.at(c.chunk) : Life{};
          until.first = std::max(made, until.first);
          if (rule.results[r].saved) until.second = std::max(until.second, back);
          for (int d : c.devices) {
            if (!rule.view) hold(d, bytes_of(c.box, t), made, until, again_at);
            hold(d, volume(c.box) * rule.results[r].saved_bytes_more, made, Life{made, back}, again_at);
          }
          if (rule.view) keep_viewed(*n, c.chunk, until, lives);
        }
      }
    }
    kind = Held::kCopies;
    for (const auto& [key, until] : lives) copies(key, until);
  }

  // What a view looks at lives as long as the view.
  void keep_viewed(const Node& view, int chunk, const Life& until, std::map<Key, Life>& lives) const {
    for (int g : p.groups_of[view.inputs[0]]) {
      for (const Use& u : p.groups[g].uses) {
        if (u.node != view.id || u.operand != 0) continue;
        const int chunks = p.tilings[view.id].chunks();
        for (size_t i = chunk; i < u.coord_of.size(); i += chunks) {
          if (u.coord_of[i] < 0) continue;
          Life& last = lives.at({g, p.groups[g].copies.coords[u.coord_of[i]].chunk});
          last.first = std::max(last.first, until.first);
          int& end_again = is_remade(g, u.coord_of[i], view.id) ? last.second : last.first;
          end_again = std::max(end_again, until.second);
        }
      }
    }
  }

  void copies(const Key& key, const Life& until) {
    const CopyGroup& g = p.groups[key.first];
    const Tensor& t = p.graph.tensors[g.tensor];
    const auto v = views.find(key);
    const int made = fill.at(key), again = at(refill, key);
    for (size_t j = 0; j < g.copies.coords.size(); ++j) {
      const Coord& c = g.copies.coords[j];
      if (c.chunk != key.second) continue;
      for (int d : c.devices) {
        if (v != views.end() && v->second.count({static_cast<int>(j), d})) continue;
        const int64_t bytes = bytes_of(c.box, t);
        if (const auto received = arrivals[made].find(d);
            again < 0 && received != arrivals[made].end() && received->second.views.count({key.first, static_cast<int>(j)})) {
          received->second.end = std::max({received->second.end, until.first, until.second});
          continue;
        }
        if (again >= 0 && at(forward_end, key) < again) {
          hold(d, bytes, made, at(forward_end, key));
          hold(d, bytes, again, std::max(until.first, until.second));
        } else {
          hold(d, bytes, made, until, at(filled_again, key));
        }
      }
    }
  }

  void gradients() {
    kind = Held::kGradients;
    std::map<std::pair<int, int>, int64_t> new_sums;  // (device, step)
    for (size_t g = 0; g < p.groups.size(); ++g) {
      const CopyGroup& group = p.groups[g];
      if (!group.grad) continue;
      const Tensor& t = p.graph.tensors[group.tensor];
      const Node& producer = p.graph.nodes[t.producer];
      std::map<std::pair<int, int>, int> leaves;  // copy (coord, device) -> last step that brings it home
      struct Arrival {
        int copy = -1;  // the one that is this tile's gradient, or has it as one stretch
        bool part = false;
        int step = -1;
        bool reduced = false;
      };
      std::map<std::pair<int, int>, Arrival> tiles;
      for (auto it = grad_fill.lower_bound({static_cast<int>(g), 0}); it != grad_fill.end() && it->first.first == static_cast<int>(g); ++it) {
        const MovedItem& moved = pieces[it->second.first][it->second.second];
        const auto& list = moved.pieces;
        std::map<std::pair<int, int>, int> arriving;
        for (const Flow& x : list) ++arriving[{x.dst, x.to}];
        for (const Flow& x : list) {
          int& last = leaves[{x.src, x.from}];
          last = std::max(last, it->second.first);
          const Box &tile = p.tiles[t.id].coords[x.dst].box, &copy = group.copies.coords[x.src].box;
          const bool whole = arriving[{x.dst, x.to}] == 1 && x.from == x.to && x.elements == volume(tile);
          const bool part = whole && x.elements < volume(copy) && is_stretch(tile, copy);
          const bool same = part || (whole && x.elements == volume(copy));
          tiles[{x.dst, x.to}] = {same ? x.src : -1, part, it->second.first, moved.movement.pattern == Pattern::kAllReduce};
        }
      }
      std::set<std::pair<int, int>> shared;  // copies whose gradient is a tile's
      for (const auto& [tile, from] : tiles) {
        const auto [coord, device] = tile;
        const Coord& c = p.tiles[t.id].coords[coord];
        int begin = from.step;
        const int until = producer.kind == NodeKind::kOp ? at(compute_back, {producer.id, c.chunk}) : end;
        if (from.part) {
          int& last = leaves.at({from.copy, device});
          last = std::max(last, until);
          continue;
        }
        if (from.copy >= 0) {
          shared.insert({from.copy, device});
          if (from.reduced) hold(device, bytes_of(c.box, t), from.step, from.step);  // the sum, beside what is summed
          begin = at(backward_begin, {static_cast<int>(g), group.copies.coords[from.copy].chunk});
          if (begin < 0) begin = from.step;
        }
        hold(device, bytes_of(c.box, t), std::min(begin, end), until);
      }
      for (const auto& [copy, last] : leaves) {
        const auto added = sums.find({static_cast<int>(g), copy.first});
        if (added != sums.end()) {
          const int64_t bytes = bytes_of(group.copies.coords[copy.first].box, t);
          for (auto s = std::next(added->second.begin()); s != added->second.end(); ++s) {
            hold(copy.second, bytes, *s, *s);
            if (s != std::next(added->second.begin())) continue;
            int64_t& largest = new_sums[{copy.second, *s}];  // one after the other
            largest = std::max(largest, bytes);
          }
        }
        if (shared.count(copy)) continue;
        const Coord& c = group.copies.coords[copy.first];
        const int begin = at(backward_begin, {static_cast<int>(g), c.chunk});
        hold(copy.second, bytes_of(c.box, t), begin < 0 ? last : std::min(begin, last), last);
      }
    }
    for (const auto& [at, bytes] : new_sums) hold(at.first, bytes, at.second, at.second);
  }

  // What an exchange sends and receives: sent things until they are sent, what came until it is put together, or as long as something views it.
  void moving() {
    for (int s = 0; s < end; ++s) {
      for (const auto& [device, a] : arrivals[s]) {
        kind = Held::kMoving;
        hold(device, std::max<int64_t>(a.sent - a.made, 0), s, s);
        const bool viewed = a.end >= 0 || (p.steps[s].kind == StepKind::kGradFill && !a.views.empty());
        if (viewed) kind = Held::kCopies;
        int64_t gradients = 0;
        if (p.steps[s].kind == StepKind::kGradFill) {
          for (const auto& [group, coord] : a.views)
            gradients += bytes_of(p.tiles[p.groups[group].tensor].coords[coord].box, p.graph.tensors[p.groups[group].tensor]);
        }
        hold(device, std::max<int64_t>(a.bytes - gradients, 0), s, std::max(s, a.end));
      }
    }
  }
};

Memory filled(const Program& program, const StepPieces& pieces, const Machine& machine, std::vector<MemoryCurve>* curves) {
  Memory m{.p = program, .pieces = pieces, .curves = curves, .arrivals = find_arrivals(program, pieces, machine)};
  m.index_steps();
  m.stored();
  m.find_views();
  m.find_again();
  m.readers();
  m.own_copies();
  m.values();
  m.gradients();
  m.moving();
  return m;
}

}  // namespace

StepPieces step_pieces(const Program& p) {
  StepPieces out(p.steps.size());
  for (size_t s = 0; s < p.steps.size(); ++s) {
    const Step& step = p.steps[s];
    if (step.kind == StepKind::kCompute || step.kind == StepKind::kComputeBackward) continue;
    for (const StepItem& item : step.items) {
      Flows flows = item_flows(p, step.kind, item);
      out[s].push_back({std::move(flows.list), std::move(flows.movement)});
    }
  }
  return out;
}

std::vector<int64_t> peak_memory(const Program& program, const StepPieces& pieces, const Machine& machine) {
  const Memory m = filled(program, pieces, machine, nullptr);
  std::vector<int64_t> peaks;
  for (const auto& changes : m.changes) {
    int64_t now = 0, peak = 0;
    for (int64_t c : changes) peak = std::max(peak, now += c);
    peaks.push_back(peak);
  }
  return peaks;
}

std::vector<MemoryCurve> memory_curves(const Program& program, const StepPieces& pieces, const Machine& machine) {
  std::vector<MemoryCurve> curves;
  filled(program, pieces, machine, &curves);
  for (MemoryCurve& curve : curves) {
    for (size_t s = 1; s < curve.size(); ++s) {
      for (int k = 0; k < kHeldKinds; ++k) curve[s][k] += curve[s - 1][k];
    }
    curve.pop_back();
  }
  return curves;
}

}  // namespace soap
