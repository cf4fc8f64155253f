// A Program and a RankProgram as text.
#include "fmt/ranges.h"
#include "program/project.h"

namespace soap {

std::string_view to_string(StepKind kind) {
  switch (kind) {
    case StepKind::kFill: return "fill";
    case StepKind::kCompute: return "compute";
    case StepKind::kGradFill: return "grad_fill";
    case StepKind::kComputeBackward: return "compute_backward";
    case StepKind::kRefill: return "refill";
  }
  return "?";
}

std::string to_string(const Program& p) {
  std::string out;
  for (const Node& n : p.graph.nodes) {
    const Tiling& t = p.tilings[n.id];
    out += fmt::format("{}  {}", n.name, to_string(p.rules[n.id]));
    for (const FactorParts& c : t.cuts) {
      out += fmt::format("  {}=", p.rules[n.id].factors[c.factor].name);
      for (const auto& tile : c.parts) {
        out += "{";
        for (size_t i = 0; i < tile.size(); ++i) out += (i ? ";" : "") + to_string(tile[i]);
        out += "}";
      }
    }
    out += fmt::format(" x{} @ [{}]", t.replicas, fmt::join(t.devices, ","));
    if (p.regions[n.id] >= 0) out += fmt::format(" again in region {}", p.regions[n.id]);
    out += "\n";
  }
  for (size_t i = 0; i < p.steps.size(); ++i) {
    const Step& s = p.steps[i];
    out += fmt::format("{:4} {}", i, to_string(s.kind));
    for (const StepItem& item : s.items) {
      if (s.kind == StepKind::kCompute || s.kind == StepKind::kComputeBackward) {
        out += fmt::format(" {}#{}", p.graph.nodes[item.id].name, item.chunk);
      } else {
        const auto pieces = item_pieces(p, s.kind, item);
        const Movement m = item_movement(p, s.kind, item, pieces);
        const char* how = m.pattern == Pattern::kLocal ? "local" : m.pattern == Pattern::kAllReduce ? "all_reduce" : "exchange";
        out += fmt::format(" {}#{}:{}({})", p.graph.nodes[p.graph.tensors[p.groups[item.id].tensor].producer].name, item.chunk, how, m.elements);
      }
    }
    out += "\n";
  }
  return out;
}

std::string to_string(const Program& p, const RankProgram& r) {
  const auto name = [&](int v) {
    if (v < 0) return std::string("-");
    const LocalValue& value = r.values[v];
    const std::string& producer = p.graph.nodes[p.graph.tensors[value.tensor].producer].name;
    return value.group < 0 ? fmt::format("{}.{}", producer, value.coord) : fmt::format("{}>{}.{}", producer, value.group, value.coord);
  };
  std::string out = fmt::format("rank {}\n", r.rank);
  for (const Instruction& i : r.instructions) {
    switch (i.kind) {
      case InstructionKind::kSegment:
        out += fmt::format("  segment {}:", i.segment);
        for (const ComputeItem& item : r.segments[i.segment].items)
          out += fmt::format(" {}#{}.{}{}", p.graph.nodes[item.node].name, item.chunk, item.tile, item.empty ? "(empty)" : "");
        break;
      case InstructionKind::kSegmentBackward:
        out += fmt::format("  backward {}", i.segment);
        for (const Again& a : i.recomputes) out += a.segment >= 0 ? fmt::format(" after again {}", a.segment) : fmt::format(" after refilling {}", a.fill);
        break;
      default:
        out += fmt::format("  {}:", i.kind == InstructionKind::kFill ? "fill" : i.kind == InstructionKind::kRefill ? "refill" : "grad_fill");
        for (const Transfer& t : i.transfers) {
          out += t.pattern == Pattern::kAllReduce ? fmt::format(" all_reduce[{}]({})", fmt::join(t.ranks, ","), t.elements) : "";
          for (const Move& m : t.moves) {
            if (t.pattern == Pattern::kAllReduce && m.peer >= 0) continue;
            out += m.send        ? fmt::format(" {}->@{}", name(m.src), m.peer)
                   : m.peer >= 0 ? fmt::format(" @{}->{}", m.peer, name(m.dst))
                                 : fmt::format(" {}->{}", name(m.src), name(m.dst));
          }
        }
    }
    out += "\n";
  }
  return out;
}

}  // namespace soap
