#!/usr/bin/env python3
"""Speed beside llm.c's CPU program on the GPT-2 124M shape: the same weights, the same tokens, 4 x 256 a step.

    git clone https://github.com/karpathy/llm.c LLMC
    tools/bench_llmc.py LLMC [--rounds 2] [--before COMMAND]

llm.c's train_gpt2 is built by its own Makefile (OpenMP, -Ofast -march=native) from a copy in which only the sequence
length (64 to 256) and the numbers of validation batches and of steps are changed.  Both sides start from one set of
random weights, written as llm.c's checkpoint and as a Hugging Face folder, so that their first losses agree; nothing
is downloaded.  Ours trains plain rows (--objective sft) in fp32 and bf16.  The runs alternate; of each step the
shortest time of all rounds counts, the first step is left out.  Standard library only.
"""
import argparse
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

VOCAB, PADDED, POSITIONS, LAYERS, HEADS, WIDTH = 50257, 50304, 1024, 12, 12, 768
SEQUENCES, LENGTH, STEPS = 4, 256, 2
STEP = re.compile(r"step (\d+): train loss ([\d.]+) \(took ([\d.]+) ms\)")


class Numbers:
    """Weights without a matrix library: row i of a matrix is tile[i : i + columns], so its transpose is as easy."""

    def __init__(self, seed=42):
        draw = random.Random(seed)
        self.draw, self.tile = draw, array("f", (draw.gauss(0, 0.02) for _ in range(PADDED + 5 * WIDTH)))

    def matrix(self, rows, columns):
        """(as [rows, columns], as [columns, rows]), bytes."""
        shift = self.draw.randrange(WIDTH)
        tile = self.tile[shift:] + self.tile[:shift]

        def lines(count, length):
            return b"".join(tile[i:i + length].tobytes() for i in range(count))

        return lines(rows, columns), lines(columns, rows)


def constant(value, count):
    return array("f", [value]).tobytes() * count


def make_weights():
    """[(llm.c's tensors in its order: name, [bytes a layer])] and {Hugging Face name: (shape, bytes)}."""
    numbers, hf = Numbers(), {}
    wte, _ = numbers.matrix(VOCAB, WIDTH)
    wpe, _ = numbers.matrix(POSITIONS, WIDTH)
    hf["wte.weight"], hf["wpe.weight"] = ([VOCAB, WIDTH], wte), ([POSITIONS, WIDTH], wpe)
    stacks = [("ln_1.weight", WIDTH, 0), ("ln_1.bias", WIDTH, 0), ("attn.c_attn.weight", WIDTH, 3 * WIDTH),
              ("attn.c_attn.bias", 3 * WIDTH, 0), ("attn.c_proj.weight", WIDTH, WIDTH), ("attn.c_proj.bias", WIDTH, 0),
              ("ln_2.weight", WIDTH, 0), ("ln_2.bias", WIDTH, 0), ("mlp.c_fc.weight", WIDTH, 4 * WIDTH),
              ("mlp.c_fc.bias", 4 * WIDTH, 0), ("mlp.c_proj.weight", 4 * WIDTH, WIDTH), ("mlp.c_proj.bias", WIDTH, 0)]
    theirs = [wte + constant(0, (PADDED - VOCAB) * WIDTH), wpe]
    for name, rows, columns in stacks:
        for layer in range(LAYERS):
            if columns:  # Hugging Face keeps [in, out], llm.c [out, in]
                ours, transposed = numbers.matrix(rows, columns)
                hf[f"h.{layer}.{name}"] = [rows, columns], ours
                theirs.append(transposed)
            else:
                values = constant(1.0 if name.endswith("weight") else 0.0, rows)
                hf[f"h.{layer}.{name}"] = [rows], values
                theirs.append(values)
    hf["ln_f.weight"], hf["ln_f.bias"] = ([WIDTH], constant(1, WIDTH)), ([WIDTH], constant(0, WIDTH))
    return theirs + [constant(1, WIDTH), constant(0, WIDTH)], hf


def write_llmc(folder, weights, tokens):
    header = array("i", [20240326, 3, POSITIONS, VOCAB, LAYERS, HEADS, WIDTH, PADDED] + [0] * 248)
    with open(folder / "gpt2_124M.bin", "wb") as out:
        out.write(header.tobytes())
        for tensor in weights:
            out.write(tensor)
    data = folder / "dev" / "data" / "tinyshakespeare"
    data.mkdir(parents=True, exist_ok=True)
    header = array("i", [20240520, 1, len(tokens)] + [0] * 253)
    for part in ("train", "val"):
        (data / f"tiny_shakespeare_{part}.bin").write_bytes(header.tobytes() + array("H", tokens).tobytes())


def write_ours(folder, tensors, tokens):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCAB, "n_positions": POSITIONS,
        "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "torch_dtype": "float32"}))
    entries, end = {}, 0
    for name, (shape, values) in tensors.items():
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + len(values)]}
        end += len(values)
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for _, values in tensors.values():
            out.write(values)
    rows = [tokens[i:i + LENGTH + 1] for i in range(0, len(tokens) - LENGTH, LENGTH)]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt_ids": [], "completion_ids": row}) + "\n" for row in rows))


def build_llmc(clone, folder):
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git"))
    source = (folder / "train_gpt2.c").read_text()
    for old, new in (("int T = 64;", f"int T = {LENGTH};"), ("int val_num_batches = 5;", "int val_num_batches = 1;"),
                     ("step <= 40;", f"step < {STEPS};")):
        if source.count(old) != 1:
            sys.exit(f"bench_llmc: train_gpt2.c of {clone} does not hold '{old}' once; this tool knows another version")
        source = source.replace(old, new)
    (folder / "train_gpt2.c").write_text(source)
    subprocess.run(["make", "-C", folder, "train_gpt2"], check=True, stdout=subprocess.DEVNULL)


class Side:
    """One program over all rounds: the shortest time of each step."""

    def __init__(self, name, start):
        self.name, self.start, self.seconds, self.losses = name, start, None, None

    def go(self):
        seconds, self.losses = self.start()
        self.seconds = seconds if self.seconds is None else list(map(min, self.seconds, seconds))

    def rate(self):
        return SEQUENCES * LENGTH * (len(self.seconds) - 1) / sum(self.seconds[1:])


def run_llmc(args, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run([*shlex.split(args.before), "./train_gpt2"], cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE)
    steps = [(float(ms) / 1000, float(loss)) for _, loss, ms in STEP.findall(done.stdout)]
    if len(steps) != STEPS:
        sys.exit(f"bench_llmc: train_gpt2 ended with {done.returncode} after {len(steps)} steps")
    return [s for s, _ in steps], [loss for _, loss in steps]


def run_ours(args, folder, dtype):
    out = folder / "out"
    command = [*shlex.split(args.before), args.program, "--model", folder, "--data", folder / "rows.jsonl", "--output",
               out, "--overwrite", "--objective", "sft", "--dtype", dtype, "--batch-pairs", SEQUENCES, "--max-steps",
               STEPS, "--no-shuffle", "--threads", args.threads, "--learning-rate", "1e-4", "--max-grad-norm", 0]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"bench_llmc: {done.stderr.strip().splitlines()[-1]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [SEQUENCES / line["pairs_per_second"] for line in lines], [line["loss"] for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path, help="llm.c's repository")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--before", default="", help="command in front of every timed run")
    parser.add_argument("--program", type=Path, default=Path(__file__).resolve().parent.parent / "orpo_train")
    parser.add_argument("--json", type=Path, help="the figures, one JSON object")
    args = parser.parse_args()
    args.program = args.program.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        theirs, ours = Path(scratch) / "llmc", Path(scratch) / "ours"
        build_llmc(args.clone, theirs)
        draw = random.Random(7)
        tokens = [draw.randrange(VOCAB) for _ in range(SEQUENCES * LENGTH + 1)]  # llm.c shuffles: one batch, each step
        weights, tensors = make_weights()
        write_llmc(theirs, weights, tokens)
        write_ours(ours, tensors, tokens)
        del weights, tensors
        sides = [Side("llm.c", lambda: run_llmc(args, theirs)), Side("ours fp32", lambda: run_ours(args, ours, "fp32")),
                 Side("ours bf16", lambda: run_ours(args, ours, "bf16"))]
        for number in range(args.rounds):
            for side in sides:
                side.go()
                print(f"bench_llmc: round {number + 1}: {side.name}: {side.rate():.1f} tokens/s", file=sys.stderr)
    print(f"GPT-2 124M, {SEQUENCES} x {LENGTH} tokens a step, {args.threads} threads")
    for side in sides:
        print(f"{side.name:<10} {side.rate():8.1f} tokens/s  {side.rate() / sides[0].rate():6.2f} times llm.c  "
              f"losses {' '.join(f'{loss:.4f}' for loss in side.losses)}")
    if args.json:
        args.json.write_text(json.dumps([{"name": s.name, "tokens_per_second": s.rate(), "seconds": s.seconds,
                                          "losses": s.losses} for s in sides], indent=1) + "\n")


if __name__ == "__main__":
    main()
