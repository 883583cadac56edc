// The JSON files of a checkpoint: state/trainer.json for this trainer, trainer_state.json for transformers and what
// reads its logs.
#include <limits>

#include "src/checkpoint.h"
#include "src/fail.h"
#include "src/json.h"
#include "src/training_state.h"

namespace orpo {
namespace {

// Reads one object's fields; absent ones and ones of another type are refused by name.
class Reader {
 public:
  Reader(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
    if (!json.is_object()) fail(where_, ": is no JSON object");
  }
  const Json& field(const char* key) const {
    const auto found = json_.find(key);
    if (found == json_.end()) fail(where_, ": ", key, " is missing");
    return *found;
  }
  int64_t whole(const char* key) const { return whole(key, field(key)); }
  int64_t whole(const std::string& key, const Json& value) const {
    const bool fits = value.is_number_integer() &&
                      (!value.is_number_unsigned() || value.get<uint64_t>() <= std::numeric_limits<int64_t>::max());
    if (!fits) fail(where_, ": ", key, " ", brief(value), " is no whole number");
    return value.get<int64_t>();
  }
  int64_t count(const char* key) const {
    const int64_t value = whole(key);
    if (value < 0) fail(where_, ": ", key, " ", value, " is negative");
    return value;
  }
  uint64_t bits(const char* key) const {
    if (!field(key).is_number_unsigned()) fail(where_, ": ", key, " ", brief(field(key)), " is no whole number");
    return field(key).get<uint64_t>();
  }
  double number(const char* key) const {
    if (!field(key).is_number()) fail(where_, ": ", key, " ", brief(field(key)), " is no number");
    return field(key).get<double>();
  }
  const Json& list(const char* key) const {
    if (!field(key).is_array()) fail(where_, ": ", key, " is no list");
    return field(key);
  }
  const Json& object(const char* key) const {
    if (!field(key).is_object()) fail(where_, ": ", key, " is no object");
    return field(key);
  }
  const std::string& where() const { return where_; }

 private:
  const Json& json_;
  std::string where_;
};

}  // namespace

std::string trainer_json(const TrainingState& s) {
  Json options = Json::array();
  for (const auto& [name, value] : s.options) options.push_back(Json::array({name, value}));
  const Json json = {{"step", s.step},
                     {"epoch", s.epoch},
                     {"max_steps", s.max_steps},
                     {"epochs", s.epochs},
                     {"batch_pairs", s.batch_pairs},
                     {"eval_every", s.eval_every},
                     {"save_every", s.save_every},
                     {"seed", s.seed},
                     {"counters", s.counters},
                     {"options", options}};
  return json.dump(2) + "\n";
}

// The fields of transformers' TrainerState; those that say nothing here have its defaults.
std::string trainer_state_json(const TrainingState& s) {
  Json history = Json::array();
  for (const std::string& entry : s.log_history) history.push_back(parse_json(entry, "an entry of the log history"));
  const Json json = {{"best_global_step", nullptr},
                     {"best_metric", nullptr},
                     {"best_model_checkpoint", nullptr},
                     {"epoch", s.epoch},
                     {"eval_steps", s.eval_every},
                     {"global_step", s.step},
                     {"is_hyper_param_search", false},
                     {"is_local_process_zero", true},
                     {"is_world_process_zero", true},
                     {"log_history", history},
                     {"logging_steps", 1},
                     {"max_steps", s.max_steps},
                     {"num_input_tokens_seen", 0},
                     {"num_train_epochs", s.epochs},
                     {"save_steps", s.save_every},
                     {"stateful_callbacks", Json::object()},
                     {"total_flos", 0.0},
                     {"train_batch_size", s.batch_pairs},
                     {"trial_name", nullptr},
                     {"trial_params", nullptr}};
  return json.dump(2) + "\n";
}

TrainingState parse_training_state(std::string_view trainer, std::string_view trainer_state, const std::string& where) {
  const Json own = parse_json(trainer, where + "/state/trainer.json"),
             theirs = parse_json(trainer_state, where + "/trainer_state.json");
  const Reader reader(own, where + "/state/trainer.json"), log(theirs, where + "/trainer_state.json");
  TrainingState s;
  s.step = reader.count("step");
  s.epoch = reader.number("epoch");
  s.max_steps = reader.count("max_steps");
  s.epochs = reader.number("epochs");
  s.batch_pairs = reader.count("batch_pairs");
  s.eval_every = reader.count("eval_every");
  s.save_every = reader.count("save_every");
  s.seed = reader.bits("seed");
  for (const auto& [name, value] : reader.object("counters").items())
    s.counters[name] = reader.whole("counters: " + name, value);
  for (const Json& option : reader.list("options")) {
    if (!option.is_array() || option.size() != 2 || !option[0].is_string() || !option[1].is_string())
      fail(reader.where(), ": options hold ", brief(option), ", not a name and its value");
    s.options.emplace_back(option[0], option[1]);
  }
  for (const Json& entry : log.list("log_history")) {
    if (!entry.is_object()) fail(log.where(), ": log_history holds ", brief(entry), ", not an object");
    s.log_history.push_back(entry.dump());
  }
  if (log.whole("global_step") != s.step)
    fail(log.where(), ": is of step ", log.whole("global_step"), ", state/trainer.json of step ", s.step);
  return s;
}

}  // namespace orpo
