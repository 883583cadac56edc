#include "src/json.h"

#include <set>
#include <vector>

#include "src/fail.h"

namespace orpo {

Json parse_json(std::string_view text, const std::string& where) {
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto check = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > 64) fail(where, ": JSON is nested deeper than 64 levels");
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
      fail(where, ": the key '", value.get<std::string>(), "' is given twice");
    return true;
  };
  try {
    return Json::parse(text, check);
  } catch (const Json::parse_error& e) {
    fail(where, ": is not valid JSON; it ",
         e.byte > text.size() ? "ends too early" : concat("goes wrong at byte ", e.byte, " of ", text.size()));
  } catch (const Json::exception&) {
    fail(where, ": is not valid JSON; it holds a number that no double can hold");
  }
}

std::string brief(const Json& value) {
  const std::string text = value.dump();
  return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

}  // namespace orpo
