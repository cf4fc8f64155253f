#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "search/exhaustive.h"
#include "search/optimize_layers.h"

namespace py = pybind11;

namespace soap {

void bind_layers(py::module_& m) {
  py::class_<Choices>(m, "Choices", "The choice of each node that an elimination found.")
      .def_readonly("choice", &Choices::choice)
      .def_readonly("cost", &Choices::cost)
      .def_readonly("exact", &Choices::exact)
      .def_readonly("node_eliminations", &Choices::node_eliminations)
      .def_readonly("edge_eliminations", &Choices::edge_eliminations)
      .def_readonly("left", &Choices::left)
      .def_readonly("with_tables", &Choices::with_tables)
      .def_readonly("fixed", &Choices::fixed);
  py::class_<LimitedChoices>(m, "LimitedChoices")
      .def_readonly("choices", &LimitedChoices::choices)
      .def_readonly("weight", &LimitedChoices::weight)
      .def_readonly("multiplier", &LimitedChoices::multiplier)
      .def_readonly("fits", &LimitedChoices::fits);
  py::class_<ChoiceGraph::Edge>(m, "ChoiceEdge")
      .def(py::init([](int a, int b, int table) { return ChoiceGraph::Edge{a, b, table}; }), py::arg("a"), py::arg("b"), py::arg("table"))
      .def_readonly("a", &ChoiceGraph::Edge::a)
      .def_readonly("b", &ChoiceGraph::Edge::b)
      .def_readonly("table", &ChoiceGraph::Edge::table);
  py::class_<ChoiceGraph>(m, "ChoiceGraph", "Costs of each node's choices, and of pairs of choices along edges.")
      .def(py::init([](std::vector<std::vector<int64_t>> nodes, std::vector<std::vector<int64_t>> tables, std::vector<ChoiceGraph::Edge> edges) {
             return ChoiceGraph{std::move(nodes), std::move(tables), std::move(edges)};
           }),
           py::arg("nodes"), py::arg("tables"), py::arg("edges"))
      .def_readonly("nodes", &ChoiceGraph::nodes)
      .def_readonly("tables", &ChoiceGraph::tables)
      .def_readonly("edges", &ChoiceGraph::edges)
      .def("cost", &ChoiceGraph::cost, py::arg("choice"));
  m.def(
      "minimize", [](const ChoiceGraph& g, int64_t largest_table) { return minimize(g, {.largest_table = largest_table}); }, py::arg("graph"),
      py::arg("largest_table") = EliminationOptions{}.largest_table, py::call_guard<py::gil_scoped_release>());
  m.def(
      "minimize_within",
      [](const ChoiceGraph& g, const std::vector<std::vector<int64_t>>& weights, int64_t limit) { return minimize_within(g, weights, limit); },
      py::arg("graph"), py::arg("weights"), py::arg("limit"), py::call_guard<py::gil_scoped_release>());

  py::class_<Layer>(m, "Layer", "An operator that is configured, and what follows it.")
      .def_readonly("head", &Layer::head)
      .def_readonly("nodes", &Layer::nodes)
      .def_readonly("configs", &Layer::configs);
  py::class_<LayerOptions>(m, "LayerOptions")
      .def(py::init([](bool reductions, int max_configurations, bool by_resolving) { return LayerOptions{reductions, max_configurations, by_resolving}; }),
           py::arg("reductions") = true, py::arg("max_configurations") = LayerOptions{}.max_configurations, py::arg("by_resolving") = false)
      .def_readwrite("reductions", &LayerOptions::reductions)
      .def_readwrite("max_configurations", &LayerOptions::max_configurations)
      .def_readwrite("by_resolving", &LayerOptions::by_resolving);
  py::class_<LayerCosts>(m, "LayerCosts", "Layer-wise costs of all configurations.")
      .def_readonly("layers", &LayerCosts::layers)
      .def_readonly("choices", &LayerCosts::choices)
      .def_readonly("memory_bytes", &LayerCosts::memory_bytes)
      .def_readonly("distinct_layers", &LayerCosts::distinct_layers)
      .def_readonly("resolved", &LayerCosts::resolved, "Configurations that had to be resolved as lowering does.");
  m.def("layer_costs", &layer_costs, py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("options") = LayerOptions{},
        py::call_guard<py::gil_scoped_release>());
  m.def("strategy_of", &strategy_of, py::arg("graph"), py::arg("costs"), py::arg("choice"));
  m.def("choices_of", &choices_of, py::arg("graph"), py::arg("costs"), py::arg("strategy"));
  py::class_<LayerPlan>(m, "LayerPlan", "The strategy with the smallest layer-wise cost.")
      .def_readonly("strategy", &LayerPlan::strategy)
      .def_readonly("cost_ns", &LayerPlan::cost_ns)
      .def_readonly("memory_bytes", &LayerPlan::memory_bytes)
      .def_readonly("fits", &LayerPlan::fits)
      .def_readonly("choices", &LayerPlan::choices)
      .def_readonly("layers", &LayerPlan::layers)
      .def_readonly("distinct_layers", &LayerPlan::distinct_layers)
      .def_readonly("edges", &LayerPlan::edges)
      .def_readonly("configurations", &LayerPlan::configurations)
      .def_readonly("largest", &LayerPlan::largest)
      .def_readonly("table_seconds", &LayerPlan::table_seconds)
      .def_readonly("elimination_seconds", &LayerPlan::elimination_seconds);
  m.def("optimize_layers", &optimize_layers, py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("options") = LayerOptions{},
        py::arg("memory_limit_bytes") = py::none(), py::call_guard<py::gil_scoped_release>());

  py::class_<ExhaustiveOptions>(m, "ExhaustiveOptions")
      .def(py::init<>())
      .def_readwrite("operators", &ExhaustiveOptions::operators)
      .def_readwrite("starts", &ExhaustiveOptions::starts)
      .def_readwrite("reductions", &ExhaustiveOptions::reductions)
      .def_readwrite("bucket_bytes", &ExhaustiveOptions::bucket_bytes)
      .def_readwrite("most_bounds", &ExhaustiveOptions::most_bounds)
      .def_readwrite("bound_scale", &ExhaustiveOptions::bound_scale);
  py::class_<ExhaustiveSpace>(m, "ExhaustiveSpace", "Configurations of each layer, of which a plan takes one each.")
      .def(
          py::init([](std::vector<NodeId> heads, std::vector<std::vector<OpConfig>> configs) { return ExhaustiveSpace{std::move(heads), std::move(configs)}; }),
          py::arg("heads"), py::arg("configs"))
      .def_readonly("heads", &ExhaustiveSpace::heads)
      .def_readonly("configs", &ExhaustiveSpace::configs);
  py::class_<ExhaustiveResult>(m, "ExhaustiveResult")
      .def_readonly("strategy", &ExhaustiveResult::strategy)
      .def_readonly("step_ns", &ExhaustiveResult::step_ns)
      .def_readonly("proven", &ExhaustiveResult::proven)
      .def_readonly("configurations", &ExhaustiveResult::configurations)
      .def_readonly("plans", &ExhaustiveResult::plans)
      .def_readonly("bounds", &ExhaustiveResult::bounds)
      .def_readonly("pruned", &ExhaustiveResult::pruned)
      .def_readonly("simulated", &ExhaustiveResult::simulated)
      .def_readonly("illegal", &ExhaustiveResult::illegal)
      .def_readonly("last_better", &ExhaustiveResult::last_better);
  m.def("exhaustive_space", &exhaustive_space, py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("options") = ExhaustiveOptions{});
  m.def("partial_bounds", &partial_bounds, py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("space"), py::arg("choice"),
        py::arg("options") = ExhaustiveOptions{}, "Bounds of a plan as its layers are configured one after another.");
  m.def(
      "exhaustive_search",
      [](const OpGraph& graph, const FedRows& rows, const CostModel& cost, const ExhaustiveSpace& space, const ExhaustiveOptions& options,
         const py::object& observer, int every_ms) {
        const py::gil_scoped_release without_gil;
        return exhaustive_search(graph, rows, cost, space, options, observer_of(observer, every_ms));
      },
      py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("space"), py::arg("options") = ExhaustiveOptions{}, py::arg("observer") = py::none(),
      py::arg("every_ms") = 50, "The fastest plan of a space by simulation. observer(Progress) -> bool is asked now and then; False: end without proof.");
}

}  // namespace soap
