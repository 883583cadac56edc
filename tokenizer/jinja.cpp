#include "tokenizer/jinja.h"

#include <algorithm>
#include <functional>

#include "src/fail.h"
#include "tokenizer/jinja_lexer.h"
#include "tokenizer/jinja_value.h"

namespace orpo::jinja {
namespace {

// Names by scope, innermost last; a for loop opens one for each turn, and what is set in it ends with it.
struct Env {
  std::vector<Dict> scopes;
  int64_t steps = 0;

  Value get(const std::string& name) const {
    for (size_t i = scopes.size(); i-- > 0;)
      if (const auto found = scopes[i].find(name); found != scopes[i].end()) return found->second;
    return {};
  }
  void step() {
    if (++steps > 100000) fail("a chat template takes too long on a short conversation");
  }
};

using Expression = std::function<Value(Env&)>;
using Statement = std::function<void(Env&, std::string&)>;
using Statements = std::vector<Statement>;

// Recursive descent over one tag's words, into closures.
class Parser {
 public:
  explicit Parser(const std::string& tag) : words_(words_of(tag)) {}

  bool done() const { return at_ >= words_.size(); }
  const std::string& peek() const {
    static const std::string nothing;
    return done() ? nothing : words_[at_];
  }
  std::string take() {
    if (done()) fail("a chat template has a tag that ends too early");
    return words_[at_++];
  }
  bool accept(const std::string& word) { return peek() == word && ++at_; }
  void need(const std::string& word) {
    if (!accept(word)) fail("a chat template has \"", peek(), "\" where ", word, " is due");
  }
  void finish() const {
    if (!done()) fail("a chat template has \"", peek(), "\", which is not supported there");
  }

  Expression expression() {
    if (++depth_ > 100) fail("a chat template nests expressions too deeply");
    Expression value = either();
    if (accept("if")) {
      Expression condition = either(), otherwise = [](Env&) { return Value{}; };
      if (accept("else")) otherwise = expression();
      value = [value, condition, otherwise](Env& e) { return truth(condition(e)) ? value(e) : otherwise(e); };
    }
    --depth_;
    return value;
  }

  Expression choice() { return either(); }  // an expression that an "if" may follow

 private:
  Expression either() {
    Expression a = both();
    while (accept("or"))
      a = [a, b = both()](Env& e) {
        Value v = a(e);
        return truth(v) ? v : b(e);
      };
    return a;
  }
  Expression both() {
    Expression a = negation();
    while (accept("and"))
      a = [a, b = negation()](Env& e) {
        Value v = a(e);
        return truth(v) ? b(e) : v;
      };
    return a;
  }
  Expression negation() {
    bool negative = false;
    while (accept("not")) negative = !negative;
    Expression a = comparison();
    return negative ? [a](Env& e) { return Value{!truth(a(e))}; } : a;
  }
  Expression comparison() {
    Expression a = sum();
    while (true) {
      const size_t before = at_;
      const bool negative = accept("not");
      if (accept("in")) {
        a = [a, b = sum(), negative](Env& e) { return Value{contains(b(e), a(e)) != negative}; };
      } else if (negative) {
        at_ = before;
        return a;
      } else if (const std::string op = peek(); op == "==" || op == "!=") {
        ++at_;
        a = [a, b = sum(), op](Env& e) { return Value{equal(a(e), b(e)) == (op == "==")}; };
      } else if (op == "<" || op == ">" || op == "<=" || op == ">=") {
        ++at_;
        a = [a, b = sum(), op](Env& e) {
          const int64_t x = number(a(e)), y = number(b(e));
          return Value{op == "<" ? x < y : op == ">" ? x > y : op == "<=" ? x <= y : x >= y};
        };
      } else {
        return a;
      }
    }
  }
  Expression sum() {
    Expression a = joined();
    while (peek() == "+" || peek() == "-") {
      const bool plus = take() == "+";
      a = [a, b = joined(), plus](Env& e) {
        const Value x = a(e), y = b(e);
        if (plus && x.as<std::string>()) return Value{x.text() + y.text()};
        return Value{plus ? number(x) + number(y) : number(x) - number(y)};
      };
    }
    return a;
  }
  Expression joined() {
    Expression a = product();
    while (accept("~")) a = [a, b = product()](Env& e) { return Value{print(a(e)) + print(b(e))}; };
    return a;
  }
  Expression product() {
    Expression a = tested();
    while (accept("%"))
      a = [a, b = tested()](Env& e) {
        const int64_t x = number(a(e)), y = number(b(e));
        if (y <= 0) fail("a chat template divides by what is not positive");
        return Value{(x % y + y) % y};
      };
    return a;
  }
  Expression tested() {
    Expression a = filtered();
    while (accept("is")) {
      const bool negative = accept("not");
      a = [a, test = take(), negative](Env& e) { return Value{is(test, a(e)) != negative}; };
    }
    return a;
  }
  Expression filtered() {
    Expression a = unit();
    while (accept("|")) {
      const std::string name = take();
      std::vector<Expression> args;
      if (accept("(")) args = arguments();
      a = [a, name, args](Env& e) { return call(name, a(e), values(args, e)); };
    }
    return a;
  }

  static List values(const std::vector<Expression>& args, Env& e) {
    List out;
    for (const Expression& a : args) out.push_back(a(e));
    return out;
  }
  std::vector<Expression> arguments() {
    std::vector<Expression> args;
    while (!accept(")")) {
      args.push_back(expression());
      if (accept("="))
        args.back() = [value = expression()](Env&) -> Value { fail("a chat template passes an argument by name"); };
      if (peek() != ")") need(",");
    }
    return args;
  }

  Expression unit() {
    Expression a = atom();
    while (true) {
      if (accept(".")) {
        const std::string name = take();
        if (accept("(")) a = [a, name, args = arguments()](Env& e) { return call(name, a(e), values(args, e)); };
        else a = [a, name](Env& e) { return attribute(a(e), {name}); };
      } else if (accept("[")) {
        Expression from = [](Env&) { return Value{}; }, to = from;
        if (peek() != ":") from = expression();
        if (accept(":")) {
          if (peek() != "]") to = expression();
          a = [a, from, to](Env& e) { return slice(a(e), from(e), to(e)); };
        } else {
          a = [a, from](Env& e) { return attribute(a(e), from(e)); };
        }
        need("]");
      } else {
        return a;
      }
    }
  }

  Expression atom() {
    const std::string word = take();
    const auto constant = [](Value v) { return [v](Env&) { return v; }; };
    if (word[0] == '\'') {
      std::string text = word.substr(1);
      while (peek()[0] == '\'') text += take().substr(1);
      return constant({text});
    }
    if (std::isdigit(static_cast<unsigned char>(word[0])) && word.size() < 10)
      return constant({int64_t{std::atoll(word.c_str())}});
    if (word == "-") return [a = unit()](Env& e) { return Value{-number(a(e))}; };
    if (word == "true" || word == "True") return constant({true});
    if (word == "false" || word == "False") return constant({false});
    if (word == "none" || word == "None") return constant({None{}});
    if (word == "(") {
      Expression a = expression();
      need(")");
      return a;
    }
    if (word == "[") {
      std::vector<Expression> items;
      while (!accept("]")) {
        items.push_back(expression());
        if (peek() != "]") need(",");
      }
      return [items](Env& e) { return make_list(values(items, e)); };
    }
    if (!std::isalpha(static_cast<unsigned char>(word[0])) && word[0] != '_')
      fail("a chat template has \"", word, "\", which is not supported there");
    if (peek() == "(") return function(word);
    return [word](Env& e) {
      e.step();
      return e.get(word);
    };
  }

  Expression function(const std::string& name) {
    need("(");
    if (name == "raise_exception") {
      return [args = arguments()](Env& e) -> Value {
        fail("the chat template refuses: ", args.empty() ? "" : print(args[0](e)));
      };
    }
    if (name != "namespace") fail("a chat template calls ", name, ", which is not supported");
    std::vector<std::pair<std::string, Expression>> members;
    while (!accept(")")) {
      std::string key = take();
      need("=");
      members.emplace_back(std::move(key), expression());
      if (peek() != ")") need(",");
    }
    return [members](Env& e) {
      Dict all;
      for (const auto& [key, value] : members) all[key] = value(e);
      return make_dict(std::move(all));
    };
  }

  std::vector<std::string> words_;
  size_t at_ = 0;
  int depth_ = 0;
};

void run(const Statements& body, Env& e, std::string& out) {
  for (const Statement& s : body) s(e, out);
}

// Tags into statements.
class Builder {
 public:
  explicit Builder(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  // Up to one of the closing words, which is returned with what follows it in the tag; the end of the text where none
  // is due.
  Statements body(const std::vector<std::string>& closing, Parser* closer = nullptr) {
    if (++depth_ > 50) fail("a chat template nests blocks too deeply");
    Statements out;
    for (; at_ < tokens_.size();) {
      const Token token = tokens_[at_++];
      if (token.kind == Token::text) {
        out.push_back([text = token.content](Env&, std::string& to) { to += text; });
      } else if (token.kind == Token::print) {
        Parser p(token.content);
        out.push_back([value = p.expression()](Env& e, std::string& to) { to += print(value(e)); });
        p.finish();
      } else {
        Parser p(token.content);
        if (std::find(closing.begin(), closing.end(), p.peek()) != closing.end()) {
          *closer = p;
          --depth_;
          return out;
        }
        out.push_back(block(p));
      }
    }
    if (!closing.empty()) fail("a chat template has a block without its ", closing.back());
    --depth_;
    return out;
  }

 private:
  Statement block(Parser& p) {
    const std::string word = p.take();
    if (word == "set") return set(p);
    if (word == "if") return branch(p);
    if (word == "for") return loop(p);
    if (word == "generation") {  // transformers' mark around what the assistant says
      Parser closer("");
      return [inside = body({"endgeneration"}, &closer)](Env& e, std::string& out) { run(inside, e, out); };
    }
    fail("a chat template has the tag ", word, ", which is not supported");
  }

  static Statement set(Parser& p) {
    const std::string name = p.take(), member = p.accept(".") ? p.take() : "";
    p.need("=");
    Expression value = p.expression();
    p.finish();
    return [name, member, value](Env& e, std::string&) {
      if (member.empty()) return void(e.scopes.back()[name] = value(e));
      const Value space = e.get(name);
      if (!space.dict()) fail("a chat template sets a member of what has none");
      (*space.dict())[member] = value(e);
    };
  }

  Statement branch(Parser& p) {
    Expression condition = p.expression();
    p.finish();
    Parser closer("");
    Statements yes = body({"elif", "else", "endif"}, &closer), no;
    const std::string word = closer.take();
    if (word == "elif") no.push_back(branch(closer));
    if (word == "else") no = body({"endif"}, &closer);
    return [condition, yes, no](Env& e, std::string& out) { run(truth(condition(e)) ? yes : no, e, out); };
  }

  Statement loop(Parser& p) {
    const std::string name = p.take();
    const bool pairs = p.accept(",") && !p.take().empty();
    p.need("in");
    Expression items = p.choice(), wanted = [](Env&) { return Value{true}; };
    if (p.accept("if")) wanted = p.expression();
    p.finish();
    Parser closer("");
    Statements each = body({"endfor"}, &closer);
    return [name, pairs, items, wanted, each](Env& e, std::string& out) {
      if (pairs) fail("a chat template loops over pairs");
      Value all = items(e);
      if (!all.list()) fail("a chat template loops over what is no list");
      List chosen;
      for (const Value& item : *all.list()) {
        e.scopes.push_back({{name, item}});
        if (truth(wanted(e))) chosen.push_back(item);
        e.scopes.pop_back();
      }
      all = make_list(std::move(chosen));
      const int64_t size = static_cast<int64_t>(all.list()->size());
      for (int64_t i = 0; i < size; ++i) {
        e.step();
        Dict about{
            {"index0", {i}}, {"index", {i + 1}}, {"first", {i == 0}}, {"last", {i + 1 == size}}, {"length", {size}}};
        if (i > 0) about["previtem"] = (*all.list())[i - 1];
        if (i + 1 < size) about["nextitem"] = (*all.list())[i + 1];
        e.scopes.push_back({{name, (*all.list())[i]}, {"loop", make_dict(std::move(about))}});
        run(each, e, out);
        e.scopes.pop_back();
      }
    };
  }

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace

struct Block {
  Statements statements;
};

Program::Program(const std::string& text) : body_(std::make_unique<Block>()) {
  body_->statements = Builder(cut(text)).body({});
}

Program::~Program() = default;

std::string Program::render(const std::vector<Message>& messages, const std::string& bos_token,
                            const std::string& eos_token, bool add_generation_prompt) const {
  List all;
  for (const Message& m : messages) all.push_back(make_dict({{"role", {m.role}}, {"content", {m.content}}}));
  Env e;
  e.scopes.push_back({{"messages", make_list(std::move(all))},
                      {"bos_token", {bos_token}},
                      {"eos_token", {eos_token}},
                      {"add_generation_prompt", {add_generation_prompt}},
                      {"tools", {None{}}},
                      {"documents", {None{}}}});
  e.scopes.emplace_back();
  std::string out;
  run(body_->statements, e, out);
  return out;
}

}  // namespace orpo::jinja
