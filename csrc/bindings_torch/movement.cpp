#include "bindings_torch/movement.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>
#include <variant>

#include "movement/exchange.h"

namespace py = pybind11;

namespace soap {
namespace {

using namespace movement;

using Shape = std::vector<int64_t>;
using Number = std::variant<bool, int64_t, double>;
using SentTuple = std::tuple<int, int, at::ScalarType, Shape, Index>;      // peer, source, dtype, shape, index
using ArrivingTuple = std::tuple<int, int, int64_t, Shape, Index, Index>;  // source, message, begin, shape, index there, index here
using ResultTuple = std::tuple<Shape, at::ScalarType, at::ScalarType, Combine, Number, std::vector<ArrivingTuple>>;

constexpr int64_t kLong = 64 << 10;  // bytes: to copy them takes longer than to give the GIL away

class Released {
 public:
  explicit Released(int64_t num_bytes) {
    if (num_bytes >= kLong) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

Packing packing(const std::vector<SentTuple>& parts, int num_peers) {
  std::vector<Sent> out;
  for (const auto& [peer, source, dtype, shape, index] : parts) out.push_back({.peer = peer, .source = source, .dtype = dtype, .part = Part(shape, index)});
  return Packing(std::move(out), num_peers);
}

Assembly assembly(const std::vector<ResultTuple>& results) {
  std::vector<Result> out;
  for (const auto& [shape, dtype, sums, combine, identity, pieces] : results) {
    Result& result = out.emplace_back(Result{
        .shape = shape, .dtype = dtype, .sums = sums, .combine = combine, .identity = std::visit([](auto number) { return c10::Scalar(number); }, identity)});
    for (const auto& [source, message, begin, box, from, to] : pieces) {
      result.pieces.push_back({.source = source, .message = message, .begin = begin, .from = Part(box, from), .to = Part(box, to)});
    }
  }
  return Assembly(std::move(out));
}

int64_t num_bytes(const std::vector<at::Tensor>& tensors) {
  int64_t out = 0;
  for (const at::Tensor& tensor : tensors) out += static_cast<int64_t>(tensor.nbytes());
  return out;
}

}  // namespace

void bind_movement(py::module_& m) {
  py::enum_<Combine>(m, "Combine").value("replace", Combine::kReplace).value("add", Combine::kAdd).value("maximum", Combine::kMaximum);
  py::class_<Packing>(m, "Packing")
      .def(py::init(&packing), py::arg("parts"), py::arg("num_peers"), "Of each part (peer, source, dtype, shape, index).")
      .def_property_readonly("num_bytes", &Packing::num_bytes)
      .def(
          "pack",
          [](const Packing& p, const std::vector<at::Tensor>& sources) {
            const Released released(p.num_bytes());
            return p.pack(sources);
          },
          py::arg("sources"));
  py::class_<Assembly>(m, "Assembly")
      .def(py::init(&assembly), py::arg("results"),
           "Of each result (shape, dtype, dtype of sums, combine, identity, pieces), of each piece (source, message, begin, shape, index there, index here).")
      .def_property_readonly("placed", &Assembly::placed, "Results that can be written to given memory.")
      .def(
          "unpack",
          [](const Assembly& a, const std::vector<at::Tensor>& sources, const std::vector<at::Tensor>& messages,
             const std::vector<std::optional<at::Tensor>>& places) {
            const Released released(a.num_bytes());
            return a.unpack(sources, messages, places);
          },
          py::arg("sources"), py::arg("messages"), py::arg("places"));
  py::class_<Exchange>(m, "Exchange")
      .def(py::init<Packing, std::vector<int>, Assembly, std::vector<int>, int, int>(), py::arg("packing"), py::arg("to"), py::arg("assembly"),
           py::arg("from_"), py::arg("rank"), py::arg("num_ranks"), "`to` and `from_`: ranks in the group.")
      .def("run", &Exchange::run, py::arg("backend"), py::arg("outgoing"), py::arg("own"), py::arg("places"), py::call_guard<py::gil_scoped_release>());
  m.def("all_reduce", &all_reduce, py::arg("backend"), py::arg("tensors"), py::arg("maximum"), py::call_guard<py::gil_scoped_release>(),
        "The sums of tensors over all ranks, in one operation.");
  m.def(
      "flatten",
      [](const std::vector<at::Tensor>& tensors, at::ScalarType dtype) {
        const Released released(num_bytes(tensors));
        return flatten(tensors, dtype);
      },
      py::arg("tensors"), py::arg("dtype"), "All elements as one new tensor.");
  m.def("unflatten", &unflatten, py::arg("flat"), py::arg("like"), "Views of it in the shapes of others.");
}

}  // namespace soap
