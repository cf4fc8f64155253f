// Views that regroup dims (view, reshape, flatten, unsqueeze, squeeze, ...): both shapes are refined into common factors. Walking from
// the right, the products of trailing sizes of both shapes are cut points; where each divides the next, their ratios are the factors. A
// group of dims where they don't ([6,4] -> [8,3]) is read whole.
#include <algorithm>

#include "base/error.h"
#include "sharding/rules/families.h"

namespace soap {
namespace {

struct Group {
  std::vector<size_t> in, out;  // dims, from the right
};

// Groups of dims with equal products, from the right; dims of size 1 are left out.
std::vector<Group> groups(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  std::vector<Group> out;
  auto i = static_cast<int64_t>(a.size()) - 1, j = static_cast<int64_t>(b.size()) - 1;
  while (i >= 0 || j >= 0) {
    Group g;
    int64_t x = 1, y = 1;
    while (true) {
      if (x == y && !g.in.empty()) break;
      if (x <= y && i >= 0) {
        if (a[i] != 1) g.in.push_back(i);
        x *= a[i--];
      } else if (j >= 0) {
        if (b[j] != 1) g.out.push_back(j);
        y *= b[j--];
      } else if (i >= 0) {
        if (a[i] != 1) g.in.push_back(i);
        x *= a[i--];
      } else {
        break;
      }
      if (x == y && x > 1) break;
    }
    if (!g.in.empty() || !g.out.empty()) out.push_back(std::move(g));
  }
  return out;
}

Rule view(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto &in = graph.input(node, 0).shape, &shape = graph.output(node, 0).shape;
  std::vector<std::string> x(in.size(), "*"), y(shape.size(), "*");
  if (numel(in) == 0) return r.operand(0, x).result(y).view().build();
  int count = 0;
  for (const Group& g : groups(in, shape)) {
    // Cut points: suffix products of either side.
    std::vector<int64_t> points{1};
    for (const auto& [dims, sizes] : {std::pair{&g.in, &in}, std::pair{&g.out, &shape}}) {
      int64_t p = 1;
      for (size_t d : *dims) points.push_back(p *= (*sizes)[d]);
    }
    std::sort(points.begin(), points.end());
    points.erase(std::unique(points.begin(), points.end()), points.end());
    bool chain = true;
    for (size_t k = 1; k < points.size(); ++k) chain = chain && points[k] % points[k - 1] == 0;
    if (!chain) continue;
    std::vector<std::string> names;
    for (size_t k = 1; k < points.size(); ++k) {
      names.push_back(fmt::format("f{}", count++));
      r.factor(names.back(), points[k] / points[k - 1], FactorKind::kAttribute);
    }
    const auto assign = [&](const std::vector<size_t>& dims, const std::vector<int64_t>& sizes, std::vector<std::string>& texts) {
      int64_t p = 1;
      for (size_t d : dims) {
        const int64_t end = p * sizes[d];
        std::string text;
        for (size_t k = 1; k < points.size(); ++k) {
          if (points[k - 1] >= p && points[k] <= end) text = names[k - 1] + (text.empty() ? "" : " ") + text;
        }
        texts[d] = text;
        p = end;
      }
    };
    assign(g.in, in, x);
    assign(g.out, shape, y);
  }
  return r.operand(0, x).result(y).view().build();
}

// transpose, permute, t, movedim, ...: the capture gives every one of them as `permute` with its dims.
Rule permute(const OpGraph& graph, const Node& node) {
  RuleSpec r(graph, node);
  const auto& in = graph.input(node, 0).shape;
  const auto dims = node.ints("dims", in.size(), 0);
  std::vector<std::string> x, y;
  for (size_t d = 0; d < in.size(); ++d) {
    x.push_back(fmt::format("d{}", d));
    r.factor(x.back(), in[d], FactorKind::kAttribute);
  }
  for (int64_t d : dims) y.push_back(x[d < 0 ? d + static_cast<int64_t>(in.size()) : d]);
  return r.operand(0, x).result(y).view().build();
}

}  // namespace

void register_view(RuleRegistry& rules) {
  rules.add({"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view", "view_as", "reshape_as"}, view);
  rules.add({"permute"}, permute);
}

}  // namespace soap
