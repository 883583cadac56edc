#!/usr/bin/env python3
"""Writes tests/fixtures/tokenizer_*: small tokenizers trained on generated text, and what Hugging Face makes of hostile texts.

    pip install transformers==5.23.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf jinja2
    python3 tools/make_tokenizer_fixtures.py tests/fixtures

tokenizer_cases.json: for each folder the ids and the decoded text of each text (AutoTokenizer, add_special_tokens=False; for the unigram
model the sentencepiece library itself, since transformers 5 reads its pieces as BPE).
"""
import io
import json
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))
import sentencepiece
import tokenizers
import transformers
from compare_tokenizers import hostile
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MARK = "\u2581"


def corpus(lines=600):
    rng = random.Random(7)
    subject = ["I", "You", "The cat", "My friend", "Everyone here", "Caf\u00e9 owners", "\u4f60\u597d", "She"]
    verb = ["doesn't like", "hasn't seen", "was reading", "will've sold", "isn't", "loves", "can't find", "we're"]
    thing = ["3 apples", "the 2024 report", "it's own tail", "snow   and rain", "a d\u00e9j\u00e0 vu", "\u4e16\u754c", "12345 words", "x = y + 1;"]
    return [f"{rng.choice(subject)} {rng.choice(verb)} {rng.choice(thing)}{rng.choice(['.', '!', '?', '...', chr(10)])}" for _ in range(lines)]


def byte_level(split=None, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


def save(out, name, tokenizer, joined_merges=False, family="llama", **config):
    folder = out / f"tokenizer_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        description = json.loads(tokenizer.to_str())
        if joined_merges:  # the older spelling of merges
            description["model"]["merges"] = [" ".join(m) for m in description["model"]["merges"]]
        (folder / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": family}) + "\n")
    return folder


def sentencepiece_model(folder, kind):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type=kind, vocab_size=380 if kind == "bpe" else 330, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["<|user|>", "<|assistant|>"],
        hard_vocab_limit=False, num_threads=1, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def build(out):
    folders = []
    gpt2 = byte_level()
    gpt2.add_special_tokens(["<|endoftext|>"])
    folders.append(save(out, "gpt2", gpt2, joined_merges=True, family="gpt2", tokenizer_class="GPT2Tokenizer"))

    smollm = byte_level()
    smollm.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    smollm.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folders.append(save(out, "digits", smollm, bos_token="<|im_start|>", eos_token="<|im_end|>"))

    qwen = byte_level([pre_tokenizers.Split(Regex(HEAD + TAIL), "isolated")])
    qwen.normalizer = normalizers.NFC()
    qwen.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folders.append(save(out, "qwen2", qwen, family="qwen2", tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>"))

    llama3 = byte_level([pre_tokenizers.Split(Regex(HEAD + "{1,3}" + TAIL), "isolated")], ignore_merges=True)
    llama3.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>"])
    begin = llama3.token_to_id("<|begin_of_text|>")
    llama3.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)])])
    folders.append(save(out, "llama3", llama3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"))

    # a pattern of nobody's, with every flag that added tokens have
    flags = byte_level([pre_tokenizers.Digits(), pre_tokenizers.Split("=", "merged_with_next"), pre_tokenizers.Split(Regex(r"[a-z]+|\s"), "contiguous")])
    flags.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(), pre_tokenizers.Split("=", "merged_with_next"), pre_tokenizers.Split("?", "merged_with_previous"),
        pre_tokenizers.Split(Regex(r"[a-z]+|\s"), "contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=True)])
    flags.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("...", "\u2026")])
    flags.add_tokens([AddedToken("<s>", lstrip=True, rstrip=True, normalized=False), AddedToken("World", single_word=True),
                      AddedToken("</s>", lstrip=True), AddedToken("hell"), AddedToken("<|im_", rstrip=True), AddedToken("e\u0301")])
    flags.add_special_tokens([AddedToken("[INST]", special=True)])
    folders.append(save(out, "flags", flags))

    # Llama-2's kind of tokenizer.json: characters, bytes where one is unknown; the two ways to write the space in front
    for name, steps in (("prepend", True), ("metaspace", False)):
        llama2 = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        llama2.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]) if steps else None
        llama2.pre_tokenizer = None if steps else pre_tokenizers.Metaspace(MARK, prepend_scheme="first", split=False)
        llama2.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)])
        special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        words = [w for line in corpus() for w in line.split(" ")]  # word by word, or merges would join words
        llama2.train_from_iterator(words, trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False))
        description = json.loads(llama2.to_str())
        description["added_tokens"] = description["added_tokens"][:3]
        if steps:
            description["added_tokens"][1]["normalized"] = True
        folders.append(save(out, name, Tokenizer.from_str(json.dumps(description)), family="mistral", tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>"))

    for legacy in (False, True):
        folder = save(out, f"pieces_{'each' if legacy else 'first'}", None, tokenizer_class="LlamaTokenizer", legacy=legacy, add_bos_token=True)
        sentencepiece_model(folder, "bpe")
        folders.append(folder)
    folder = save(out, "unigram", None, tokenizer_class="LlamaTokenizer", legacy=True, add_bos_token=True)
    sentencepiece_model(folder, "unigram")
    return folders, folder


def main():
    out = Path(sys.argv[1])
    texts = list(dict.fromkeys(corpus(6) + [t for t in hostile(3, 560) if len(t) < 120]))
    texts = texts[:6] + random.Random(5).sample(texts[6:], 190)
    cases = {}
    folders, unigram = build(out)
    for folder in folders:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ids = theirs(texts, add_special_tokens=False).input_ids
        cases[folder.name] = {"bos": theirs.bos_token_id, "eos": theirs.eos_token_id, "begins": bool(theirs("x").input_ids[0] == theirs.bos_token_id),
                              "size": len(theirs), "ids": ids, "decoded": [theirs.decode(i) for i in ids]}
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(unigram / "tokenizer.model"))
    plain = ["" if "<" in t else t for t in texts]  # special tokens are cut out before the library sees a text
    cases[unigram.name] = {"bos": 1, "eos": 2, "begins": True, "size": pieces.get_piece_size(), "texts": plain, "ids": pieces.encode(plain), "decoded": None}
    # words alone: small vocabularies join too little to show every cut
    sample = ["'\u017fx it'\u017f", " \n \n x", "a \r\n\r\n  b", "\n \t", "x\n  y", "it'S 'LL don't", "!!\n\n x", "\t-word", *texts[100:170]]
    patterns = {"gpt2": GPT2, "qwen2": HEAD + TAIL, "llama3": HEAD + "{1,3}" + TAIL}
    words = {n: {"pattern": p, "words": [[w for w, _ in pre_tokenizers.Split(Regex(p), "isolated").pre_tokenize_str(t)] for t in sample]} for n, p in patterns.items()}
    made = f"tools/make_tokenizer_fixtures.py: transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, sentencepiece {sentencepiece.__version__}"
    with open(out / "tokenizer_cases.json", "w", encoding="ascii") as file:
        file.write(json.dumps({"made_by": made, "texts": texts, "folders": cases, "sample": sample, "patterns": words}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
