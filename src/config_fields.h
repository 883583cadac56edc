// The fields of a config.json, each taken once; what is left at the end and not known to be harmless is refused.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "src/fail.h"
#include "src/json.h"

namespace orpo {

// Errors are UserErrors of one line: file, field, value and what is supported.
class Fields {
 public:
  Fields(const Json& json, std::string where) : json_(json), where_(std::move(where)) {}

  template <class... Parts> [[noreturn]] void refuse(const std::string& key, const Parts&... what) const {
    fail(where_, ": ", key, " ", brief(json_.value(key, Json())), what...);
  }

  // The field's value; null where it is absent.
  const Json& take(const std::string& key) {
    static const Json absent;
    taken_.insert(key);
    const auto found = json_.find(key);
    return found == json_.end() ? absent : *found;
  }
  bool contains(const std::string& key) const { return json_.contains(key); }
  bool has(const std::string& key) const { return json_.contains(key) && !json_[key].is_null(); }

  int64_t count(const std::string& key, int64_t most, std::optional<int64_t> otherwise = std::nullopt) {
    const Json& value = take(key);
    if (value.is_null() && otherwise) return *otherwise;
    if (value.is_null()) fail(where_, ": ", key, " is missing");
    const bool whole = value.is_number_integer() && (value.is_number_unsigned() || value.get<int64_t>() >= 0);
    if (!whole || value.get<uint64_t>() < 1 || value.get<uint64_t>() > static_cast<uint64_t>(most))
      refuse(key, " is not a whole number from 1 to ", most);
    return value.get<int64_t>();
  }
  double positive(const std::string& key, std::optional<double> otherwise = std::nullopt) {
    const Json& value = take(key);
    if (value.is_null() && otherwise) return *otherwise;
    if (value.is_null()) fail(where_, ": ", key, " is missing");
    if (!value.is_number() || !(value.get<double>() > 0) || !std::isfinite(value.get<double>()))
      refuse(key, " is not a positive number");
    return value.get<double>();
  }
  bool flag(const std::string& key, bool otherwise) {
    const Json& value = take(key);
    if (value.is_null()) return otherwise;
    if (!value.is_boolean()) refuse(key, " is neither true nor false");
    return value.get<bool>();
  }
  // A field that changes the result and of which only some values are computed; null and absence stand for the first.
  void only(const std::string& key, const std::vector<Json>& supported) {
    const Json& value = take(key);
    if (value.is_null() || std::find(supported.begin(), supported.end(), value) != supported.end()) return;
    std::string list;
    for (const Json& s : supported) list += (list.empty() ? "" : " or ") + s.dump();
    refuse(key, " is not supported; this trainer computes ", list);
  }
  void dropout(const std::string& key, std::vector<std::string>& notes) {
    const Json& value = take(key);
    if (value.is_null() || value == 0) return;
    if (!value.is_number() || value.get<double>() < 0 || value.get<double>() >= 1)
      refuse(key, " is not a number from 0 to 1");
    notes.push_back(key + " " + value.dump() + " is taken as 0");
  }

  void refuse_the_rest() const;
  const std::string& where() const { return where_; }

 private:
  const Json& json_;
  std::string where_;
  std::set<std::string> taken_;
};

}  // namespace orpo
