// A tokenizer: text to token ids and back, equal token for token to the Hugging Face one of the same model folder.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace orpo {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Loads the tokenizer of a Hugging Face model folder: tokenizer.json (byte-level BPE) or else tokenizer.model
  // (sentencepiece), with the special tokens that tokenizer_config.json / special_tokens_map.json /
  // generation_config.json name. Throws UserError: no tokenizer files, or a setting in them that would change the ids
  // and is not supported (named in the message).
  static std::unique_ptr<Tokenizer> load(const std::filesystem::path& folder);

  // Token ids of UTF-8 text. Special and added tokens written in the text become their ids, as in transformers. Nothing
  // is added: no begin or end of sequence (encode(text, add_special_tokens=False) there). Thread-safe.
  virtual std::vector<int32_t> encode(std::string_view text) const = 0;

  // Text of token ids; special tokens are written out unless skip_special.
  virtual std::string decode(std::span<const int32_t> ids, bool skip_special = false) const = 0;

  // Id of a token's exact text (added tokens included), if there is one.
  virtual std::optional<int32_t> token_id(std::string_view token) const = 0;

  // The token's text as the vocabulary spells it, for people to read.
  virtual std::string token_text(int32_t id) const = 0;

  virtual int32_t vocabulary_size() const = 0;  // one more than the largest id

  std::optional<int32_t> begin_of_sequence;  // bos_token
  std::optional<int32_t> end_of_sequence;    // eos_token
  bool adds_begin_of_sequence = false;       // what transformers' tokenizer(text) puts before a plain text
  uint64_t fingerprint = 0;                  // hash of the files it was made from; part of the token cache's key
};

}  // namespace orpo
