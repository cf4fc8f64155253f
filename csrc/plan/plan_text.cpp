#include "plan/plan_text.h"

#include <algorithm>
#include <charconv>
#include <set>

#include "base/error.h"
#include "base/text.h"
#include "fmt/ranges.h"
#include "sharding/region.h"
#include "sharding/tiling.h"
#include "substitution/match.h"

namespace soap {
namespace {

struct Line {
  int number = 0;
  std::string text, pattern, store;
  OpConfig config;
  bool has_devices = false, has_config = false;
  bool is_pattern() const { return pattern.find_first_of("*?") != std::string::npos; }
};

[[noreturn]] void fail(const Line& line, const std::string& message) {
  user_error("plan line {}: {}\n  {}", line.number, message, line.text);
}

std::vector<std::string> words_of(std::string_view text) {
  std::vector<std::string> out;
  std::string word;
  int depth = 0;
  for (char c : text) {
    if (c == '[') ++depth;
    if (c == ']') --depth;
    const bool blank = c == ' ' || c == '\t' || c == '\r';
    if (blank && depth == 0) {
      if (!word.empty()) out.push_back(std::move(word));
      word.clear();
    } else if (!blank) {
      word += c;
    }
  }
  if (!word.empty()) out.push_back(std::move(word));
  return out;
}

int64_t number(const Line& line, std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) fail(line, fmt::format("\"{}\" is not a number", text));
  return value;
}

std::vector<int64_t> numbers(const Line& line, std::string_view text, char separator) {
  std::vector<int64_t> out;
  while (!text.empty()) {
    const size_t at = std::min(text.find(separator), text.size());
    out.push_back(number(line, text.substr(0, at)));
    text.remove_prefix(std::min(at + 1, text.size()));
  }
  return out;
}

// "0,1,4..7,8..24:8": single devices and runs, ends included, of every one or every eighth.
std::vector<int> devices(const Line& line, std::string_view text) {
  std::vector<int> out;
  while (!text.empty()) {
    const size_t comma = std::min(text.find(','), text.size());
    std::string_view item = text.substr(0, comma);
    text.remove_prefix(std::min(comma + 1, text.size()));
    const size_t colon = item.find(':'), dots = item.find("..");
    if (dots == std::string_view::npos) {
      out.push_back(static_cast<int>(number(line, item)));
      continue;
    }
    const int64_t step = colon == std::string_view::npos ? 1 : number(line, item.substr(colon + 1));
    item = item.substr(0, colon);
    const int64_t first = number(line, item.substr(0, dots)), last = number(line, item.substr(dots + 2));
    if (last < first || step < 1) fail(line, fmt::format("\"{}\" is no run of devices: from the smaller to the larger, in steps of 1 or more", item));
    for (int64_t d = first; d <= last; d += step) out.push_back(static_cast<int>(d));
  }
  return out;
}

// fed | 4 | 4z | [0,5,13], each with x8t for chunks and :outer.middle.inner for mixed radix.
Cut parse_cut(const Line& line, std::string_view text, int world_size) {
  Cut cut;
  const std::string whole(text);
  if (const size_t colon = text.find(':'); colon != std::string_view::npos) {
    cut.radix = numbers(line, text.substr(colon + 1), '.');
    if (cut.radix.size() != 3) fail(line, fmt::format("\"{}\": mixed radix is :outer.middle.inner", whole));
    text = text.substr(0, colon);
  }
  if (!text.empty() && text.back() == 't') {
    const size_t x = text.rfind('x');
    cut.chunks =
        static_cast<int>(number(line, text.substr(x == std::string_view::npos ? 0 : x + 1, text.size() - 1 - (x == std::string_view::npos ? 0 : x + 1))));
    text = x == std::string_view::npos ? std::string_view("1") : text.substr(0, x);
  }
  if (text == "fed") {
    cut.fed = true;
    cut.tiles = world_size;
  } else if (!text.empty() && text.front() == '[') {
    if (text.back() != ']') fail(line, fmt::format("\"{}\": missing ]", whole));
    cut.bounds = numbers(line, text.substr(1, text.size() - 2), ',');
    if (cut.bounds.size() < 2) fail(line, fmt::format("\"{}\": cut points are [0, ..., size]", whole));
    cut.tiles = static_cast<int>(cut.bounds.size()) - 1;
  } else {
    if (!text.empty() && text.back() == 'z') {
      cut.zigzag = true;
      text.remove_suffix(1);
    }
    cut.tiles = static_cast<int>(number(line, text));
  }
  if (cut.tiles < 1 || cut.chunks < 1) fail(line, fmt::format("\"{}\": degrees are 1 or more", whole));
  return cut;
}

Line parse_line(int number_, std::string_view text, int world_size) {
  Line line{.number = number_, .text = std::string(text)};
  const auto words = words_of(text);
  line.pattern = words[0];
  for (size_t i = 1; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word.front() == '@') {
      std::string list = word.substr(1);
      if (list.empty() && i + 1 < words.size()) list = words[++i];
      if (list.size() < 2 || list.front() != '[' || list.back() != ']') fail(line, "devices are written @ [0,1]");
      line.config.devices = devices(line, std::string_view(list).substr(1, list.size() - 2));
      line.has_devices = true;
      continue;
    }
    const size_t eq = word.find('=');
    if (eq == std::string::npos || eq == 0) fail(line, fmt::format("\"{}\" is not factor=degree, store=, keep=, replicas= or @ [devices]", word));
    const std::string key = word.substr(0, eq), value = word.substr(eq + 1);
    if (key == "store") {
      if (!line.store.empty()) fail(line, "store= stands twice");
      line.store = value;
    } else if (key == "replicas") {
      line.config.replicas = static_cast<int>(number(line, value));
      if (line.config.replicas < 1) fail(line, "replicas is 1 or more");
      line.has_config = true;
    } else if (key == "keep") {
      const auto* k = std::find(std::begin(kKeepWords), std::end(kKeepWords), value);
      if (k == std::end(kKeepWords)) fail(line, fmt::format("keep is {}", fmt::join(kKeepWords, ", ")));
      line.config.keep = static_cast<Keep>(k - std::begin(kKeepWords));
    } else {
      line.config.cuts.push_back({key, parse_cut(line, value, world_size)});
      if (line.config.cuts.back().cut.fed && key != "n") fail(line, fmt::format("\"{}\": only n is cut as the processes feed", word));
      line.has_config = true;
    }
  }
  return line;
}

// Global settings: `set order=1f1b`, `set bucket_bytes=1048576`.
void apply_setting(const Line& line, const std::vector<std::string>& words, Strategy& strategy) {
  for (size_t i = 1; i < words.size(); ++i) {
    const size_t eq = words[i].find('=');
    const std::string key = words[i].substr(0, eq), value = eq == std::string::npos ? "" : words[i].substr(eq + 1);
    if (key == "order" && value == "gpipe")
      strategy.order = Order::kForwardThenBackward;
    else if (key == "order" && value == "1f1b")
      strategy.order = Order::kInterleaved;
    else if (key == "bucket_bytes")
      strategy.bucket_bytes = number(line, value);
    else
      fail(line, fmt::format("unknown setting \"{}\"; there are order=gpipe|1f1b and bucket_bytes=N", words[i]));
  }
  if (words.size() < 2) fail(line, "set what? There are order=gpipe|1f1b and bucket_bytes=N");
  if (strategy.bucket_bytes < 1) fail(line, "bucket_bytes must be positive");
}

// `edge producer -> consumer via=exchange`: how a tensor travels between two nodes.
void apply_edge(const Line& line, const std::vector<std::string>& words, const OpGraph& graph, Strategy& strategy) {
  if (words.size() != 5 || words[2] != "->" || (words[4] != "via=exchange" && words[4] != "via=auto")) {
    fail(line, "an edge is written: edge producer -> consumer via=exchange|auto");
  }
  const auto consumer = graph.find(words[3]);
  if (!graph.find(words[1]) || !consumer) fail(line, fmt::format("there is no operator or parameter {}", graph.find(words[1]) ? words[3] : words[1]));
  std::vector<std::string> sources;
  for (TensorId t : graph.nodes[*consumer].inputs) sources.push_back(graph.nodes[graph.tensors[t].producer].name);
  if (!std::count(sources.begin(), sources.end(), words[1]))
    fail(line, fmt::format("{} doesn't read {}; it reads {}", words[3], words[1], fmt::join(sources, ", ")));
  strategy.edges[{words[1], words[3]}] = words[4] == "via=exchange" ? Via::kExchange : Via::kAuto;
}

// `recompute h.* features.0+features.1`: a region for each word, of a pattern one for each that fits and is in none yet.
void apply_recompute(const Line& line, const std::vector<std::string>& words, const OpGraph& graph, Strategy& strategy) {
  if (words.size() < 2) fail(line, "recompute what? Name modules or operators: recompute h.0 h.1, or recompute h.*");
  std::set<std::string> taken;
  for (const Region& r : strategy.recompute) taken.insert(r.begin(), r.end());
  try {
    for (size_t i = 1; i < words.size(); ++i) {
      const bool pattern = words[i].find_first_of("*?") != std::string::npos && words[i].find('+') == std::string::npos;
      for (Region& r : parse_regions(graph, words[i])) {
        if (pattern && taken.count(r[0])) continue;
        taken.insert(r.begin(), r.end());
        strategy.recompute.push_back(std::move(r));
      }
    }
    named_regions(graph, strategy.recompute);  // no operator twice
  } catch (const std::invalid_argument& e) {
    std::string message = e.what();
    if (message.starts_with("[plan] ")) message = message.substr(7);
    fail(line, message);
  }
}

// Parameters of an operator: those that it reads directly.
std::vector<const Node*> parameters_of(const OpGraph& graph, const Node& node) {
  std::vector<const Node*> out;
  for (TensorId t : node.inputs) {
    const Node& producer = graph.nodes[graph.tensors[t].producer];
    if (producer.kind == NodeKind::kParam) out.push_back(&producer);
  }
  return out;
}

// store=whole, store=shard, or store=<factor>: the parameter is cut as the operator cuts that factor.
OpConfig storage(const OpGraph& graph, const Line& line, const Node& node, const Rule& rule, const Node& param, const OpConfig& config, int world_size) {
  OpConfig out{.keep = config.keep};
  const std::vector<int64_t>& shape = graph.output(param, 0).shape;
  if (line.store == "whole") {
    std::set<int> devices(config.devices.begin(), config.devices.end());
    if (devices.empty()) {
      for (int d = 0; d < std::min(world_size, config.num_tiles() * config.replicas); ++d) devices.insert(d);
    }
    out.devices.assign(devices.begin(), devices.end());
    out.replicas = static_cast<int>(devices.size());
    return out;
  }
  if (line.store == "shard") {
    if (shape.empty()) {
      out.replicas = world_size;
    } else {
      out.cuts.push_back({"d0", {.tiles = world_size}});
    }
    return out;
  }
  const int f = rule.factor(line.store);
  if (f < 0) {
    std::vector<std::string> names;
    for (const Factor& factor : rule.factors) names.push_back(factor.name);
    fail(line, fmt::format("store={}: {} ({}) has the factors {}; or store=whole, store=shard", line.store, node.name, node.target, fmt::join(names, ", ")));
  }
  const auto cut = std::find_if(config.cuts.begin(), config.cuts.end(), [&](const FactorCut& c) { return c.factor == line.store; });
  if (cut == config.cuts.end()) fail(line, fmt::format("store={0}: the line does not cut {0}", line.store));
  size_t operand = 0;
  while (graph.tensors[node.inputs[operand]].producer != param.id) ++operand;
  const auto& dims = rule.operands[operand].dims;
  for (size_t d = 0; d < dims.size(); ++d) {
    if (dims[d].factors.size() == 1 && dims[d].factors[0] == f && !dims[d].map) {
      Cut c = cut->cut;
      c.chunks = 1;
      out.cuts.push_back({fmt::format("d{}", d), c});
    }
  }
  // The devices of the operator's grid, one row per tile of that factor; the others are replicas.
  std::vector<std::set<int>> rows(out.cuts.empty() ? 1 : cut->cut.tiles);
  int inner = config.replicas;
  for (auto c = config.cuts.rbegin(); &*c != &*cut; ++c) inner *= c->cut.tiles;
  const int grid = config.num_tiles() * config.replicas;
  for (int slot = 0; slot < grid; ++slot) {
    const int device = config.devices.empty() ? slot : config.devices[slot];
    rows[out.cuts.empty() ? 0 : slot / inner % cut->cut.tiles].insert(device);
  }
  for (const auto& row : rows) {
    if (row.size() != rows[0].size()) fail(line, "store=: the tiles lie on different numbers of devices; write a param: line");
    out.devices.insert(out.devices.end(), row.begin(), row.end());
  }
  out.replicas = static_cast<int>(rows[0].size());
  return out;
}

std::string known_names(const OpGraph& graph, std::string_view pattern) {
  std::vector<std::string> close, all;
  const std::string_view stem = pattern.substr(0, pattern.find_first_of("./*"));
  for (const Node& n : graph.nodes) {
    if (n.kind != NodeKind::kOp && n.kind != NodeKind::kParam) continue;
    if (n.kind == NodeKind::kOp) all.push_back(n.name);
    if (!stem.empty() && n.name.find(stem) != std::string::npos) close.push_back(n.name);
  }
  const auto& list = close.empty() ? all : close;
  const size_t shown = std::min<size_t>(list.size(), 12);
  return fmt::format("{}{}", fmt::join(list.begin(), list.begin() + static_cast<int64_t>(shown), ", "), shown < list.size() ? ", ..." : "");
}

}  // namespace

std::vector<Region> parse_regions(const OpGraph& graph, std::string_view word) {
  std::vector<Region> out;
  const bool joined = word.find('+') != std::string_view::npos;
  for (std::string_view rest = word; !rest.empty();) {
    const size_t plus = std::min(rest.find('+'), rest.size());
    const std::string_view pattern = rest.substr(0, plus);
    rest.remove_prefix(std::min(plus + 1, rest.size()));
    const std::vector<std::string> members = members_matching(graph, pattern);
    if (members.empty()) {
      std::vector<std::string> modules = members_matching(graph, "*");
      for (std::string& m : members_matching(graph, "*.*")) modules.push_back(std::move(m));
      modules.resize(std::min<size_t>(modules.size(), 12));
      user_error("recompute: there is no module or operator {}; there are {}, ...", pattern, fmt::join(modules, ", "));
    }
    if (joined && !out.empty()) {
      out[0].insert(out[0].end(), members.begin(), members.end());
    } else if (joined) {
      out.push_back(members);
    } else {
      for (const std::string& m : members) out.push_back({m});
    }
  }
  return out;
}

namespace {

// `rewrite substitution anchors...`, done to the graph line by line; the other lines are about what they leave.
void apply_rewrites(std::string_view text, OpGraph& graph, std::vector<Rewrite>& rewrites) {
  for (int count = 1; !text.empty(); ++count) {
    const std::string_view row = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(row.size() + 1, text.size()));
    auto words = words_of(row.substr(0, row.find('#')));
    if (words.empty() || words[0] != "rewrite") continue;
    const Line line{.number = count, .text = std::string(row)};
    if (words.size() < 3) fail(line, "a rewrite is written: rewrite substitution operator ...");
    Rewrite r{.substitution = words[1], .anchors = {words.begin() + 2, words.end()}};
    try {
      graph = rewritten(graph, {r});
    } catch (const std::invalid_argument& e) {
      fail(line, e.what());
    }
    rewrites.push_back(std::move(r));
  }
}

Strategy parse_lines(const OpGraph& graph, std::string_view text, int world_size) {
  Strategy strategy{.world_size = world_size};
  std::vector<Line> lines;
  int count = 0;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view row = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    ++count;
    row = row.substr(0, std::min(row.find('#'), row.size()));
    const auto words = words_of(row);
    if (words.empty() || words[0] == "rewrite") continue;
    if (words[0] == "set") {
      apply_setting({.number = count, .text = std::string(row)}, words, strategy);
    } else if (words[0] == "edge") {
      apply_edge({.number = count, .text = std::string(row)}, words, graph, strategy);
    } else if (words[0] == "recompute") {
      apply_recompute({.number = count, .text = std::string(row)}, words, graph, strategy);
    } else {
      lines.push_back(parse_line(count, row, world_size));
    }
  }
  std::vector<char> used(lines.size());
  for (const Node& node : graph.nodes) {
    if (node.kind != NodeKind::kOp && node.kind != NodeKind::kParam) continue;
    for (size_t i = 0; i < lines.size(); ++i) {
      const Line& line = lines[i];
      const bool bare = line.pattern == "*" && node.kind != NodeKind::kOp;  // "*" means every operator
      if (bare || !matches(line.pattern, node.name)) continue;
      used[i] = 1;
      const Rule rule = make_rule(graph, node, world_size);
      OpConfig config = line.config;
      if (line.is_pattern()) {  // takes what the operator has
        std::erase_if(config.cuts, [&](const FactorCut& c) {
          if (c.cut.fed || c.factor == "n") return false;
          const int f = rule.factor(c.factor);
          return f < 0 || rule.factors[f].cut == Cuttable::kWhole;
        });
        if (line.has_config && config.cuts.empty() && !line.config.cuts.empty() && !line.has_devices) break;
      }
      try {
        if (line.has_config || line.has_devices || node.kind == NodeKind::kParam) {
          // Legal but for what only the whole graph shows (the fed rows).
          OpConfig probe = config;
          std::erase_if(probe.cuts, [&](const FactorCut& c) { return c.cut.fed || (c.factor == "n" && rule.factor("n") < 0); });
          if (probe.cuts.size() == config.cuts.size()) make_tiling(node, rule, probe, std::nullopt, world_size);
          strategy.nodes[node.name] = config;
        }
        if (!line.store.empty()) {
          for (const Node* p : parameters_of(graph, node)) {
            OpConfig s = storage(graph, line, node, rule, *p, config, world_size);
            make_tiling(*p, make_rule(graph, *p, world_size), s, std::nullopt, world_size);
            strategy.nodes.emplace(p->name, std::move(s));
          }
        }
      } catch (const std::invalid_argument& e) {
        const std::string message = e.what();
        if (message.starts_with("plan line")) throw;
        fail(line, message);
      }
      break;
    }
  }
  for (size_t i = 0; i < lines.size(); ++i) {
    if (used[i]) continue;
    // A sub-operator of an operator that its configuration expands: known only after lowering.
    const size_t slash = lines[i].pattern.rfind('/');
    const bool sub = !lines[i].is_pattern() && slash != std::string::npos && graph.find(std::string_view(lines[i].pattern).substr(0, slash));
    if (sub) {
      strategy.nodes[lines[i].pattern] = lines[i].config;
      continue;
    }
    const bool shadowed = std::any_of(graph.nodes.begin(), graph.nodes.end(), [&](const Node& n) {
      return (n.kind == NodeKind::kOp || n.kind == NodeKind::kParam) && matches(lines[i].pattern, n.name);
    });
    if (shadowed && lines[i].is_pattern()) continue;  // earlier lines took all that it fits
    fail(lines[i], shadowed ? fmt::format("an earlier line already configures {}", lines[i].pattern)
                            : fmt::format("there is no operator or parameter {}; there are {}", lines[i].pattern, known_names(graph, lines[i].pattern)));
  }
  return strategy;
}

}  // namespace

Strategy parse_plan(const OpGraph& graph, std::string_view text, int world_size) {
  if (world_size < 1) user_error("[plan] world size {}", world_size);
  if (text.find("rewrite ") == std::string_view::npos) return parse_lines(graph, text, world_size);
  OpGraph now = graph;
  std::vector<Rewrite> rewrites;
  apply_rewrites(text, now, rewrites);
  Strategy strategy = parse_lines(now, text, world_size);
  strategy.rewrites = std::move(rewrites);
  return strategy;
}

std::map<std::string, std::optional<OpConfig>> parse_changes(const OpGraph& graph, std::string_view text, int world_size) {
  const Strategy parsed = parse_plan(graph, text, world_size);
  std::map<std::string, std::optional<OpConfig>> out;
  for (const auto& [name, config] : parsed.nodes) out[name] = config;
  int count = 0;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view row = text.substr(0, std::min(end, text.find('#')));
    text.remove_prefix(std::min(end + 1, text.size()));
    ++count;
    const auto words = words_of(row);
    if (words.empty()) continue;
    if (words[0] == "set" || words[0] == "edge" || words[0] == "recompute" || words[0] == "rewrite")
      fail({.number = count, .text = std::string(row)}, "only lines of operators and parameters fit here");
    const Line line = parse_line(count, row, world_size);
    if (!line.store.empty() && !line.has_config && !line.has_devices) continue;
    for (const Node& n : graph.nodes) {
      if (n.kind == NodeKind::kOp && matches(line.pattern, n.name)) out.emplace(n.name, std::nullopt);
    }
  }
  return out;
}

}  // namespace soap
