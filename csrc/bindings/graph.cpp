#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "graph/op_graph.h"

namespace py = pybind11;

namespace soap {

void bind_graph(py::module_& m) {
  py::enum_<NodeKind>(m, "NodeKind")
      .value("op", NodeKind::kOp)
      .value("param", NodeKind::kParam)
      .value("buffer", NodeKind::kBuffer)
      .value("const", NodeKind::kConst)
      .value("feed", NodeKind::kFeed)
      .value("return_", NodeKind::kReturn);
  py::class_<Tensor>(m, "Tensor")
      .def_readonly("id", &Tensor::id)
      .def_readonly("shape", &Tensor::shape)
      .def_readonly("dtype", &Tensor::dtype)
      .def_readonly("element_bytes", &Tensor::element_bytes)
      .def_readonly("requires_grad", &Tensor::requires_grad)
      .def_readonly("producer", &Tensor::producer)
      .def_readonly("result", &Tensor::result);
  py::class_<Node>(m, "Node")
      .def_readonly("id", &Node::id)
      .def_readonly("kind", &Node::kind)
      .def_readonly("name", &Node::name)
      .def_readonly("target", &Node::target)
      .def_readonly("family", &Node::family)
      .def_readonly("inputs", &Node::inputs)
      .def_readonly("operand_names", &Node::operand_names)
      .def_readonly("attrs", &Node::attrs)
      .def_readonly("outputs", &Node::outputs)
      .def_readonly("source", &Node::source)
      .def_readonly("sample_dim", &Node::sample_dim)
      .def_readonly("origin", &Node::origin)
      .def_readonly("no_grad", &Node::no_grad);
  bind_list<Tensor>(m, "TensorList");
  bind_list<Node>(m, "NodeList");
  py::class_<OpGraph>(m, "OpGraph", "Operators, parameters, feeds and returns of a captured module, at one batch size.")
      .def(py::init<>())
      .def_readonly("nodes", &OpGraph::nodes)
      .def_readonly("tensors", &OpGraph::tensors)
      .def("find", &OpGraph::find, py::arg("name"))
      .def("add_tensor", &add_tensor, py::arg("shape"), py::arg("dtype"), py::arg("element_bytes"), py::arg("requires_grad"))
      .def(
          "add_node",
          [](OpGraph& g, NodeKind kind, std::string name, std::string target, std::string family, std::vector<TensorId> inputs,
             std::vector<std::string> operand_names, AttrMap attrs, std::vector<TensorId> outputs, std::string source, int sample_dim, int origin,
             bool no_grad) {
            return add_node(g, {.kind = kind,
                                .name = std::move(name),
                                .target = std::move(target),
                                .family = std::move(family),
                                .inputs = std::move(inputs),
                                .operand_names = std::move(operand_names),
                                .attrs = std::move(attrs),
                                .outputs = std::move(outputs),
                                .source = std::move(source),
                                .sample_dim = sample_dim,
                                .origin = origin,
                                .no_grad = no_grad});
          },
          py::arg("kind"), py::arg("name"), py::arg("target"), py::arg("family"), py::arg("inputs"), py::arg("operand_names"), py::arg("attrs"),
          py::arg("outputs"), py::arg("source"), py::arg("sample_dim"), py::arg("origin"), py::arg("no_grad"))
      .def("__str__", [](const OpGraph& g) { return to_string(g); });
}

}  // namespace soap
