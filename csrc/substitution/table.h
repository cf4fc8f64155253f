// The table of substitutions, as data: what a piece of a graph looks like, and what computes the same.
//
// Source: TASO (Jia et al., SOSP 2019) searches such pairs, Unity (Unger et al., OSDI 2022, section 3) tries them jointly with the
// parallelization. Ours are written down (the text is in entries.cpp), one matcher and one builder interpret them (match.h), and each use is
// computed both ways on a small example before it is believed (torch_soap/rewrite/substitution.py).
//
//   fuse_linears: rounding
//     from y* = linear(x, weight*, bias*?)
//     if   rank(weight*, 2) alike_but(weight*, 0)
//     to   weight = cat(weight*; dim=0)
//     to   bias = cat(bias*; dim=0)
//     to   joined = like y(x, weight, bias)
//     to   y* = split(joined; dim=-1)
//
// name: bits | rounding   whether both sides agree to the last bit, or as sums in another order do.
// from                    operators that must be there, the one that all others lead to last: result = target(operands; attributes).
//                         target: one name or several with |, or @unary: elementwise with one operand.
//                         a*: a list. `y* = ...` alone is two or more operators that share every operand and attribute written without a
//                         star; else the list is what the operator reads that names it. a*?: an operand that may be absent, in all alike.
//                         attributes that aren't written may be anything, alike in a list; dim=d gives it a name, dim=1 wants the value.
// if                      conditions, by name (conditions.cpp).
// to                      what is made instead. `like y`: the operator that made y, with other operands. A line whose operand is absent is
//                         left out. `y* = split(...)` has the sizes of y*. `y = x` alone: readers of y read x. `y* = like y(a*)`: one for each.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace soap {

struct Variable {
  std::string name;
  bool list = false;
  bool optional = false;
  bool operator==(const Variable&) const = default;
};

// One line `from` or `to`.
struct OperatorPattern {
  Variable result;
  std::vector<std::string> targets;  // from: any of them; to: one. Empty: the result is the operand
  std::string like;                  // to: variable whose operator is copied
  std::vector<Variable> operands;
  std::vector<std::pair<std::string, std::string>> attrs;  // name, and what stands for its value
};

struct Condition {
  std::string name;
  std::vector<std::string> arguments;
  std::string text;
};

struct Substitution {
  std::string name;
  bool bits = false;  // equal to the last bit
  std::vector<OperatorPattern> from, to;
  std::vector<Condition> conditions;

  // Anchored at a list of two or more operators; else at the one operator of the last `from` line.
  bool siblings() const { return from.size() == 1 && from[0].result.list; }
};

using SubstitutionTable = std::vector<Substitution>;

// Throws std::invalid_argument with the line that can't be read.
SubstitutionTable parse_substitutions(std::string_view text);
// The table that plans and the search use.
const SubstitutionTable& substitutions();
std::string_view substitutions_text();
// Throws std::invalid_argument, which lists the names that there are.
const Substitution& find_substitution(const SubstitutionTable& table, std::string_view name);

}  // namespace soap
