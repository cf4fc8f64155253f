#include "substitution/match.h"

#include <algorithm>
#include <charconv>
#include <set>

#include "base/error.h"
#include "fmt/ranges.h"

namespace soap {
namespace {

bool named(const std::string& attr) {
  return !attr.empty() && attr.find_first_not_of("-0123456789") != std::string::npos;
}

std::string key(const Variable& v) {
  return v.list ? v.name + "*" : v.name;
}

struct Matcher {
  const OpGraph& graph;
  const Substitution& substitution;

  // The line that makes a variable, if any.
  const OperatorPattern* maker(const Variable& v) const {
    for (const OperatorPattern& p : substitution.from) {
      if (p.result.name == v.name && p.result.list == v.list) return &p;
    }
    return nullptr;
  }

  static bool is_target(const OperatorPattern& p, const OpGraph& graph, const Node& n) {
    return std::any_of(p.targets.begin(), p.targets.end(), [&](const std::string& t) {
      if (t != "@unary") return t == n.target;
      return n.family == "pointwise" && n.inputs.size() == 1 && n.outputs.size() == 1 && graph.input(n, 0).shape == graph.output(n, 0).shape;
    });
  }

  // "" and more in `m`, or the reason why not (then `m` is spoilt). An element is one of a list: stars stand for one tensor.
  std::string fits_operator(Match& m, const OperatorPattern& p, NodeId id) const {
    const Node& n = graph.nodes[id];
    if (n.kind != NodeKind::kOp || n.outputs.size() != 1 || !is_target(p, graph, n)) {
      return fmt::format("{} is {}, not {}", n.name, n.kind == NodeKind::kOp ? n.target : std::string(to_string(n.kind)), fmt::join(p.targets, " or "));
    }
    for (const auto& [label, nodes] : m.operators) {
      if (!nodes.empty() && graph.nodes[nodes[0]].no_grad != n.no_grad)
        return fmt::format("only one of {} and {} is in a no_grad region", n.name, graph.nodes[nodes[0]].name);
    }
    auto& made = m.operators[p.result.name];
    if (!made.empty()) {
      if (!p.result.list) return made[0] == id ? "" : fmt::format("{} and {} should be one operator", n.name, graph.nodes[made[0]].name);
      if (std::string why = alike(p, graph.nodes[made[0]], n); !why.empty()) return why;
      if (std::count(made.begin(), made.end(), id)) return fmt::format("{} stands twice", n.name);
    }
    made.push_back(id);
    m.tensors[key(p.result)].push_back(n.outputs[0]);
    for (const auto& [name, text] : p.attrs) {
      if (std::string why = fits_attr(m, n, name, text); !why.empty()) return why;
    }
    return fits_operands(m, p, n, 0, 0);
  }

  std::string alike(const OperatorPattern& p, const Node& first, const Node& n) const {
    AttrMap a = first.attrs, b = n.attrs;
    for (const auto& [name, text] : p.attrs) {
      if (text.back() == '*') a.erase(name), b.erase(name);
    }
    if (first.target != n.target || a != b) return fmt::format("{} and {} differ in more than their operands", first.name, n.name);
    if (graph.output(first, 0).requires_grad != graph.output(n, 0).requires_grad)
      return fmt::format("only one of {} and {} needs a gradient", first.name, n.name);
    if (graph.output(first, 0).dtype != graph.output(n, 0).dtype) return fmt::format("{} and {} have other dtypes", first.name, n.name);
    if (first.inputs.size() != n.inputs.size()) return fmt::format("{} has {} operands, {} has {}", first.name, first.inputs.size(), n.name, n.inputs.size());
    return "";
  }

  std::string fits_attr(Match& m, const Node& n, const std::string& name, const std::string& text) const {
    const auto it = n.attrs.find(name);
    if (it == n.attrs.end()) return named(text) ? fmt::format("{} has no {}", n.name, name) : "";
    if (!named(text)) {
      int64_t wanted = 0;
      std::from_chars(text.data(), text.data() + text.size(), wanted);
      const auto* i = std::get_if<int64_t>(&it->second);
      const auto* d = std::get_if<double>(&it->second);
      return (i && *i == wanted) || (d && *d == static_cast<double>(wanted)) ? "" : fmt::format("{} has another {} than {}", n.name, name, wanted);
    }
    auto& values = m.attrs[text];
    if (text.back() != '*' && !values.empty()) return values[0] == it->second ? "" : fmt::format("{} has another {}", n.name, name);
    values.push_back(it->second);
    return "";
  }

  // Operands from `operand` on for the patterns from `pattern` on.
  std::string fits_operands(Match& m, const OperatorPattern& p, const Node& n, size_t pattern, size_t operand) const {
    const size_t left = n.inputs.size() - operand;
    if (pattern == p.operands.size()) return left == 0 ? "" : fmt::format("{} has {} operands", n.name, n.inputs.size());
    const Variable& v = p.operands[pattern];
    if (v.list && !p.result.list) {  // any number of operands, the most first
      std::string why = fmt::format("{} has too few operands", n.name);
      for (size_t count = left + 1; count-- > 0;) {
        Match attempt = m;
        why = fits_list(attempt, v, {n.inputs.begin() + static_cast<int64_t>(operand), n.inputs.begin() + static_cast<int64_t>(operand + count)});
        if (why.empty()) why = fits_operands(attempt, p, n, pattern + 1, operand + count);
        if (why.empty()) {
          m = std::move(attempt);
          return "";
        }
        if (pattern + 1 == p.operands.size()) return why;  // the last takes all that is left
      }
      return why;
    }
    if (left == 0) {
      if (!v.optional) return fmt::format("{} has {} operands", n.name, n.inputs.size());
      m.tensors[key(v)];
      return fits_operands(m, p, n, pattern + 1, operand);
    }
    if (std::string why = fits_tensor(m, v, n.inputs[operand]); !why.empty()) return why;
    return fits_operands(m, p, n, pattern + 1, operand + 1);
  }

  std::string fits_list(Match& m, const Variable& v, const std::vector<TensorId>& tensors) const {
    const OperatorPattern* p = maker(v);
    if (p && tensors.empty()) return fmt::format("{} is empty", key(v));
    if (!p) {
      m.tensors[key(v)] = tensors;
      return "";
    }
    for (TensorId t : tensors) {
      if (std::string why = fits_operator(m, *p, graph.tensors[t].producer); !why.empty()) return why;
    }
    return "";
  }

  std::string fits_tensor(Match& m, const Variable& v, TensorId t) const {
    if (const OperatorPattern* p = maker(v)) return fits_operator(m, *p, graph.tensors[t].producer);
    auto& known = m.tensors[key(v)];
    if (v.list || known.empty()) {
      known.push_back(t);
      return "";
    }
    if (known[0] == t) return "";
    const auto name = [&](TensorId tensor) { return graph.nodes[graph.tensors[tensor].producer].name; };
    return fmt::format("{} is {} and {}", v.name, name(known[0]), name(t));
  }

  std::string fits(Match& m, const std::vector<NodeId>& anchors) const {
    const OperatorPattern& last = substitution.from.back();
    for (NodeId id : anchors) {
      if (std::string why = fits_operator(m, last, id); !why.empty()) return why;
    }
    for (const OperatorPattern& p : substitution.from) {
      for (const Variable& v : p.operands) {
        if (!v.optional || !p.result.list || !v.list) continue;
        const size_t count = m.tensors[key(v)].size();
        if (count != 0 && count != m.operators[p.result.name].size()) return fmt::format("only some have {}", v.name);
      }
    }
    for (const Condition& c : substitution.conditions) {
      if (std::string why = violated(graph, c, m); !why.empty()) return why;
    }
    return "";
  }
};

// Siblings by what they share, each group as large as it can be; sorted by their first attribute that differs (parts by where they begin).
std::vector<std::vector<NodeId>> sibling_groups(const OpGraph& graph, const Substitution& s) {
  const Matcher matcher{graph, s};
  const auto& attrs = s.from[0].attrs;
  const auto by = std::find_if(attrs.begin(), attrs.end(), [](const auto& a) { return a.second.back() == '*'; });
  const bool all_at_once = by != attrs.end();
  size_t common = 0;  // an operand that they share
  while (s.from[0].operands.at(common).list) ++common;
  std::vector<std::vector<NodeId>> groups;
  std::map<TensorId, std::vector<size_t>> groups_of;  // by that operand
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp || n.outputs.size() != 1 || !Matcher::is_target(s.from[0], graph, n)) continue;
    const auto joins = [&](const std::vector<NodeId>& group) {
      Match m;
      if (all_at_once) {  // conditions are about the whole list
        return matcher.fits_operator(m, s.from[0], group[0]).empty() && matcher.fits_operator(m, s.from[0], n.id).empty();
      }
      std::vector<NodeId> both = group;
      both.push_back(n.id);
      return matcher.fits(m, both).empty();
    };
    if (common >= n.inputs.size()) continue;
    auto& near = groups_of[n.inputs[common]];
    const auto group = std::find_if(near.begin(), near.end(), [&](size_t g) { return joins(groups[g]); });
    if (group != near.end()) {
      groups[*group].push_back(n.id);
      continue;
    }
    near.push_back(groups.size());
    groups.push_back({n.id});
  }
  if (all_at_once) {
    for (auto& group : groups) {
      std::stable_sort(group.begin(), group.end(), [&](NodeId a, NodeId b) { return graph.nodes[a].attrs.at(by->first) < graph.nodes[b].attrs.at(by->first); });
    }
  }
  return groups;
}

}  // namespace

Match match(const OpGraph& graph, const Substitution& substitution, const std::vector<std::string>& anchors) {
  std::vector<NodeId> ids;
  for (const std::string& name : anchors) {
    const auto id = graph.find(name);
    if (!id) user_error("[rewrite] {}: there is no operator {}", substitution.name, name);
    ids.push_back(*id);
  }
  if (substitution.siblings() ? ids.size() < 2 : ids.size() != 1) {
    user_error("[rewrite] {} is anchored at {}, not {}", substitution.name, substitution.siblings() ? "two or more operators" : "one operator", ids.size());
  }
  Match m;
  const std::string why = Matcher{graph, substitution}.fits(m, ids);
  if (!why.empty()) user_error("[rewrite] {} {}: {}", substitution.name, fmt::join(anchors, " "), why);
  return m;
}

std::vector<Rewrite> find_rewrites(const OpGraph& graph, const SubstitutionTable& table) {
  std::vector<Rewrite> out;
  const auto keep = [&](const Substitution& s, const std::vector<NodeId>& anchors) {
    Match m;
    if (!Matcher{graph, s}.fits(m, anchors).empty()) return;
    Rewrite r{.substitution = s.name};
    for (NodeId id : anchors) r.anchors.push_back(graph.nodes[id].name);
    out.push_back(std::move(r));
  };
  for (const Substitution& s : table) {
    if (s.siblings()) {
      for (const auto& group : sibling_groups(graph, s)) {
        if (group.size() >= 2) keep(s, group);
      }
      continue;
    }
    for (const Node& n : graph.nodes) {
      if (n.kind == NodeKind::kOp) keep(s, {n.id});
    }
  }
  return out;
}

std::string to_string(const Rewrite& rewrite) {
  return fmt::format("{} {}", rewrite.substitution, fmt::join(rewrite.anchors, " "));
}

}  // namespace soap
