#include "tokenizer/jinja_value.h"

#include <algorithm>

#include "tokenizer/jinja.h"
#include "tokenizer/unicode.h"

namespace orpo::jinja {

Value make_list(List items) { return {std::make_shared<List>(std::move(items))}; }
Value make_dict(Dict items) { return {std::make_shared<Dict>(std::move(items))}; }

bool truth(const Value& a) {
  if (auto b = a.as<bool>()) return *b;
  if (auto i = a.as<int64_t>()) return *i != 0;
  if (auto s = a.as<std::string>()) return !s->empty();
  if (auto l = a.list()) return !l->empty();
  if (auto d = a.dict()) return !d->empty();
  return false;
}

std::string print(const Value& a) {
  if (auto s = a.as<std::string>()) return *s;
  if (auto i = a.as<int64_t>()) return std::to_string(*i);
  if (auto b = a.as<bool>()) return *b ? "True" : "False";
  if (a.as<None>()) return "None";
  if (!a.defined()) return "";
  fail("a chat template prints a list or a dictionary");
}

int64_t number(const Value& a) {
  if (auto i = a.as<int64_t>()) return *i;
  if (auto b = a.as<bool>()) return *b;
  fail("a chat template takes for a number what is none");
}

bool equal(const Value& a, const Value& b) {
  if (a.as<std::string>() && b.as<std::string>()) return a.text() == b.text();
  if ((a.as<int64_t>() || a.as<bool>()) && (b.as<int64_t>() || b.as<bool>())) return number(a) == number(b);
  if (a.list() && b.list())
    return std::equal(a.list()->begin(), a.list()->end(), b.list()->begin(), b.list()->end(), equal);
  return (a.as<None>() && b.as<None>()) || (!a.defined() && !b.defined());
}

bool contains(const Value& all, const Value& one) {
  if (all.as<std::string>()) return all.text().find(one.text()) != std::string::npos;
  if (auto l = all.list()) return std::any_of(l->begin(), l->end(), [&](const Value& v) { return equal(v, one); });
  if (auto d = all.dict()) return d->contains(one.text());
  fail("a chat template looks into what holds nothing");
}

Value attribute(const Value& of, const Value& key) {
  if (auto d = of.dict()) {
    const auto found = d->find(print(key));
    return found == d->end() ? Value{} : found->second;
  }
  if (auto l = of.list(); l && key.as<int64_t>()) {
    const int64_t size = static_cast<int64_t>(l->size()), i = number(key) < 0 ? number(key) + size : number(key);
    return i >= 0 && i < size ? (*l)[i] : Value{};
  }
  if (!of.defined()) fail("a chat template looks into what is not there");
  return {};
}

Value slice(const Value& of, const Value& from, const Value& to) {
  const auto bound = [&](const Value& v, int64_t size, int64_t otherwise) {
    if (!v.as<int64_t>()) return otherwise;
    return std::clamp<int64_t>(number(v) < 0 ? number(v) + size : number(v), 0, size);
  };
  if (!of.list()) fail("a chat template cuts what is no list");
  const int64_t size = static_cast<int64_t>(of.list()->size()), a = bound(from, size, 0), b = bound(to, size, size);
  return make_list(a < b ? List(of.list()->begin() + a, of.list()->begin() + b) : List());
}

static const Value& first_of(const List& args) {
  if (args.empty()) fail("a chat template leaves out an argument");
  return args[0];
}

Value call(const std::string& name, const Value& self, const List& args) {
  if (name == "default") return self.defined() ? self : first_of(args);
  if (name == "length" || name == "count")
    return {static_cast<int64_t>(self.list() ? self.list()->size() : self.text().size())};
  if (name == "string") return {print(self)};
  if (name == "first") return attribute(self, {int64_t{0}});
  if (name == "last") return attribute(self, {int64_t{-1}});
  if (name == "list" && self.list()) return self;
  if (name == "selectattr" && self.list() && args.size() == 3 &&
      (args[1].text() == "equalto" || args[1].text() == "==")) {
    List chosen;
    for (const Value& item : *self.list())
      if (equal(attribute(item, args[0]), args[2])) chosen.push_back(item);
    return make_list(std::move(chosen));
  }
  if (name == "get" && self.dict()) {
    const Value found = attribute(self, first_of(args));
    return found.defined() ? found : args.size() > 1 ? args[1] : Value{None{}};
  }
  if (name == "trim" || name == "strip" || name == "lstrip" || name == "rstrip") {
    if (!args.empty()) fail("a chat template strips given characters, which is not supported");
    const std::string& text = self.text();
    const std::string_view both = strip(text);
    const size_t begin = both.data() - text.data();
    if (name == "lstrip") return {text.substr(both.empty() ? text.size() : begin)};
    if (name == "rstrip") return {both.empty() ? std::string() : text.substr(0, begin + both.size())};
    return {std::string(both)};
  }
  if (name == "startswith") return {self.text().starts_with(first_of(args).text())};
  if (name == "endswith") return {self.text().ends_with(first_of(args).text())};
  if (name == "upper" || name == "lower" || name == "capitalize" || name == "title") {
    std::string text = self.text();
    for (size_t i = 0; i < text.size(); ++i) {
      const bool up = name == "upper" || (name != "lower" && (i == 0 || (name == "title" && text[i - 1] == ' ')));
      text[i] = static_cast<char>(up ? std::toupper(static_cast<unsigned char>(text[i]))
                                     : std::tolower(static_cast<unsigned char>(text[i])));
    }
    return {text};
  }
  fail("a chat template uses ", name, ", which is not supported");
}

bool is(const std::string& test, const Value& a) {
  if (test == "defined") return a.defined();
  if (test == "undefined") return !a.defined();
  if (test == "none") return a.as<None>();
  if (test == "string") return a.as<std::string>();
  if (test == "mapping") return a.dict();
  if (test == "iterable" || test == "sequence") return a.as<std::string>() || a.list() || a.dict();
  if (test == "boolean") return a.as<bool>();
  if (test == "true") return a.as<bool>() && *a.as<bool>();
  if (test == "false") return a.as<bool>() && !*a.as<bool>();
  fail("a chat template tests for ", test, ", which is not supported");
}

std::string_view strip(std::string_view text) {
  const auto blank = [&](size_t at) {
    const char32_t code = unicode::decode(text, at).code;
    return (unicode::class_of(code) & unicode::space) || (code >= 0x1C && code <= 0x1F);
  };
  while (!text.empty() && blank(0)) text.remove_prefix(unicode::decode(text, 0).size);
  while (!text.empty() && blank(unicode::previous(text, text.size())))
    text = text.substr(0, unicode::previous(text, text.size()));
  return text;
}

}  // namespace orpo::jinja
