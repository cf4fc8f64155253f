#include "machine/machine.h"

#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "cost/cost.h"
#include "cost/work.h"
#include "machine/presets.h"

namespace py = pybind11;

namespace soap {
namespace {

// Tuples, which the stubs can name.
using Points = std::vector<std::tuple<double, double, double>>;

std::map<std::string, Points> curves_of(const Machine& machine) {
  std::map<std::string, Points> out;
  for (const auto& [key, curve] : machine.curves) {
    Points& points = out[key];
    for (const auto& [size, forward, backward] : curve) points.emplace_back(size, forward, backward);
  }
  return out;
}

void set_curves(Machine& machine, const std::map<std::string, Points>& curves) {
  machine.curves.clear();
  for (const auto& [key, points] : curves) {
    EfficiencyCurve& curve = machine.curves[key];
    for (const auto& [size, forward, backward] : points) curve.push_back({size, forward, backward});
  }
}

using Times = std::map<std::string, std::pair<double, double>>;

Times launch_of(const Machine& machine) {
  Times out;
  for (const auto& [key, times] : machine.launch) out[key] = {times[0], times[1]};
  return out;
}

void set_launch(Machine& machine, const Times& launch) {
  machine.launch.clear();
  for (const auto& [key, times] : launch) machine.launch[key] = {times.first, times.second};
}

}  // namespace

void bind_machine(py::module_& m) {
  py::class_<Link>(m, "Link", "One direction of a link; `per_host` of them serve the devices of a host, 0: each device has its own.")
      .def(py::init<double, double, int>(), py::arg("latency_ns"), py::arg("bytes_per_s"), py::arg("per_host") = 0)
      .def_readwrite("latency_ns", &Link::latency_ns)
      .def_readwrite("bytes_per_s", &Link::bytes_per_s)
      .def_readwrite("per_host", &Link::per_host)
      .def(py::self == py::self);
  py::class_<Machine>(m, "Machine", "Devices, hosts and links, and what was measured on them.")
      .def(py::init(&make_machine), py::arg("num_devices"), py::arg("num_hosts") = 1)
      .def(py::init<const Machine&>(), py::arg("other"))
      .def_readwrite("name", &Machine::name)
      .def_readwrite("host_of", &Machine::host_of)
      .def_readwrite("cores_of", &Machine::cores_of)
      .def("sharing", &Machine::sharing, "cores_of, or host_of where that is empty.")
      .def_readwrite("speed", &Machine::speed)
      .def_readwrite("flops_per_s", &Machine::flops_per_s)
      .def_readwrite("flops_by_dtype", &Machine::flops_by_dtype)
      .def_readwrite("tf32", &Machine::tf32)
      .def_readwrite("memory_bytes_per_s", &Machine::memory_bytes_per_s)
      .def_readwrite("op_overhead_ns", &Machine::op_overhead_ns)
      .def_readwrite("efficiency", &Machine::efficiency)
      .def_property("curves", &curves_of, &set_curves)
      .def_property("launch", &launch_of, &set_launch)
      .def_readwrite("memory_bytes", &Machine::memory_bytes)
      .def_readwrite("overlap", &Machine::overlap)
      .def_readwrite("step_overhead_ns", &Machine::step_overhead_ns)
      .def_readwrite("segment_overhead_ns", &Machine::segment_overhead_ns)
      .def_readwrite("busy_speed", &Machine::busy_speed)
      .def_readwrite("update_speed", &Machine::update_speed)
      .def_readwrite("jitter", &Machine::jitter)
      .def_readwrite("cold_ns", &Machine::cold_ns)
      .def_readwrite("turn_ns", &Machine::turn_ns)
      .def_readwrite("piece_ns", &Machine::piece_ns)
      .def_readwrite("send_ns_per_byte", &Machine::send_ns_per_byte)
      .def_readwrite("receive_ns_per_byte", &Machine::receive_ns_per_byte)
      .def_readwrite("packs", &Machine::packs)
      .def_readwrite("update", &Machine::update)
      .def_readwrite("intra", &Machine::intra)
      .def_readwrite("inter", &Machine::inter)
      .def_readwrite("tables", &Machine::tables)
      .def_property_readonly("num_devices", &Machine::num_devices)
      .def(
          "parts_of",
          [](const Machine& m, const std::string& family, const std::string& dtype, double size, double width) {
            const auto [forward, backward] = m.parts_of(family, dtype, size, width);
            return std::pair(forward, backward);
          },
          py::arg("family"), py::arg("dtype"), py::arg("size"), py::arg("width") = 0.0)
      .def(py::self == py::self);
  m.def("machine_preset", &preset, py::arg("name"), py::arg("hosts"), py::arg("devices_per_host"));
  m.def("machine_presets", &preset_names);
  m.def("check_machine", &check, py::arg("machine"));
  m.attr("OP_FAMILIES") = std::vector<std::string>(kOpFamilies.begin(), kOpFamilies.end());
  m.def("movement_ns", &movement_ns, py::arg("machine"), py::arg("kind"), py::arg("ranks"), py::arg("num_bytes"), py::arg("at_once") = 1);
  py::class_<OpSample>(m, "OpSample")
      .def_readonly("key", &OpSample::key)
      .def_readonly("node", &OpSample::node)
      .def_readonly("tile", &OpSample::tile)
      .def_readonly("chunk", &OpSample::chunk);
  py::class_<Work>(m, "Work", "What one tile of one operator has to do, forward.")
      .def_property_readonly("family", [](const Work& w) { return std::string(w.family); })
      .def_readonly("dtype", &Work::dtype)
      .def_readonly("flops", &Work::flops)
      .def_readonly("num_bytes", &Work::bytes)
      .def_readonly("size", &Work::size)
      .def_readonly("width", &Work::width);
  m.def("family_of", [](const Node& node) { return std::string(family_of(node)); }, py::arg("node"));
  m.def("work_of", &work_of, py::arg("program"), py::arg("node"), py::arg("tile") = 0, py::arg("chunk") = 0);
  py::class_<CostModel>(m, "CostModel")
      .def(py::init<Machine>(), py::arg("machine"))
      .def_property_readonly("machine", &CostModel::machine)
      .def(
          "time",
          [](const CostModel& c, const Program& p, int node, int tile, int chunk) {
            const OpTime t = c.time(p, node, tile, chunk);
            return std::pair(t.forward_ns, t.backward_ns);
          },
          py::arg("program"), py::arg("node"), py::arg("tile") = 0, py::arg("chunk") = 0)
      .def(
          "launch",
          [](const CostModel& c, const Program& p, int node) {
            const OpTime t = c.launch(p, node);
            return std::pair(t.forward_ns, t.backward_ns);
          },
          py::arg("program"), py::arg("node"))
      .def(
          "measure", [](CostModel& c, const Program& p, const OpSample& s, int64_t forward, int64_t backward) { c.measure(p, s, {forward, backward}); },
          py::arg("program"), py::arg("sample"), py::arg("forward_ns"), py::arg("backward_ns"))
      .def("missing", &CostModel::missing, py::arg("program"))
      .def_static("turns", &CostModel::turns, py::arg("program"), py::arg("keys"));
}

}  // namespace soap
