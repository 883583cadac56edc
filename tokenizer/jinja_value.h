// Values of a chat template's expressions, and what can be asked of them. Internal to jinja.cpp.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "src/fail.h"

namespace orpo::jinja {

struct Value;
using List = std::vector<Value>;
using Dict = std::map<std::string, Value>;
struct Undefined {};
struct None {};

struct Value {
  std::variant<Undefined, None, bool, int64_t, std::string, std::shared_ptr<List>, std::shared_ptr<Dict>> v;

  template <class T>
  const T* as() const {
    return std::get_if<T>(&v);
  }
  const List* list() const { return as<std::shared_ptr<List>>() ? std::get<std::shared_ptr<List>>(v).get() : nullptr; }
  Dict* dict() const { return as<std::shared_ptr<Dict>>() ? std::get<std::shared_ptr<Dict>>(v).get() : nullptr; }
  const std::string& text() const {
    if (!as<std::string>()) fail("a chat template takes for text what is none");
    return std::get<std::string>(v);
  }
  bool defined() const { return !as<Undefined>(); }
};

Value make_list(List items);
Value make_dict(Dict items);
bool truth(const Value& a);
std::string print(const Value& a);  // as {{ }} writes it
int64_t number(const Value& a);
bool equal(const Value& a, const Value& b);
bool contains(const Value& all, const Value& one);                 // one in all
Value attribute(const Value& of, const Value& key);                // of.key, of[key]
Value slice(const Value& of, const Value& from, const Value& to);  // of[from:to]
// Methods of texts and dictionaries, and filters, by one name. Throws UserError where it is none of those that
// templates use.
Value call(const std::string& name, const Value& self, const List& args);
bool is(const std::string& test, const Value& a);  // a is test

}  // namespace orpo::jinja
