// The graph after a substitution.
#include <algorithm>
#include <functional>
#include <queue>
#include <set>

#include "base/error.h"
#include "fmt/ranges.h"
#include "substitution/match.h"

namespace soap {
namespace {

using Shape = std::vector<int64_t>;

// The shape of the one result of a new operator. `like`: of the operator that it copies.
Shape shape_of(const std::string& target, const std::string& family, const std::vector<Shape>& in, const AttrMap& attrs, const Shape& like) {
  const auto dim = [&](const Shape& s) {
    const auto it = attrs.find("dim");
    return static_cast<size_t>(wrapped(it == attrs.end() ? 0 : std::get<int64_t>(it->second), s.size()));
  };
  Shape out = in.at(0);
  if (target == "cat") {
    for (size_t i = 1; i < in.size(); ++i) out.at(dim(out)) += in[i].at(dim(out));
  } else if (target == "linear") {
    out.back() = in.at(1).at(0);
  } else if (target == "conv1d" || target == "conv2d" || target == "conv3d") {
    out = like;
    out.at(out.size() - in.at(1).size() + 1) = in.at(1).at(0);
  } else if (target == "matmul" || target == "mm" || target == "bmm" || target == "addmm") {
    out = like;
    out.back() = in.back().back();
  } else if (target == "permute") {
    const auto& dims = std::get<Shape>(attrs.at("dims"));
    for (size_t i = 0; i < dims.size(); ++i) out.at(i) = in[0].at(wrapped(dims[i], in[0].size()));
  } else {
    SOAP_CHECK(family == "pointwise" && in.size() == 1, "[substitution] the shape of {} isn't known", target);
  }
  return out;
}

// Uses of one substitution that don't touch one another are done to the graph together.
struct Applier {
  const OpGraph& source;
  const Substitution& substitution;

  std::vector<std::string> anchors = {};  // of the use at hand
  Match m = {};
  NodeId place = -1;

  std::vector<Tensor> tensors = source.tensors;
  std::vector<std::pair<NodeId, Node>> made = {};  // with the place of the use in the old order
  std::set<NodeId> inner = {};                     // what any use has matched
  std::map<TensorId, TensorId> aliases = {};       // result that is gone -> what its readers read instead
  std::set<std::string> taken = {};
  std::set<NodeId> gone = {};

  std::string key(const Variable& v) const { return v.list ? v.name + "*" : v.name; }

  const Node* like(const OperatorPattern& p) const {
    if (p.like.empty()) return nullptr;
    const auto it = m.operators.find(p.like);
    SOAP_CHECK(it != m.operators.end() && !it->second.empty(), "[substitution] {}: no operator {}", substitution.name, p.like);
    return &source.nodes[it->second[0]];
  }

  // Whether the `from` lines make this variable: then its readers stay, and read what the new line makes.
  bool is_result(const Variable& v) const {
    return std::any_of(substitution.from.begin(), substitution.from.end(),
                       [&](const OperatorPattern& p) { return p.result.name == v.name && p.result.list == v.list; });
  }

  std::string fresh_name(const std::string& wanted) {
    std::string name = wanted;
    for (int i = 1; source.find(name) || taken.count(name); ++i) name = fmt::format("{}.{}", wanted, i);
    taken.insert(name);
    return name;
  }

  static std::set<NodeId> matched(const Match& match) {
    std::set<NodeId> out;
    for (const auto& [label, nodes] : match.operators) out.insert(nodes.begin(), nodes.end());
    return out;
  }

  // Whether an operator of the `from` lines is read by others too, and stays.
  bool stays(const Node& n) const {
    std::set<NodeId> inner;
    for (const auto& [label, nodes] : m.operators) inner.insert(nodes.begin(), nodes.end());
    return !gone.count(n.id) && std::any_of(source.nodes.begin(), source.nodes.end(), [&](const Node& reader) {
      return !inner.count(reader.id) && std::count(reader.inputs.begin(), reader.inputs.end(), n.outputs[0]) > 0;
    });
  }

  // An operator that moves keeps its name; one that comes in several, or is made of several, has a new one.
  std::string name_of(const OperatorPattern& p, const Node* copied, int element) {
    if (copied && m.operators.at(p.like).size() == 1 && element < 0 && !taken.count(copied->name) && !stays(*copied)) {
      taken.insert(copied->name);
      gone.insert(copied->id);
      return copied->name;
    }
    const bool split = p.targets == std::vector<std::string>{"split"};
    const std::string role = split ? "split" : copied && is_result(p.result) ? copied->target : p.result.name;
    return fresh_name(fmt::format("{}/{}{}", anchors[0], role, element < 0 ? "" : fmt::format(".{}", element)));
  }

  void add(const OperatorPattern& p, std::vector<TensorId> inputs, std::vector<TensorId> outputs, int element) {
    const Node* copied = like(p);
    Node n = copied ? *copied : Node{.kind = NodeKind::kOp, .target = p.targets.at(0), .source = source.nodes[m.operators.begin()->second[0]].source};
    n.id = -1;
    n.name = name_of(p, copied, element);
    n.no_grad = source.nodes[m.operators.begin()->second[0]].no_grad;
    for (const auto& [name, text] : p.attrs) n.attrs[name] = evaluated(source, text, m);
    if (const auto dim = n.attrs.find("dim"); dim != n.attrs.end()) {
      dim->second = wrapped(std::get<int64_t>(dim->second), tensors[inputs.at(0)].shape.size());
    }
    if (n.target == "cat" || n.target == "split" || n.operand_names.size() < inputs.size()) {
      n.operand_names.clear();
      for (size_t i = 0; i < inputs.size(); ++i) n.operand_names.push_back(n.target == "cat" ? fmt::format("tensors[{}]", i) : "self");
    }
    n.operand_names.resize(inputs.size());
    std::vector<Shape> shapes;
    bool grad = false;
    for (TensorId t : inputs) {
      shapes.push_back(tensors[t].shape);
      grad = grad || tensors[t].requires_grad;
    }
    if (n.target == "split") {
      Shape sum = tensors[outputs.at(0)].shape;
      const auto dim = static_cast<size_t>(std::get<int64_t>(n.attrs.at("dim")));
      for (size_t i = 1; i < outputs.size(); ++i) sum.at(dim) += tensors[outputs[i]].shape.at(dim);
      check(sum, shapes[0], n.name);
    } else {
      const Tensor& known = copied ? source.output(*copied, 0) : tensors[inputs.at(0)];
      const Shape shape = shape_of(n.target, n.family, shapes, n.attrs, known.shape);
      if (outputs.empty()) {
        const auto id = static_cast<TensorId>(tensors.size());
        tensors.push_back({.id = id,
                           .shape = shape,
                           .dtype = known.dtype,
                           .element_bytes = known.element_bytes,
                           .requires_grad = grad && !n.no_grad && (!copied || known.requires_grad)});
        outputs = {id};
        m.tensors[key({p.result.name, p.result.list})].push_back(id);
      } else {
        check(shape, tensors[outputs[0]].shape, n.name);
      }
    }
    n.inputs = std::move(inputs);
    n.outputs = std::move(outputs);
    made.emplace_back(place, std::move(n));
  }

  void check(const Shape& shape, const Shape& wanted, const std::string& name) const {
    if (shape != wanted)
      user_error("[rewrite] {}: {} would have the shape [{}], not [{}]", substitution.name, name, fmt::join(shape, ","), fmt::join(wanted, ","));
  }

  void line(const OperatorPattern& p) {
    const bool result = is_result(p.result);
    std::vector<TensorId> outputs;
    if (result) {
      for (NodeId id : m.operators.at(p.result.name)) {
        outputs.push_back(source.nodes[id].outputs[0]);
        gone.insert(id);
      }
    }
    std::vector<std::vector<TensorId>> operands;
    size_t present = 0;
    for (const Variable& v : p.operands) {
      const auto it = m.tensors.find(key(v));
      operands.push_back(it == m.tensors.end() ? std::vector<TensorId>{} : it->second);
      present += operands.back().size();
    }
    if (present == 0) return;  // an operand that is absent here
    if (p.targets.empty() && p.like.empty()) {
      aliases[outputs.at(0)] = p.attrs.empty() ? operands[0].at(0) : element_at(operands[0], std::get<int64_t>(evaluated(source, p.attrs[0].second, m)));
      return;
    }
    const bool each = p.result.list && p.targets != std::vector<std::string>{"split"};
    for (size_t e = 0; e < (each ? operands.at(0).size() : 1); ++e) {
      std::vector<TensorId> inputs;
      for (size_t i = 0; i < operands.size(); ++i) {
        if (each && p.operands[i].list)
          inputs.push_back(operands[i].at(e));
        else
          inputs.insert(inputs.end(), operands[i].begin(), operands[i].end());
      }
      add(p, std::move(inputs), each ? (result ? std::vector{outputs.at(e)} : std::vector<TensorId>{}) : outputs, each ? static_cast<int>(e) : -1);
    }
  }

  // The element of a list that begins at an index of its concatenation.
  TensorId element_at(const std::vector<TensorId>& list, int64_t start) const {
    const int64_t dim = std::get<int64_t>(m.attrs.at("d").at(0));
    int64_t begin = 0;
    for (TensorId t : list) {
      if (begin == start && tensors[t].shape.at(wrapped(dim, tensors[t].shape.size())) > 0) return t;
      begin += tensors[t].shape.at(wrapped(dim, tensors[t].shape.size()));
    }
    throw InternalError(fmt::format("[substitution] {}: no element begins at {}", substitution.name, start));
  }

  // False where it touches what another use has, or fits only what that one leaves.
  bool add_use(const std::vector<std::string>& where) {
    Match found;
    try {
      found = match(source, substitution, where);
    } catch (const std::invalid_argument&) {
      if (made.empty() && aliases.empty()) throw;
      return false;
    }
    const std::set<NodeId> own = matched(found);
    if (std::any_of(own.begin(), own.end(), [&](NodeId id) { return inner.count(id) > 0; })) return false;
    anchors = where;
    m = std::move(found);
    inner.insert(own.begin(), own.end());
    place = static_cast<NodeId>(source.nodes.size());
    for (const std::string& a : anchors) place = std::min(place, *source.find(a));
    for (const OperatorPattern& p : substitution.to) line(p);
    return true;
  }

  TensorId read(TensorId t) const {
    for (auto it = aliases.find(t); it != aliases.end(); it = aliases.find(t)) t = it->second;
    return t;
  }

  // Nodes that stay, with what they read now, and the new ones; each with its place in the old order.
  std::vector<std::pair<NodeId, Node>> remaining() {
    std::vector<std::pair<NodeId, Node>> all;
    for (const Node& n : source.nodes) {
      if (!gone.count(n.id)) all.emplace_back(n.id, n);
    }
    for (auto& entry : made) all.push_back(std::move(entry));
    for (auto& [place, n] : all) {
      for (TensorId& t : n.inputs) t = read(t);
    }
    for (bool changed = true; changed;) {  // what only the old operators read
      std::set<TensorId> used;
      for (const auto& [place, n] : all) used.insert(n.inputs.begin(), n.inputs.end());
      changed = std::erase_if(all, [&](const auto& x) {
                  const Node& n = x.second;
                  return inner.count(n.id) && std::none_of(n.outputs.begin(), n.outputs.end(), [&](TensorId t) { return used.count(t) > 0; });
                }) > 0;
    }
    return all;
  }

  // In topological order, otherwise as before.
  OpGraph sorted(std::vector<std::pair<NodeId, Node>> nodes) const {
    std::map<TensorId, size_t> producer;
    for (size_t i = 0; i < nodes.size(); ++i) {
      for (TensorId t : nodes[i].second.outputs) producer[t] = i;
    }
    std::vector<int> missing(nodes.size(), 0);
    std::vector<std::vector<size_t>> readers(nodes.size());
    using Entry = std::pair<NodeId, size_t>;
    std::priority_queue<Entry, std::vector<Entry>, std::greater<>> ready;
    for (size_t i = 0; i < nodes.size(); ++i) {
      for (TensorId t : nodes[i].second.inputs) {
        readers[producer.at(t)].push_back(i);
        ++missing[i];
      }
      if (missing[i] == 0) ready.emplace(nodes[i].first, i);
    }
    OpGraph out;
    std::map<TensorId, TensorId> now;
    while (!ready.empty()) {
      const size_t i = ready.top().second;
      ready.pop();
      Node n = nodes[i].second;
      for (TensorId& t : n.inputs) t = now.at(t);
      for (TensorId& t : n.outputs) {
        const Tensor& s = tensors[t];
        t = now[t] = add_tensor(out, s.shape, s.dtype, s.element_bytes, s.requires_grad);
      }
      add_node(out, std::move(n));
      for (size_t r : readers[i]) {
        if (--missing[r] == 0) ready.emplace(nodes[r].first, r);
      }
    }
    if (out.nodes.size() != nodes.size())
      user_error("[rewrite] {} {}: one of them reads what another one leads to", substitution.name, fmt::join(anchors, " "));
    return out;
  }
};

}  // namespace

OpGraph rewritten(const OpGraph& graph, const std::vector<Rewrite>& rewrites, const SubstitutionTable& table) {
  OpGraph out = graph;
  for (size_t i = 0; i < rewrites.size();) {
    const OpGraph before = std::move(out);
    Applier applier{.source = before, .substitution = find_substitution(table, rewrites[i].substitution)};
    const size_t first = i;
    for (; i < rewrites.size() && rewrites[i].substitution == rewrites[first].substitution && applier.add_use(rewrites[i].anchors); ++i) {
    }
    out = applier.sorted(applier.remaining());
  }
  return out;
}

std::vector<Rewrite> fitting(const OpGraph& graph, const std::vector<Rewrite>& rewrites) {
  std::vector<Rewrite> out;
  OpGraph now = graph;
  for (const Rewrite& r : rewrites) {
    try {
      now = rewritten(now, {r});
      out.push_back(r);
    } catch (const std::invalid_argument&) {  // it doesn't fit this graph
    }
  }
  return out;
}

}  // namespace soap
