// Adds movements to the module `torch_soap._backend`.
#pragma once

#include <pybind11/pybind11.h>

namespace soap {

void bind_movement(pybind11::module_& m);

}  // namespace soap
