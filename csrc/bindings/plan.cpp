#include <pybind11/stl.h>

#include "base/text.h"
#include "bindings/bindings.h"
#include "plan/plan_text.h"
#include "sharding/region.h"

namespace py = pybind11;

namespace soap {

void bind_plan(py::module_& m) {
  m.def("parse_plan", &parse_plan, py::arg("graph"), py::arg("text"), py::arg("world_size"));
  m.def("parse_changes", &parse_changes, py::arg("graph"), py::arg("text"), py::arg("world_size"));
  m.def("matches", &matches, py::arg("pattern"), py::arg("name"));
  m.def("parse_regions", &parse_regions, py::arg("graph"), py::arg("word"));
  m.def("repeated_blocks", &repeated_blocks, py::arg("graph"));
  m.def("print_plan", &print_plan, py::arg("graph"), py::arg("strategy"));
  m.def("print_config", &print_config, py::arg("config"));
}

}  // namespace soap
