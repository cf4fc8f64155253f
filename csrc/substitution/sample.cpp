#include "substitution/sample.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "base/error.h"
#include "fmt/ranges.h"
#include "sharding/rule.h"

namespace soap {
namespace {

// Dims that must have equal or added sizes are one class; each class is divided by one number.
struct Classes {
  std::vector<int> parent;
  int add() {
    parent.push_back(static_cast<int>(parent.size()));
    return parent.back();
  }
  int find(int c) {
    while (parent[c] != c) c = parent[c] = parent[parent[c]];
    return c;
  }
  void join(int a, int b) { parent[find(a)] = find(b); }
};

std::string text_of(const AttrMap& attrs) {
  std::string out;
  for (const auto& [name, value] : attrs) {
    out += fmt::format(" {}=", name);
    std::visit(
        [&](const auto& v) {
          using T = std::decay_t<decltype(v)>;
          if constexpr (std::is_same_v<T, std::monostate>)
            out += "None";
          else if constexpr (std::is_same_v<T, std::vector<int64_t>> || std::is_same_v<T, std::vector<double>>)
            out += fmt::format("{}", fmt::join(v, ","));
          else
            out += fmt::format("{}", v);
        },
        value);
  }
  return out;
}

// The operators that a match names, in the graph's order.
std::vector<NodeId> operators_of(const Match& m) {
  std::set<NodeId> ids;
  for (const auto& [label, nodes] : m.operators) ids.insert(nodes.begin(), nodes.end());
  return {ids.begin(), ids.end()};
}

struct Shrinker {
  const OpGraph& graph;
  std::vector<NodeId> ids;
  Classes classes;
  std::map<std::pair<TensorId, size_t>, int> class_of;
  std::map<int, std::vector<int64_t>> sizes;  // of a class: all sizes and positions
  std::set<int> fixed;
  std::map<int, int64_t> divisors;

  int at(TensorId t, size_t d) {
    const auto [it, fresh] = class_of.try_emplace({t, d}, 0);
    if (fresh) it->second = classes.add();
    return it->second;
  }

  // Tensors that a condition wants alike but for a dim.
  void gather_alike(const Substitution& substitution, const Match& m) {
    for (const Condition& c : substitution.conditions) {
      if (c.name != "alike_but") continue;
      std::vector<TensorId> all;
      for (size_t i = 0; i + 1 < c.arguments.size(); ++i) all.insert(all.end(), m.tensors.at(c.arguments[i]).begin(), m.tensors.at(c.arguments[i]).end());
      const auto free = static_cast<size_t>(wrapped(std::stoll(c.arguments.back()), graph.tensors[all.at(0)].shape.size()));
      for (TensorId t : all) {
        for (size_t d = 0; d < graph.tensors[t].shape.size(); ++d) {
          if (d != free) classes.join(at(t, d), at(all[0], d));
        }
      }
    }
  }

  void gather() {
    std::vector<std::pair<int, int64_t>> positions;
    std::vector<int> kept;
    for (NodeId id : ids) {
      const Node& n = graph.nodes[id];
      const Rule rule = make_rule(graph, n, 1);
      std::map<int, int> of_factor;
      const auto see = [&](const std::vector<DimExpr>& dims, TensorId t) {
        for (size_t d = 0; d < dims.size(); ++d) {
          const int c = at(t, d);
          const bool added =
              dims[d].map && (dims[d].map->kind == IndexMap::Kind::kShift || (dims[d].map->kind == IndexMap::Kind::kStride && dims[d].map->stride == 1));
          if (dims[d].factors.size() != 1 || (dims[d].map && !added)) {
            kept.push_back(c);
            for (int f : dims[d].factors) {
              const auto [it, fresh] = of_factor.try_emplace(f, classes.add());
              kept.push_back(it->second);
            }
            continue;
          }
          const auto [it, fresh] = of_factor.try_emplace(dims[d].factors[0], c);
          if (!fresh) classes.join(it->second, c);
          if (rule.factors[dims[d].factors[0]].unit > 1) kept.push_back(c);
        }
      };
      for (size_t i = 0; i < n.inputs.size(); ++i) see(rule.operands[i].dims, n.inputs[i]);
      for (size_t i = 0; i < n.outputs.size(); ++i) see(rule.results[i].dims, n.outputs[i]);
      if (n.target == "narrow") {
        const int c = at(n.inputs[0], static_cast<size_t>(wrapped(n.attr<int64_t>("dim", 0), graph.input(n, 0).shape.size())));
        positions.emplace_back(c, n.attr<int64_t>("start", 0));
        positions.emplace_back(c, n.attr<int64_t>("length", 0));
      }
    }
    for (const auto& [where, c] : class_of) sizes[classes.find(c)].push_back(graph.tensors[where.first].shape[where.second]);
    for (const auto& [c, position] : positions) sizes[classes.find(c)].push_back(position);
    for (int c : kept) fixed.insert(classes.find(c));
  }

  // The largest divisor that leaves sizes of two or more; a little different from class to class, so that no two dims are mixed up unseen.
  void choose() {
    int64_t number = 0;
    for (const auto& [c, all] : sizes) {
      int64_t common = 0, smallest = 0;
      for (int64_t s : all) {
        common = std::gcd(common, s);
        if (s > 0 && (smallest == 0 || s < smallest)) smallest = s;
      }
      const int64_t least = 2 + number++ % 3;
      int64_t divisor = 1;
      for (int64_t d = 1; !fixed.count(c) && d <= common; ++d) {
        if (common % d == 0 && smallest / d >= least) divisor = d;
      }
      divisors[c] = divisor;
    }
  }

  std::vector<int64_t> shape(TensorId t) {
    std::vector<int64_t> out = graph.tensors[t].shape;
    for (size_t d = 0; d < out.size(); ++d) out[d] /= divisors.at(classes.find(class_of.at({t, d})));
    return out;
  }

  TensorId tensor(OpGraph& out, TensorId t) {
    const Tensor& s = graph.tensors[t];
    const bool real = s.dtype.starts_with("float") || s.dtype == "bfloat16";
    return add_tensor(out, shape(t), real ? "float64" : s.dtype, real ? 8 : s.element_bytes, s.requires_grad);
  }
};

}  // namespace

Sample sample_of(const OpGraph& graph, const Rewrite& rewrite, const SubstitutionTable& table) {
  const Match m = match(graph, find_substitution(table, rewrite.substitution), rewrite.anchors);
  Shrinker s{.graph = graph, .ids = operators_of(m)};
  s.gather_alike(find_substitution(table, rewrite.substitution), m);
  s.gather();
  s.choose();
  OpGraph out;
  std::map<TensorId, TensorId> now;
  for (NodeId id : s.ids) {
    Node n = graph.nodes[id];
    for (TensorId& t : n.inputs) {
      const auto [it, fresh] = now.try_emplace(t, -1);
      if (fresh) {
        it->second = s.tensor(out, t);
        add_node(out, {.kind = NodeKind::kFeed, .name = fmt::format("in:{}", now.size() - 1), .outputs = {it->second}});
      }
      t = it->second;
    }
    if (n.target == "narrow") {
      const auto dim = static_cast<size_t>(wrapped(n.attr<int64_t>("dim", 0), graph.input(graph.nodes[id], 0).shape.size()));
      const int64_t divisor = s.divisors.at(s.classes.find(s.class_of.at({graph.nodes[id].inputs[0], dim})));
      n.attrs["start"] = n.attr<int64_t>("start", 0) / divisor;
      n.attrs["length"] = n.attr<int64_t>("length", 0) / divisor;
    }
    for (TensorId& t : n.outputs) t = now[t] = s.tensor(out, t);
    add_node(out, std::move(n));
  }
  // What anybody else reads.
  std::set<NodeId> inside(s.ids.begin(), s.ids.end());
  std::set<TensorId> read;
  for (const Node& n : graph.nodes) {
    if (!inside.count(n.id)) read.insert(n.inputs.begin(), n.inputs.end());
  }
  int returns = 0;
  for (NodeId id : s.ids) {
    for (TensorId t : graph.nodes[id].outputs) {
      if (read.count(t)) add_node(out, {.kind = NodeKind::kReturn, .name = fmt::format("out:{}", returns++), .inputs = {now.at(t)}});
    }
  }
  OpGraph target = rewritten(out, {rewrite}, table);
  return {.source = std::move(out), .target = std::move(target)};
}

std::string signature(const OpGraph& graph, const Rewrite& rewrite, const SubstitutionTable& table) {
  const Match m = match(graph, find_substitution(table, rewrite.substitution), rewrite.anchors);
  std::map<TensorId, int> number;
  std::string out = rewrite.substitution;
  const auto name = [&](TensorId t) {
    const auto [it, fresh] = number.try_emplace(t, static_cast<int>(number.size()));
    const Tensor& tensor = graph.tensors[t];
    if (!fresh) return fmt::format("%{}", it->second);
    return fmt::format("%{}:{}[{}]{}{}", it->second, tensor.dtype, fmt::join(tensor.shape, ","), tensor.requires_grad ? "'" : "",
                       is_store(graph.nodes[tensor.producer]) ? "w" : "");
  };
  for (NodeId id : operators_of(m)) {
    const Node& n = graph.nodes[id];
    out += fmt::format(" | {}{}(", n.target, text_of(n.attrs));
    for (TensorId t : n.inputs) out += name(t) + " ";
    out += ")";
    for (TensorId t : n.outputs) out += " " + name(t);
  }
  return out;
}

}  // namespace soap
