// torch_soap._backend: what is linked with torch's Python library, unlike _C: the c10d backend, movements (movement.cpp) and the engine (engine.cpp).
#include <pybind11/chrono.h>
#include <torch/csrc/utils/pybind.h>

#include "backend/soap_backend.h"
#include "bindings_torch/engine.h"
#include "bindings_torch/movement.h"
#include "transport/cores.h"
#include "transport/process.h"

namespace py = pybind11;
using soap::backend::SoapBackend;

PYBIND11_MODULE(_backend, m) {
  m.doc() = "The c10d backend soap, which torch_soap/backend.py registers, movements and the engine, for torch_soap/runtime.";
  py::module_::import("torch.distributed");  // has the base class

  py::class_<SoapBackend, c10::intrusive_ptr<SoapBackend>, c10d::Backend>(m, "SoapBackend")
      .def(py::init<const c10::intrusive_ptr<c10d::Store>&, int, int, std::chrono::milliseconds, const std::string&>(), py::arg("store"), py::arg("rank"),
           py::arg("size"), py::arg("timeout"), py::arg("host") = "", py::call_guard<py::gil_scoped_release>(),
           "Collective over the ranks of the group. `host` stands for this host's identity unless it is empty.")
      .def_property_readonly("shares_memory", &SoapBackend::shares_memory, "Whether all ranks do.")
      .def_property_readonly("spans_hosts", &SoapBackend::spans_hosts, "Whether the ranks of each of several hosts share memory.")
      .def_property_readonly("num_hosts", &SoapBackend::num_hosts)
      .def_property_readonly("why_not", &SoapBackend::why_not, "Why there is no shared memory, on one host or on each.")
      .def("set_fallback", &SoapBackend::set_fallback, py::arg("fallback"),
           "The backend that serves this group where there is no shared memory, and what isn't a collective where ranks are on several hosts.")
      .def("set_profiler_name", &SoapBackend::set_profiler_name, py::arg("name"), "What the profiler shows before ':all_reduce'.")
      .def("set_random_delay", &SoapBackend::set_random_delay, py::arg("most"), "For tests: delays every step by a random time up to this.");
  m.def("leave_all_groups", &soap::backend::leave_all_groups, py::call_guard<py::gil_scoped_release>(), "To be called before the interpreter ends.");
  m.def(
      "kernel", [] { return soap::transport::this_process("").kernel; },
      "Of the operating system: the same for processes that share cores, in containers too.");
  m.def("core_distance_ns", &soap::transport::core_distance_ns, py::call_guard<py::gil_scoped_release>(),
        "Of a cache line from one core that this process may run on to another, and back; 0 where it has only one.");
  soap::bind_movement(m);
  soap::bind_engine(m);
}
