#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "search/rewrites.h"
#include "substitution/sample.h"
#include "substitution/transfer.h"

namespace py = pybind11;

namespace soap {

void bind_substitution(py::module_& m) {
  py::class_<Substitution>(m, "Substitution", "One entry of the table: what is equal to what.")
      .def_readonly("name", &Substitution::name)
      .def_readonly("bits", &Substitution::bits);
  m.def("find_substitution", &find_substitution, py::arg("table"), py::arg("name"));
  m.def("substitutions", [] { return substitutions(); }, "The table that plans and the search use.");
  m.def("substitutions_text", &substitutions_text);
  m.def("parse_substitutions", &parse_substitutions, py::arg("text"));
  m.def("find_rewrites", &find_rewrites, py::arg("graph"), py::arg("table") = substitutions());
  m.def("rewritten", &rewritten, py::arg("graph"), py::arg("rewrites"), py::arg("table") = substitutions());
  m.def("fitting", &fitting, py::arg("graph"), py::arg("rewrites"));
  m.def("transferred", &transferred, py::arg("before"), py::arg("strategy"), py::arg("rewrites"), py::arg("after"));
  py::class_<Sample>(m, "Sample", "A use of a substitution by itself, small.").def_readonly("source", &Sample::source).def_readonly("target", &Sample::target);
  m.def("sample_of", &sample_of, py::arg("graph"), py::arg("rewrite"), py::arg("table") = substitutions());
  m.def("signature", &signature, py::arg("graph"), py::arg("rewrite"), py::arg("table") = substitutions());
}

void bind_rewrite_search(py::module_& m) {
  py::class_<RewriteOptions>(m, "RewriteOptions")
      .def(py::init<>())
      .def_readwrite("least_gain", &RewriteOptions::least_gain)
      .def_readwrite("rounds", &RewriteOptions::rounds)
      .def_readwrite("refusal", &RewriteOptions::refusal);
  py::class_<UsedRewrites>(m, "UsedRewrites").def_readonly("rewrites", &UsedRewrites::rewrites).def_readonly("gain_ns", &UsedRewrites::gain_ns);
  py::class_<RewriteSearchResult>(m, "RewriteSearchResult")
      .def_readonly("search", &RewriteSearchResult::search)
      .def_readonly("used", &RewriteSearchResult::used)
      .def_readonly("refused", &RewriteSearchResult::refused)
      .def_readonly("priced", &RewriteSearchResult::priced);
  m.def(
      "search_with_rewrites",
      [](const OpGraph& graph, const FedRows& rows, const CostModel& cost, const SearchOptions& options, const RewriteOptions& rewriting,
         const py::object& observer, int every_ms) {
        const py::gil_scoped_release without_gil;
        return search_with_rewrites(graph, rows, cost, options, rewriting, observer_of(observer, every_ms));
      },
      py::arg("graph"), py::arg("rows"), py::arg("cost"), py::arg("options"), py::arg("rewriting"), py::arg("observer") = py::none(), py::arg("every_ms") = 50,
      "The best strategy found on the graph and on what rewrites make of it. observer: see search.");
}

}  // namespace soap
