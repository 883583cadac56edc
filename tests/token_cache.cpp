#include "data/token_cache.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "tests/byte_tokenizer.h"
#include "tests/temporary_folder.h"

using namespace orpo;

namespace {

const LetterTemplate letters;
const BareTemplate bare;

// A data file and a cache folder of the test's own.
struct Cache {
  TemporaryFolder folder;
  std::filesystem::path rows = folder.path() / "rows.jsonl";
  DataSettings settings;
  ByteTokenizer tokenizer;

  Cache() {
    setenv("ORPO_CACHE", (folder.path() / "cache").c_str(), 1);
    write(100);
    settings.threads = 2;
  }
  ~Cache() { unsetenv("ORPO_CACHE"); }

  void write(int count, const std::string& answer = "yes") {
    std::ofstream out(rows);
    for (int i = 0; i < count; ++i)
      out << R"({"prompt":"number )" << i << R"(","chosen":")" << answer << R"(","rejected":"no"})" << "\n";
  }
  std::unique_ptr<PairSet> load(const ChatTemplate* chat_template = &letters) const {
    return PairSet::load({rows}, &tokenizer, chat_template, settings);
  }
  bool hit(const ChatTemplate* chat_template = &letters) const { return load(chat_template)->report().from_cache; }
  std::vector<std::filesystem::path> files() const {
    std::vector<std::filesystem::path> found;
    for (const auto& entry : std::filesystem::directory_iterator(folder.path() / "cache"))
      found.push_back(entry.path());
    return found;
  }
};

bool equal(const PairSet& a, const PairSet& b) {
  const auto same = [](auto x, auto y) { return std::equal(x.begin(), x.end(), y.begin(), y.end()); };
  bool result = a.size() == b.size();
  for (int64_t i = 0; result && i < a.size(); ++i)
    result = same(a[i].trunk, b[i].trunk) && same(a[i].chosen, b[i].chosen) && same(a[i].rejected, b[i].rejected) &&
             a[i].row == b[i].row && a[i].file == b[i].file;
  return result;
}

}  // namespace

TEST_CASE("a second load comes from the cache and is the same") {
  Cache cache;
  const auto first = cache.load(), second = cache.load();
  CHECK_FALSE(first->report().from_cache);
  CHECK(second->report().from_cache);
  CHECK(equal(*first, *second));
  CHECK(first->report().tokens == second->report().tokens);
  CHECK(first->report().rows == second->report().rows);
  CHECK(cache.files().size() == 1);
  cache.settings.use_cache = false;
  const auto without = cache.load();
  CHECK_FALSE(without->report().from_cache);
  CHECK(equal(*first, *without));
}

TEST_CASE("the key is the content: another name or time hits, another byte misses") {
  Cache cache;
  cache.load();
  const auto moved = cache.folder.path() / "moved.jsonl";
  std::filesystem::rename(cache.rows, moved);
  cache.rows = moved;
  CHECK(cache.hit());
  const auto time = std::filesystem::last_write_time(cache.rows);
  const auto size = std::filesystem::file_size(cache.rows);
  cache.write(100, "yea");
  std::filesystem::last_write_time(cache.rows, time);
  CHECK(std::filesystem::file_size(cache.rows) == size);
  CHECK_FALSE(cache.hit());
  CHECK(cache.hit());
}

TEST_CASE("whatever decides the tokens is part of the key; limits and threads are not") {
  Cache cache;
  const auto whole = cache.load();
  cache.settings.threads = 1;
  CHECK(cache.hit());
  cache.settings.max_length = cache.settings.max_prompt_length = 17;
  const auto cut = cache.load();
  CHECK(cut->report().from_cache);
  CHECK(cut->report().dropped == 90);
  CHECK(cut->size() == 10);
  CHECK((*cut)[9].row == 10);
  cache.settings.on_long = OnLong::truncate;
  const auto truncated = cache.load();
  CHECK(truncated->report().from_cache);
  CHECK(truncated->report().truncated == 90);
  CHECK((*truncated)[99].trunk.size() + (*truncated)[99].chosen.size() == 17);
  CHECK((*truncated)[99].trunk.back() == (*whole)[99].trunk.back());
  CHECK_FALSE(cache.hit(&bare));
  struct Shouting : LetterTemplate {
    std::string prompt(const std::vector<Message>& messages) const override {
      return LetterTemplate::prompt(messages) + "!";
    }
  } const same_name;
  CHECK_FALSE(cache.hit(&same_name));
  const auto misses = [&](auto&& change) {
    const auto settings = cache.settings;
    const auto tokenizer = cache.tokenizer;
    change();
    const bool missed = !cache.hit() && cache.hit();
    cache.settings = settings;
    cache.tokenizer = tokenizer;
    return missed;
  };
  CHECK(misses([&] { cache.settings.single_answers = true; }));
  CHECK(misses([&] { cache.settings.vocabulary = 300; }));
  CHECK(misses([&] { cache.tokenizer.fingerprint = 18; }));
  CHECK(misses([&] { cache.tokenizer.adds_begin_of_sequence = true; }));
  CHECK(misses([&] { cache.tokenizer.end_of_sequence = 65; }));
  CHECK(cache.hit());
}

TEST_CASE("a cache file that is broken anywhere or cut off is made again") {
  Cache cache;
  const auto first = cache.load();
  const auto file = cache.files().at(0);
  const auto size = std::filesystem::file_size(file);
  for (uintmax_t place = 0; place < size; place += place < 64 ? 1 : 97) {
    {
      std::fstream out(file, std::ios::in | std::ios::out | std::ios::binary);
      out.seekg(place);
      const char byte = static_cast<char>(out.get() ^ 4);
      out.seekp(place);
      out.put(byte);
    }
    const auto again = cache.load();
    CHECK_FALSE(again->report().from_cache);
    CHECK(equal(*first, *again));
  }
  for (const uintmax_t length : {uintmax_t{0}, uintmax_t{10}, uintmax_t{64}, size / 2, size - 1}) {
    std::filesystem::resize_file(file, length);
    CHECK_FALSE(cache.hit());
    CHECK(cache.hit());
  }
  std::ofstream(file, std::ios::app) << "x";
  CHECK_FALSE(cache.hit());
  CHECK(cache.files().size() == 1);
}

TEST_CASE(
    "a bad row leaves no cache and no half-written file; skipped ones are remembered under the file's present name") {
  Cache cache;
  std::ofstream(cache.rows, std::ios::app) << "{}\n";
  CHECK_THROWS_AS(cache.load(), UserError);
  CHECK(cache.files().empty());
  cache.settings.on_bad_row = OnBadRow::skip;
  cache.load();
  const auto moved = cache.folder.path() / "moved.jsonl";
  std::filesystem::rename(cache.rows, moved);
  cache.rows = moved;
  const auto set = cache.load();
  CHECK(set->report().from_cache);
  CHECK(set->report().bad == 1);
  CHECK(set->report().first_bad == std::vector<std::string>{moved.string() + ":101: chosen: missing"});
  cache.settings.on_bad_row = OnBadRow::error;
  CHECK_THROWS_WITH(cache.load(), (moved.string() + ":101: chosen: missing; mend the row, or leave bad rows out with "
                                   "--on-bad-row skip").c_str());
  CHECK(set->report().bad_reasons == std::vector<std::pair<std::string, int64_t>>{{"chosen: missing", 1}});
}

TEST_CASE("without a folder to write in, tokens are kept in memory and a note says so") {
  Cache cache;
  const auto cached = cache.load();
  std::ofstream(cache.folder.path() / "file") << "no folder";
  setenv("ORPO_CACHE", (cache.folder.path() / "file").c_str(), 1);
  const auto set = cache.load();
  CHECK_FALSE(set->report().from_cache);
  CHECK(equal(*cached, *set));
  CHECK(set->report().note.starts_with("tokens are kept in memory, not cached (" +
                                       (cache.folder.path() / "file").string()));
}

TEST_CASE("the folder: ORPO_CACHE, else XDG_CACHE_HOME, else HOME") {
  struct Variable {  // put back when the test ends
    const char* name;
    std::optional<std::string> before;
    explicit Variable(const char* variable) : name(variable) {
      if (const char* value = std::getenv(variable)) before = value;
      unsetenv(variable);
    }
    ~Variable() { before ? setenv(name, before->c_str(), 1) : unsetenv(name); }
  } own("ORPO_CACHE"), xdg("XDG_CACHE_HOME"), home("HOME");
  CHECK(token_cache_folder().empty());
  setenv("HOME", "/h", 1);
  CHECK(token_cache_folder() == "/h/.cache/orpo");
  setenv("XDG_CACHE_HOME", "/x", 1);
  CHECK(token_cache_folder() == "/x/orpo");
  setenv("ORPO_CACHE", "/o", 1);
  CHECK(token_cache_folder() == "/o");
}

TEST_CASE("caches that were not used for a month go when another is written") {
  Cache cache;
  cache.load();
  const auto old = cache.files().at(0), stranger = old.parent_path() / "notes.txt";
  std::ofstream(stranger) << "kept";
  const auto now = std::filesystem::file_time_type::clock::now();
  for (const auto& path : {old, stranger}) std::filesystem::last_write_time(path, now - std::chrono::hours(24 * 31));
  cache.settings.vocabulary = 500;
  cache.load();
  CHECK_FALSE(std::filesystem::exists(old));
  CHECK(std::filesystem::exists(stranger));
  for (const auto& path : cache.files())
    if (path != stranger) std::filesystem::last_write_time(path, now - std::chrono::hours(24 * 31));
  CHECK(cache.hit());  // and that was a use of it
  cache.settings.vocabulary = 501;
  cache.load();
  cache.settings.vocabulary = 500;
  CHECK(cache.hit());
}
