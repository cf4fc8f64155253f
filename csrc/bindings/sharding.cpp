#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "sharding/expand.h"
#include "sharding/rule.h"
#include "sharding/tiling.h"
#include "substitution/match.h"

namespace py = pybind11;

namespace soap {

void bind_sharding(py::module_& m) {
  py::enum_<FactorKind>(m, "FactorKind")
      .value("sample", FactorKind::kSample)
      .value("attribute", FactorKind::kAttribute)
      .value("parameter", FactorKind::kParameter)
      .value("reduction", FactorKind::kReduction);
  py::enum_<Cuttable>(m, "Cuttable")
      .value("any", Cuttable::kAny)
      .value("interval", Cuttable::kInterval)
      .value("expand", Cuttable::kExpand)
      .value("whole", Cuttable::kWhole);
  py::enum_<Reduce>(m, "Reduce").value("none", Reduce::kNone).value("sum", Reduce::kSum).value("max", Reduce::kMax);
  py::class_<Factor>(m, "Factor")
      .def_readonly("name", &Factor::name)
      .def_readonly("size", &Factor::size)
      .def_readonly("kind", &Factor::kind)
      .def_readonly("cut", &Factor::cut)
      .def_readonly("unit", &Factor::unit);
  py::class_<DimExpr>(m, "DimExpr").def_readonly("factors", &DimExpr::factors).def_property_readonly("mapped", [](const DimExpr& d) {
    return d.map.has_value();
  });
  py::class_<Operand>(m, "Operand").def_readonly("dims", &Operand::dims).def_readonly("anchors", &Operand::anchors);
  py::class_<Result>(m, "Result")
      .def_readonly("dims", &Result::dims)
      .def_readonly("reduce", &Result::reduce)
      .def_readonly("saved_bytes_more", &Result::saved_bytes_more);
  py::class_<Rule>(m, "Rule")
      .def_readonly("factors", &Rule::factors)
      .def_readonly("operands", &Rule::operands)
      .def_readonly("results", &Rule::results)
      .def("factor", &Rule::factor, py::arg("name"))
      .def_readonly("exclusive", &Rule::exclusive)
      .def("__str__", [](const Rule& r) { return to_string(r); });
  m.def("make_rule", &make_rule, py::arg("graph"), py::arg("node"), py::arg("world_size"));
  m.def("registered_rules", [] {
    std::vector<std::string> out;
    for (const auto& [name, builder] : rule_registry().builders) out.push_back(name);
    return out;
  });

  py::class_<Cut>(m, "Cut")
      .def(py::init([](int tiles, int chunks, std::vector<int64_t> bounds, bool fed, bool zigzag, std::vector<int64_t> radix) {
             return Cut{.tiles = tiles, .chunks = chunks, .bounds = std::move(bounds), .fed = fed, .zigzag = zigzag, .radix = std::move(radix)};
           }),
           py::arg("tiles") = 1, py::arg("chunks") = 1, py::arg("bounds") = std::vector<int64_t>{}, py::arg("fed") = false, py::arg("zigzag") = false,
           py::arg("radix") = std::vector<int64_t>{})
      .def_readwrite("tiles", &Cut::tiles)
      .def_readwrite("chunks", &Cut::chunks)
      .def_readwrite("bounds", &Cut::bounds)
      .def_readwrite("fed", &Cut::fed)
      .def_readwrite("zigzag", &Cut::zigzag)
      .def_readwrite("radix", &Cut::radix)
      .def(py::self == py::self);
  py::enum_<Keep>(m, "Keep").value("until_backward", Keep::kUntilBackward).value("use", Keep::kUse).value("until_step", Keep::kUntilStep);
  py::class_<OpConfig>(m, "OpConfig")
      .def(py::init([](const std::vector<std::pair<std::string, Cut>>& cuts, std::vector<int> devices, int replicas, Keep keep) {
             OpConfig c{.devices = std::move(devices), .replicas = replicas, .keep = keep};
             for (const auto& [factor, cut] : cuts) c.cuts.push_back({factor, cut});
             return c;
           }),
           py::arg("cuts") = std::vector<std::pair<std::string, Cut>>{}, py::arg("devices") = std::vector<int>{}, py::arg("replicas") = 1,
           py::arg("keep") = Keep::kUntilBackward)
      .def_property_readonly("cuts",
                             [](const OpConfig& c) {
                               std::vector<std::pair<std::string, Cut>> out;
                               for (const FactorCut& f : c.cuts) out.emplace_back(f.factor, f.cut);
                               return out;
                             })
      .def_readwrite("devices", &OpConfig::devices)
      .def_readwrite("replicas", &OpConfig::replicas)
      .def_readwrite("keep", &OpConfig::keep)
      .def(py::self == py::self);
  py::enum_<Order>(m, "Order").value("forward_then_backward", Order::kForwardThenBackward).value("interleaved", Order::kInterleaved);
  py::class_<Rewrite>(m, "Rewrite", "A substitution at one place of a graph.")
      .def(py::init([](std::string substitution, std::vector<std::string> anchors) { return Rewrite{std::move(substitution), std::move(anchors)}; }),
           py::arg("substitution"), py::arg("anchors"))
      .def_readonly("substitution", &Rewrite::substitution)
      .def_readonly("anchors", &Rewrite::anchors)
      .def("__str__", [](const Rewrite& r) { return to_string(r); })
      .def("__hash__", [](const Rewrite& r) { return py::hash(py::str(to_string(r))); })
      .def(py::self == py::self);
  py::class_<Strategy>(m, "Strategy")
      .def(py::init([](int world_size) { return Strategy{.world_size = world_size}; }), py::arg("world_size") = 1)
      .def("copy", [](const Strategy& s) { return s; })
      .def(
          "remove", [](Strategy& s, const std::string& name) { s.nodes.erase(name); }, py::arg("name"))
      .def_property_readonly("names",
                             [](const Strategy& s) {
                               std::vector<std::string> out;
                               for (const auto& [name, config] : s.nodes) out.push_back(name);
                               return out;
                             })
      .def_readwrite("world_size", &Strategy::world_size)
      .def_readwrite("rewrites", &Strategy::rewrites)
      .def_readwrite("nodes", &Strategy::nodes)
      .def(
          "set", [](Strategy& s, const std::string& name, OpConfig c) { s.nodes[name] = std::move(c); }, py::arg("name"), py::arg("config"))
      .def(
          "keep_storage",
          [](Strategy& s, const std::string& name, const Sharding& sharding) {
            auto& parts = s.stored[name];
            parts.clear();
            for (const Coord& c : sharding.coords) parts.push_back({c.box, c.devices});
          },
          py::arg("name"), py::arg("sharding"))
      .def_readwrite("order", &Strategy::order)
      .def_readwrite("recompute", &Strategy::recompute)
      .def_readwrite("bucket_bytes", &Strategy::bucket_bytes)
      .def(py::self == py::self);
  py::class_<FactorParts>(m, "FactorParts").def_readonly("factor", &FactorParts::factor).def_readonly("parts", &FactorParts::parts);
  py::class_<Tiling>(m, "Tiling")
      .def_readonly("cuts", &Tiling::cuts)
      .def_readonly("replicas", &Tiling::replicas)
      .def_readonly("devices", &Tiling::devices)
      .def_property_readonly("tiles", &Tiling::tiles)
      .def_property_readonly("chunks", &Tiling::chunks);
  py::class_<Coord>(m, "Coord").def_readonly("box", &Coord::box).def_readonly("chunk", &Coord::chunk).def_readonly("devices", &Coord::devices);
  py::class_<Sharding>(m, "Sharding").def_readonly("partial", &Sharding::partial).def_readonly("coords", &Sharding::coords);
}

}  // namespace soap
