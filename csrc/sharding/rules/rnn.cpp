// Recurrent layers, one direction each (the capture splits nn.LSTM, nn.GRU and nn.RNN into layers).
//   lstm_layer  x[t n i]  h0[n o*]  c0[n o]  w_ih[(4 o) i]  w_hh[(4 o) *]  biases[(4 o)]  ->  y[t n o]  hn[n o]  cn[n o]
// Projected (w_hr[* o]), y and hn are sums over the units o, as wide as the projection.
// Cut along t it expands into cells, each on the device of its part; a cut along the hidden units o needs single time steps, since every
// step reads all of the last one's.
#include <algorithm>

#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

int64_t gates(const Node& node) {
  return node.target == "lstm_layer" ? 4 : node.target == "gru_layer" ? 3 : 1;
}

// oneDNN's rows: whole vectors of 64 bytes, and not a multiple of 1 KiB, which would fall on the same lines of the cache.
int64_t padded_row(int64_t size) {
  const int64_t row = (size + 15) / 16 * 16;
  return row % 256 == 0 ? row + 16 : row;
}

// Elements that torch's CPU kernels keep for backward for each row, besides operands and results: gates, and states of each step. oneDNN's LSTM (the one
// without projection, nor cut by units) has a workspace: gates of each step, and for each and one more 6 padded and 5 plain planes of states and gradients.
int64_t saved_per_row(const Node& node, int64_t steps, int64_t in, int64_t hidden, bool projected) {
  if (node.target == "gru_layer") return 7 * steps * hidden;
  if (node.target != "lstm_layer") return steps * hidden;
  if (projected) return 7 * steps * hidden;
  if (node.attr<bool>("by_unit", false)) return 5 * steps * hidden;
  return steps * padded_row(4 * hidden) + (steps + 1) * (6 * padded_row(std::max(in, hidden)) + 5 * hidden);
}

// The gates' rows are (gate, unit); a layer as a whole can't cut o, one step can.
Rule recurrent(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& x = graph.input(node, 0).shape;
  const bool lstm = node.target == "lstm_layer", projected = node.operand("w_hr") >= 0;
  const int64_t hidden = graph.input(node, node.operand("w_ih")).shape[0] / gates(node);
  const bool step = x[0] == 1;
  r.factor("t", x[0], FactorKind::kAttribute, Cuttable::kExpand)
      .factor("n", x[1], FactorKind::kSample)
      .factor("i", x[2], FactorKind::kReduction, Cuttable::kWhole);
  r.factor("q", gates(node), FactorKind::kAttribute, Cuttable::kWhole).factor("o", hidden, FactorKind::kParameter, step ? Cuttable::kAny : Cuttable::kExpand);
  r.operand("input", {"t", "n", "i"}).operand("h0", {"n", "*"});
  if (lstm) r.operand("c0", {"n", "o"});
  if (!lstm) r.operand("h0_own", {"n", "o"});
  r.operand("w_ih", {"q o", "i"}).operand("w_hh", {"q o", "*"}).operand("b_ih", {"q o"}).operand("b_hh", {"q o"}).operand("w_hr", {"*", "o"});
  const char* units = projected ? "*" : "o";
  const Reduce reduce = projected ? Reduce::kSum : Reduce::kNone;
  r.result({"t", "n", units}, reduce).result({"n", units}, reduce);
  if (lstm) r.result({"n", "o"});
  Rule rule = r.build();
  rule.results.back().saved_bytes_more = graph.input(node, 0).element_bytes * saved_per_row(node, x[0], x[2], hidden, projected) / hidden;
  return rule;
}

void expand_recurrent(Expander& e, const Node& node, const Rule& rule, const Tiling& tiling) {
  const bool lstm = node.target == "lstm_layer", projected = node.operand("w_hr") >= 0;
  const bool reverse = node.attr<bool>("reverse", false);
  const auto x = e.operand("input");
  const auto shape = e.shape(x);
  const int64_t hidden = e.shape(e.operand("w_ih"))[0] / gates(node), width = e.shape(e.operand("w_hh"))[1];
  const bool by_unit = std::any_of(tiling.cuts.begin(), tiling.cuts.end(),
                                   [&](const FactorParts& c) { return rule.factors[c.factor].name == "o" && c.tiles() * c.chunks() > 1; });
  // Parts of t in the order of time, whatever tile has them; single steps where the hidden units are cut.
  std::vector<std::pair<Run, int>> parts;
  int index = 0;
  for (const IndexSet& set : e.part_sets("t")) {
    for (const Run& run : set.runs()) {
      if (!by_unit) parts.emplace_back(run, index);
      for (int64_t t = run.begin; by_unit && t < run.end; ++t) parts.emplace_back(Run{t, t + 1}, index);
    }
    ++index;
  }
  std::sort(parts.begin(), parts.end());
  if (reverse) std::reverse(parts.begin(), parts.end());
  TensorId h = e.operand("h0"), c = lstm ? e.operand("c0") : -1;
  AttrMap attrs = node.attrs;
  if (by_unit) attrs["by_unit"] = true;
  std::vector<TensorId> outputs;
  for (const auto& [run, part] : parts) {
    const int64_t length = run.end - run.begin;
    const std::vector<std::pair<std::string, int>> at{{"t", part}};
    const std::string suffix = fmt::format("t{}", run.begin);
    const std::vector<int64_t> piece{length, shape[1], shape[2]};
    const TensorId xt = length == shape[0] ? x
                                           : e.add({.name = suffix + "/x",
                                                    .target = "narrow",
                                                    .inputs = {x},
                                                    .attrs = {{"dim", int64_t{0}}, {"start", run.begin}, {"length", length}},
                                                    .inherit = {{"d1", "n"}},
                                                    .at = at},
                                                   piece);
    std::vector<TensorId> inputs{xt, h};
    std::vector<std::string> names{"input", "h0"};
    const auto add = [&](const char* name, TensorId t) {
      if (t < 0) return;
      inputs.push_back(t);
      names.push_back(name);
    };
    add("c0", c);
    if (!lstm) add("h0_own", h);
    for (const char* w : {"w_ih", "w_hh", "b_ih", "b_hh", "w_hr"}) add(w, e.operand(w));
    std::vector<std::vector<int64_t>> results{{length, shape[1], width}, {shape[1], width}};
    if (lstm) results.push_back({shape[1], hidden});
    const auto made = e.add_many(
        {.name = suffix, .target = node.target, .inputs = inputs, .operand_names = names, .attrs = attrs, .inherit = {{"n", "n"}, {"o", "o"}}, .at = at},
        results);
    outputs.push_back(made[0]);
    h = made[1];
    if (lstm) c = made[2];
  }
  if (reverse) std::reverse(outputs.begin(), outputs.end());
  std::vector<std::pair<std::string, std::string>> inherit{{"d1", "n"}};
  if (!projected) inherit.emplace_back("d2", "o");
  e.bind(0, outputs.size() == 1
                ? outputs[0]
                : e.add({.name = "cat", .target = "cat", .inputs = outputs, .attrs = {{"dim", int64_t{0}}}, .inherit = inherit}, {shape[0], shape[1], width}));
  e.bind(1, h);
  if (lstm) e.bind(2, c);
}

}  // namespace

void register_rnn(RuleRegistry& rules, ExpansionRegistry& expansions) {
  rules.add({"lstm_layer", "gru_layer", "rnn_layer"}, recurrent);
  expansions.add({"lstm_layer", "gru_layer", "rnn_layer"}, expand_recurrent);
}

}  // namespace soap
