#include "search/dynamic_programming.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "base/error.h"

namespace soap {
namespace {

using Table = std::vector<int64_t>;
constexpr int64_t kInfinite = std::numeric_limits<int64_t>::max() / 4;

// A table over some nodes, the first slowest.
struct Factor {
  std::vector<int> scope;
  Table table;
};

struct Elimination {
  const ChoiceGraph& graph;
  const EliminationOptions& options;
  std::vector<Table> nodes;
  std::vector<std::map<int, Table>> edges;  // [a][b], a < b: [choice of a * choices of b + choice of b]
  std::vector<std::vector<int>> near;       // neighbours, sorted
  std::vector<char> gone;
  // What was eliminated, in order, with every table that mentioned it: the choice is the best for its neighbours' choices.
  struct Done {
    int node = -1;
    std::vector<Factor> tables;
  };
  std::vector<Done> done;
  Choices out;

  int choices(int n) const { return static_cast<int>(nodes[n].size()); }

  void connect(int a, int b, Table table) {  // table has a slowest, a < b
    const auto [it, fresh] = edges[a].try_emplace(b);
    if (fresh) {
      it->second = std::move(table);
      near[a].insert(std::lower_bound(near[a].begin(), near[a].end(), b), b);
      near[b].insert(std::lower_bound(near[b].begin(), near[b].end(), a), a);
    } else {
      for (size_t i = 0; i < table.size(); ++i) it->second[i] += table[i];
      ++out.edge_eliminations;
    }
  }

  static Table transposed(const Table& t, int rows, int columns) {
    Table out(t.size());
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) out[size_t(c) * rows + r] = t[size_t(r) * columns + c];
    }
    return out;
  }

  void build() {
    nodes = graph.nodes;
    edges.resize(nodes.size());
    near.resize(nodes.size());
    gone.resize(nodes.size());
    for (size_t n = 0; n < nodes.size(); ++n) {
      if (nodes[n].empty()) user_error("[search] node {} has no choice", n);
    }
    for (const ChoiceGraph::Edge& e : graph.edges) {
      if (e.a == e.b) user_error("[search] an edge from node {} to itself", e.a);
      const Table& t = graph.tables.at(e.table);
      const size_t wanted = nodes.at(e.a).size() * nodes.at(e.b).size();
      if (t.size() != wanted) user_error("[search] the table between nodes {} and {} has {} entries, it needs {}", e.a, e.b, t.size(), wanted);
      if (e.a < e.b)
        connect(e.a, e.b, t);
      else
        connect(e.b, e.a, transposed(t, choices(e.a), choices(e.b)));
    }
  }

  // Takes the table between j and another node out, with j fastest.
  Table take(int j, int other) {
    const int a = std::min(j, other), b = std::max(j, other);
    auto handle = edges[a].extract(b);
    std::erase(near[a], b);
    std::erase(near[b], a);
    return j == b ? std::move(handle.mapped()) : transposed(handle.mapped(), choices(a), choices(b));
  }

  void eliminate_between(int j) {
    const int i = near[j][0], k = near[j][1], cj = choices(j), ci = choices(i), ck = choices(k);
    Done d{.node = j};
    d.tables.push_back({{i, j}, take(j, i)});
    d.tables.push_back({{k, j}, take(j, k)});
    Table result(size_t(ci) * ck), row(cj);
    for (int x = 0; x < ci; ++x) {
      for (int y = 0; y < cj; ++y) row[y] = d.tables[0].table[size_t(x) * cj + y] + nodes[j][y];
      for (int z = 0; z < ck; ++z) {
        const int64_t* column = &d.tables[1].table[size_t(z) * cj];
        int64_t best = kInfinite;
        for (int y = 0; y < cj; ++y) best = std::min(best, row[y] + column[y]);
        result[size_t(x) * ck + z] = best;
      }
    }
    gone[j] = 1;
    done.push_back(std::move(d));
    connect(i, k, std::move(result));
  }

  void eliminate_leaf(int j) {
    Done d{.node = j};
    if (!near[j].empty()) {
      const int i = near[j][0], cj = choices(j);
      d.tables.push_back({{i, j}, take(j, i)});
      for (int x = 0; x < choices(i); ++x) {
        int64_t best = kInfinite;
        for (int y = 0; y < cj; ++y) best = std::min(best, d.tables[0].table[size_t(x) * cj + y] + nodes[j][y]);
        nodes[i][x] += best;
      }
    }
    gone[j] = 1;
    done.push_back(std::move(d));
  }

  // Node and edge elimination, and leaves when asked for, until nothing changes.
  void reduce(bool leaves) {
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t n = 0; n < nodes.size(); ++n) {
        if (gone[n]) continue;
        if (near[n].size() == 2) {
          eliminate_between(static_cast<int>(n));
          ++out.node_eliminations;
          changed = true;
        } else if (leaves && near[n].size() < 2) {
          eliminate_leaf(static_cast<int>(n));
          changed = true;
        }
      }
    }
  }

  int64_t size_of(const std::vector<int>& scope) const {
    int64_t size = 1;
    for (int n : scope) size = std::min(size * choices(n), kInfinite >> 16);
    return size;
  }

  // Position in a factor's table of an assignment (choices per node).
  size_t position(const Factor& f, const std::vector<int>& assignment) const {
    size_t at = 0;
    for (int n : f.scope) at = at * nodes[n].size() + assignment[n];
    return at;
  }

  static std::vector<int> neighbours(const std::vector<Factor>& factors, int node) {
    std::vector<int> scope;
    for (const Factor& f : factors) {
      if (!std::count(f.scope.begin(), f.scope.end(), node)) continue;
      for (int n : f.scope) {
        if (n != node && !std::count(scope.begin(), scope.end(), n)) scope.push_back(n);
      }
    }
    return scope;
  }

  // What is left, with tables over all neighbours.
  void eliminate_rest() {
    std::vector<Factor> factors;
    std::vector<int> rest;
    for (size_t n = 0; n < nodes.size(); ++n) {
      if (!gone[n]) rest.push_back(static_cast<int>(n));
      for (auto& [b, table] : edges[n]) factors.push_back({{static_cast<int>(n), b}, std::move(table)});
      edges[n].clear();
    }
    while (!rest.empty()) {
      int best = -1, largest = -1;
      std::vector<int> scope;
      size_t degree = 0;
      for (int n : rest) {
        std::vector<int> around = neighbours(factors, n);
        if (largest < 0 || around.size() > degree) {
          largest = n;
          degree = around.size();
        }
        if (best < 0 || size_of(around) < size_of(scope)) {
          best = n;
          scope = std::move(around);
        }
      }
      if (size_of(scope) > options.largest_table) {
        fix(largest, factors);
        std::erase(rest, largest);
        continue;
      }
      eliminate_with_table(best, scope, factors);
      std::erase(rest, best);
    }
  }

  void eliminate_with_table(int node, const std::vector<int>& scope, std::vector<Factor>& factors) {
    Done d{.node = node};
    for (Factor& f : factors) {
      if (std::count(f.scope.begin(), f.scope.end(), node)) d.tables.push_back(std::move(f));
    }
    std::erase_if(factors, [](const Factor& f) { return f.table.empty(); });
    Factor made{.scope = scope, .table = Table(size_of(scope))};
    std::vector<int> assignment(nodes.size());
    for (size_t at = 0; at < made.table.size(); ++at) {
      size_t rest = at;
      for (size_t i = scope.size(); i-- > 0;) {
        assignment[scope[i]] = static_cast<int>(rest % nodes[scope[i]].size());
        rest /= nodes[scope[i]].size();
      }
      made.table[at] = best_choice(d, assignment).second;
    }
    out.with_tables += scope.size() > 2;
    if (!scope.empty()) factors.push_back(std::move(made));
    gone[node] = 1;
    done.push_back(std::move(d));
  }

  // The choice that is best by itself: its own cost and the smallest that each neighbour's table allows.
  void fix(int node, std::vector<Factor>& factors) {
    Table alone = nodes[node];
    for (const Factor& f : factors) {
      const auto it = std::find(f.scope.begin(), f.scope.end(), node);
      if (it == f.scope.end()) continue;
      const int64_t inner = size_of({it + 1, f.scope.end()});
      Table smallest(alone.size(), kInfinite);
      for (size_t at = 0; at < f.table.size(); ++at) {
        int64_t& s = smallest[at / inner % alone.size()];
        s = std::min(s, f.table[at]);
      }
      for (size_t c = 0; c < alone.size(); ++c) alone[c] += smallest[c];
    }
    const auto best = static_cast<size_t>(std::min_element(alone.begin(), alone.end()) - alone.begin());
    for (size_t c = 0; c < alone.size(); ++c) {
      if (c != best) nodes[node][c] = kInfinite;
    }
    for (Factor& f : factors) {  // its dim of each table is that one choice from now on
      const auto it = std::find(f.scope.begin(), f.scope.end(), node);
      if (it == f.scope.end()) continue;
      const auto inner = static_cast<size_t>(size_of({it + 1, f.scope.end()}));
      Table kept;
      for (size_t at = 0; at < f.table.size(); ++at) {
        if (at / inner % alone.size() == best) kept.push_back(f.table[at]);
      }
      f.table = std::move(kept);
      f.scope.erase(it);
    }
    done.push_back({.node = node});
    gone[node] = 1;
    out.exact = false;
    ++out.fixed;
  }

  std::pair<int, int64_t> best_choice(const Done& d, std::vector<int>& assignment) const {
    std::pair<int, int64_t> best{0, kInfinite * 2};
    for (int c = 0; c < choices(d.node); ++c) {
      assignment[d.node] = c;
      int64_t cost = nodes[d.node][c];
      for (const Factor& f : d.tables) cost += f.table[position(f, assignment)];
      if (cost < best.second) best = {c, cost};
    }
    return best;
  }

  void read_back() {
    out.choice.assign(nodes.size(), 0);
    for (auto d = done.rbegin(); d != done.rend(); ++d) {
      const int best = best_choice(*d, out.choice).first;
      out.choice[d->node] = best;
    }
  }

  // Every node by itself, as long as one gains.
  void improve() {
    std::vector<std::vector<const ChoiceGraph::Edge*>> of(nodes.size());
    for (const ChoiceGraph::Edge& e : graph.edges) {
      of[e.a].push_back(&e);
      of[e.b].push_back(&e);
    }
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t n = 0; n < nodes.size(); ++n) {
        const auto cost = [&](int c) {
          int64_t sum = graph.nodes[n][c];
          for (const ChoiceGraph::Edge* e : of[n]) {
            const int a = e->a == static_cast<int>(n) ? c : out.choice[e->a], b = e->b == static_cast<int>(n) ? c : out.choice[e->b];
            sum += graph.tables[e->table][a * graph.nodes[e->b].size() + b];
          }
          return sum;
        };
        int best = out.choice[n];
        for (int c = 0; c < choices(static_cast<int>(n)); ++c) {
          if (cost(c) < cost(best)) best = c;
        }
        changed = changed || best != out.choice[n];
        out.choice[n] = best;
      }
    }
  }
};

}  // namespace

int64_t ChoiceGraph::cost(const std::vector<int>& choice) const {
  int64_t sum = 0;
  for (size_t n = 0; n < nodes.size(); ++n) sum += nodes[n].at(choice.at(n));
  for (const Edge& e : edges) sum += tables[e.table].at(choice[e.a] * nodes[e.b].size() + choice[e.b]);
  return sum;
}

Choices minimize(const ChoiceGraph& graph, const EliminationOptions& options) {
  Elimination e{.graph = graph, .options = options};
  e.build();
  e.reduce(false);
  e.out.left = static_cast<int>(std::count(e.gone.begin(), e.gone.end(), 0));
  e.reduce(true);
  e.eliminate_rest();
  e.read_back();
  if (!e.out.exact) e.improve();
  e.out.cost = graph.cost(e.out.choice);
  return std::move(e.out);
}

LimitedChoices minimize_within(const ChoiceGraph& graph, const std::vector<std::vector<int64_t>>& weights, int64_t limit, const EliminationOptions& options) {
  const auto with = [&](double multiplier) {
    ChoiceGraph g = graph;
    for (size_t n = 0; n < g.nodes.size(); ++n) {
      for (size_t c = 0; c < g.nodes[n].size(); ++c) g.nodes[n][c] += std::llround(multiplier * static_cast<double>(weights.at(n).at(c)));
    }
    LimitedChoices out{.choices = minimize(g, options), .multiplier = multiplier};
    out.choices.cost = graph.cost(out.choices.choice);
    for (size_t n = 0; n < g.nodes.size(); ++n) out.weight += weights[n][out.choices.choice[n]];
    out.fits = out.weight <= limit;
    return out;
  };
  LimitedChoices best = with(0);
  if (best.fits) return best;
  // 1e-6 ns per byte is too little to change a choice, 1e3 outweighs every cost there is.
  double low = 0, high = 1e-6;
  best = with(high);
  while (!best.fits && high < 1e3) {
    low = high;
    best = with(high *= 10);
  }
  if (!best.fits) return best;
  for (int i = 0; i < 20; ++i) {
    const double middle = low > 0 ? std::sqrt(low * high) : high / 2;
    LimitedChoices next = with(middle);
    if (next.fits) {
      high = middle;
      if (next.choices.cost <= best.choices.cost) best = std::move(next);
    } else {
      low = middle;
    }
  }
  return best;
}

}  // namespace soap
