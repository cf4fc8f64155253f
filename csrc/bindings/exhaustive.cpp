#include "search/exhaustive.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "search/partial_plan.h"

namespace py = pybind11;

namespace soap {

void bind_exhaustive(py::module_& m) {
  py::class_<ExhaustiveOptions>(m, "ExhaustiveOptions")
      .def(py::init<>())
      .def_readwrite("operators", &ExhaustiveOptions::operators)
      .def_readwrite("starts", &ExhaustiveOptions::starts)
      .def_readwrite("reductions", &ExhaustiveOptions::reductions)
      .def_readwrite("bucket_bytes", &ExhaustiveOptions::bucket_bytes)
      .def_readwrite("most_bounds", &ExhaustiveOptions::most_bounds)
      .def_readwrite("bound_scale", &ExhaustiveOptions::bound_scale);
  py::class_<ExhaustiveSpace>(m, "ExhaustiveSpace", "Configurations of each layer, of which a plan takes one each.")
      .def(
          py::init([](std::vector<NodeId> heads, std::vector<std::vector<OpConfig>> configs) { return ExhaustiveSpace{std::move(heads), std::move(configs)}; }),
          py::arg("heads"), py::arg("configs"))
      .def_readonly("heads", &ExhaustiveSpace::heads)
      .def_readonly("configs", &ExhaustiveSpace::configs);
  py::class_<ExhaustiveResult>(m, "ExhaustiveResult")
      .def_readonly("strategy", &ExhaustiveResult::strategy)
      .def_readonly("step_ns", &ExhaustiveResult::step_ns)
      .def_readonly("proven", &ExhaustiveResult::proven)
      .def_readonly("configurations", &ExhaustiveResult::configurations)
      .def_readonly("plans", &ExhaustiveResult::plans)
      .def_readonly("bounds", &ExhaustiveResult::bounds)
      .def_readonly("pruned", &ExhaustiveResult::pruned)
      .def_readonly("simulated", &ExhaustiveResult::simulated)
      .def_readonly("illegal", &ExhaustiveResult::illegal)
      .def_readonly("last_better", &ExhaustiveResult::last_better);
  m.def("exhaustive_space", &exhaustive_space, py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("options") = ExhaustiveOptions{});
  m.def("partial_bounds", &partial_bounds, py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("space"), py::arg("choice"),
        py::arg("options") = ExhaustiveOptions{}, "Bounds of a plan as its layers are configured one after another.");
  m.def(
      "exhaustive_search",
      [](const OpGraph& graph, const FedRows& rows, const CostModel& cost, const ExhaustiveSpace& space, const ExhaustiveOptions& options,
         const py::object& observer, int every_ms) {
        const py::gil_scoped_release without_gil;
        return exhaustive_search(graph, rows, cost, space, options, observer_of(observer, every_ms));
      },
      py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("space"), py::arg("options") = ExhaustiveOptions{}, py::arg("observer") = py::none(),
      py::arg("every_ms") = 50, "The fastest plan of a space by simulation. observer(Progress) -> bool is asked now and then; False: end without proof.");
}

}  // namespace soap
