// Bytes as a data file: every line becomes a row or a BadRow, and what becomes a row is tokenised and packed; nothing
// else may happen.
#include <algorithm>
#include <string>

#include "data/packer.h"
#include "data/rows.h"
#include "data/tokenise.h"
#include "tests/byte_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
  using namespace orpo;
  static const ByteTokenizer tokenizer(true);
  static const LetterTemplate chat_template;
  static RowParser parser({.single_answers = true, .vocabulary = 300});
  const std::string padded = std::string(reinterpret_cast<const char*>(data), size) + std::string(64, ' ');
  try {
    PairTokens tokens = tokenise(parser.parse({padded.data(), size}), &tokenizer, &chat_template);
    TokenPair pair{tokens.trunk, tokens.chosen, tokens.rejected, 1, 0};
    if (pair.chosen.empty() || pair.trunk.size() + pair.chosen.size() < 2) __builtin_trap();
    DataSettings settings;
    settings.max_length = 1 + size % 50, settings.max_prompt_length = 1 + size % 7;
    settings.on_long = OnLong::truncate;
    const Fit fit = fit_to_limits(pair, settings);
    const size_t longest = pair.trunk.size() + std::max(pair.chosen.size(), pair.rejected.size());
    if (fit != Fit::dropped && (longest > size_t(settings.max_length) || pair_targets(pair, false) < 1))
      __builtin_trap();
  } catch (const BadRow& bad) {
    if (bad.text().empty()) __builtin_trap();
  }
  return 0;
}
