// What conditions and attributes of the table mean.
#include <algorithm>
#include <charconv>
#include <numeric>

#include "base/error.h"
#include "substitution/match.h"

namespace soap {
namespace {

using Shape = std::vector<int64_t>;

struct Asked {
  const OpGraph& graph;
  const Condition& condition;
  const Match& match;

  const std::string& argument(size_t i) const { return condition.arguments.at(i); }
  int64_t integer(size_t i) const {
    const std::string& text = argument(i);
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    SOAP_CHECK(error == std::errc() && end == text.data() + text.size(), "[substitution] {}: {} is no number", condition.text, text);
    return value;
  }
  std::vector<const Tensor*> tensors(size_t i) const {
    const auto it = match.tensors.find(argument(i));
    SOAP_CHECK(it != match.tensors.end(), "[substitution] {}: no variable {}", condition.text, argument(i));
    std::vector<const Tensor*> out;
    for (TensorId t : it->second) out.push_back(&graph.tensors[t]);
    return out;
  }
  const std::vector<Attr>& attr(size_t i) const {
    const auto it = match.attrs.find(argument(i));
    SOAP_CHECK(it != match.attrs.end(), "[substitution] {}: no attribute {}", condition.text, argument(i));
    return it->second;
  }
  int64_t value(size_t i, size_t at = 0) const {
    const auto* v = std::get_if<int64_t>(&attr(i).at(at));
    SOAP_CHECK(v != nullptr, "[substitution] {}: {} is no integer", condition.text, argument(i));
    return *v;
  }
};

std::string rank(const Asked& a) {
  for (const Tensor* t : a.tensors(0)) {
    if (static_cast<int64_t>(t->shape.size()) != a.integer(1)) return fmt::format("{} has {} dims, not {}", a.argument(0), t->shape.size(), a.integer(1));
  }
  return "";
}

std::string rank_at_least(const Asked& a) {
  for (const Tensor* t : a.tensors(0)) {
    if (static_cast<int64_t>(t->shape.size()) < a.integer(1)) return fmt::format("{} has {} dims, fewer than {}", a.argument(0), t->shape.size(), a.integer(1));
  }
  return "";
}

// Equal in everything but the size of one dim. The last argument is the dim, the others lists or tensors.
std::string alike_but(const Asked& a) {
  std::vector<const Tensor*> all;
  for (size_t i = 0; i + 1 < a.condition.arguments.size(); ++i) {
    const auto some = a.tensors(i);
    all.insert(all.end(), some.begin(), some.end());
  }
  for (const Tensor* t : all) {
    Shape first = all[0]->shape, own = t->shape;
    if (own.size() != first.size() || own.empty()) return fmt::format("{} have {} and {} dims", a.argument(0), first.size(), own.size());
    first[wrapped(a.integer(a.condition.arguments.size() - 1), own.size())] = own[wrapped(a.integer(a.condition.arguments.size() - 1), own.size())] = 0;
    if (own != first) return fmt::format("{} differ in more than dim {}", a.argument(0), a.integer(a.condition.arguments.size() - 1));
    if (t->dtype != all[0]->dtype) return fmt::format("{} are {} and {}", a.argument(0), all[0]->dtype, t->dtype);
    if (t->requires_grad != all[0]->requires_grad) return fmt::format("only some of {} need a gradient", a.argument(0));
  }
  return "";
}

// Tensors of the first list have one dim, as long as the last of the second's.
std::string as_long_as_last(const Asked& a) {
  const auto biases = a.tensors(0), weights = a.tensors(1);
  for (size_t i = 0; i < biases.size(); ++i) {
    if (biases[i]->shape.back() != weights[i]->shape.back()) return fmt::format("{} is broadcast", a.argument(0));
    if (biases[i]->requires_grad != biases[0]->requires_grad) return fmt::format("only some of {} need a gradient", a.argument(0));
  }
  return "";
}

// The parts [start, start + length) of dim d follow one another from 0 to the end of x.
std::string covers(const Asked& a) {
  const Shape& shape = a.tensors(0)[0]->shape;
  int64_t end = 0;
  for (size_t i = 0; i < a.attr(2).size(); ++i) {
    if (a.value(2, i) != end) return fmt::format("a part begins at {}, the one before it ends at {}", a.value(2, i), end);
    end += a.value(3, i);
  }
  const int64_t size = shape.at(wrapped(a.value(1), shape.size()));
  return end == size ? "" : fmt::format("the parts end at {} of {}", end, size);
}

// [start, start + length) of dim d of the concatenation is one of the list.
std::string is_part(const Asked& a) {
  int64_t begin = 0;
  for (const Tensor* t : a.tensors(0)) {
    const int64_t size = t->shape.at(wrapped(a.value(1), t->shape.size()));
    if (begin == a.value(2) && size == a.value(3)) return "";
    begin += size;
  }
  return fmt::format("no part of the concatenation is [{}, {})", a.value(2), a.value(2) + a.value(3));
}

bool is_identity(const Shape& dims) {
  Shape same(dims.size());
  std::iota(same.begin(), same.end(), 0);
  return dims == same;
}

// The permutation that does `first`, then `second`: result dim i is dim first[second[i]].
Shape composed(const Attr& first, const Attr& second) {
  const auto &p = std::get<Shape>(first), &q = std::get<Shape>(second);
  Shape out;
  for (int64_t d : q) out.push_back(wrapped(p.at(wrapped(d, p.size())), p.size()));
  return out;
}

std::string undoes(const Asked& a) {
  return is_identity(composed(a.attr(1)[0], a.attr(0)[0])) ? "" : "the second permutation doesn't undo the first";
}

std::string doesnt_undo(const Asked& a) {
  return is_identity(composed(a.attr(1)[0], a.attr(0)[0])) ? "the second permutation undoes the first" : "";
}

const std::map<std::string, std::string (*)(const Asked&), std::less<>> kConditions{{"rank", rank},           {"rank_at_least", rank_at_least},
                                                                                    {"alike_but", alike_but}, {"as_long_as_last", as_long_as_last},
                                                                                    {"covers", covers},       {"is_part", is_part},
                                                                                    {"undoes", undoes},       {"doesnt_undo", doesnt_undo}};

}  // namespace

int64_t wrapped(int64_t dim, size_t rank) {
  return dim < 0 ? dim + static_cast<int64_t>(rank) : dim;
}

std::string violated(const OpGraph& graph, const Condition& condition, const Match& match) {
  const auto it = kConditions.find(condition.name);
  SOAP_CHECK(it != kConditions.end(), "[substitution] there is no condition {}", condition.name);
  return it->second({graph, condition, match});
}

Attr evaluated(const OpGraph& graph, const std::string& text, const Match& match) {
  const auto known = match.attrs.find(text);
  if (known != match.attrs.end()) return known->second.at(0);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc() && end == text.data() + text.size()) return value;
  const auto inside = [&](std::string_view head) { return std::string_view(text).substr(head.size(), text.size() - head.size() - 1); };
  if (text.starts_with("1-rank(")) {
    const auto it = match.tensors.find(inside("1-rank("));
    if (it != match.tensors.end() && it->second.at(0) < static_cast<TensorId>(graph.tensors.size()))
      return 1 - static_cast<int64_t>(graph.tensors[it->second.at(0)].shape.size());
  }
  if (text.starts_with("compose(")) {
    const std::string_view pair = inside("compose(");
    const size_t comma = pair.find(',');
    const auto first = match.attrs.find(pair.substr(0, comma)), second = match.attrs.find(pair.substr(pair.find_first_not_of(" ", comma + 1)));
    if (first != match.attrs.end() && second != match.attrs.end()) return composed(first->second[0], second->second[0]);
  }
  throw InternalError(fmt::format("[substitution] {} is no value: a number, 1-rank(tensor), compose(p, q), of tensors and names that a from line binds", text));
}

}  // namespace soap
