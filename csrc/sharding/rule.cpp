#include "sharding/rule.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "base/error.h"

namespace soap {
namespace {

int64_t floor_div(int64_t a, int64_t b) {
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}
int64_t ceil_div(int64_t a, int64_t b) {
  return -floor_div(-a, b);
}

IndexSet each_run(const IndexSet& set, int64_t size, const std::function<Run(const Run&)>& f) {
  const auto clipped = [&](const Run& r) {
    const Run out = f(r);
    return Run{std::max<int64_t>(out.begin, 0), std::min(out.end, size)};
  };
  if (set.empty()) return {};
  if (set.is_interval()) {
    const Run out = clipped({set.begin(), set.end()});
    return IndexSet::interval(out.begin, out.end);
  }
  std::vector<Run> runs;
  for (const Run& r : set.runs()) runs.push_back(clipped(r));
  return IndexSet::from_runs(std::move(runs));
}

IndexSet each_index(const IndexSet& set, int64_t size, const std::function<int64_t(int64_t)>& f) {
  std::vector<Run> runs;
  for (const Run& r : set.runs()) {
    for (int64_t i = r.begin; i < r.end; ++i) {
      const int64_t x = f(i);
      if (x >= 0 && x < size) runs.push_back({x, x + 1});
    }
  }
  return IndexSet::from_runs(std::move(runs));
}

// Where output index i of an interpolation reads, as a real number (torch's area_pixel_compute_source_index).
double source(const IndexMap& m, int64_t i) {
  if (m.align_corners) return m.scale * static_cast<double>(i);
  const double x = m.scale * (static_cast<double>(i) + 0.5) - 0.5;
  return m.reach > 0 ? x : std::max(x, 0.0);
}

int64_t reflect(int64_t i, int64_t size) {
  if (size == 1) return 0;
  const int64_t period = 2 * (size - 1);
  i = ((i % period) + period) % period;
  return i < size ? i : period - i;
}

}  // namespace

IndexSet apply(const IndexMap& m, const IndexSet& set, int64_t size) {
  if (set.empty()) return {};
  using Kind = IndexMap::Kind;
  switch (m.kind) {
    case Kind::kShift: return shift(set, m.offset, size);
    case Kind::kStride:
      if (m.stride == 1) return shift(set, m.offset, size);
      return each_index(set, size, [&](int64_t i) { return i * m.stride + m.offset; });
    case Kind::kWindow:
      return each_run(set, size,
                      [&](const Run& r) { return Run{r.begin * m.stride - m.pad, (r.end - 1) * m.stride - m.pad + m.dilation * (m.kernel - 1) + 1}; });
    case Kind::kTransposedWindow:
      return each_run(set, size, [&](const Run& r) {
        return Run{ceil_div(r.begin + m.pad - m.dilation * (m.kernel - 1), m.stride), floor_div(r.end - 1 + m.pad, m.stride) + 1};
      });
    case Kind::kAdaptive:
      return each_run(set, size, [&](const Run& r) { return Run{floor_div(r.begin * size, m.out_size), ceil_div(r.end * size, m.out_size)}; });
    case Kind::kResample:
      return each_run(set, size, [&](const Run& r) {
        // Border indices are repeated (clamped), so the interval keeps at least the nearest row.
        const auto lo = static_cast<int64_t>(std::floor(source(m, r.begin))) - m.reach;
        const auto hi = static_cast<int64_t>(std::floor(source(m, r.end - 1))) + 2 + m.reach;
        return Run{std::clamp<int64_t>(lo, 0, size - 1), std::clamp<int64_t>(hi, 1, size)};
      });
    case Kind::kFlip: return each_run(set, size, [&](const Run& r) { return Run{size - r.end, size - r.begin}; });
    case Kind::kRoll: return each_index(set, size, [&](int64_t i) { return (((i - m.offset) % size) + size) % size; });
    case Kind::kModulo: return digit(set, 1, size);
    case Kind::kFloorDiv: return each_run(set, size, [&](const Run& r) { return Run{r.begin / m.stride, (r.end - 1) / m.stride + 1}; });
    case Kind::kTable: {
      IndexSet out;
      for (const Run& r : set.runs()) {
        for (int64_t i = r.begin; i < r.end; ++i) out = unite(out, m.table.at(i));
      }
      return out;
    }
    case Kind::kReflect: {
      // The hull of the reflected indices: contiguous, so that the local pad sees its neighbours.
      const IndexSet exact = each_index(set, size, [&](int64_t i) { return reflect(i - m.offset, size); });
      return IndexSet::interval(exact.begin(), exact.end());
    }
  }
  SOAP_CHECK(false, "[rule] unknown index map {}", static_cast<int>(m.kind));
}

int Rule::factor(std::string_view name) const {
  for (size_t f = 0; f < factors.size(); ++f) {
    if (factors[f].name == name) return static_cast<int>(f);
  }
  return -1;
}

void verify(const Rule& rule, const OpGraph& graph, const Node& node) {
  const auto check = [&](const std::vector<DimExpr>& dims, const Tensor& t, const std::string& what) {
    SOAP_CHECK(dims.size() == t.shape.size(), "[rule] {} {}: {} dims described, tensor has {}", node.name, what, dims.size(), t.shape.size());
    for (size_t d = 0; d < dims.size(); ++d) {
      int64_t size = 1;
      for (int f : dims[d].factors) {
        SOAP_CHECK(f >= 0 && f < static_cast<int>(rule.factors.size()), "[rule] {} {}: no factor {}", node.name, what, f);
        size *= rule.factors[f].size;
      }
      if (dims[d].factors.empty()) continue;
      if (dims[d].map) {
        SOAP_CHECK(dims[d].factors.size() == 1, "[rule] {} {} dim {}: a map takes one factor", node.name, what, d);
      } else {
        SOAP_CHECK(size == t.shape[d], "[rule] {} ({}) {} dim {}: factors make {}, tensor has {}", node.name, node.target, what, d, size, t.shape[d]);
      }
    }
  };
  SOAP_CHECK(rule.operands.size() == node.inputs.size(), "[rule] {}: {} operands described of {}", node.name, rule.operands.size(), node.inputs.size());
  SOAP_CHECK(rule.results.size() == node.outputs.size(), "[rule] {}: {} results described of {}", node.name, rule.results.size(), node.outputs.size());
  for (size_t i = 0; i < node.inputs.size(); ++i) check(rule.operands[i].dims, graph.tensors[node.inputs[i]], "operand " + node.operand_names[i]);
  for (size_t i = 0; i < node.outputs.size(); ++i) check(rule.results[i].dims, graph.tensors[node.outputs[i]], fmt::format("result {}", i));
}

Rule whole_rule(const OpGraph& graph, const Node& node) {
  Rule rule;
  for (TensorId t : node.inputs) rule.operands.push_back({.dims = std::vector<DimExpr>(graph.tensors[t].shape.size())});
  for (TensorId t : node.outputs) rule.results.push_back({.dims = std::vector<DimExpr>(graph.tensors[t].shape.size())});
  return rule;
}

namespace {

// Params, buffers and feeds: one factor per dim, d0, d1, ...; the sample dim of a feed is called n.
Rule source_rule(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const Tensor& t = graph.output(node, 0);
  std::vector<std::string> dims;
  for (size_t d = 0; d < t.shape.size(); ++d) {
    const bool sample = static_cast<int>(d) == node.sample_dim;
    dims.push_back(sample ? "n" : fmt::format("d{}", d));
    r.factor(dims.back(), t.shape[d], sample ? FactorKind::kSample : FactorKind::kParameter);
  }
  return r.result(dims).build();
}

// A return with a sample dim brings each process its rows. One without has a hidden factor `process` that the tensor lacks: every
// process gets the value, and the gradients that come in (each times 1/P) are a partial sum.
Rule return_rule(const OpGraph& graph, const Node& node, int world_size) {
  RuleSpec r(graph, node);
  std::vector<std::string> dims;
  const Tensor& t = graph.input(node, 0);
  for (size_t d = 0; d < t.shape.size(); ++d) {
    const bool sample = static_cast<int>(d) == node.sample_dim;
    dims.push_back(sample ? "n" : fmt::format("d{}", d));
    r.factor(dims.back(), t.shape[d], sample ? FactorKind::kSample : FactorKind::kAttribute, sample ? Cuttable::kAny : Cuttable::kWhole);
  }
  if (node.sample_dim < 0) r.factor("process", world_size, FactorKind::kSample);
  return r.operand(0, dims).build();
}

}  // namespace

Rule make_rule(const OpGraph& graph, const Node& node, int world_size) {
  switch (node.kind) {
    case NodeKind::kReturn: return return_rule(graph, node, world_size);
    case NodeKind::kParam:
    case NodeKind::kBuffer:
    case NodeKind::kConst:
    case NodeKind::kFeed: return source_rule(graph, node);
    case NodeKind::kOp: break;
  }
  const auto& builders = rule_registry().builders;
  auto it = builders.find(node.target);
  if (it == builders.end() && node.family == "pointwise") it = builders.find("pointwise");
  if (it == builders.end()) return whole_rule(graph, node);
  Rule rule = it->second(graph, node);
  verify(rule, graph, node);
  return rule;
}

void RuleRegistry::add(std::initializer_list<const char*> targets, RuleBuilder builder) {
  for (const char* target : targets) {
    SOAP_CHECK(builders.emplace(target, builder).second, "[rule] {} is registered twice", target);
  }
}

RuleSpec& RuleSpec::factor(std::string_view name, int64_t size, FactorKind kind, Cuttable cut, int64_t unit) {
  SOAP_CHECK(rule_.factor(name) < 0, "[rule] {}: factor {} is named twice", node_.name, name);
  rule_.factors.push_back({std::string(name), size, kind, size <= 1 ? Cuttable::kWhole : cut, unit});
  return *this;
}

std::vector<DimExpr> RuleSpec::parse(const std::vector<std::string>& dims) const {
  std::vector<DimExpr> out;
  for (const std::string& text : dims) {
    DimExpr expr;
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find(' ', begin), text.size());
      const std::string_view word = std::string_view(text).substr(begin, end - begin);
      begin = end + 1;
      if (word.empty()) continue;
      if (word == "*") break;
      const int f = rule_.factor(word);
      SOAP_CHECK(f >= 0, "[rule] {}: no factor {}", node_.name, word);
      expr.factors.push_back(f);
    }
    out.push_back(std::move(expr));
  }
  return out;
}

RuleSpec& RuleSpec::operand(int index, std::vector<std::string> dims) {
  last_operand_ = index;
  rule_.operands.at(index).dims = parse(dims);
  described_.resize(rule_.operands.size());
  described_[index] = 1;
  return *this;
}

RuleSpec& RuleSpec::operand(std::string_view name, std::vector<std::string> dims) {
  const int index = node_.operand(name);
  if (index >= 0) return operand(index, std::move(dims));
  last_operand_ = -2;  // absent: map and anchor have nothing to change
  return *this;
}

RuleSpec& RuleSpec::map(int dim, std::string_view factor, IndexMap map) {
  if (last_operand_ == -2) return *this;
  auto& dims = last_operand_ >= 0 ? rule_.operands[last_operand_].dims : rule_.results.back().dims;
  const int f = rule_.factor(factor);
  SOAP_CHECK(f >= 0, "[rule] {}: no factor {}", node_.name, factor);
  dims.at(dim) = {.factors = {f}, .map = map};
  return *this;
}

RuleSpec& RuleSpec::anchor(std::string_view factor) {
  if (last_operand_ == -2) return *this;
  const int f = rule_.factor(factor);
  SOAP_CHECK(f >= 0 && last_operand_ >= 0, "[rule] {}: no factor {} to anchor on", node_.name, factor);
  rule_.operands[last_operand_].anchors.push_back(f);
  return *this;
}

RuleSpec& RuleSpec::constant() {
  if (last_operand_ == -2) return *this;
  (last_operand_ >= 0 ? rule_.operands[last_operand_].differentiable : rule_.results.back().differentiable) = false;
  return *this;
}

RuleSpec& RuleSpec::result(std::vector<std::string> dims, Reduce reduce) {
  last_operand_ = -1;
  rule_.results.push_back({.dims = parse(dims), .reduce = reduce});
  return *this;
}

RuleSpec& RuleSpec::saves(const std::vector<std::string>& names) {
  saves_ = names;
  return *this;
}

RuleSpec& RuleSpec::view() {
  rule_.view = true;
  return saves({});
}

Rule RuleSpec::build() {
  if (saves_) {
    const auto listed = [&](std::string_view name) { return std::count(saves_->begin(), saves_->end(), name) > 0; };
    for (size_t i = 0; i < rule_.operands.size(); ++i) rule_.operands[i].saved = listed(node_.operand_names[i]) || listed(fmt::format("{}", i));
    for (Result& r : rule_.results) r.saved = listed("result");
  }
  described_.resize(rule_.operands.size());
  for (size_t i = 0; i < rule_.operands.size(); ++i) {
    if (!described_[i]) rule_.operands[i].dims.assign(graph_.tensors[node_.inputs[i]].shape.size(), {});
  }
  verify(rule_, graph_, node_);
  return std::move(rule_);
}

std::string_view to_string(FactorKind kind) {
  switch (kind) {
    case FactorKind::kSample: return "S";
    case FactorKind::kAttribute: return "A";
    case FactorKind::kParameter: return "P";
    case FactorKind::kReduction: return "R";
  }
  return "?";
}

std::string to_string(const Rule& rule) {
  const auto dims = [&](const std::vector<DimExpr>& exprs) {
    std::string out = "[";
    for (size_t d = 0; d < exprs.size(); ++d) {
      std::string dim;
      for (int f : exprs[d].factors) dim += (dim.empty() ? "" : " ") + rule.factors[f].name;
      if (dim.empty()) dim = "*";
      if (exprs[d].map) dim += "'";
      if (exprs[d].factors.size() > 1) dim = "(" + dim + ")";
      out += (d ? " " : "") + dim;
    }
    return out + "]";
  };
  std::string out;
  for (const Operand& o : rule.operands) out += dims(o.dims) + " ";
  out += "->";
  for (const Result& r : rule.results) out += " " + dims(r.dims) + (r.reduce == Reduce::kSum ? "+" : r.reduce == Reduce::kMax ? "^" : "");
  return out;
}

}  // namespace soap
