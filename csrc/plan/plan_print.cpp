#include <algorithm>
#include <set>

#include "fmt/ranges.h"
#include "plan/plan_text.h"
#include "sharding/region.h"
#include "substitution/match.h"

namespace soap {
namespace {

constexpr size_t kShortRun = 8;  // is written out

std::string device_list(const std::vector<int>& devices) {
  std::string out;
  for (size_t i = 0; i < devices.size();) {
    size_t end = i + 1;
    const int step = end < devices.size() ? devices[end] - devices[i] : 0;
    while (step > 0 && end < devices.size() && devices[end] - devices[end - 1] == step) ++end;
    if (end - i <= kShortRun) end = i + 1;
    out += fmt::format("{}{}", i == 0 ? "" : ",", devices[i]);
    if (end - i > 1) out += fmt::format("..{}{}", devices[end - 1], step > 1 ? fmt::format(":{}", step) : "");
    i = end;
  }
  return out;
}

}  // namespace

std::string print_config(const OpConfig& config) {
  std::vector<std::string> words;
  for (const FactorCut& c : config.cuts) {
    std::string text = c.cut.fed              ? "fed"
                       : c.cut.bounds.empty() ? fmt::format("{}{}", c.cut.tiles, c.cut.zigzag ? "z" : "")
                                              : fmt::format("[{}]", fmt::join(c.cut.bounds, ","));
    if (c.cut.chunks > 1) text += fmt::format("x{}t", c.cut.chunks);
    if (!c.cut.radix.empty()) text += fmt::format(":{}", fmt::join(c.cut.radix, "."));
    words.push_back(fmt::format("{}={}", c.factor, text));
  }
  if (config.replicas > 1) words.push_back(fmt::format("replicas={}", config.replicas));
  if (config.keep != Keep::kUntilBackward) words.push_back(fmt::format("keep={}", kKeepWords[static_cast<int>(config.keep)]));
  if (!config.devices.empty()) words.push_back(fmt::format("@ [{}]", device_list(config.devices)));
  if (words.empty()) return "replicas=1";  // whole, on device 0: a name alone would follow
  return fmt::format("{}", fmt::join(words, " "));
}

std::string print_plan(const OpGraph& graph, const Strategy& strategy) {
  std::string out;
  for (const Rewrite& r : strategy.rewrites) out += fmt::format("rewrite {}\n", to_string(r));
  if (strategy.order == Order::kInterleaved) out += "set order=1f1b\n";
  if (strategy.bucket_bytes != Strategy{}.bucket_bytes) out += fmt::format("set bucket_bytes={}\n", strategy.bucket_bytes);
  if (!strategy.recompute.empty()) {
    out += "recompute";
    for (const Region& r : strategy.recompute) out += " " + to_string(r);
    out += "\n";
  }
  size_t width = 0;
  for (const auto& [name, config] : strategy.nodes) width = std::max(width, name.size());
  std::set<std::string> printed;
  const auto line = [&](const std::string& name, const OpConfig& config) {
    out += fmt::format("{:<{}}  {}\n", name, width, print_config(config));
    printed.insert(name);
  };
  const OpGraph now = rewritten(graph, strategy.rewrites);
  for (const Node& node : now.nodes) {
    const auto it = strategy.nodes.find(node.name);
    if (it != strategy.nodes.end()) line(it->first, it->second);
  }
  for (const auto& [name, config] : strategy.nodes) {
    if (!printed.count(name)) line(name, config);
  }
  for (const auto& [edge, via] : strategy.edges) {
    out += fmt::format("edge {} -> {} via={}\n", edge.first, edge.second, via == Via::kExchange ? "exchange" : "auto");
  }
  return out;
}

}  // namespace soap
