#include "tokenizer/bpe.h"

#include <atomic>
#include <bit>
#include <cstring>
#include <queue>

#include "src/fail.h"
#include "tokenizer/unicode.h"

namespace orpo {
namespace {

constexpr std::string_view space_mark = "\u2581";
constexpr uint64_t free_pair = ~uint64_t{0};

uint64_t mix(uint64_t x) {
  x *= 0x9E3779B97F4A7C15u;
  return x ^ x >> 32;
}

}  // namespace

// Bytes that print as themselves stand for themselves; the others, in order, for U+0100 on (encoder.py of GPT-2).
char32_t byte_to_character(uint8_t byte) {
  const auto prints = [](int b) { return (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE; };
  static const auto table = [&] {
    std::array<char32_t, 256> t{};
    char32_t next = 256;
    for (int b = 0; b < 256; ++b) t[b] = prints(b) ? static_cast<char32_t>(b) : next++;
    return t;
  }();
  return table[byte];
}

int character_to_byte(char32_t character) {
  static const auto table = [] {
    std::array<int, 512> t;
    t.fill(-1);
    for (int b = 0; b < 256; ++b) t[byte_to_character(static_cast<uint8_t>(b))] = b;
    return t;
  }();
  return character < table.size() ? table[character] : -1;
}

std::optional<std::string> byte_level_bytes(std::string_view token) {
  std::string bytes;
  for (size_t i = 0; i < token.size();) {
    const unicode::Character c = unicode::decode(token, i);
    const int byte = c.valid ? character_to_byte(c.code) : -1;
    if (byte < 0) return std::nullopt;
    bytes += static_cast<char>(byte);
    i += c.size;
  }
  return bytes;
}

WordCache::WordCache() : slots_(slots) {}

uint64_t WordCache::hash(std::string_view word) {
  uint64_t h = word.size() * 0xA24BAED4963EE407u;
  const char* p = word.data();
  size_t left = word.size();
  for (; left >= 8; p += 8, left -= 8) {
    uint64_t eight;
    std::memcpy(&eight, p, 8);
    h = mix(h ^ eight);
  }
  uint64_t rest = 0;
  for (size_t i = 0; i < left; ++i) rest |= uint64_t{static_cast<unsigned char>(p[i])} << (8 * i);
  return mix(mix(h ^ rest));
}

std::pair<const int32_t*, size_t> WordCache::find(std::string_view word, uint64_t hash) const {
  for (size_t i = hash % slots; slots_[i].size; i = (i + 1) % slots) {
    const Slot& s = slots_[i];
    if (s.hash == hash && s.size == word.size() && std::memcmp(text_.data() + s.text, word.data(), word.size()) == 0)
      return {ids_.data() + s.ids, s.count};
  }
  return {nullptr, 0};
}

void WordCache::put(std::string_view word, uint64_t hash, const int32_t* ids, size_t count) {
  if (word.empty() || word.size() > longest || count > UINT16_MAX) return;
  if (used_ >= slots / 2) {  // full: start again, the common words come back first
    std::fill(slots_.begin(), slots_.end(), Slot{});
    text_.clear();
    ids_.clear();
    used_ = 0;
  }
  size_t i = hash % slots;
  while (slots_[i].size) i = (i + 1) % slots;
  slots_[i] = {hash, static_cast<uint32_t>(text_.size()), static_cast<uint32_t>(ids_.size()),
               static_cast<uint16_t>(word.size()), static_cast<uint16_t>(count)};
  text_.append(word);
  ids_.insert(ids_.end(), ids, ids + count);
  ++used_;
}

Bpe::Bpe(BpeFiles files, const std::string& where) : files_(std::move(files)) {
  static std::atomic<uint64_t> models{0};
  serial_ = ++models;
  byte_ids_.fill(-1);
  const auto id_of = [&](std::string_view text) {
    const auto found = files_.vocabulary.find(text);
    return found == files_.vocabulary.end() ? -1 : found->second;
  };
  if (!files_.unknown.empty()) {
    unknown_ = id_of(files_.unknown);
    if (unknown_ < 0) fail(where, ": unk_token \"", files_.unknown, "\" is not in the vocabulary");
  }
  for (int b = 0; b < 256; ++b) {
    std::string spelled;
    if (files_.byte_level) {
      unicode::append(spelled, byte_to_character(static_cast<uint8_t>(b)));
    } else if (files_.byte_fallback) {
      constexpr char hex[] = "0123456789ABCDEF";
      spelled = {'<', '0', 'x', hex[b >> 4], hex[b & 15], '>'};
    } else {
      continue;
    }
    byte_ids_[b] = id_of(spelled);
  }
  if (files_.ignore_merges)
    for (const auto& [text, id] : files_.vocabulary) {
      const auto word = files_.byte_level ? byte_level_bytes(text) : text;
      if (word) words_.emplace(*word, id);
    }
  add_merges(where);
}

void Bpe::add_merges(const std::string& where) {
  merges_.assign(std::bit_ceil(files_.merges.size() * 2 + 1), Merge{free_pair, 0, 0});
  const auto known = [&](const std::string& text, size_t rank) {
    const auto found = files_.vocabulary.find(text);
    if (found == files_.vocabulary.end())
      fail(where, ": merge ", rank + 1, " of the model needs \"", text, "\", which is not in the vocabulary");
    return found->second;
  };
  cuts_at_spaces_ = !files_.byte_level && !files_.ignore_merges && files_.vocabulary.contains(space_mark);
  for (size_t rank = 0; rank < files_.merges.size(); ++rank) {
    const auto& [left, right] = files_.merges[rank];
    const uint64_t pair = static_cast<uint64_t>(known(left, rank)) << 32 | static_cast<uint32_t>(known(right, rank));
    const Merge entry{pair, static_cast<uint32_t>(rank), known(left + right, rank)};
    size_t i = mix(pair) & (merges_.size() - 1);
    while (merges_[i].pair != free_pair && merges_[i].pair != pair) i = (i + 1) & (merges_.size() - 1);
    merges_[i] = entry;  // of two equal pairs the later one counts, as there
    if (right.starts_with(space_mark) && !left.ends_with(space_mark)) cuts_at_spaces_ = false;
  }
  files_.merges.clear();
  files_.merges.shrink_to_fit();
}

inline const Bpe::Merge* Bpe::merge(int32_t left, int32_t right) const {
  const uint64_t pair = static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
  for (size_t i = mix(pair) & (merges_.size() - 1);; i = (i + 1) & (merges_.size() - 1)) {
    if (merges_[i].pair == pair) return &merges_[i];
    if (merges_[i].pair == free_pair) return nullptr;
  }
}

// A word's bytes or characters as ids. Unknown ones: their bytes, else unk_token (a run of them once, with
// fuse_unknown), else nothing. The unknown token is held back until the next known symbol, past bytes that fall back,
// in the order in which the library writes them.
void Bpe::symbols(std::string_view word, std::vector<int32_t>& out) const {
  bool pending = false;
  const auto put_pending = [&] {
    if (pending) out.push_back(unknown_);
    pending = false;
  };
  for (size_t i = 0; i < word.size();) {
    size_t size = 1;
    int32_t id;
    if (files_.byte_level) {
      id = byte_ids_[static_cast<uint8_t>(word[i])];
    } else {
      size = unicode::decode(word, i).size;
      const auto found = files_.vocabulary.find(word.substr(i, size));
      id = found == files_.vocabulary.end() ? -1 : found->second;
    }
    if (id >= 0) {
      put_pending();
      out.push_back(id);
    } else {
      bool fell_back = files_.byte_fallback && !files_.byte_level;
      for (size_t k = 0; k < size; ++k) fell_back = fell_back && byte_ids_[static_cast<uint8_t>(word[i + k])] >= 0;
      if (fell_back) {
        for (size_t k = 0; k < size; ++k) out.push_back(byte_ids_[static_cast<uint8_t>(word[i + k])]);
      } else if (unknown_ >= 0) {
        if (!files_.fuse_unknown) put_pending();
        pending = true;
      }
    }
    i += size;
  }
  put_pending();
}

// Joins in place, the best merge first, the leftmost of equals: for the few symbols of a word a scan is fastest.
void Bpe::join_short(int32_t* ids, size_t& count) const {
  constexpr uint32_t none = UINT32_MAX;
  const Merge* found[64];
  uint32_t ranks[64];
  const auto look = [&](size_t i) {
    found[i] = i + 1 < count ? merge(ids[i], ids[i + 1]) : nullptr;
    ranks[i] = found[i] ? found[i]->rank : none;
  };
  for (size_t i = 0; i < count; ++i) look(i);
  while (true) {
    size_t best = 0;
    for (size_t i = 1; i < count; ++i)
      if (ranks[i] < ranks[best]) best = i;
    if (count < 2 || ranks[best] == none) return;
    ids[best] = found[best]->id;
    --count;
    std::memmove(ids + best + 1, ids + best + 2, (count - best - 1) * sizeof *ids);
    std::memmove(found + best + 1, found + best + 2, (count - best - 1) * sizeof *found);
    std::memmove(ranks + best + 1, ranks + best + 2, (count - best - 1) * sizeof *ranks);
    look(best);
    if (best > 0) look(best - 1);
  }
}

// The same order by a queue, for words of any length.
void Bpe::join_long(std::vector<int32_t>& ids, size_t from) const {
  struct Candidate {
    uint32_t rank, at;
    int32_t left, right;
    bool operator>(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };
  const uint32_t count = static_cast<uint32_t>(ids.size() - from);
  std::vector<int32_t> symbol(ids.begin() + from, ids.end());
  std::vector<uint32_t> next(count), previous(count);
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto offer = [&](uint32_t at) {
    if (next[at] < count)
      if (const Merge* m = merge(symbol[at], symbol[next[at]])) queue.push({m->rank, at, symbol[at], symbol[next[at]]});
  };
  for (uint32_t i = 0; i < count; ++i) {
    next[i] = i + 1;
    previous[i] = i - 1;
  }
  for (uint32_t i = 0; i < count; ++i) offer(i);
  while (!queue.empty()) {
    const Candidate c = queue.top();
    queue.pop();
    const uint32_t right = next[c.at];
    if (symbol[c.at] != c.left || right >= count || symbol[right] != c.right) continue;  // joined otherwise since
    symbol[c.at] = merge(c.left, c.right)->id;
    symbol[right] = -1;
    next[c.at] = next[right];
    if (next[right] < count) previous[next[right]] = c.at;
    if (c.at > 0) offer(previous[c.at]);
    offer(c.at);
  }
  ids.resize(from);
  for (uint32_t i = 0; i < count; i = next[i]) ids.push_back(symbol[i]);
}

void Bpe::encode(std::string_view word, std::vector<int32_t>& ids) const {
  thread_local WordCache cache;
  thread_local uint64_t cache_of = 0;
  if (cache_of != serial_) {
    cache = WordCache();
    cache_of = serial_;
  }
  const bool short_word = word.size() <= WordCache::longest;
  const uint64_t hash = short_word ? WordCache::hash(word) : 0;
  if (short_word)
    if (const auto [known, count] = cache.find(word, hash); known)
      return void(ids.insert(ids.end(), known, known + count));

  const size_t from = ids.size();
  const auto whole = files_.ignore_merges ? words_.find(word) : words_.end();
  if (whole != words_.end()) {
    ids.push_back(whole->second);
  } else {
    symbols(word, ids);
    size_t count = ids.size() - from;
    if (count > 64) {
      join_long(ids, from);
    } else if (count > 1) {
      join_short(ids.data() + from, count);
      ids.resize(from + count);
    }
  }
  if (short_word) cache.put(word, hash, ids.data() + from, ids.size() - from);
}

}  // namespace orpo
