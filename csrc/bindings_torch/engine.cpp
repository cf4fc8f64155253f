#include "engine/engine.h"

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "bindings_torch/engine.h"
#include "engine/gradient_watch.h"

namespace py = pybind11;

namespace soap {
namespace {

using namespace engine;
using movement::Read;
using movement::Step;

using ReadTuple = std::tuple<int, at::ScalarType>;
using InputTuple = std::tuple<int, bool, bool>;  // value, wants_grad, is_store
using SegmentTuple = std::tuple<std::vector<InputTuple>, std::vector<int>, std::vector<int>, bool, bool, std::vector<bool>>;
using Values = std::vector<int>;
using InstructionTuple = std::tuple<Instruction::Kind, int, bool, bool, Values, Values, Values, Values, Values>;
using BeginTuple = std::tuple<int, std::string, std::vector<int64_t>>;

std::vector<Read> reads(const std::vector<ReadTuple>& tuples) {
  std::vector<Read> out;
  for (const auto& [value, dtype] : tuples) out.push_back({value, dtype});
  return out;
}

void check(const Slots& slots, int value) {
  if (value < 0 || static_cast<size_t>(value) >= slots.tensors.size()) throw py::index_error("no such value");
}

Engine make(const std::vector<SegmentTuple>& segments, const std::vector<Step>& steps, const std::vector<InstructionTuple>& instructions,
            const std::vector<std::vector<int64_t>>& shapes, const std::vector<BeginTuple>& stores) {
  Engine out;
  for (const auto& [inputs, outputs, given_back, differentiable, is_region, again] : segments) {
    Segment& segment = out.segments.emplace_back(
        Segment{.outputs = outputs, .given_back = given_back, .differentiable = differentiable, .is_region = is_region, .again = {again.begin(), again.end()}});
    for (const auto& [value, wants_grad, is_store] : inputs) segment.inputs.push_back({value, wants_grad, is_store});
  }
  out.steps = steps;
  for (const auto& [kind, index, is_backward, is_param_fill, frees, kept, released, dropped_copies, dropped_grads] : instructions) {
    out.instructions.push_back({kind, index, is_backward, is_param_fill, frees, kept, released, dropped_copies, dropped_grads});
  }
  out.shapes = shapes;
  for (const auto& [value, name, shape] : stores) out.stores.push_back({value, name, shape});
  return out;
}

// A segment's forward, called with its arguments, which it alone holds then, and `random`.
std::vector<at::Tensor> call(py::handle forward, std::vector<at::Tensor> arguments, py::handle random) {
  py::tuple packed(arguments.size() + 1);
  for (size_t i = 0; i < arguments.size(); ++i) PyTuple_SET_ITEM(packed.ptr(), i, THPVariable_Wrap(std::move(arguments[i])));
  PyTuple_SET_ITEM(packed.ptr(), arguments.size(), random.inc_ref().ptr());
  const auto results = py::reinterpret_steal<py::object>(PyObject_CallObject(forward.ptr(), packed.ptr()));
  if (!results) throw py::error_already_set();
  std::vector<at::Tensor> out;
  for (const py::handle result : py::reinterpret_borrow<py::tuple>(results)) out.push_back(THPVariable_Unpack(result.ptr()));
  return out;
}

Compute compute_by(const py::list& forwards, const py::object& random) {
  return [&](int segment, std::vector<at::Tensor> arguments) {
    const py::gil_scoped_acquire locked;
    return call(PyList_GET_ITEM(forwards.ptr(), segment), std::move(arguments), random);
  };
}

void begin(const Engine& engine, State& state, const std::vector<at::Tensor>& stored) {
  engine.begin(state, stored);
}

void run(Engine& engine, State& state, int begin, int end, bool grad, const py::list& forwards, const py::object& random, const py::function& rare) {
  const Engine::Host host = {.compute = compute_by(forwards, random), .rare = [&](int position) {
                               const py::gil_scoped_acquire locked;
                               rare(position);
                             }};
  const py::gil_scoped_release released;
  engine.run(state, begin, end, grad, host);
}

void forward(const Engine& engine, State& state, int segment, bool record, bool again, const py::list& forwards, const py::object& random) {
  const Compute compute = compute_by(forwards, random);
  const py::gil_scoped_release released;
  run_forward(state, engine.segments.at(segment), segment, record, again, compute);
}

void backward(State& state, int segment) {
  const py::gil_scoped_release released;
  run_backward(state, segment);
}

std::tuple<int64_t, int64_t, int64_t, int64_t> taken(Engine& engine) {
  const movement::Counts counts = std::exchange(engine.counts, {});
  return {counts.exchanges, counts.exchanged_bytes, counts.all_reduces, counts.reduced_bytes};
}

void bind_slots(py::module_& m) {
  py::class_<Slots>(m, "Slots", "Tensors by the number of a local value, as a dict.")
      .def("__contains__", [](const Slots& s, int v) { return check(s, v), s.has(v); })
      .def("__getitem__", [](const Slots& s, int v) { return check(s, v), s.has(v) ? s.tensors[v] : throw py::key_error(std::to_string(v)); })
      .def("__setitem__", [](Slots& s, int v, const at::Tensor& tensor) { check(s, v), s.tensors[v] = tensor; })
      .def(
          "get", [](const Slots& s, int v) { return check(s, v), s.tensors[v]; }, "None where there is none.")
      .def(
          "pop", [](Slots& s, int v) { return check(s, v), s.take(v); }, "None where there is none.")
      .def("__iter__", [](const Slots& s) {
        py::list out;
        for (size_t v = 0; v < s.tensors.size(); ++v) {
          if (s.tensors[v].defined()) out.append(v);
        }
        return py::iter(out);
      });
}

// Integers of ranks in a tensor, rows of equal width; a row begins with how many of it count, a meeting and those.
void write_row(const at::Tensor& row, int64_t meeting, const std::vector<int64_t>& values) {
  int64_t* to = row.mutable_data_ptr<int64_t>();
  to[0] = static_cast<int64_t>(values.size());
  to[1] = meeting;
  std::copy(values.begin(), values.end(), to + 2);
}

std::pair<std::vector<int64_t>, std::vector<std::vector<int64_t>>> read_rows(const at::Tensor& rows, int64_t width) {
  std::pair<std::vector<int64_t>, std::vector<std::vector<int64_t>>> out;
  const int64_t* from = rows.const_data_ptr<int64_t>();
  for (int64_t begin = 0; begin < rows.numel(); begin += width) {
    out.first.push_back(from[begin + 1]);
    out.second.emplace_back(from + begin + 2, from + begin + 2 + std::min(from[begin], width - 2));
  }
  return out;
}

}  // namespace

void bind_engine(py::module_& m) {
  bind_slots(m);
  py::class_<State>(m, "State")
      .def(py::init<int, int>(), py::arg("num_values"), py::arg("num_segments"))
      .def(py::init([](const State& other) {
             State out = other;
             std::fill(out.sums.begin(), out.sums.end(), false);
             return out;
           }),
           py::arg("other"), "For a backward after which another one may come.")
      .def_readonly("values", &State::values)
      .def_readonly("grads", &State::grads)
      .def_readonly("copies", &State::copies)
      .def_readwrite("retain_graph", &State::retain_graph)
      .def_readwrite("deferred", &State::deferred);
  py::class_<Step>(m, "Step", "The movements of one step that stay within the rank, or go among ranks that share memory.")
      .def_static(
          "as_it_is", [](ReadTuple source, int result) { return Step{.same = Step::Same{{std::get<0>(source), std::get<1>(source)}, result}}; },
          py::arg("source"), py::arg("result"))
      .def(py::init<>())
      .def(
          "assemble",
          [](Step& s, const movement::Assembly& assembly, const std::vector<ReadTuple>& own, Values results) {
            s.pieces = Step::Pieces{.own = reads(own), .results = std::move(results), .assembly = assembly};
          },
          py::arg("assembly"), py::arg("own"), py::arg("results"))
      .def(
          "exchange",
          [](Step& s, const movement::Exchange& exchange, movement::BackendPtr backend, const Values& ranks, int64_t num_bytes,
             const std::vector<ReadTuple>& outgoing, const std::vector<ReadTuple>& own, Values results) {
            s.pieces = Step::Pieces{.outgoing = reads(outgoing),
                                    .own = reads(own),
                                    .results = std::move(results),
                                    .exchange = exchange,
                                    .backend = std::move(backend),
                                    .num_bytes = num_bytes};
            s.ranks.push_back(ranks);
          },
          py::arg("exchange"), py::arg("backend"), py::arg("ranks"), py::arg("num_bytes"), py::arg("outgoing"), py::arg("own"), py::arg("results"))
      .def(
          "all_reduce",
          [](Step& s, movement::BackendPtr backend, const Values& ranks, bool maximum, const std::vector<ReadTuple>& sources, std::vector<Values> reached,
             std::vector<std::pair<int, std::vector<int64_t>>> empty) {
            s.buckets.push_back({std::move(backend), maximum, reads(sources), std::move(reached), std::move(empty)});
            s.ranks.push_back(ranks);
          },
          py::arg("backend"), py::arg("ranks"), py::arg("maximum"), py::arg("sources"), py::arg("reached"), py::arg("empty"));
  py::enum_<Instruction::Kind>(m, "Kind")
      .value("segment", Instruction::Kind::kSegment)
      .value("segment_backward", Instruction::Kind::kSegmentBackward)
      .value("fill", Instruction::Kind::kFill)
      .value("grad_fill", Instruction::Kind::kGradFill)
      .value("rare", Instruction::Kind::kRare);
  py::class_<Engine>(m, "Engine", "Contracts are in csrc/engine/engine.h.")
      .def(py::init(&make), py::arg("segments"), py::arg("steps"), py::arg("instructions"), py::arg("shapes"), py::arg("stores"))
      .def("begin", torch::wrap_pybind_function(&begin), py::arg("state"), py::arg("stored"))
      .def("run", torch::wrap_pybind_function(&run), py::arg("state"), py::arg("begin"), py::arg("end"), py::arg("grad"), py::arg("forwards"),
           py::arg("random"), py::arg("rare"))
      .def("forward", torch::wrap_pybind_function(&forward), py::arg("state"), py::arg("segment"), py::arg("record"), py::arg("again"), py::arg("forwards"),
           py::arg("random"))
      .def_static("take_gradients", &Engine::take_gradients, py::arg("state"), py::arg("values"), py::arg("dtypes"))
      .def("take_counts", &taken, "Exchanges, their bytes, all-reduces, their bytes, since this was called.")
      .def_property_readonly("moving", &Engine::moving, "Among whom the movement that failed was; empty: none did.")
      .def_readwrite("timed", &Engine::timed)
      .def_readwrite("spent_ns", &Engine::spent_ns, "While `timed`: in segments' operators, their backward, and movements between ranks.");
  m.def("run_backward", torch::wrap_pybind_function(&backward), py::arg("state"), py::arg("segment"));
  py::class_<GradientWatch>(m, "GradientWatch", "Contracts are in csrc/engine/gradient_watch.h.")
      .def(py::init())
      .def("add", &GradientWatch::add)
      .def(
          "is_ours",
          [](GradientWatch& watch, int index, const std::optional<at::Tensor>& gradient) { return watch.is_ours(index, gradient.value_or(at::Tensor())); },
          py::arg("index"), py::arg("gradient"))
      .def(
          "expect",
          [](GradientWatch& watch, const Values& indices, const std::vector<std::optional<at::Tensor>>& gradients) {
            std::vector<at::Tensor> given;
            for (const auto& gradient : gradients) given.push_back(gradient.value_or(at::Tensor()));
            watch.expect(indices, given);
          },
          py::arg("indices"), py::arg("gradients"));
  m.def("write_row", &write_row, py::arg("row"), py::arg("meeting"), py::arg("values"), "How many values, the meeting, and the values.");
  m.def("read_rows", &read_rows, py::arg("rows"), py::arg("width"), "The meetings and the values of rows of that width.");
  m.def("accumulate", &accumulate, py::arg("state"), py::arg("value"), py::arg("grad"));
}

}  // namespace soap
