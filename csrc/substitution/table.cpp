#include "substitution/table.h"

#include <algorithm>

#include "base/error.h"
#include "fmt/ranges.h"

namespace soap {
namespace {

std::string_view trimmed(std::string_view s) {
  const size_t begin = s.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return {};
  return s.substr(begin, s.find_last_not_of(" \t") - begin + 1);
}

// Parts between separators that stand outside parentheses.
std::vector<std::string_view> divided(std::string_view text, char separator) {
  std::vector<std::string_view> out;
  size_t begin = 0;
  int depth = 0;
  for (size_t i = 0; i <= text.size(); ++i) {
    if (i < text.size()) depth += text[i] == '(' ? 1 : text[i] == ')' ? -1 : 0;
    if (i < text.size() && (text[i] != separator || depth > 0)) continue;
    const auto part = trimmed(text.substr(begin, i - begin));
    if (!part.empty()) out.push_back(part);
    begin = i + 1;
  }
  return out;
}

struct Reader {
  int number = 0;
  std::string_view row;

  [[noreturn]] void fail(const std::string& message) const { user_error("[substitution] line {}: {}\n  {}", number, message, row); }

  Variable variable(std::string_view text) const {
    Variable out;
    if (!text.empty() && text.back() == '?') {
      out.optional = true;
      text.remove_suffix(1);
    }
    if (!text.empty() && text.back() == '*') {
      out.list = true;
      text.remove_suffix(1);
    }
    if (text.empty() || text.find_first_of(" ()=;,*?") != std::string_view::npos) fail(fmt::format("\"{}\" is no variable: a, a*, a? or a*?", text));
    out.name = text;
    return out;
  }

  // result = target(operands; attributes), or result = variable.
  OperatorPattern pattern(std::string_view text) const {
    const size_t eq = text.find('=');
    if (eq == std::string_view::npos) fail("an operator is written result = target(operands; attributes)");
    OperatorPattern out{.result = variable(trimmed(text.substr(0, eq)))};
    std::string_view call = trimmed(text.substr(eq + 1));
    const size_t open = call.find('(');
    if (open == std::string_view::npos) {
      const size_t bracket = call.find('[');  // x*[s]: the element that starts at s
      out.operands.push_back(variable(call.substr(0, bracket)));
      if (bracket != std::string_view::npos) out.attrs.emplace_back("at", std::string(call.substr(bracket + 1, call.size() - bracket - 2)));
      return out;
    }
    if (call.back() != ')') fail("missing )");
    std::string_view target = trimmed(call.substr(0, open));
    if (target.starts_with("like ")) {
      out.like = trimmed(target.substr(5));
    } else {
      for (std::string_view t : divided(target, '|')) out.targets.emplace_back(t);
    }
    const auto halves = divided(call.substr(open + 1, call.size() - open - 2), ';');
    if (halves.empty()) fail("an operator without operands");
    for (std::string_view o : divided(halves[0], ',')) out.operands.push_back(variable(o));
    for (std::string_view a : halves.size() > 1 ? divided(halves[1], ',') : std::vector<std::string_view>{}) {
      const size_t at = a.find('=');
      if (at == std::string_view::npos) fail(fmt::format("\"{}\" is no attribute: name=value", a));
      out.attrs.emplace_back(std::string(trimmed(a.substr(0, at))), std::string(trimmed(a.substr(at + 1))));
    }
    return out;
  }

  std::vector<Condition> conditions(std::string_view text) const {
    std::vector<Condition> out;
    for (std::string_view c : divided(text, ' ')) {
      const size_t open = c.find('(');
      if (open == std::string_view::npos || c.back() != ')') fail(fmt::format("\"{}\" is no condition: name(arguments)", c));
      Condition condition{.name = std::string(c.substr(0, open)), .text = std::string(c)};
      for (std::string_view a : divided(c.substr(open + 1, c.size() - open - 2), ',')) condition.arguments.emplace_back(a);
      out.push_back(std::move(condition));
    }
    return out;
  }
};

}  // namespace

SubstitutionTable parse_substitutions(std::string_view text) {
  SubstitutionTable out;
  Reader r;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    r.row = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    ++r.number;
    const std::string_view line = trimmed(r.row.substr(0, std::min(r.row.find('#'), r.row.size())));
    if (line.empty()) continue;
    const std::string_view word = line.substr(0, line.find(' ')), rest = trimmed(line.substr(word.size()));
    if (word.back() == ':') {
      if (rest != "bits" && rest != "rounding") r.fail("a substitution begins with name: bits, or name: rounding");
      out.push_back({.name = std::string(word.substr(0, word.size() - 1)), .bits = rest == "bits"});
    } else if (out.empty() || (word != "from" && word != "if" && word != "to")) {
      r.fail("a line is name: bits|rounding, or begins with from, if or to");
    } else if (word == "if") {
      for (Condition& c : r.conditions(rest)) out.back().conditions.push_back(std::move(c));
    } else {
      (word == "from" ? out.back().from : out.back().to).push_back(r.pattern(rest));
    }
  }
  for (const Substitution& s : out) {
    if (s.from.empty() || s.to.empty()) user_error("[substitution] {} needs lines from and to", s.name);
  }
  return out;
}

const SubstitutionTable& substitutions() {
  static const SubstitutionTable table = parse_substitutions(substitutions_text());
  return table;
}

const Substitution& find_substitution(const SubstitutionTable& table, std::string_view name) {
  const auto it = std::find_if(table.begin(), table.end(), [&](const Substitution& s) { return s.name == name; });
  if (it != table.end()) return *it;
  std::vector<std::string_view> names;
  for (const Substitution& s : table) names.push_back(s.name);
  user_error("[rewrite] there is no substitution {}; there are {}", name, fmt::join(names, ", "));
}

}  // namespace soap
