#pragma once

#include <pybind11/pybind11.h>

namespace soap {

void bind_engine(pybind11::module_& m);

}  // namespace soap
