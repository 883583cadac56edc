#include "data/token_cache.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

#include "data/packer.h"

namespace orpo {
namespace {

// Raise it when a change to tokenizer/ or data/ makes other tokens of the same files, or when the layout below changes.
constexpr int cache_format = 1;

constexpr int64_t block_bytes = int64_t{4} << 20;

struct Header {
  char magic[8];
  uint64_t key;
  int64_t pairs, tokens, report_bytes, file_bytes;
  uint64_t body_hash, header_hash;  // of all after the header; of the header before this field
};
static_assert(sizeof(Header) == 64);
constexpr char magic[9] = "orpotok\n";

uint64_t hash_of(const void* data, size_t bytes) { return xxh64({static_cast<const std::byte*>(data), bytes}); }
uint64_t header_hash(const Header& header) { return hash_of(&header, offsetof(Header, header_hash)); }

// Blocks are hashed on all threads, then their hashes in order.
uint64_t blockwise_hash(std::string_view data, int threads) {
  std::vector<uint64_t> hashes((data.size() + block_bytes - 1) / block_bytes);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (size_t i = 0; i < hashes.size(); ++i) hashes[i] = xxh64(bytes_of(data.substr(i * block_bytes, block_bytes)));
  return hash_of(hashes.data(), hashes.size() * sizeof(uint64_t));
}

int64_t padded(int64_t bytes) { return (bytes + 7) / 8 * 8; }

std::string report_json(const DataReport& report, const std::vector<BadPlace>& bad) {
  nlohmann::json first_bad = nlohmann::json::array();
  for (const BadPlace& place : bad) first_bad.push_back({place.file, place.line, place.text});
  return nlohmann::json{
      {"rows", report.rows}, {"bad", report.bad}, {"bad_reasons", report.bad_reasons}, {"first_bad", first_bad}}
      .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::filesystem::path cache_file(CacheKey key) {
  return token_cache_folder() / (hash_text(key.value) + ".tokens");
}

// Sizes that add up and hashes that agree.
bool whole(std::string_view file, CacheKey key, int threads) {
  Header header;
  if (file.size() < sizeof header) return false;
  std::memcpy(&header, file.data(), sizeof header);
  if (std::memcmp(header.magic, magic, 8) != 0 || header.header_hash != header_hash(header)) return false;
  if (header.key != key.value || header.file_bytes != static_cast<int64_t>(file.size())) return false;
  return header.body_hash == blockwise_hash(file.substr(sizeof header), threads);
}

void remove_unused(const std::filesystem::path& folder) {
  using namespace std::chrono_literals;
  std::error_code ignored;
  const auto now = std::filesystem::file_time_type::clock::now();
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const auto extension = entry.path().extension();
    if (extension != ".tokens" && extension != ".partial") continue;
    const auto written = entry.last_write_time(ignored);
    if (!ignored && now - written > (extension == ".partial" ? 48h : 30 * 24h)) std::filesystem::remove(entry, ignored);
  }
}

// What the template makes of a probe dialogue, or why it refuses it.
std::string rendered(const ChatTemplate& chat_template, const std::vector<Message>& messages) {
  try {
    return chat_template.prompt(messages) + "\x1f" + chat_template.response(messages, " Ja\n");
  } catch (const UserError& refusal) {
    return refusal.what();
  }
}

void add_tokenizer(std::string& text, const Tokenizer& tokenizer) {
  text += concat("tokenizer ", tokenizer.fingerprint, " ", tokenizer.begin_of_sequence.value_or(-1), " ",
                 tokenizer.end_of_sequence.value_or(-1), " ", tokenizer.adds_begin_of_sequence, " ",
                 tokenizer.vocabulary_size(), ":");
  const char* probe =
      "I'm 12345 years old; who's  there?\n\n\t na\u00efve caf\u00e9 \u4f60\u597d \U0001f44d\u200d e\u0301 <s></s>";
  for (const int32_t id : tokenizer.encode(probe)) text += concat(" ", id);
}

}  // namespace

std::optional<CacheKey> token_cache_key(const std::vector<std::filesystem::path>& files, const Tokenizer* tokenizer,
                                        const ChatTemplate* chat_template, const DataSettings& settings) {
  std::string text = concat("format ", cache_format, "\n");
  for (const auto& path : files) {
    if (!std::filesystem::is_regular_file(path)) return std::nullopt;
    const MappedFile file(path);
    text += concat("file ", file.text().size(), " ", blockwise_hash(file.text(), settings.threads), "\n");
  }
  if (tokenizer) add_tokenizer(text, *tokenizer);
  if (chat_template)
    text += concat("\ntemplate ", chat_template->name(), " ", rendered(*chat_template, {{"user", "Hm?\n"}}), " ",
                   rendered(*chat_template, {{"system", "S."}, {"user", " U"}, {"assistant", "A "}, {"user", "V"}}));
  text += concat("\nwelcome ", settings.single_answers, " ", settings.vocabulary);
  return CacheKey{hash_of(text.data(), text.size())};
}

std::filesystem::path token_cache_folder() {
  const auto set = [](const char* name) {
    const char* value = std::getenv(name);
    return value && *value ? value : nullptr;
  };
  if (const char* folder = set("ORPO_CACHE")) return folder;
  if (const char* folder = set("XDG_CACHE_HOME")) return std::filesystem::path(folder) / "orpo";
  if (const char* home = set("HOME")) return std::filesystem::path(home) / ".cache" / "orpo";
  return {};
}

std::unique_ptr<StoredPairs> open_token_cache(CacheKey key, const std::vector<std::filesystem::path>& files,
                                              int threads) {
  std::error_code ignored;
  const std::filesystem::path path = cache_file(key);
  if (token_cache_folder().empty() || !std::filesystem::is_regular_file(path, ignored)) return nullptr;
  std::optional<MappedFile> file;
  try {
    file.emplace(path);
  } catch (const UserError&) {
    return nullptr;  // another user's, or removed this moment
  }
  if (!whole(file->text(), key, threads)) return nullptr;
  std::filesystem::last_write_time(path, std::filesystem::file_time_type::clock::now(), ignored);  // its last use
  return std::make_unique<StoredPairs>(std::move(*file), files, true);
}

StoredPairs::StoredPairs(MappedFile file, const std::vector<std::filesystem::path>& files, bool from_cache)
    : file_(std::move(file)) {
  const char* data = file_.text().data();
  const auto& header = *reinterpret_cast<const Header*>(data);
  tokens_ = reinterpret_cast<const int32_t*>(data + sizeof(Header));
  pairs_ = reinterpret_cast<const StoredPair*>(data + sizeof(Header) + padded(header.tokens * 4));
  count_ = header.pairs;
  const char* text = reinterpret_cast<const char*>(pairs_ + count_);
  const auto json = nlohmann::json::parse(text, text + header.report_bytes);
  json.at("rows").get_to(report_.rows);
  json.at("bad").get_to(report_.bad);
  json.at("bad_reasons").get_to(report_.bad_reasons);
  for (const auto& bad : json.at("first_bad"))
    report_.first_bad.push_back(concat(files.at(bad.at(0).get<size_t>()).string(), ":", bad.at(1).get<int64_t>(), ": ",
                                       bad.at(2).get<std::string>()));
  report_.from_cache = from_cache;
}

TokenPair StoredPairs::whole_pair(int64_t index) const {
  const StoredPair& p = pairs_[index];
  const int32_t* first = tokens_ + p.first;
  return {{first, size_t(p.trunk)}, {first + p.trunk, size_t(p.chosen)},
          {first + p.trunk + p.chosen, size_t(p.rejected)}, p.row, static_cast<int32_t>(p.file)};
}

TokenPair StoredPairs::operator[](int64_t index) const {
  if (all_whole_) return whole_pair(index);
  const Kept& kept = kept_[index];
  TokenPair pair = whole_pair(kept.index);
  pair.trunk = pair.trunk.last(kept.trunk);
  pair.chosen = pair.chosen.first(kept.chosen), pair.rejected = pair.rejected.first(kept.rejected);
  return pair;
}

void StoredPairs::fit(const DataSettings& settings) {
  for (int64_t i = 0; i < count_; ++i) {
    TokenPair pair = whole_pair(i);
    const Fit fit = fit_to_limits(pair, settings);
    const bool dropped = fit == Fit::dropped;
    const int64_t trunk = static_cast<int64_t>(pair.trunk.size()), chosen = static_cast<int64_t>(pair.chosen.size());
    const int64_t rejected = static_cast<int64_t>(pair.rejected.size());
    if (fit != Fit::whole && all_whole_) {
      for (int64_t k = 0; k < i; ++k) kept_.push_back({k, pairs_[k].trunk, pairs_[k].chosen, pairs_[k].rejected});
      all_whole_ = false;
    }
    report_.dropped += dropped;
    if (dropped) continue;
    if (!all_whole_)
      kept_.push_back({i, static_cast<int32_t>(trunk), static_cast<int32_t>(chosen), static_cast<int32_t>(rejected)});
    report_.truncated += fit == Fit::truncated;
    report_.prompts_merged += pairs_[i].prompt_merged;
    report_.tokens += trunk + chosen + rejected;
    report_.longest_prompt = std::max(report_.longest_prompt, trunk);
    report_.longest_sequence = std::max(report_.longest_sequence, trunk + std::max(chosen, rejected));
    report_.largest_pair_rows = std::max(report_.largest_pair_rows, pair_rows(pair));
  }
  report_.kept = size();
}

struct TokenWriter::Impl {
  std::optional<CacheKey> key;
  std::filesystem::path partial;  // empty: in memory
  int fd = -1;
  std::vector<char> block;        // of the body, not yet written
  std::vector<uint64_t> hashes;   // of the blocks written
  std::vector<StoredPair> pairs;
  int64_t tokens = 0, body = 0;

  [[noreturn]] void trouble(const char* what) const {
    const std::string reason = concat(what, ": ", std::strerror(errno));
    if (partial.empty()) fail_machine("keeping the tokens in memory failed: ", reason);
    throw CacheTrouble(concat(partial.parent_path().string(), ": ", reason));
  }

  void write_at(const void* data, int64_t bytes, int64_t offset) const {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t n = pwrite(fd, from, bytes, offset);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) trouble("cannot write");
      from += n, bytes -= n, offset += n;
    }
  }

  void flush_block() {
    if (block.empty()) return;
    hashes.push_back(hash_of(block.data(), block.size()));
    write_at(block.data(), static_cast<int64_t>(block.size()), static_cast<int64_t>(sizeof(Header)) + body);
    body += static_cast<int64_t>(block.size());
    block.clear();
  }

  void put(const void* data, int64_t bytes) {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const int64_t part = std::min(bytes, block_bytes - static_cast<int64_t>(block.size()));
      block.insert(block.end(), from, from + part);
      if (static_cast<int64_t>(block.size()) == block_bytes) flush_block();
      from += part, bytes -= part;
    }
  }
};

TokenWriter::TokenWriter(std::optional<CacheKey> key) : impl_(std::make_unique<Impl>()) {
  impl_->key = key;
  impl_->block.reserve(block_bytes);
  if (!key) {
    impl_->fd = memfd_create("orpo-tokens", MFD_CLOEXEC);
    if (impl_->fd < 0) impl_->trouble("memfd_create");
    return;
  }
  const std::filesystem::path folder = token_cache_folder();
  if (folder.empty()) throw CacheTrouble("none of ORPO_CACHE, XDG_CACHE_HOME and HOME is set");
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw CacheTrouble(concat(folder.string(), ": ", error.message()));
  static std::atomic<int> number = 0;
  impl_->partial = folder / concat(key->value, "-", getpid(), "-", number++, ".partial");
  impl_->fd = open(impl_->partial.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (impl_->fd < 0) impl_->trouble("cannot write");
}

TokenWriter::~TokenWriter() {
  if (impl_->fd >= 0) close(impl_->fd);
  if (!impl_->partial.empty()) unlink(impl_->partial.c_str());
}

void TokenWriter::append(const TokenPair& pair, bool prompt_merged) {
  impl_->pairs.push_back({impl_->tokens, pair.row, static_cast<uint32_t>(pair.file), prompt_merged,
                          static_cast<int32_t>(pair.trunk.size()), static_cast<int32_t>(pair.chosen.size()),
                          static_cast<int32_t>(pair.rejected.size())});
  for (const auto part : {pair.trunk, pair.chosen, pair.rejected}) impl_->put(part.data(), part.size_bytes());
  impl_->tokens += impl_->pairs.back().tokens();
}

std::unique_ptr<StoredPairs> TokenWriter::finish(const DataReport& report, const std::vector<BadPlace>& bad,
                                                 const std::vector<std::filesystem::path>& files) {
  const std::string text = report_json(report, bad);
  const int64_t zero = 0;
  impl_->put(&zero, padded(impl_->tokens * 4) - impl_->tokens * 4);
  impl_->put(impl_->pairs.data(), static_cast<int64_t>(impl_->pairs.size() * sizeof(StoredPair)));
  impl_->put(text.data(), static_cast<int64_t>(text.size()));
  impl_->flush_block();
  Header header{};
  std::memcpy(header.magic, magic, 8);
  header.key = impl_->key ? impl_->key->value : 0;
  header.pairs = static_cast<int64_t>(impl_->pairs.size());
  header.tokens = impl_->tokens;
  header.report_bytes = static_cast<int64_t>(text.size());
  header.file_bytes = static_cast<int64_t>(sizeof header) + impl_->body;
  header.body_hash = hash_of(impl_->hashes.data(), impl_->hashes.size() * sizeof(uint64_t));
  header.header_hash = header_hash(header);
  impl_->write_at(&header, sizeof header, 0);
  if (!impl_->partial.empty()) {
    if (rename(impl_->partial.c_str(), cache_file(*impl_->key).c_str()) != 0) impl_->trouble("cannot rename");
    impl_->partial.clear();
    remove_unused(token_cache_folder());
  }
  return std::make_unique<StoredPairs>(MappedFile(impl_->fd, "the token cache"), files, false);
}

}  // namespace orpo
