// Where a substitution fits a graph, and the graph after it.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "graph/op_graph.h"
#include "sharding/strategy.h"
#include "substitution/table.h"

namespace soap {

// What the variables of a substitution stand for at one place. Keys are written as in the table: "x", "weight*".
struct Match {
  std::map<std::string, std::vector<TensorId>, std::less<>> tensors;  // one, or a list's in order; none: an absent operand
  std::map<std::string, std::vector<NodeId>, std::less<>> operators;  // by the variable of their result, without a star
  std::map<std::string, std::vector<Attr>, std::less<>> attrs;
};

// Throws std::invalid_argument, which says what doesn't fit.
Match match(const OpGraph& graph, const Substitution& substitution, const std::vector<std::string>& anchors);
// Every place where a substitution of the table fits; of siblings the largest groups. In the order of the table, then of the graph.
std::vector<Rewrite> find_rewrites(const OpGraph& graph, const SubstitutionTable& table = substitutions());
// The graph after all of these, one after another; later ones may name what earlier ones made. Operators that move keep their names, new
// ones are named "<first anchor>/<variable>", a split "<first anchor>/split". Operators that nobody reads any more are gone. Throws
// std::invalid_argument where one doesn't fit.
OpGraph rewritten(const OpGraph& graph, const std::vector<Rewrite>& rewrites, const SubstitutionTable& table = substitutions());
// Those that fit, in order, each after the ones before it.
std::vector<Rewrite> fitting(const OpGraph& graph, const std::vector<Rewrite>& rewrites);
// "fuse_linears q k v"
std::string to_string(const Rewrite& rewrite);

// A dim that may count from the end.
int64_t wrapped(int64_t dim, size_t rank);
// Conditions of the table (conditions.cpp): "" where it holds, else the reason. Throws InternalError for one that isn't there.
std::string violated(const OpGraph& graph, const Condition& condition, const Match& match);
// The value of an attribute of a `to` line: a number, 1-rank(v), compose(p, q) or a name that a `from` line has bound.
Attr evaluated(const OpGraph& graph, const std::string& text, const Match& match);

}  // namespace soap
