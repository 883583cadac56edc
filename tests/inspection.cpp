#include "src/inspection.h"

#include <doctest/doctest.h>

#include <fstream>

#include "src/files.h"
#include "tests/byte_tokenizer.h"
#include "tests/temporary_folder.h"

using namespace orpo;
using Ids = std::vector<int32_t>;

namespace {

constexpr int64_t no_limit = 1 << 30;

std::unique_ptr<PairSet> load(const std::string& text, bool single_answers = false) {
  const TemporaryFolder folder;
  write_file(folder.path() / "rows.jsonl", text);
  DataSettings settings;
  settings.max_length = settings.max_prompt_length = no_limit;
  settings.use_cache = false;
  settings.single_answers = single_answers;
  return PairSet::load({folder.path() / "rows.jsonl"}, nullptr, nullptr, settings);
}

DataSettings limits(int64_t max_length, OnLong on_long = OnLong::drop) {
  DataSettings settings;
  settings.max_length = settings.max_prompt_length = max_length;
  settings.on_long = on_long;
  return settings;
}

}  // namespace

TEST_CASE("quantiles by nearest rank") {
  const Lengths ten{{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}};
  CHECK(ten.quantile(0) == 1);
  CHECK(ten.quantile(0.5) == 5);
  CHECK(ten.quantile(0.9) == 9);
  CHECK(ten.quantile(1) == 10);
  CHECK(Lengths{{7}}.quantile(0.5) == 7);
  CHECK(Lengths{}.quantile(0.5) == 0);
}

TEST_CASE("lengths are those of all rows, costs those of the rows that the limits keep") {
  const auto set = load(R"({"prompt_ids":[1,2,3],"chosen_ids":[4,5],"rejected_ids":[6,7,8,9]})" "\n"
                        R"({"prompt_ids":[1],"chosen_ids":[4,5,6],"rejected_ids":[6,7]})" "\n"
                        R"({"prompt_ids":[1,2],"chosen_ids":[4],"rejected_ids":[5]})" "\n");
  const Inspection all = inspect(*set, limits(no_limit));
  CHECK(all.prompt.sorted == std::vector<int64_t>{1, 2, 3});
  CHECK(all.chosen.sorted == std::vector<int64_t>{1, 2, 3});
  CHECK(all.rejected.sorted == std::vector<int64_t>{1, 2, 4});
  CHECK(all.pairs == 3);
  CHECK(all.chosen_longer == 1);
  CHECK(all.same_length == 1);
  CHECK(all.packed_rows == (3 + 1 + 3) + (1 + 2 + 1) + (2 + 0 + 0));
  CHECK(all.separate_rows == (5 + 7) + (4 + 3) + (3 + 3));
  CHECK(all.padded_rows == 3 * 2 * 7);
  const Inspection short_only = inspect(*set, limits(6));
  CHECK(short_only.kept == 2);
  CHECK(short_only.dropped == 1);
  CHECK(short_only.prompt.sorted.size() == 3);
  CHECK(short_only.packed_rows == 4 + 2);
  CHECK(short_only.padded_rows == 2 * 2 * 4);
  CHECK(inspect(*set, limits(6, OnLong::truncate)).truncated == 1);
}

TEST_CASE("padding is counted batch by batch") {
  std::string rows;
  for (int64_t i = 0; i < padding_pairs + 1; ++i)
    rows += i == 0 ? R"({"prompt_ids":[1,2,3,4],"chosen_ids":[4],"rejected_ids":[6,7]})" "\n"
                   : R"({"prompt_ids":[1],"chosen_ids":[4],"rejected_ids":[5]})" "\n";
  CHECK(inspect(*load(rows), limits(no_limit)).padded_rows == padding_pairs * 2 * 6 + 2 * 2);
}

TEST_CASE("doubled begins, unscored and inner ends are found, with the first row of each") {
  const auto set = load(R"({"prompt_ids":[0,1],"chosen_ids":[4,9],"rejected_ids":[6,8]})" "\n"
                        R"({"prompt_ids":[0,0],"chosen_ids":[4,9],"rejected_ids":[6,9]})" "\n"
                        R"({"prompt_ids":[0],"chosen_ids":[4,9],"rejected_ids":[6,7]})" "\n"
                        R"({"prompt_ids":[0],"chosen_ids":[0,9,5,9],"rejected_ids":[6,9]})" "\n"
                        R"({"prompt_ids":[0],"chosen_ids":[5],"rejected_ids":[6,9]})" "\n");
  const Mistakes found = find_mistakes(*set, 0, {8, 9});
  CHECK(found.doubled_begin.rows == 2);
  CHECK(found.doubled_begin.first.row == 2);
  CHECK(found.unscored_end.rows == 2);
  CHECK(found.unscored_end.first.row == 3);
  CHECK(found.inner_end.rows == 1);
  CHECK(found.inner_end.first.row == 4);
  const Mistakes unknown = find_mistakes(*set, -1, {});
  CHECK(unknown.doubled_begin.rows + unknown.unscored_end.rows + unknown.inner_end.rows == 0);
}

TEST_CASE("tokens that end a sequence: the tokenizer's, the configuration's, the template's where it is one token") {
  const TemporaryFolder folder;
  const ByteTokenizer tokenizer;
  CHECK(ending_tokens(folder.path(), nullptr, nullptr).empty());
  CHECK(ending_tokens(folder.path(), &tokenizer, nullptr) == std::set<int32_t>{257});
  struct Ending : LetterTemplate {
    std::string end;
    explicit Ending(std::string text) : end(std::move(text)) {}
    std::string response(const std::vector<Message>&, std::string_view answer) const override {
      return std::string(answer) + end;
    }
  };
  const Ending one("ab"), two("<end>"), none("");
  CHECK(ending_tokens(folder.path(), &tokenizer, &one) == std::set<int32_t>{257, 258});
  CHECK(ending_tokens(folder.path(), &tokenizer, &two) == std::set<int32_t>{257});
  CHECK(ending_tokens(folder.path(), &tokenizer, &none) == std::set<int32_t>{257});
  write_file(folder.path() / "config.json", R"({"eos_token_id": 5})");
  write_file(folder.path() / "generation_config.json", R"({"eos_token_id": [6, 7]})");
  CHECK(ending_tokens(folder.path(), nullptr, nullptr) == std::set<int32_t>{5, 6, 7});
}

TEST_CASE("written rows read back as the same tokens, cut to the limits") {
  const std::string text = R"({"prompt_ids":[],"chosen_ids":[4,5],"rejected_ids":[6,7,8,9]})" "\n"
                           R"({"prompt_ids":[1,2,3],"chosen_ids":[4,5,6,7,8],"rejected_ids":[6]})" "\n"
                           R"({"prompt_ids":[1],"completion_ids":[4]})" "\n";
  const auto set = load(text, true);
  const TemporaryFolder folder;
  const auto file = folder.path() / "out.jsonl";
  CHECK(write_token_rows(*set, limits(no_limit), file) == 3);
  const auto again = load(read_file(file), true);
  for (int64_t i = 0; i < 3; ++i) {
    const auto same = [](auto a, auto b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); };
    CHECK(same((*set)[i].trunk, (*again)[i].trunk));
    CHECK(same((*set)[i].chosen, (*again)[i].chosen));
    CHECK(same((*set)[i].rejected, (*again)[i].rejected));
  }
  CHECK(write_token_rows(*set, limits(4), file) == 2);
  CHECK(write_token_rows(*set, limits(4, OnLong::truncate), file) == 3);
  CHECK(read_file(file).find(R"({"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [6]})") !=
        std::string::npos);
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path()), {}) == 1);
  CHECK_THROWS_AS(write_token_rows(*set, limits(4), folder.path() / "absent" / "out.jsonl"), MachineError);
}
