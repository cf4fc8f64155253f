#include "search/search.h"

#include <pybind11/stl.h>

#include <chrono>

#include "bindings/bindings.h"
#include "report/describe.h"
#include "report/explain.h"
#include "search/grid_search.h"
#include "search/manual.h"
#include "search/recompute.h"
#include "search/replica_graph.h"
#include "sim/delta.h"

namespace py = pybind11;

namespace soap {

Observer observer_of(const py::object& tell, int every_ms) {
  using Clock = std::chrono::steady_clock;
  return [&tell, every = std::chrono::milliseconds(every_ms), last = Clock::time_point{}](const Progress& progress) mutable {
    const Clock::time_point now = Clock::now();
    if (now - last < every) return true;
    last = now;
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    return tell.is_none() || tell(progress).cast<bool>();
  };
}

void bind_search(py::module_& m) {
  py::class_<Event>(m, "Event")
      .def_readonly("step", &Event::step)
      .def_readonly("device", &Event::device)
      .def_readonly("communication", &Event::communication)
      .def_readonly("host", &Event::host)
      .def_readonly("begin_ns", &Event::begin_ns)
      .def_readonly("end_ns", &Event::end_ns);
  py::class_<Simulation>(m, "Simulation")
      .def_readonly("step_ns", &Simulation::step_ns)
      .def_readonly("compute_ns", &Simulation::compute_ns)
      .def_readonly("communication_ns", &Simulation::communication_ns)
      .def_readonly("host_ns", &Simulation::host_ns)
      .def_readonly("device_step_ns", &Simulation::device_step_ns)
      .def_readonly("memory_bytes", &Simulation::memory_bytes)
      .def_readonly("node_ns", &Simulation::node_ns)
      .def_readonly("moved_bytes", &Simulation::moved_bytes)
      .def_readonly("events", &Simulation::events);
  m.def("simulate", &simulate, py::arg("program"), py::arg("cost"), py::arg("record") = false, py::call_guard<py::gil_scoped_release>());
  m.def("step_name", &step_name, py::arg("program"), py::arg("step"));
  struct OwnedDelta {  // with the cost model and graph that its cache refers to kept alive by the caller
    std::unique_ptr<LayoutCache> cache;
    DeltaSimulator simulator;
  };
  py::class_<OwnedDelta>(m, "DeltaSimulator", "The simulated step time of a strategy that changes a little at a time.")
      .def(py::init([](const OpGraph& graph, const Strategy& start, const FedRows& rows, const CostModel& cost) {
             auto cache = std::make_unique<LayoutCache>(graph, rows, cost);
             LayoutCache& shared = *cache;
             return std::unique_ptr<OwnedDelta>(new OwnedDelta{std::move(cache), DeltaSimulator(shared, start, rows)});
           }),
           py::arg("graph"), py::arg("strategy"), py::arg("rows"), py::arg("cost"), py::keep_alive<1, 2>(), py::keep_alive<1, 5>())
      .def_property_readonly("step_ns", [](const OwnedDelta& d) { return d.simulator.step_ns(); })
      .def_property_readonly("strategy", [](const OwnedDelta& d) { return d.simulator.strategy(); })
      .def_property_readonly("stored_bytes", [](const OwnedDelta& d) { return d.simulator.stored_bytes(); })
      .def(
          "change", [](OwnedDelta& d, NodeId node, std::optional<OpConfig> config) { return d.simulator.change({{node, std::move(config)}}); }, py::arg("node"),
          py::arg("config"), "Step time with a node's new configuration; None: it follows. ValueError when it isn't legal.")
      .def(
          "change_buckets", [](OwnedDelta& d, int64_t bytes) { return d.simulator.change({}, bytes); }, py::arg("bytes"),
          "Step time with gradients in buckets of another size.")
      .def("undo", [](OwnedDelta& d) { d.simulator.undo(); });
  py::class_<ManualOptions>(m, "ManualOptions")
      .def(py::init<>())
      .def_readwrite("dp", &ManualOptions::dp)
      .def_readwrite("tp", &ManualOptions::tp)
      .def_readwrite("pp", &ManualOptions::pp)
      .def_readwrite("micro_batches", &ManualOptions::micro_batches)
      .def_readwrite("order", &ManualOptions::order)
      .def_readwrite("zero", &ManualOptions::zero)
      .def_readwrite("zero_group", &ManualOptions::zero_group)
      .def_readwrite("sequence", &ManualOptions::sequence)
      .def_readwrite("recompute", &ManualOptions::recompute)
      .def_readwrite("fsdp", &ManualOptions::fsdp)
      .def_readwrite("strict", &ManualOptions::strict);
  py::class_<GridPrice>(m, "GridPrice")
      .def_readonly("step_ns", &GridPrice::step_ns)
      .def_readonly("compute_ns", &GridPrice::compute_ns)
      .def_readonly("communication_ns", &GridPrice::communication_ns)
      .def_readonly("host_ns", &GridPrice::host_ns)
      .def_readonly("device_step_ns", &GridPrice::device_step_ns)
      .def_readonly("memory_bytes", &GridPrice::memory_bytes)
      .def_readonly("stage_memory", &GridPrice::stage_memory);
  py::class_<GridSearchOptions>(m, "GridSearchOptions")
      .def(py::init<>())
      .def_readwrite("memory_limit_bytes", &GridSearchOptions::memory_limit_bytes)
      .def_readwrite("descents", &GridSearchOptions::descents)
      .def_readwrite("descent_simulations", &GridSearchOptions::descent_simulations);
  py::class_<GridCandidate>(m, "GridCandidate")
      .def_readonly("name", &GridCandidate::name)
      .def_readonly("options", &GridCandidate::options)
      .def_readonly("price", &GridCandidate::price)
      .def_readonly("fits", &GridCandidate::fits);
  py::class_<GridSearchResult>(m, "GridSearchResult")
      .def_readonly("candidates", &GridSearchResult::candidates)
      .def_readonly("strategy", &GridSearchResult::strategy)
      .def_readonly("simulations", &GridSearchResult::simulations);
  m.def("search_grids", &search_grids, py::arg("graph"), py::arg("world_size"), py::arg("cost"), py::arg("options"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "grid_price",
      [](const OpGraph& graph, int world_size, const CostModel& cost, const ManualOptions& options) {
        const ManualPlanner planner(graph, world_size);
        return GridPricer(graph, planner, cost).price(options);
      },
      py::arg("graph"), py::arg("world_size"), py::arg("cost"), py::arg("options"), "A manual plan priced without naming its devices.");
  m.def(
      "replica_graph", [](const OpGraph& graph, int64_t parts) { return replica_graph(graph, ManualPlanner(graph, 1), parts); }, py::arg("graph"),
      py::arg("parts"), "What one of `parts` equal shares of the samples computes.");
  m.def("manual_strategy", &manual_strategy, py::arg("graph"), py::arg("world_size"), py::arg("options"));
  py::class_<Constraints>(m, "Constraints").def(py::init<>()).def_readwrite("pin", &Constraints::pin).def_readwrite("forbid", &Constraints::forbid);
  py::class_<SearchOptions>(m, "SearchOptions")
      .def(py::init<>())
      .def_readwrite("seed", &SearchOptions::seed)
      .def_readwrite("descent_simulations", &SearchOptions::descent_simulations)
      .def_readwrite("mcmc_simulations", &SearchOptions::mcmc_simulations)
      .def_readwrite("chains", &SearchOptions::chains)
      .def_readwrite("temperature", &SearchOptions::temperature)
      .def_readwrite("stops_early", &SearchOptions::stops_early)
      .def_readwrite("memory_limit_bytes", &SearchOptions::memory_limit_bytes)
      .def_readwrite("count_memory", &SearchOptions::count_memory)
      .def_readwrite("constraints", &SearchOptions::constraints)
      .def_readwrite("starts", &SearchOptions::starts);
  py::class_<Candidate>(m, "Candidate")
      .def_readonly("name", &Candidate::name)
      .def_readonly("strategy", &Candidate::strategy)
      .def_readonly("step_ns", &Candidate::step_ns)
      .def_readonly("memory_bytes", &Candidate::memory_bytes)
      .def_readonly("fits", &Candidate::fits);
  py::class_<Progress>(m, "Progress")
      .def_readonly("phase", &Progress::phase)
      .def_readonly("simulations", &Progress::simulations)
      .def_readonly("budget", &Progress::budget)
      .def_readonly("best_ns", &Progress::best_ns);
  py::class_<SearchResult>(m, "SearchResult")
      .def_readonly("candidates", &SearchResult::candidates)
      .def_readonly("best", &SearchResult::best)
      .def_readonly("simulations", &SearchResult::simulations)
      .def_readonly("chains", &SearchResult::chains)
      .def_readonly("illegal", &SearchResult::illegal)
      .def_readonly("progress", &SearchResult::progress)
      .def_readonly("interrupted", &SearchResult::interrupted);
  m.def("seeds", &seeds, py::arg("graph"), py::arg("world_size"));
  m.def(
      "search",
      [](const OpGraph& graph, const FedRows& rows, const CostModel& cost, const SearchOptions& options, const py::object& observer, int every_ms) {
        const py::gil_scoped_release without_gil;
        return search(graph, rows, cost, options, observer_of(observer, every_ms));
      },
      py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("options"), py::arg("observer") = py::none(), py::arg("every_ms") = 50,
      "The best strategy found. observer(Progress) -> bool is asked now and then; False: end with the best so far.");
  py::class_<NodeDescription>(m, "NodeDescription", "What a node does on which devices.")
      .def_readonly("samples", &NodeDescription::samples)
      .def_readonly("attributes", &NodeDescription::attributes)
      .def_readonly("parameters", &NodeDescription::parameters)
      .def_readonly("chunks", &NodeDescription::chunks)
      .def_readonly("replicas", &NodeDescription::replicas)
      .def_readonly("devices", &NodeDescription::devices)
      .def_readonly("cuts", &NodeDescription::cuts)
      .def_readonly("result_bytes", &NodeDescription::result_bytes);
  py::class_<MemoryPoint>(m, "MemoryPoint").def_readonly("time_ns", &MemoryPoint::time_ns).def_property_readonly("bytes", [](const MemoryPoint& p) {
    return std::vector<int64_t>(p.bytes.begin(), p.bytes.end());
  });
  m.def("describe", &describe, py::arg("program"), py::arg("node"));
  m.def("memory_over_time", &memory_over_time, py::arg("program"), py::arg("simulation"), py::arg("machine"), py::arg("most_points"),
        "Per device: stored, tiles, copies, gradients and moving bytes over a recorded step.");
  m.def("explain", &explain, py::arg("program"), py::arg("simulation"));
  m.def("explain_recompute", &explain_recompute, py::arg("graph"), py::arg("strategy"), py::arg("rows"), py::arg("cost"), py::arg("memory_limit_bytes"));
  m.def("usual_regions", &usual_regions, py::arg("graph"));
  m.def("candidates_table", &candidates_table, py::arg("candidates"));
}

}  // namespace soap
