#include "data/pairs.h"

#include <doctest/doctest.h>
#include <zlib.h>

#include <fstream>

#include "data/lines.h"
#include "tests/byte_tokenizer.h"
#include "tests/temporary_folder.h"

using namespace orpo;
using Ids = std::vector<int32_t>;

namespace {

const ByteTokenizer plain;
const ByteTokenizer with_begin(true);
const LetterTemplate letters;
const BareTemplate bare;

DataSettings settings(int64_t max_length = 1000) {
  DataSettings s;
  s.max_length = s.max_prompt_length = max_length;
  s.use_cache = false;
  s.threads = 2;
  return s;
}

std::filesystem::path write(const TemporaryFolder& folder, const std::string& text, const char* name = "rows.jsonl") {
  std::ofstream(folder.path() / name, std::ios::binary) << text;
  return folder.path() / name;
}

std::unique_ptr<PairSet> load(const std::string& text, const DataSettings& s = settings(),
                              const Tokenizer* tokenizer = &plain, const ChatTemplate* chat_template = &letters) {
  const TemporaryFolder folder;
  return PairSet::load({write(folder, text)}, tokenizer, chat_template, s);
}

// The message of the error, from the file's name on.
template <class Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const UserError& e) {
    const std::string text = e.what();
    const size_t name = text.find("rows.jsonl");
    return name == std::string::npos ? text : text.substr(name);
  }
  return "";
}

std::string shown(std::span<const int32_t> ids) { return plain.decode(ids); }
std::string shown(const TokenPair& pair) {
  return shown(pair.trunk) + "|" + shown(pair.chosen) + "|" + shown(pair.rejected);
}

const std::string row = R"({"prompt":"hi","chosen":"yes","rejected":"no"})" "\n";
const std::string advice = "; mend the row, or leave bad rows out with --on-bad-row skip";

}  // namespace

TEST_CASE("a row becomes trunk, chosen and rejected; the end of sequence is scored") {
  CHECK(shown((*load(row))[0]) == "U:hi\nA:|yes</s>|no</s>");
  CHECK(shown((*load(row, settings(), &with_begin))[0]) == "<s>U:hi\nA:|yes</s>|no</s>");
  CHECK(shown((*load(row, settings(), &plain, &bare))[0]) == "hi|yes</s>|no</s>");
  CHECK(shown((*load(row, settings(), &with_begin, &bare))[0]) == "<s>hi|yes</s>|no</s>");
}

TEST_CASE("neither begin nor end of sequence is doubled") {
  const std::string marked = R"({"prompt":"<s>hi","chosen":"yes</s>","rejected":"no"})";
  CHECK(shown((*load(marked, settings(), &with_begin, &bare))[0]) == "<s>hi|yes</s>|no</s>");
}

TEST_CASE("the trunk ends where the sequences part or the prompt ends, whichever is first") {
  CHECK(shown((*load(R"({"prompt":"hi","chosen":"so-a","rejected":"so-b"})"))[0]) == "U:hi\nA:|so-a</s>|so-b</s>");
  // "a" + "b..." is one token: the prompt's last token belongs to the branches of both sides, whichever merges.
  const auto merged = load(R"({"prompt":"xa","chosen":"by","rejected":"c"})", settings(), &plain, &bare);
  CHECK(shown((*merged)[0]) == "x|aby</s>|ac</s>");
  CHECK((*merged)[0].chosen[0] == 258);
  CHECK(merged->report().prompts_merged == 1);
  CHECK(load(row)->report().prompts_merged == 0);
}

TEST_CASE("an empty prompt has no trunk, or the begin of sequence alone") {
  const std::string empty = R"({"prompt":"","chosen":"yes","rejected":"no"})";
  CHECK(shown((*load(empty, settings(), &plain, &bare))[0]) == "|yes</s>|no</s>");
  CHECK(shown((*load(empty, settings(), &with_begin, &bare))[0]) == "<s>|yes</s>|no</s>");
}

TEST_CASE("single answers have no rejected branch") {
  DataSettings s = settings();
  s.single_answers = true;
  const std::string text = R"({"text":"so"})", completion = R"({"prompt":"hi","completion":"yes"})";
  CHECK(shown((*load(text, s))[0]) == "|so</s>|");
  CHECK(shown((*load(text, s, &with_begin))[0]) == "<s>|so</s>|");
  CHECK(shown((*load(text, s, &with_begin, nullptr))[0]) == "<s>|so</s>|");
  CHECK(shown((*load(completion, s))[0]) == "U:hi\nA:|yes</s>|");
  CHECK(shown((*load(row, s))[0]) == "U:hi\nA:|yes</s>|no</s>");
  CHECK(load(text + "\n" + completion + "\n" + row, s)->size() == 3);
}

TEST_CASE("pre-tokenised rows need neither tokenizer nor template; rows of text say what they need") {
  const std::string ids = R"({"prompt_ids":[1,2],"chosen_ids":[3,4],"rejected_ids":[3,5]})";
  const auto set = load(ids, settings(), nullptr, nullptr);
  const TokenPair pair = (*set)[0];
  CHECK(Ids(pair.trunk.begin(), pair.trunk.end()) == Ids{1, 2});
  CHECK(Ids(pair.chosen.begin(), pair.chosen.end()) == Ids{3, 4});
  CHECK(Ids(pair.rejected.begin(), pair.rejected.end()) == Ids{3, 5});
  CHECK(error_of([&] { load(row, settings(), nullptr, nullptr); }) ==
        "rows.jsonl:1: chosen: text without a tokenizer (the model folder has none; token ids need none)" + advice);
  CHECK(error_of([&] { load(row, settings(), &plain, nullptr); }) ==
        "rows.jsonl:1: chosen: dialogue without a chat template (choose one with --template; none joins the texts as "
        "they "
        "stand)" +
            advice);
}

TEST_CASE("files: gzip, CRLF, a byte-order mark, blank lines, no last line feed") {
  for (const std::string& text : {row + row, "\xef\xbb\xbf" + row + row, row + "\n \n" + row + "\n",
                                  row + row.substr(0, row.size() - 1), row.substr(0, row.size() - 1) + "\r\n" + row}) {
    const auto set = load(text);
    CHECK(set->size() == 2);
    CHECK(set->report().rows == 2);
    CHECK(shown((*set)[1]) == "U:hi\nA:|yes</s>|no</s>");
  }
  CHECK((*load(row + "\n \n" + row))[1].row == 4);

  const TemporaryFolder folder;
  const auto path = folder.path() / "rows.jsonl.gz";
  gzFile file = gzopen(path.c_str(), "wb");
  for (int i = 0; i < 5000; ++i) gzputs(file, row.c_str());
  gzclose(file);
  const auto set = PairSet::load({path}, &plain, &letters, settings());
  CHECK(set->size() == 5000);
  CHECK((*set)[4999].row == 5000);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 10);
  CHECK(error_of([&] { PairSet::load({path}, &plain, &letters, settings()); }) ==
        "rows.jsonl.gz: the gzip file is cut off or damaged; make or copy it again");
  std::ofstream(path, std::ios::binary) << "\x93\x01\xff random";
  CHECK(error_of([&] { PairSet::load({path}, &plain, &letters, settings()); }) ==
        "rows.jsonl.gz: is named .gz and is no gzip file; make or copy it again");
  std::ofstream(path, std::ios::binary) << row;  // unpacked under its old name
  CHECK(PairSet::load({path}, &plain, &letters, settings())->size() == 1);
}

TEST_CASE("lines longer than a block and blocks that end anywhere") {
  const TemporaryFolder folder;
  const std::string text = "a\n\nbcd\n" + std::string(100, 'x') + "\ne";
  for (int64_t block = 1; block < 130; ++block) {
    LineReader reader(write(folder, text), block);
    LineBlock lines;
    std::string joined;
    int64_t next = 1;
    while (reader.read(lines)) {
      CHECK(lines.first_line == next);
      for (const auto line : lines.lines) joined += std::string(line) + "\n", ++next;
    }
    CHECK(joined == text + "\n");
  }
}

TEST_CASE("files that cannot be read as rows") {
  const TemporaryFolder folder;
  const auto file = [&](const std::string& text) {
    return error_of([&] { PairSet::load({write(folder, text)}, &plain, &letters, settings()); });
  };
  CHECK(file("") == "rows.jsonl: holds no row; a row is one JSON object on a line");
  CHECK(file("\n\n") == "rows.jsonl: holds no row; a row is one JSON object on a line");
  CHECK(file("PAR1\x15") ==
        "rows.jsonl: is a Parquet file; convert it to JSON Lines in UTF-8, one object a line (.gz is fine)");
  CHECK(file("\xff\xfe{") ==
        "rows.jsonl: is UTF-16 text; convert it to JSON Lines in UTF-8, one object a line (.gz is fine)");
  const auto load_path = [&](const std::filesystem::path& path) {
    return error_of([&] { PairSet::load({path}, &plain, &letters, settings()); });
  };
  CHECK(load_path("/nowhere/rows.jsonl") == "rows.jsonl: cannot be read: No such file or directory");
  CHECK(load_path(folder.path()) == folder.path().string() + ": is a folder; a JSON Lines file is needed");
}

TEST_CASE("the first bad row in file order ends the pass, whatever the number of threads") {
  std::string text;
  for (int i = 0; i < 400; ++i) text += i >= 250 ? "{}\n" : row;
  text.insert(0, R"({"prompt":"hi","chosen":"yes","rejected":"no","extra":[{}]})" "\n");
  for (const int threads : {1, 2, 4}) {
    DataSettings s = settings();
    s.threads = threads;
    CHECK(error_of([&] { load(text, s); }) == "rows.jsonl:252: chosen: missing" + advice);
  }
}

TEST_CASE("bad rows can be left out, counted by reason") {
  DataSettings s = settings();
  s.on_bad_row = OnBadRow::skip;
  const std::string refused =
      R"({"prompt":[{"role":"system","content":"s"}],"chosen":[{"role":"assistant","content":"a"}],)"
      R"("rejected":[{"role":"assistant","content":"b"}]})"
      "\n";
  const auto set = load("{}\n" + row + "{\"x\": x}\n" + refused + row + "{\n{}\n{}\n", s);
  const DataReport& report = set->report();
  CHECK(set->size() == 2);
  CHECK(report.rows == 8);
  CHECK(report.bad == 6);
  CHECK(report.bad_reasons ==
        std::vector<std::pair<std::string, int64_t>>{
            {"chosen: missing", 3}, {"not JSON", 2}, {"prompt: refused by the template letter", 1}});
  CHECK(report.first_bad.size() == 5);
  CHECK(report.first_bad[2].ends_with(
      "rows.jsonl:4: prompt: refused by the template letter (roles must alternate, user first)"));
  CHECK(error_of([&] { load("{}\n", s); }).starts_with("rows.jsonl: no row is left of 1: 1 bad (the first: "));
}

TEST_CASE("answers that the tokenizer makes equal or leaves nothing of") {
  struct Folding : ByteTokenizer {
    Ids encode(std::string_view text) const override {
      Ids ids = ByteTokenizer::encode(text);
      std::erase(ids, int32_t{'~'});
      return ids;
    }
  };
  const Folding folding;
  CHECK(error_of([&] { load(R"({"prompt":"q","chosen":"a~","rejected":"a"})", settings(), &folding); }) ==
        "rows.jsonl:1: rejected: equal to chosen (as tokens)" + advice);
  CHECK(error_of([&] { load(R"({"prompt":"","chosen":"~","rejected":"a"})", settings(), &folding, &bare); }) ==
        "rows.jsonl:1: chosen: nothing to score (one token and no prompt)" + advice);
}

TEST_CASE("rows past the limits are dropped, or cut: the prompt keeps its end, the answers their start") {
  const std::string text =
      R"({"prompt_ids":[1,2,3,4,5,6,7,8,9,10],"chosen_ids":[21,22,23,24,25,26],"rejected_ids":[31,32,33]})";
  const auto cut = [&](int64_t max_length, int64_t max_prompt) {
    DataSettings s = settings(max_length);
    s.max_prompt_length = max_prompt;
    s.on_long = OnLong::truncate;
    const auto set = load(text, s);
    const TokenPair pair = (*set)[0];
    CHECK(set->report().truncated == (max_length < 16 || max_prompt < 10));
    CHECK(set->report().kept == 1);
    CHECK(pair.trunk.back() == 10);
    CHECK(pair.chosen[0] == 21);
    CHECK(pair.rejected[0] == 31);
    return Ids{int32_t(pair.trunk.size()), int32_t(pair.chosen.size()), int32_t(pair.rejected.size())};
  };
  CHECK(cut(16, 16) == Ids{10, 6, 3});
  CHECK(cut(16, 10) == Ids{10, 6, 3});
  CHECK(cut(16, 4) == Ids{4, 6, 3});
  CHECK(cut(15, 15) == Ids{10, 5, 3});
  CHECK(cut(12, 12) == Ids{10, 2, 2});
  CHECK(cut(10, 10) == Ids{9, 1, 1});  // the prompt alone fills the limit: it gives way
  CHECK(cut(2, 2) == Ids{1, 1, 1});
  CHECK(cut(8, 3) == Ids{3, 5, 3});

  DataSettings s = settings(15);
  CHECK(error_of([&] { load(text, s); }) ==
        "rows.jsonl: no row is left of 1: 0 bad, 1 longer than --max-length 15 or --max-prompt-length 15; raise them "
        "or use "
        "--on-long truncate");
  const auto set = load(text + "\n" + R"({"prompt_ids":[1],"chosen_ids":[2],"rejected_ids":[3]})", s);
  CHECK(set->size() == 1);
  CHECK(set->report().dropped == 1);
  CHECK(set->report().truncated == 0);
  s.max_length = 16, s.max_prompt_length = 9;
  CHECK(error_of([&] { load(text, s); }).starts_with("rows.jsonl: no row is left"));
}

TEST_CASE("an answer after a prompt that fills the limit still has room: an eighth of it") {
  std::string prompt = "[0";
  for (int i = 1; i < 100; ++i) prompt += concat(",", i);
  DataSettings s = settings(80);
  s.on_long = OnLong::truncate;
  const auto sizes = [&](const std::string& chosen) {
    const auto set = load(concat("{\"prompt_ids\":", prompt, "],\"chosen_ids\":", chosen, ",\"rejected_ids\":[1]}"), s);
    const TokenPair pair = (*set)[0];
    CHECK(pair.trunk.back() == 99);
    return Ids{int32_t(pair.trunk.size()), int32_t(pair.chosen.size()), int32_t(pair.rejected.size())};
  };
  CHECK(sizes("[5,6,7]") == Ids{77, 3, 1});
  CHECK(sizes("[5,6,7,1,2,3,4,5,6,7,8,9,10]") == Ids{70, 10, 1});
}

TEST_CASE("the set and fit_to_limits cut the same tokens") {
  DataSettings s = settings(7);
  s.on_long = OnLong::truncate;
  const std::string text = R"({"prompt_ids":[1,2,3,4,5,6,7,8,9],"chosen_ids":[21,22,23],"rejected_ids":[31,32]})";
  const auto whole = load(text), set = load(text, s);
  TokenPair cut = (*whole)[0];
  CHECK(fit_to_limits(cut, s) == Fit::truncated);
  for (const TokenPair& pair : {cut, (*set)[0]}) {
    CHECK(Ids(pair.trunk.begin(), pair.trunk.end()) == Ids{4, 5, 6, 7, 8, 9});
    CHECK(Ids(pair.chosen.begin(), pair.chosen.end()) == Ids{21});
    CHECK(Ids(pair.rejected.begin(), pair.rejected.end()) == Ids{31});
  }
}

TEST_CASE("a pair that truncation makes equal is dropped") {
  DataSettings s = settings(4);
  s.on_long = OnLong::truncate;
  const auto set = load(R"({"prompt_ids":[1,2],"chosen_ids":[3,4,5],"rejected_ids":[3,4,6]})" "\n"
                        R"({"prompt_ids":[1,2],"chosen_ids":[3,4,5],"rejected_ids":[3,5,6]})", s);
  CHECK(set->size() == 1);
  CHECK((*set)[0].row == 2);
  CHECK(set->report().dropped == 1);
  CHECK(set->report().truncated == 1);
}

TEST_CASE("the report sums the kept rows; several files keep their names") {
  const TemporaryFolder folder;
  const auto first = write(folder, row + row, "a.jsonl"),
             second = write(folder, row + R"({"prompt":"hello","chosen":"y","rejected":"no way"})", "b.jsonl");
  const auto set = PairSet::load({first, second}, &plain, &letters, settings());
  const DataReport& report = set->report();
  CHECK(report.rows == 4);
  CHECK(report.kept == 4);
  CHECK(report.tokens == 3 * (7 + 4 + 3) + 10 + 2 + 7);
  CHECK(report.longest_prompt == 10);
  CHECK(report.longest_sequence == 17);
  CHECK(report.largest_pair_rows == 10 + 1 + 6);
  CHECK((*set)[3].file == 1);
  CHECK((*set)[3].row == 2);
  CHECK_FALSE(report.from_cache);
}
