// The part of Jinja that chat templates are written in, enough to run one on a probing conversation and see which it
// is. Training text never comes from here: the named templates of template.h render it. Semantics: Jinja 3.1 as
// transformers sets it up (trim_blocks, lstrip_blocks).
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/template.h"

namespace orpo::jinja {

struct Block;

class Program {
 public:
  // Throws UserError: the text uses something of Jinja that is not here.
  explicit Program(const std::string& text);
  ~Program();
  // Throws UserError: the template raises an exception, or does something that is not here.
  std::string render(const std::vector<Message>& messages, const std::string& bos_token, const std::string& eos_token,
                     bool add_generation_prompt) const;

 private:
  std::unique_ptr<Block> body_;
};

// Python's str.strip().
std::string_view strip(std::string_view text);

}  // namespace orpo::jinja
