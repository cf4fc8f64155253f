#include "search/search.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "report/explain.h"

namespace py = pybind11;

namespace soap {

void bind_search(py::module_& m) {
  py::class_<Event>(m, "Event")
      .def_readonly("step", &Event::step)
      .def_readonly("device", &Event::device)
      .def_readonly("communication", &Event::communication)
      .def_readonly("begin_ns", &Event::begin_ns)
      .def_readonly("end_ns", &Event::end_ns);
  py::class_<Simulation>(m, "Simulation")
      .def_readonly("step_ns", &Simulation::step_ns)
      .def_readonly("compute_ns", &Simulation::compute_ns)
      .def_readonly("communication_ns", &Simulation::communication_ns)
      .def_readonly("memory_bytes", &Simulation::memory_bytes)
      .def_readonly("node_ns", &Simulation::node_ns)
      .def_readonly("moved_bytes", &Simulation::moved_bytes)
      .def_readonly("events", &Simulation::events);
  m.def("simulate", &simulate, py::arg("program"), py::arg("cost"), py::arg("record") = false, py::call_guard<py::gil_scoped_release>());
  m.def("step_name", &step_name, py::arg("program"), py::arg("step"));
  py::class_<SearchOptions>(m, "SearchOptions")
      .def(py::init<>())
      .def_readwrite("seed", &SearchOptions::seed)
      .def_readwrite("descent_simulations", &SearchOptions::descent_simulations)
      .def_readwrite("mcmc_simulations", &SearchOptions::mcmc_simulations)
      .def_readwrite("temperature", &SearchOptions::temperature)
      .def_readwrite("memory_limit_bytes", &SearchOptions::memory_limit_bytes);
  py::class_<Candidate>(m, "Candidate")
      .def_readonly("name", &Candidate::name)
      .def_readonly("strategy", &Candidate::strategy)
      .def_readonly("step_ns", &Candidate::step_ns)
      .def_readonly("memory_bytes", &Candidate::memory_bytes)
      .def_readonly("fits", &Candidate::fits);
  py::class_<SearchResult>(m, "SearchResult")
      .def_readonly("candidates", &SearchResult::candidates)
      .def_readonly("best", &SearchResult::best)
      .def_readonly("simulations", &SearchResult::simulations)
      .def_readonly("illegal", &SearchResult::illegal);
  m.def("seeds", &seeds, py::arg("graph"), py::arg("world_size"));
  m.def("search", &search, py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("options"), py::call_guard<py::gil_scoped_release>());
  m.def("explain", &explain, py::arg("program"), py::arg("simulation"));
  m.def("candidates_table", &candidates_table, py::arg("candidates"));
}

}  // namespace soap
