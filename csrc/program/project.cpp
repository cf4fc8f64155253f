#include "program/project.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"
#include "program/project_rules.h"

namespace soap {
namespace {

struct Projector {
  const Program& p;
  RankProgram out;
  std::map<std::pair<TensorId, int>, int> tile_values;  // (tensor, coord)
  std::map<std::pair<int, int>, int> copy_values;       // (group, coord)
  std::vector<char> transparent;                        // groups whose copies here are tiles here

  int rank() const { return out.rank; }

  void make_values() {
    for (const Tensor& t : p.graph.tensors) {
      const Sharding& s = p.tiles[t.id];
      for (size_t k = 0; k < s.coords.size(); ++k) {
        if (!holds(s.coords[k], rank())) continue;
        tile_values[{t.id, static_cast<int>(k)}] = static_cast<int>(out.values.size());
        out.values.push_back({.tensor = t.id, .box = s.coords[k].box, .coord = static_cast<int>(k), .grad = t.requires_grad});
      }
    }
    transparent.resize(p.groups.size());
    for (size_t g = 0; g < p.groups.size(); ++g) {
      const CopyGroup& group = p.groups[g];
      const auto alias = agreed_aliases(p, group, rank());
      transparent[g] = alias.has_value();
      for (size_t j = 0; j < group.copies.coords.size(); ++j) {
        const Coord& c = group.copies.coords[j];
        if (!holds(c, rank())) continue;
        if (alias) {
          copy_values[{static_cast<int>(g), static_cast<int>(j)}] = tile_values.at({group.tensor, alias->at(static_cast<int>(j))});
          continue;
        }
        copy_values[{static_cast<int>(g), static_cast<int>(j)}] = static_cast<int>(out.values.size());
        out.values.push_back({.tensor = group.tensor, .box = c.box, .group = static_cast<int>(g), .coord = static_cast<int>(j), .grad = group.grad});
      }
    }
  }

  // The part of one item that concerns this rank.
  Transfer transfer(StepKind kind, const StepItem& item) const {
    const CopyGroup& g = p.groups[item.id];
    const bool back = kind == StepKind::kGradFill;
    const auto pieces = item_pieces(p, kind, item);
    const Movement m = item_movement(p, kind, item, pieces);
    const Sharding &from = back ? g.copies : p.tiles[g.tensor], &to = back ? p.tiles[g.tensor] : g.copies;
    Transfer t{.item = item, .pattern = m.pattern, .reduce = back ? Reduce::kSum : from.partial, .ranks = m.ranks, .elements = m.elements};
    if (m.pattern == Pattern::kAllReduce) {
      const ReduceGroup* group = m.group_of(rank());
      t.ranks = group ? group->ranks : std::vector<int>{};
      t.elements = group ? group->elements : 0;
    }
    const auto value = [&](bool copy, int coord) { return copy ? copy_values.at({item.id, coord}) : tile_values.at({g.tensor, coord}); };
    std::set<int> results;
    for (const Piece& x : pieces) {
      if (x.from != rank() && x.to != rank()) continue;
      Move move{.elements = volume(x.box)};
      if (x.from == rank()) {
        move.src = value(back, x.src);
        move.src_box = positions(x.box, from.coords[x.src].box);
      }
      if (x.to == rank()) {
        move.dst = value(!back, x.dst);
        move.dst_box = positions(x.box, to.coords[x.dst].box);
        results.insert(move.dst);
      }
      move.send = x.to != rank();
      move.peer = move.send ? x.to : x.from == rank() ? -1 : x.from;
      t.moves.push_back(std::move(move));
    }
    // Copies that nothing reaches (empty boxes) are completed here too.
    if (!back) {
      for (size_t j = 0; j < g.copies.coords.size(); ++j) {
        const auto it = copy_values.find({item.id, static_cast<int>(j)});
        if (it != copy_values.end() && g.copies.coords[j].chunk == item.chunk && !transparent[item.id]) results.insert(it->second);
      }
    }
    t.results.assign(results.begin(), results.end());
    return t;
  }

  Instruction movement(int step) const {
    static const std::map<StepKind, InstructionKind> kinds{
        {StepKind::kFill, InstructionKind::kFill}, {StepKind::kGradFill, InstructionKind::kGradFill}, {StepKind::kRefill, InstructionKind::kRefill}};
    Instruction out{.kind = kinds.at(p.steps[step].kind), .step = step};
    std::set<int> ranks;
    for (const StepItem& item : p.steps[step].items) {
      Transfer t = transfer(p.steps[step].kind, item);
      if (transparent[item.id]) {
        // The local ends are one value: only what goes to other ranks remains.
        std::erase_if(t.moves, [](const Move& m) { return m.peer < 0; });
        t.results.clear();
      }
      // One exchange per step, so all of its ranks must see the same union, also of items that don't concern this one.
      if (t.pattern == Pattern::kExchange) ranks.insert(t.ranks.begin(), t.ranks.end());
      const bool takes_part = t.pattern != Pattern::kLocal && std::count(t.ranks.begin(), t.ranks.end(), rank());
      if (!takes_part && t.moves.empty() && t.results.empty()) continue;
      out.transfers.push_back(std::move(t));
    }
    if (ranks.count(rank())) out.ranks.assign(ranks.begin(), ranks.end());
    return out;
  }

  // A fill of which this rank moves nothing but parts of what it stores.
  bool from_own_stores(const Step& step) const {
    return step.kind == StepKind::kFill && std::all_of(step.items.begin(), step.items.end(), [&](const StepItem& item) {
             const CopyGroup& g = p.groups[item.id];
             if (!is_store(p.graph.nodes[p.graph.tensors[g.tensor].producer]) || g.keep == Keep::kUse) return false;
             const auto pieces = item_pieces(p, step.kind, item);
             const Movement m = item_movement(p, step.kind, item, pieces);
             return m.pattern == Pattern::kLocal || !std::count(m.ranks.begin(), m.ranks.end(), rank());
           });
  }

  std::vector<ComputeItem> compute_items(NodeId node, int chunk) const {
    std::vector<ComputeItem> items;
    const Tiling& tiling = p.tilings[node];
    const Node& n = p.graph.nodes[node];
    const int chunks = tiling.chunks();
    for (int tile = 0; tile < tiling.tiles(); ++tile) {
      const auto devices = tiling.devices_of(tile);
      if (!std::count(devices.begin(), devices.end(), rank())) continue;
      ComputeItem item{.node = node, .tile = tile, .chunk = chunk, .sets = factor_sets(p.rules[node], tiling, tile, chunk)};
      item.empty = std::any_of(item.sets.begin(), item.sets.end(), [](const IndexSet& s) { return s.empty(); });
      const int coord = tile * chunks + chunk;
      for (size_t i = 0; i < n.inputs.size(); ++i) {
        const auto [g, use] = reads.at({node, static_cast<int>(i)});
        const int copy = use->coord_of[coord];
        item.operands.push_back(copy < 0 ? -1 : copy_values.at({g, copy}));
      }
      for (TensorId t : n.outputs) item.results.push_back(tile_values.at({t, coord}));
      items.push_back(std::move(item));
    }
    return items;
  }

  std::map<std::pair<NodeId, int>, std::pair<int, const Use*>> reads;

  static bool reads_from(const std::vector<ComputeItem>& readers, const std::vector<ComputeItem>& makers) {
    return std::any_of(readers.begin(), readers.end(), [&](const ComputeItem& reader) {
      return std::any_of(makers.begin(), makers.end(), [&](const ComputeItem& maker) {
        return std::any_of(maker.results.begin(), maker.results.end(), [&](int v) { return std::count(reader.operands.begin(), reader.operands.end(), v); });
      });
    });
  }

  // No operand is larger than the largest result: it costs no memory to compute it later.
  bool gathers_nothing(const std::vector<ComputeItem>& items) const {
    return std::all_of(items.begin(), items.end(), [&](const ComputeItem& item) {
      int64_t largest = 0;
      for (int v : item.results) largest = std::max(largest, volume(out.values[v].box));
      return std::all_of(item.operands.begin(), item.operands.end(), [&](int v) { return v < 0 || volume(out.values[v].box) <= largest; });
    });
  }

  // A compute step in the rank's order, with its place backward.
  struct Event {
    std::vector<ComputeItem> items;
    bool replicated = false;
    std::vector<int> devices;
    int backward = -1;  // index in `sequence`
    int step = -1, back_step = -1;
    bool differentiable = false;
    int region = -1, chunk = 0;
    int segment = -1;
  };

  void make_instructions() {
    // The rank's own sequence: compute events and movements that concern it.
    struct Entry {
      int event = -1;  // or a movement
      bool backward = false;
      Instruction movement;
    };
    std::vector<Entry> sequence;
    std::vector<Event> events;
    std::map<std::pair<NodeId, int>, int> event_of;
    // What is read off this rank's own stored tensors is there from the start; in its place it would end a segment.
    for (size_t s = 0; s < p.steps.size(); ++s) {
      if (!from_own_stores(p.steps[s])) continue;
      Instruction m = movement(static_cast<int>(s));
      if (!m.transfers.empty()) sequence.push_back({.movement = std::move(m)});
    }
    for (size_t s = 0; s < p.steps.size(); ++s) {
      const Step& step = p.steps[s];
      if (from_own_stores(step)) continue;
      if (step.kind == StepKind::kCompute) {
        const auto [node, chunk] = step.items[0];
        Event e{.items = compute_items(node, chunk),
                .replicated = p.tilings[node].replicas > 1,
                .devices = p.tilings[node].devices,
                .step = static_cast<int>(s),
                .differentiable = p.differentiable[node] != 0,
                .region = p.regions[node],
                .chunk = chunk};
        if (e.items.empty()) continue;
        event_of[{node, chunk}] = static_cast<int>(events.size());
        sequence.push_back({.event = static_cast<int>(events.size())});
        events.push_back(std::move(e));
      } else if (step.kind == StepKind::kComputeBackward) {
        const auto it = event_of.find({step.items[0].id, step.items[0].chunk});
        if (it == event_of.end()) continue;
        events[it->second].backward = static_cast<int>(sequence.size());
        events[it->second].back_step = static_cast<int>(s);
        sequence.push_back({.event = it->second, .backward = true});
      } else {
        Instruction m = movement(static_cast<int>(s));
        if (!m.transfers.empty()) sequence.push_back({.movement = std::move(m)});
      }
    }
    const auto joins = [&](const Event& a, const Event& b) {
      if (a.differentiable != b.differentiable || a.region != b.region) return false;
      if (!a.differentiable && a.region < 0) return true;  // no gradients to add in an order
      if (a.replicated != b.replicated) return false;
      if (a.region >= 0 && a.chunk != b.chunk) return false;  // one chunk's activations at a time
      if (a.differentiable && a.backward != b.backward + 1) return false;
      if (!a.replicated) return true;
      return a.devices == b.devices && b.step == a.step + 1 && (!a.differentiable || a.back_step == b.back_step + 1);
    };
    const auto is_backward = [](const Entry& e) {
      return e.event >= 0 ? e.backward : e.movement.kind == InstructionKind::kGradFill || e.movement.kind == InstructionKind::kRefill;
    };
    const auto computes_forward = [&](size_t at) { return sequence[at].event >= 0 && !sequence[at].backward; };
    // What has no gradient ends no segment for that alone: it comes before those that it doesn't read (masks, counts), or after those that don't read
    // it (running statistics). Regions keep their order: forward gives back what they made as soon as it is read.
    for (size_t at = 0; at < sequence.size(); ++at) {
      if (!computes_forward(at)) continue;
      const Event& e = events[sequence[at].event];
      if (e.region >= 0 || (e.differentiable && e.replicated)) continue;
      size_t from = at;
      while (from > 0 && computes_forward(from - 1) && events[sequence[from - 1].event].differentiable != e.differentiable) --from;
      if (from == at) continue;
      if (e.differentiable && (from == 0 || !computes_forward(from - 1) || !joins(events[sequence[from - 1].event], e))) continue;
      const auto waits = [&](const Entry& between) { return reads_from(e.items, events[between.event].items); };
      if (std::none_of(sequence.begin() + from, sequence.begin() + at, waits))
        std::rotate(sequence.begin() + from, sequence.begin() + at, sequence.begin() + at + 1);
    }
    // What is only written (running averages) comes last of all, in one segment: before the first entry that reads any of it, or before backward.
    if (!p.interleaved) {
      const std::vector<char> written = only_written(p);
      std::set<int> made;
      const auto reads_made = [&](const Entry& e) {
        const auto in_made = [&](int v) { return made.count(v) > 0; };
        if (e.event < 0) {
          return std::any_of(e.movement.transfers.begin(), e.movement.transfers.end(),
                             [&](const Transfer& t) { return std::any_of(t.moves.begin(), t.moves.end(), [&](const Move& m) { return in_made(m.src); }); });
        }
        const auto& items = events[e.event].items;
        return std::any_of(items.begin(), items.end(),
                           [&](const ComputeItem& item) { return std::any_of(item.operands.begin(), item.operands.end(), in_made); });
      };
      std::vector<Entry> kept, later;
      size_t at = 0;
      for (; at < sequence.size() && !is_backward(sequence[at]); ++at) {
        Entry& e = sequence[at];
        const bool late = e.event >= 0 && written[events[e.event].items[0].node] && gathers_nothing(events[e.event].items);
        if (!late && reads_made(e)) break;
        for (const ComputeItem& item : late ? events[e.event].items : std::vector<ComputeItem>{}) made.insert(item.results.begin(), item.results.end());
        (late ? later : kept).push_back(std::move(e));
      }
      kept.insert(kept.end(), std::move_iterator(later.begin()), std::move_iterator(later.end()));
      std::move(kept.begin(), kept.end(), sequence.begin());
    }
    // Join neighbours.
    for (size_t at = 0; at < sequence.size(); ++at) {
      if (!computes_forward(at)) continue;
      Event& e = events[sequence[at].event];
      if (at > 0 && computes_forward(at - 1) && joins(events[sequence[at - 1].event], e)) {
        e.segment = events[sequence[at - 1].event].segment;
      } else {
        e.segment = static_cast<int>(out.segments.size());
        out.segments.push_back({.differentiable = e.differentiable, .region = e.region});
      }
      auto& items = out.segments[e.segment].items;
      for (ComputeItem& item : e.items) items.push_back(std::move(item));
    }
    std::vector<char> ran(out.segments.size()), ran_back(out.segments.size());
    for (Entry& entry : sequence) {
      if (entry.event < 0) {
        out.instructions.push_back(std::move(entry.movement));
        continue;
      }
      const Event& e = events[entry.event];
      auto& done = entry.backward ? ran_back : ran;
      if (done[e.segment]) continue;
      done[e.segment] = 1;
      out.instructions.push_back({.kind = entry.backward ? InstructionKind::kSegmentBackward : InstructionKind::kSegment,
                                  .step = entry.backward ? e.back_step : e.step,
                                  .segment = e.segment});
    }
  }

  // Inputs and outputs of segments: what crosses their border.
  void connect() {
    std::vector<std::set<int>> made(out.segments.size());
    std::set<int> moved;
    std::map<int, std::set<int>> readers;  // value -> segments
    for (size_t s = 0; s < out.segments.size(); ++s) {
      for (const ComputeItem& item : out.segments[s].items) {
        made[s].insert(item.results.begin(), item.results.end());
        for (int v : item.operands) {
          if (v >= 0) readers[v].insert(static_cast<int>(s));
        }
      }
    }
    for (const Instruction& i : out.instructions) {
      for (const Transfer& t : i.transfers) {
        for (const Move& m : t.moves) {
          // A tile whose value nobody reads here still gets a gradient where it is a replica of one that is read.
          const int used = i.kind == InstructionKind::kGradFill ? m.dst : m.src;
          if (used >= 0) moved.insert(used);
        }
      }
    }
    for (int v : out.returns) moved.insert(v);
    for (size_t s = 0; s < out.segments.size(); ++s) {
      Segment& seg = out.segments[s];
      std::set<int> inputs;
      for (const ComputeItem& item : seg.items) {
        for (int v : item.operands) {
          if (v >= 0 && !made[s].count(v)) inputs.insert(v);
        }
      }
      seg.inputs.assign(inputs.begin(), inputs.end());
      for (int v : made[s]) {
        const auto it = readers.find(v);
        const bool outside =
            moved.count(v) || (it != readers.end() && std::any_of(it->second.begin(), it->second.end(), [&](int r) { return r != static_cast<int>(s); }));
        if (outside) seg.outputs.push_back(v);
      }
    }
    compute_again(made);
    free_values();
  }

  std::map<int, int> maker;                   // value -> segment
  std::map<int, int> filler;                  // copy -> instruction that fills it without a movement
  std::vector<char> done, filled;             // by segment, by instruction: computed again already
  std::map<int, size_t> kept, again, remade;  // value -> last instruction that computes again on it: as forward left it; made again; the one that does

  // Segments of regions are computed again before the first backward that needs them: their own, or that of a segment of the region which reads
  // what they made. Fills within a region that move nothing are done again too: where a gradient is summed over replicas, each reads a copy.
  void compute_again(const std::vector<std::set<int>>& made) {
    for (size_t s = 0; s < made.size(); ++s) {
      for (int v : made[s]) maker[v] = static_cast<int>(s);
    }
    for (size_t i = 0; i < out.instructions.size(); ++i) {
      const Instruction& in = out.instructions[i];
      if (in.kind != InstructionKind::kFill) continue;
      if (std::any_of(in.transfers.begin(), in.transfers.end(), [](const Transfer& t) { return t.pattern != Pattern::kLocal; })) continue;
      for (const Transfer& t : in.transfers) {
        for (int v : t.results) filler[v] = static_cast<int>(i);
      }
    }
    done.assign(out.segments.size(), 0);
    filled.assign(out.instructions.size(), 0);
    for (size_t i = 0; i < out.instructions.size(); ++i) {
      if (out.instructions[i].kind == InstructionKind::kSegmentBackward) demand(out.instructions[i].segment, i);
    }
    for (Segment& s : out.segments) std::sort(s.again.begin(), s.again.end());
  }

  void demand(int segment, size_t at) {
    const Segment& seg = out.segments[segment];
    if (seg.region < 0 || done[segment]) return;
    done[segment] = 1;
    for (int v : seg.inputs) demand_value(v, seg.region, at);
    out.instructions[at].recomputes.push_back({.segment = segment});
  }

  // A value that a segment of the region reads when it is computed again.
  void demand_value(int v, int region, size_t at) {
    const auto made = maker.find(v), copied = filler.find(v);
    const NodeId producer = p.graph.tensors[out.values[v].tensor].producer;
    if (p.regions[producer] != region || (made == maker.end() && copied == filler.end())) {
      kept[v] = at;
      return;
    }
    again[v] = at;
    if (made != maker.end()) {
      demand(made->second, at);
      std::vector<int>& wanted = out.segments[made->second].again;
      if (!std::count(wanted.begin(), wanted.end(), v)) wanted.push_back(v);
      remade.emplace(v, at);
      return;
    }
    if (filled[copied->second]) return;
    filled[copied->second] = 1;
    for (const Transfer& t : out.instructions[copied->second].transfers) {
      for (const Move& m : t.moves) {
        if (m.src >= 0) demand_value(m.src, region, at);
      }
      for (int result : t.results) {
        again.emplace(result, at);
        remade.emplace(result, at);
      }
    }
    out.instructions[at].recomputes.push_back({.fill = copied->second});
  }

  void free_values() {
    std::map<int, size_t> last;  // in forward
    for (size_t i = 0; i < out.instructions.size(); ++i) {
      const Instruction& in = out.instructions[i];
      if (in.kind == InstructionKind::kSegment) {
        for (int v : out.segments[in.segment].inputs) last[v] = i;
        for (int v : out.segments[in.segment].outputs) last[v] = std::max(last[v], i);
      } else if (in.kind == InstructionKind::kFill || in.kind == InstructionKind::kRefill) {
        for (const Transfer& t : in.transfers) {
          for (const Move& m : t.moves) {
            if (m.src >= 0) last[m.src] = i;
            if (m.dst >= 0) last[m.dst] = std::max(last[m.dst], i);
          }
          for (int v : t.results) last[v] = std::max(last[v], i);  // also those that nothing reaches
        }
      }
    }
    const std::set<int> returned(out.returns.begin(), out.returns.end()), stored(out.params.begin(), out.params.end());
    for (const auto& [v, i] : last) {
      if (returned.count(v) || stored.count(v)) continue;
      size_t end = i;
      if (const auto k = kept.find(v); k != kept.end()) end = std::max(end, k->second);
      if (const auto a = again.find(v); a != again.end()) {
        if (end < remade.at(v))
          out.instructions[a->second].frees.push_back(v);  // its second life
        else
          end = std::max(end, a->second);
      }
      out.instructions[end].frees.push_back(v);
      if (end > i) out.instructions[i].kept.push_back(v);
    }
  }

  void run() {
    for (size_t g = 0; g < p.groups.size(); ++g) {
      for (const Use& u : p.groups[g].uses) reads[{u.node, u.operand}] = {static_cast<int>(g), &u};
    }
    make_values();
    out.params.assign(p.graph.nodes.size(), -1);
    out.returns.assign(p.graph.nodes.size(), -1);
    for (const Node& n : p.graph.nodes) {
      if (n.kind == NodeKind::kReturn) {
        const auto [g, use] = reads.at({n.id, 0});
        for (int coord : use->coord_of) {
          const auto it = copy_values.find({g, coord});
          if (it != copy_values.end()) out.returns[n.id] = it->second;
        }
      } else if (n.kind != NodeKind::kOp) {
        for (size_t k = 0; k < p.tiles[n.outputs[0]].coords.size(); ++k) {
          const auto it = tile_values.find({n.outputs[0], static_cast<int>(k)});
          if (it != tile_values.end()) out.params[n.id] = it->second;
        }
      }
    }
    make_instructions();
    connect();
  }
};

}  // namespace

RankProgram project(const Program& program, int rank) {
  SOAP_CHECK(rank >= 0 && rank < program.world_size, "[project] rank {} of {}", rank, program.world_size);
  Projector projector{.p = program};
  projector.out.rank = rank;
  projector.run();
  return std::move(projector.out);
}

}  // namespace soap
