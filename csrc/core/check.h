// Errors that reach the user. The bindings turn ValueError and TypeError into Python's own.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pared {

class ValueError : public std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

class TypeError : public std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Joins its arguments with operator<<; keeps error messages to one expression at the site.
template <class... Args>
std::string str(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// States what a user can cause: throws ValueError with "argument: expected ..., got ...".
#define PARED_CHECK(condition, ...)                                         \
  do {                                                                      \
    if (!(condition)) throw ::pared::ValueError(::pared::str(__VA_ARGS__)); \
  } while (0)

}  // namespace pared
