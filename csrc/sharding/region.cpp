#include "sharding/region.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"
#include "base/text.h"
#include "fmt/ranges.h"

namespace soap {
namespace {

std::vector<std::string_view> parts_of(std::string_view path) {
  std::vector<std::string_view> out;
  for (size_t at = 0; at <= path.size();) {
    const size_t dot = std::min(path.find('.', at), path.size());
    out.push_back(path.substr(at, dot - at));
    at = dot + 1;
  }
  return out;
}

bool is_number(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// Every module that has operators, itself or in its children; in the order of the graph, a module before its children.
std::vector<std::string> modules_of(const OpGraph& graph) {
  std::vector<std::string> out;
  std::set<std::string, std::less<>> seen;
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    const std::string_view path = module_path(n.name);
    for (size_t dot = path.find('.');; dot = path.find('.', dot + 1)) {
      const std::string_view module = path.substr(0, dot);
      if (!module.empty() && seen.emplace(module).second) out.emplace_back(module);
      if (dot == std::string_view::npos) break;
    }
  }
  return out;
}

}  // namespace

std::string_view module_path(std::string_view name) {
  return name.substr(0, name.find('/'));
}

bool belongs(std::string_view name, std::string_view member) {
  if (!name.starts_with(member)) return false;
  if (name.size() == member.size()) return true;
  // "/add.1" is another operator than "/add", "h.1.mlp" is in h.1.
  return name[member.size()] == '/' || (name[member.size()] == '.' && member.find('/') == std::string_view::npos);
}

bool may_compute_again(const Node& node) {
  return node.target != "opaque";
}

std::vector<int> named_regions(const OpGraph& graph, const std::vector<Region>& regions) {
  std::vector<int> out(graph.nodes.size(), -1);
  if (regions.empty()) return out;
  std::map<std::string_view, int> of;  // member -> region
  for (size_t r = 0; r < regions.size(); ++r) {
    for (const std::string& member : regions[r]) {
      if (!of.emplace(member, static_cast<int>(r)).second) user_error("[plan] recompute: {} stands twice", member);
    }
  }
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    const std::string_view name = n.name;
    for (size_t end = name.find_first_of("./", 1);; end = name.find_first_of("./", end + 1)) {
      const std::string_view member = name.substr(0, end);
      const auto it = of.find(member);
      if (it != of.end() && belongs(name, member)) {
        int& mine = out[n.id];
        if (mine >= 0 && mine != it->second) {
          user_error("[plan] recompute: {} is in two regions, {} and {}; an operator is computed again in one", n.name, to_string(regions[mine]),
                     to_string(regions[it->second]));
        }
        mine = it->second;
      }
      if (end == std::string_view::npos) break;
    }
  }
  return out;
}

std::vector<std::string> members_matching(const OpGraph& graph, std::string_view pattern) {
  std::vector<std::string> out;
  if (pattern.find('/') != std::string_view::npos) {
    for (const Node& n : graph.nodes) {
      if (n.kind == NodeKind::kOp && matches(pattern, n.name)) out.push_back(n.name);
    }
    return out;
  }
  const auto wanted = parts_of(pattern);
  for (std::string& module : modules_of(graph)) {
    const auto parts = parts_of(module);
    if (std::equal(wanted.begin(), wanted.end(), parts.begin(), parts.end(), matches)) out.push_back(std::move(module));
  }
  return out;
}

std::vector<Region> repeated_blocks(const OpGraph& graph) {
  std::map<std::string, std::pair<int, std::set<std::string>>, std::less<>> made;  // module -> operators with work, the kinds of them
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    const std::string_view path = module_path(n.name);
    for (size_t dot = path.find('.');; dot = path.find('.', dot + 1)) {
      auto& [count, kinds] = made[std::string(path.substr(0, dot))];
      ++count;
      kinds.insert(n.target);
      if (dot == std::string_view::npos) break;
    }
  }
  std::vector<Region> out;
  std::map<std::string_view, std::vector<std::string_view>> children;  // container -> numbered children
  const std::vector<std::string> modules = modules_of(graph);
  for (const std::string& module : modules) {
    const size_t dot = module.rfind('.');
    const std::string_view own = std::string_view(module).substr(dot + 1);  // npos + 1 is 0
    if (is_number(own) && made.at(module).first > 1) children[dot == std::string::npos ? "" : std::string_view(module).substr(0, dot)].push_back(module);
  }
  for (const std::string& module : modules) {
    const size_t dot = module.rfind('.');
    const auto siblings = children.find(dot == std::string::npos ? "" : std::string_view(module).substr(0, dot));
    if (siblings == children.end() || !std::count(siblings->second.begin(), siblings->second.end(), module)) continue;
    const bool inside = std::any_of(out.begin(), out.end(), [&](const Region& r) { return belongs(module, r[0]); });
    const auto& list = siblings->second;
    const bool repeated = std::any_of(list.begin(), list.end(), [&](std::string_view a) {
      return std::any_of(list.begin(), list.end(), [&](std::string_view b) { return a < b && made.find(a)->second.second == made.find(b)->second.second; });
    });
    if (!inside && repeated) out.push_back({module});
  }
  return out;
}

std::vector<Region> consecutive_regions(const OpGraph& graph, int count) {
  // A module that comes again later, or has modules in it, is taken operator by operator: regions are stretches of the graph.
  std::map<std::string_view, int> runs;
  std::string_view before;
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    const std::string_view path = module_path(n.name);
    if (path != before || runs.empty()) ++runs[path];
    before = path;
  }
  const auto bytes_of = [&](const Node& n) {
    int64_t bytes = 0;
    for (TensorId t : n.outputs) bytes += numel(graph.tensors[t].shape) * graph.tensors[t].element_bytes;
    return bytes;
  };
  const std::vector<std::string> modules = modules_of(graph);
  const auto whole = [&](std::string_view path) {
    return !path.empty() && runs.at(path) == 1 &&
           std::none_of(modules.begin(), modules.end(), [&](const std::string& m) { return m.size() > path.size() && belongs(m, path); });
  };
  int64_t total = 0, sum = 0;
  for (const Node& n : graph.nodes) total += n.kind == NodeKind::kOp ? bytes_of(n) : 0;
  std::vector<Region> out;
  int64_t begun = -1;
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp) continue;
    const std::string_view path = module_path(n.name);
    const std::string member(whole(path) ? path : std::string_view(n.name));
    const int64_t at = sum * count / std::max<int64_t>(total, 1);
    sum += bytes_of(n);
    if (!out.empty() && out.back().back() == member) continue;
    if (out.empty() || at != begun) out.emplace_back();
    begun = at;
    out.back().push_back(member);
  }
  return out;
}

std::string to_string(const Region& region) {
  return fmt::format("{}", fmt::join(region, "+"));
}

}  // namespace soap
