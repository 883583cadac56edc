// The steps from text to ids that a tokenizer's files describe: added tokens, normaliser, words, model. Each step means
// what it means in the Hugging Face tokenizers library; a step that is not here is refused when the files are read.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/splitter.h"
#include "tokenizer/tokenizer.h"

namespace orpo {

struct ComposeText {};  // NFC
struct PrependText {
  std::string text;  // to any text that is not empty
};
struct ReplaceText {
  std::string from, to;
};
using NormalizerStep = std::variant<ComposeText, PrependText, ReplaceText>;

enum class PrefixSpace { never, first, always };  // first: only before text that starts the whole string

// Spaces become U+2581, one is put in front, and words may begin at each.
struct Metaspace {
  std::string mark = "\u2581";
  PrefixSpace prefix = PrefixSpace::always;
  bool split = true;
};

struct Pipeline {
  std::vector<NormalizerStep> normalizer;
  std::optional<Metaspace> metaspace;                // else:
  std::vector<std::unique_ptr<Splitter>> splitters;  // each cuts the words of the one before
  std::optional<size_t> space_before;  // before this splitter (or after all), a space goes to each word that has none
  BpeFiles model;
  std::vector<AddedToken> added;  // ids are those of the vocabulary, or new ones in order
  std::string begins_with;        // the token that the post-processor puts before a text, if any
};

// tokenizer.json. Throws UserError: broken, or a setting that would change ids and is not supported.
Pipeline read_tokenizer_json(const std::filesystem::path& file);
// vocab.json and merges.txt, the older form of GPT-2 and OPT folders (words and added tokens come from the tokenizer's
// class).
Pipeline read_vocabulary_and_merges(const std::filesystem::path& vocabulary, const std::filesystem::path& merges);

// A sentencepiece model file. BPE pieces become merges as transformers makes them; unigram pieces need the library's
// own search.
struct SentencePieces {
  Pipeline pipeline;    // model and added tokens (control and user-defined pieces)
  std::string unknown;  // the unknown piece
  bool unigram = false;
  bool maps_characters = false;  // it has a character map of its own (nmt_nfkc and such)
  bool prefix_space = true;      // add_dummy_prefix
  std::string proto;             // the file
};
SentencePieces read_sentencepiece(const std::filesystem::path& file);
// The library on the file's bytes. prefix_space: it puts a space in front of each text, where the file says so.
std::unique_ptr<WordModel> make_sentencepiece_model(std::string proto, bool prefix_space, const std::string& where);

// Puts a tokenizer together: special tokens and fingerprint are the caller's. model: in place of the pipeline's merges.
std::unique_ptr<Tokenizer> make_tokenizer(Pipeline pipeline, std::unique_ptr<WordModel> model,
                                          const std::string& where);

}  // namespace orpo
