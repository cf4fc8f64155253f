#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "bindings/bindings.h"
#include "program/project.h"

namespace py = pybind11;

namespace soap {

void bind_program(py::module_& m) {
  py::enum_<Pattern>(m, "Pattern").value("local", Pattern::kLocal).value("all_reduce", Pattern::kAllReduce).value("exchange", Pattern::kExchange);
  py::enum_<StepKind>(m, "StepKind")
      .value("fill", StepKind::kFill)
      .value("compute", StepKind::kCompute)
      .value("grad_fill", StepKind::kGradFill)
      .value("compute_backward", StepKind::kComputeBackward)
      .value("refill", StepKind::kRefill);
  py::class_<StepItem>(m, "StepItem").def_readonly("id", &StepItem::id).def_readonly("chunk", &StepItem::chunk);
  py::class_<Step>(m, "Step").def_readonly("kind", &Step::kind).def_readonly("items", &Step::items);
  py::class_<CopyGroup>(m, "CopyGroup")
      .def_readonly("tensor", &CopyGroup::tensor)
      .def_readonly("copies", &CopyGroup::copies)
      .def_readonly("grad", &CopyGroup::grad)
      .def_readonly("keep", &CopyGroup::keep);
  bind_list<Rule>(m, "RuleList");
  bind_list<Tiling>(m, "TilingList");
  bind_list<Sharding>(m, "ShardingList");
  bind_list<CopyGroup>(m, "CopyGroupList");
  bind_list<Step>(m, "StepList");
  py::class_<Movement>(m, "Movement")
      .def_readonly("pattern", &Movement::pattern)
      .def_readonly("ranks", &Movement::ranks)
      .def_readonly("elements", &Movement::elements);
  py::class_<Program>(m, "Program", "The ordered steps that a strategy means; the same for every rank.")
      .def_readonly("graph", &Program::graph)
      .def_readonly("world_size", &Program::world_size)
      .def_readonly("rows", &Program::rows)
      .def_readonly("interleaved", &Program::interleaved)
      .def_readonly("rules", &Program::rules)
      .def_readonly("tilings", &Program::tilings)
      .def_readonly("tiles", &Program::tiles)
      .def_readonly("groups", &Program::groups)
      .def_readonly("steps", &Program::steps)
      .def_readonly("regions", &Program::regions)
      .def(
          "movement", [](const Program& p, StepKind kind, const StepItem& item) { return item_movement(p, kind, item, item_pieces(p, kind, item)); },
          py::arg("kind"), py::arg("item"))
      .def("__str__", [](const Program& p) { return to_string(p); });
  m.def("lower", &lower, py::arg("graph"), py::arg("strategy"), py::arg("rows"), py::call_guard<py::gil_scoped_release>());

  py::class_<LocalValue>(m, "LocalValue")
      .def_readonly("tensor", &LocalValue::tensor)
      .def_readonly("box", &LocalValue::box)
      .def_readonly("group", &LocalValue::group)
      .def_readonly("coord", &LocalValue::coord)
      .def_readonly("grad", &LocalValue::grad)
      .def_property_readonly("shape", [](const LocalValue& v) { return shape(v.box); });
  py::class_<ComputeItem>(m, "ComputeItem")
      .def_readonly("node", &ComputeItem::node)
      .def_readonly("tile", &ComputeItem::tile)
      .def_readonly("chunk", &ComputeItem::chunk)
      .def_readonly("sets", &ComputeItem::sets)
      .def_readonly("operands", &ComputeItem::operands)
      .def_readonly("results", &ComputeItem::results)
      .def_readonly("empty", &ComputeItem::empty);
  py::class_<Segment>(m, "Segment")
      .def_readonly("items", &Segment::items)
      .def_readonly("inputs", &Segment::inputs)
      .def_readonly("outputs", &Segment::outputs)
      .def_readonly("differentiable", &Segment::differentiable)
      .def_readonly("region", &Segment::region)
      .def_readonly("again", &Segment::again);
  py::class_<Move>(m, "Move")
      .def_readonly("peer", &Move::peer)
      .def_readonly("send", &Move::send)
      .def_readonly("src", &Move::src)
      .def_readonly("dst", &Move::dst)
      .def_readonly("src_box", &Move::src_box)
      .def_readonly("dst_box", &Move::dst_box)
      .def_readonly("elements", &Move::elements);
  py::class_<Transfer>(m, "Transfer")
      .def_readonly("item", &Transfer::item)
      .def_readonly("pattern", &Transfer::pattern)
      .def_readonly("reduce", &Transfer::reduce)
      .def_readonly("ranks", &Transfer::ranks)
      .def_readonly("moves", &Transfer::moves)
      .def_readonly("results", &Transfer::results)
      .def_readonly("elements", &Transfer::elements);
  py::class_<Again>(m, "Again").def_readonly("segment", &Again::segment).def_readonly("fill", &Again::fill);
  py::enum_<InstructionKind>(m, "InstructionKind")
      .value("segment", InstructionKind::kSegment)
      .value("segment_backward", InstructionKind::kSegmentBackward)
      .value("fill", InstructionKind::kFill)
      .value("grad_fill", InstructionKind::kGradFill)
      .value("refill", InstructionKind::kRefill);
  py::class_<Instruction>(m, "Instruction")
      .def_readonly("kind", &Instruction::kind)
      .def_readonly("step", &Instruction::step)
      .def_readonly("segment", &Instruction::segment)
      .def_readonly("transfers", &Instruction::transfers)
      .def_readonly("ranks", &Instruction::ranks)
      .def_readonly("recomputes", &Instruction::recomputes)
      .def_readonly("frees", &Instruction::frees)
      .def_readonly("kept", &Instruction::kept);
  bind_list<LocalValue>(m, "LocalValueList");
  bind_list<Segment>(m, "SegmentList");
  bind_list<Instruction>(m, "InstructionList");
  py::class_<RankProgram>(m, "RankProgram", "What one rank does for a Program.")
      .def_readonly("rank", &RankProgram::rank)
      .def_readonly("values", &RankProgram::values)
      .def_readonly("segments", &RankProgram::segments)
      .def_readonly("instructions", &RankProgram::instructions)
      .def_readonly("params", &RankProgram::params)
      .def_readonly("returns", &RankProgram::returns)
      .def("describe", [](const RankProgram& r, const Program& p) { return to_string(p, r); }, py::arg("program"));
  // One tile by itself: its factors' sets and the boxes of what it reads (None where anchored elsewhere) and makes.
  struct TileBoxes {
    std::vector<IndexSet> sets;
    std::vector<std::optional<Box>> operand_boxes;
    std::vector<Box> result_boxes;
  };
  py::class_<TileBoxes>(m, "TileBoxes")
      .def_readonly("sets", &TileBoxes::sets)
      .def_readonly("operand_boxes", &TileBoxes::operand_boxes)
      .def_readonly("result_boxes", &TileBoxes::result_boxes);
  m.def(
      "compute_item",
      [](const Program& p, NodeId node, int tile, int chunk) {
        const Rule& rule = p.rules.at(node);
        const Node& n = p.graph.nodes.at(node);
        TileBoxes out{.sets = factor_sets(rule, p.tilings[node], tile, chunk)};
        for (size_t i = 0; i < n.inputs.size(); ++i) {
          const Operand& o = rule.operands[i];
          const bool here = std::all_of(o.anchors.begin(), o.anchors.end(), [&](int f) { return out.sets[f].contains(0); });
          out.operand_boxes.push_back(here ? std::optional(box_of(o.dims, rule, p.graph.input(n, static_cast<int>(i)).shape, out.sets)) : std::nullopt);
        }
        for (size_t r = 0; r < n.outputs.size(); ++r)
          out.result_boxes.push_back(box_of(rule.results[r].dims, rule, p.graph.output(n, static_cast<int>(r)).shape, out.sets));
        return out;
      },
      py::arg("program"), py::arg("node"), py::arg("tile"), py::arg("chunk"));
  m.def("project", &project, py::arg("program"), py::arg("rank"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace soap
