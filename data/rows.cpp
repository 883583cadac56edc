#include "data/rows.h"

#include <simdjson.h>

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "src/fail.h"

namespace orpo {
namespace {

using simdjson::dom::element;
using simdjson::dom::element_type;

enum Field { prompt, chosen, rejected, completion, text, prompt_ids, chosen_ids, rejected_ids, completion_ids, fields };
constexpr std::array<const char*, fields> names = {"prompt",     "chosen",     "rejected",     "completion",    "text",
                                                   "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids"};

using Fields = std::array<std::optional<element>, fields>;

const char* type_name(element value) {
  switch (value.type()) {
    case element_type::ARRAY: return "a list";
    case element_type::OBJECT: return "an object";
    case element_type::STRING: return "a string";
    case element_type::BOOL: return "true or false";
    case element_type::NULL_VALUE: return "null";
    default: return "a number";
  }
}

[[noreturn]] void wrong_type(const std::string& field, element value, const char* needed) {
  throw BadRow{field, "wrong type", concat(type_name(value), "; ", needed, " is needed")};
}

// simdjson says that a line is not JSON but not where: a second, slower reading of the bad line finds the column and
// the field.
struct Locator : nlohmann::json_sax<nlohmann::json> {
  int depth = 0;
  std::string field;
  size_t column = 0;
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return ++depth, true; }
  bool end_object() override { return --depth, true; }
  bool start_array(size_t) override { return ++depth, true; }
  bool end_array() override { return --depth, true; }
  bool key(string_t& name) override {
    if (depth == 1) field = name;
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    column = position;
    return false;
  }
};

[[noreturn]] void not_json(std::string_view line, simdjson::error_code error) {
  Locator at;
  nlohmann::json::sax_parse(line, &at);
  // Only a field's name that is ours is repeated: others may be as broken as the line.
  const bool known = std::find(names.begin(), names.end(), at.field) != names.end();
  const std::string field = known ? at.field : "";
  if (!simdjson::validate_utf8(line.data(), line.size()))
    throw BadRow{field, "invalid UTF-8", concat("column ", at.column)};
  if (at.column == 0) throw BadRow{field, "not JSON", simdjson::error_message(error)};
  throw BadRow{field, "not JSON",
               at.column > line.size() ? std::string("the line ends inside a value") : concat("column ", at.column)};
}

Fields read_fields(element document) {
  simdjson::dom::object object;
  if (document.get(object)) {
    const bool array = document.is_array();
    throw BadRow{"", "not an object", concat(type_name(document), array ? "; JSON Lines has one object a line" : "")};
  }
  Fields found;
  std::array<bool, fields> seen{};
  for (const auto [key, value] : object) {
    const auto name = std::find(names.begin(), names.end(), key);
    if (name == names.end()) continue;
    const size_t f = name - names.begin();
    if (seen[f]) throw BadRow{*name, "given twice", ""};
    seen[f] = true;
    if (!value.is_null()) found[f] = value;
  }
  return found;
}

std::string read_string(element value, const std::string& field, const char* needed = "a string") {
  std::string_view s;
  if (value.get(s)) wrong_type(field, value, needed);
  return std::string(s);
}

std::vector<Message> read_messages(element list, const std::string& field) {
  std::vector<Message> messages;
  for (const element item : simdjson::dom::array(list)) {
    const std::string at = concat(field, "[", messages.size(), "]");
    if (!item.is_object()) wrong_type(at, item, "an object with role and content");
    Message message;
    for (auto [name, to] : {std::pair{"role", &message.role}, {"content", &message.content}}) {
      element value;
      if (item[name].get(value)) throw BadRow{at + "." + name, "missing", ""};
      *to = read_string(value, at + "." + name);
    }
    if (message.role != "user" && message.role != "assistant" && message.role != "system")
      throw BadRow{at + ".role", "unknown role", "'" + message.role + "'; there are system, user, assistant"};
    messages.push_back(std::move(message));
  }
  return messages;
}

std::vector<int32_t> read_ids(element value, const std::string& field, int64_t vocabulary) {
  if (!value.is_array()) wrong_type(field, value, "a list of token ids");
  const int64_t limit = vocabulary > 0 ? vocabulary : std::numeric_limits<int32_t>::max();
  const simdjson::dom::array list(value);
  std::vector<int32_t> ids;
  ids.reserve(list.size());
  for (const element item : list) {
    int64_t id = 0;
    if (item.type() == element_type::UINT64 || (item.get(id) == simdjson::SUCCESS && (id < 0 || id >= limit)))
      throw BadRow{field, "token id out of range",
                   concat(simdjson::minify(item), " at index ", ids.size(), "; 0 to ", limit - 1, " exist")};
    if (item.type() != element_type::INT64)
      throw BadRow{field, "not an integer",
                   concat(item.is_number() ? simdjson::minify(item) : type_name(item), " at index ", ids.size())};
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

bool same(const Message& a, const Message& b) { return a.role == b.role && a.content == b.content; }

bool blank(std::string_view s) { return s.find_first_not_of(" \t\r\n\v\f") == std::string_view::npos; }

std::string_view trimmed(std::string_view s) {
  const auto first = s.find_first_not_of(" \t\r\n"), last = s.find_last_not_of(" \t\r\n");
  return first == std::string_view::npos ? std::string_view() : s.substr(first, last - first + 1);
}

// The answers' messages: what both sides share goes to the shared turns, one assistant message of each is left.
struct Answers {
  std::vector<Message> shared;
  std::string chosen, rejected;
};

std::string answer_of(std::vector<Message>& messages, size_t shared, const char* field) {
  if (messages.back().role != "assistant")
    throw BadRow{field, "assistant turn missing at the end", "the last role is " + messages.back().role};
  if (messages.size() > shared + 1)
    throw BadRow{field, "more than one message of its own",
                 concat(messages.size() - shared, " messages; chosen and rejected may differ in the last one only")};
  return std::move(messages.back().content);
}

// first, second: field names of the two sides; a single answer has its messages in both.
Answers split_messages(std::vector<Message> a, std::vector<Message> b, const char* first, const char* second) {
  if (a.empty()) throw BadRow{first, "empty", ""};
  if (b.empty()) throw BadRow{second, "empty", ""};
  const size_t most = std::min(a.size(), b.size()) - 1;
  size_t shared = 0;
  while (shared < most && same(a[shared], b[shared])) ++shared;
  Answers answers;
  answers.chosen = answer_of(a, shared, first);
  answers.rejected = answer_of(b, shared, second);
  answers.shared.assign(std::make_move_iterator(a.begin()), std::make_move_iterator(a.begin() + shared));
  return answers;
}

// The turns before the answers, from the row's prompt (a string, a list or absent) and the messages that the answers
// share.
std::vector<Message> join_prompt(const std::optional<element>& value, std::vector<Message> shared) {
  if (!value) {
    if (shared.empty()) throw BadRow{"prompt", "missing", "and the answers share no leading message"};
    return shared;
  }
  if (value->is_array()) {
    std::vector<Message> turns = read_messages(*value, "prompt");
    if (turns.empty() && shared.empty()) throw BadRow{"prompt", "empty", ""};
    const bool repeated = shared.size() >= turns.size() && std::equal(turns.begin(), turns.end(), shared.begin(), same);
    if (repeated) return shared;
    turns.insert(turns.end(), shared.begin(), shared.end());
    return turns;
  }
  const std::string words = read_string(*value, "prompt", "a string or a list of messages");
  if (shared.empty()) return {{"user", words}};
  const bool repeated = std::any_of(shared.begin(), shared.end(), [&](const Message& message) {
    return message.role == "user" && trimmed(message.content) == trimmed(words);
  });
  if (!repeated) throw BadRow{"prompt", "differs from the user's messages", "the lists must repeat a prompt string"};
  return shared;
}

void check_answer(std::string_view answer, const char* field) {
  if (blank(answer)) throw BadRow{field, "empty", answer.empty() ? "" : "white space only"};
}

void require(const Fields& f, Field field) {
  if (!f[field]) throw BadRow{names[field], "missing", ""};
}

Row read_dialogue(const Fields& f) {
  Row row;
  row.single = f[completion].has_value();
  const Field first = row.single ? completion : chosen, second = row.single ? completion : rejected;
  require(f, first);
  require(f, second);
  const bool lists = f[first]->is_array();
  if (!lists) require(f, prompt);
  if (!lists && f[first]->is_string() && f[prompt]->is_array())
    throw BadRow{names[first], "mixed layouts", "a string after a prompt of messages"};
  if (lists != f[second]->is_array() && (lists ? f[second] : f[first])->is_string())
    throw BadRow{names[second], "mixed layouts", "one answer is a string, the other a list of messages"};
  if (lists) {
    if (!f[second]->is_array()) wrong_type(names[second], *f[second], "a list of messages");
    Answers answers = split_messages(read_messages(*f[first], names[first]), read_messages(*f[second], names[second]),
                                     names[first], names[second]);
    row.prompt = join_prompt(f[prompt], std::move(answers.shared));
    row.chosen = std::move(answers.chosen), row.rejected = std::move(answers.rejected);
  } else {
    row.chosen = read_string(*f[first], names[first], "a string or a list of messages");
    row.rejected = read_string(*f[second], names[second], "a string or a list of messages");
    row.prompt = {{"user", read_string(*f[prompt], "prompt", "a string")}};
  }
  check_answer(row.chosen, names[first]);
  if (row.single) {
    row.rejected.clear();
    return row;
  }
  check_answer(row.rejected, names[second]);
  if (row.chosen == row.rejected) throw BadRow{"rejected", "equal to chosen", ""};
  return row;
}

// With no prompt a branch's first token is context, so it takes two to score one.
void check_ids(const Row& row, const std::vector<int32_t>& branch, const char* field) {
  if (branch.empty()) throw BadRow{field, "empty", ""};
  if (row.prompt_ids.empty() && branch.size() == 1) throw BadRow{field, "nothing to score", "one token and no prompt"};
}

Row read_token_ids(const Fields& f, int64_t vocabulary) {
  Row row;
  row.kind = Row::Kind::ids;
  row.single = f[completion_ids].has_value();
  const Field first = row.single ? completion_ids : chosen_ids;
  require(f, prompt_ids);
  require(f, first);
  row.prompt_ids = read_ids(*f[prompt_ids], names[prompt_ids], vocabulary);
  row.chosen_ids = read_ids(*f[first], names[first], vocabulary);
  check_ids(row, row.chosen_ids, names[first]);
  if (row.single) return row;
  require(f, rejected_ids);
  row.rejected_ids = read_ids(*f[rejected_ids], names[rejected_ids], vocabulary);
  check_ids(row, row.rejected_ids, names[rejected_ids]);
  if (row.chosen_ids == row.rejected_ids) throw BadRow{names[rejected_ids], "equal to chosen_ids", ""};
  return row;
}

Row read_text(const Fields& f) {
  Row row;
  row.kind = Row::Kind::text;
  row.single = true;
  row.chosen = read_string(*f[text], "text");
  check_answer(row.chosen, "text");
  return row;
}

// The first of the given fields that the row has.
std::optional<Field> any_of(const Fields& f, std::initializer_list<Field> which) {
  for (const Field field : which)
    if (f[field]) return field;
  return std::nullopt;
}

Row read_row(const Fields& f, RowRules rules) {
  const auto ids = any_of(f, {prompt_ids, chosen_ids, rejected_ids, completion_ids});
  const auto texts = any_of(f, {prompt, chosen, rejected, completion});
  const auto mixed = [](Field a, Field b) { throw BadRow{names[b], "mixed layouts", concat("beside ", names[a])}; };
  if (ids && texts) mixed(*texts, *ids);
  if (ids && f[text]) mixed(text, *ids);
  if (texts && f[text]) mixed(*texts, text);
  if (f[completion]) if (const auto pair = any_of(f, {chosen, rejected})) mixed(*pair, completion);
  if (f[completion_ids]) if (const auto pair = any_of(f, {chosen_ids, rejected_ids})) mixed(*pair, completion_ids);
  const auto single = any_of(f, {text, completion, completion_ids});
  if (single && !rules.single_answers)
    throw BadRow{names[*single], "a single answer", "rows without chosen and rejected need --objective sft"};
  if (ids) return read_token_ids(f, rules.vocabulary);
  return f[text] ? read_text(f) : read_dialogue(f);
}

}  // namespace

struct RowParser::Impl {
  RowRules rules;
  simdjson::dom::parser json;
};

RowParser::RowParser(RowRules rules) : impl_(std::make_unique<Impl>()) { impl_->rules = rules; }
RowParser::~RowParser() = default;
RowParser::RowParser(RowParser&&) noexcept = default;

Row RowParser::parse(std::string_view line) {
  element document;
  const auto error = impl_->json.parse(line.data(), line.size(), false).get(document);
  if (error) not_json(line, error);
  return read_row(read_fields(document), impl_->rules);
}

}  // namespace orpo
