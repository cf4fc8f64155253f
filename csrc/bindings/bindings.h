// One function per folder; each adds that folder's types to the module `torch_soap._C`. No logic here.
#pragma once

#include <pybind11/pybind11.h>

namespace soap {

void bind_base(pybind11::module_& m);
void bind_graph(pybind11::module_& m);
void bind_sharding(pybind11::module_& m);
void bind_program(pybind11::module_& m);
void bind_plan(pybind11::module_& m);
void bind_machine(pybind11::module_& m);
void bind_search(pybind11::module_& m);
void bind_layers(pybind11::module_& m);

}  // namespace soap
