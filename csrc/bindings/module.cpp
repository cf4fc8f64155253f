#include "bindings/bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The planning library of torch_soap.";
  soap::bind_base(m);
  soap::bind_graph(m);
  soap::bind_sharding(m);
  soap::bind_substitution(m);
  soap::bind_program(m);
  soap::bind_plan(m);
  soap::bind_machine(m);
  soap::bind_search(m);
  soap::bind_rewrite_search(m);
  soap::bind_layers(m);
}
