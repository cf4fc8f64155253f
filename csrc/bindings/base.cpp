#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include "base/error.h"
#include "base/index_set.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace soap {

void bind_base(py::module_& m) {
  py::register_exception<InternalError>(m, "InternalError", PyExc_RuntimeError);
  py::class_<IndexSet>(m, "IndexSet", "A set of indices of a dim or factor, as sorted disjoint runs.")
      .def(py::init<>())
      .def_static("interval", &IndexSet::interval, py::arg("begin"), py::arg("end"))
      .def_static(
          "from_runs",
          [](const std::vector<std::pair<int64_t, int64_t>>& runs) {
            std::vector<Run> out;
            for (const auto& [b, e] : runs) out.push_back({b, e});
            return IndexSet::from_runs(std::move(out));
          },
          py::arg("runs"))
      .def_property_readonly("runs",
                             [](const IndexSet& s) {
                               std::vector<std::pair<int64_t, int64_t>> out;
                               for (const Run& r : s.runs()) out.emplace_back(r.begin, r.end);
                               return out;
                             })
      .def_property_readonly("begin", &IndexSet::begin)
      .def_property_readonly("end", &IndexSet::end)
      .def_property_readonly("is_interval", &IndexSet::is_interval)
      .def("is_all", &IndexSet::is_all, py::arg("size"))
      .def("__contains__", &IndexSet::contains)
      .def("__len__", &IndexSet::size)
      .def("__bool__", [](const IndexSet& s) { return !s.empty(); })
      .def(py::self == py::self)
      .def("__repr__", [](const IndexSet& s) { return to_string(s); });
}

}  // namespace soap
