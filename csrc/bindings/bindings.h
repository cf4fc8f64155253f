// One function per folder; each adds that folder's types to the module `torch_soap._C`. No logic here.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "fmt/format.h"
#include "program/project.h"
#include "search/progress.h"

// Long lists stay in C++: Python gets a view of them, and an object for each element that it asks for, not for all of them at each access.
PYBIND11_MAKE_OPAQUE(std::vector<soap::Node>)
PYBIND11_MAKE_OPAQUE(std::vector<soap::Tensor>)
PYBIND11_MAKE_OPAQUE(std::vector<soap::Rule>)
PYBIND11_MAKE_OPAQUE(std::vector<soap::Tiling>)
PYBIND11_MAKE_OPAQUE(std::vector<soap::Sharding>)
PYBIND11_MAKE_OPAQUE(std::vector<soap::CopyGroup>)
PYBIND11_MAKE_OPAQUE(std::vector<soap::Step>)
PYBIND11_MAKE_OPAQUE(std::vector<soap::LocalValue>)
PYBIND11_MAKE_OPAQUE(std::vector<soap::Segment>)
PYBIND11_MAKE_OPAQUE(std::vector<soap::Instruction>)

namespace soap {

// A read-only sequence whose elements live as long as what it is a part of.
template <class T>
void bind_list(pybind11::module_& m, const char* name) {
  namespace py = pybind11;
  py::class_<std::vector<T>>(m, name)
      .def("__len__", [](const std::vector<T>& list) { return list.size(); })
      .def(
          "__getitem__",
          [](std::vector<T>& list, py::ssize_t i) -> T& {
            const auto size = static_cast<py::ssize_t>(list.size());
            if (i < 0) i += size;
            if (i < 0 || i >= size) throw py::index_error(fmt::format("index {} of {} elements", i, size));
            return list[i];
          },
          py::arg("index"), py::return_value_policy::reference_internal)
      .def("__iter__", [](std::vector<T>& list) { return py::make_iterator(list.begin(), list.end()); }, py::keep_alive<0, 1>());
}

// Lets Python handle its signals and look at the progress, at most every so many milliseconds: a search simulates thousands of times in a second.
// `tell` must outlive the observer, which holds no reference: it is copied without the GIL.
Observer observer_of(const pybind11::object& tell, int every_ms);

void bind_base(pybind11::module_& m);
void bind_graph(pybind11::module_& m);
void bind_sharding(pybind11::module_& m);
void bind_substitution(pybind11::module_& m);
void bind_program(pybind11::module_& m);
void bind_plan(pybind11::module_& m);
void bind_machine(pybind11::module_& m);
void bind_search(pybind11::module_& m);
void bind_rewrite_search(pybind11::module_& m);
void bind_layers(pybind11::module_& m);

}  // namespace soap
