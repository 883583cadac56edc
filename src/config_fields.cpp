#include "src/config_fields.h"

namespace orpo {

namespace {

// Fields that change neither logits nor gradients: who wrote the file, special tokens, how to generate, classification
// heads, what to return.
const std::set<std::string>& harmless_fields() {
  static const std::set<std::string> keys = {
      "_name_or_path", "transformers_version", "transformers.js_config", "auto_map", "use_cache", "is_llama_config",
      "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_commit_hash",
      "_flash_attn_2_enabled", "unsloth_fixed", "unsloth_version",
      // special tokens
      "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class",
      "prefix",
      // generation, as older files hold it
      "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
      "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
      "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
      "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
      "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "max_new_tokens",
      // other tasks' heads and what a call returns
      "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels",
      "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss",
      "chunk_size_feed_forward", "cross_attention_hidden_size"};
  return keys;
}

}  // namespace

void Fields::refuse_the_rest() const {
  // Null says nothing, and a leading underscore is how transformers marks what is its own bookkeeping.
  for (const auto& [key, value] : json_.items())
    if (!taken_.contains(key) && !harmless_fields().contains(key) && !value.is_null() && !key.starts_with('_'))
      fail(where_, ": the field ", key, " (", brief(value),
           ") is not known to this trainer and may change what the model computes; remove it if it does not");
}

}  // namespace orpo
