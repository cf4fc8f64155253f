// Errors: the user's mistakes and ours are different types, and both show the rule and the values.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "fmt/format.h"

namespace soap {

// A broken invariant of ours; Python sees RuntimeError.
class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// A mistake of the user's: throws std::invalid_argument, which Python sees as ValueError.
template <class... Args>
[[noreturn]] void user_error(fmt::format_string<Args...> text, Args&&... args) {
  throw std::invalid_argument(fmt::format(text, std::forward<Args>(args)...));
}

namespace detail {
[[noreturn]] inline void check_failed(const char* file, int line, const char* condition, const std::string& text) {
  throw InternalError(fmt::format("{}:{}: {} does not hold: {}", file, line, condition, text));
}
}  // namespace detail

}  // namespace soap

#define SOAP_CHECK(condition, ...)                                                                            \
  do {                                                                                                        \
    if (!(condition)) ::soap::detail::check_failed(__FILE__, __LINE__, #condition, fmt::format(__VA_ARGS__)); \
  } while (false)
