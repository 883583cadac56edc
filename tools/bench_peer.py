#!/usr/bin/env python3
"""Speed and memory beside TRL's ORPOTrainer on the same rows: both sides run alternately, ratios at the end.

    make bench-peer                                          # its own Python environment and model in build/
    tools/bench_peer.py --model DIR --python VENV/bin/python --data ROWS.jsonl ... [--rounds 2] [--json OUT]

Ours: bf16 compute, fp32 master weights and moments, 4 pairs a step and (the default) 16.  TRL's: "best", weights and
optimizer state all in bf16, one pair at a time (fastest and smallest, no fp32 state at all), and "mixed", its own
mixed-precision default, four pairs at a time.  Both train on the token ids that TRL's own tokenisation gives.

Eight rows stand for the file, the middles of as many equal parts of it by length: four of them warm up, four are timed.
The shortest time of all rounds counts.  Without --data, rows are drawn with the lengths of AlpacaEval's pairs.
--before COMMAND is put in front of every timed run (taskset, numactl).  This file needs the standard library only; the
peer's side (bench_peer_trl.py) runs under --python.
"""
import argparse
import json
import math
import os
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
ROWS, STEP_PAIRS, STEPS = 8, 4, 2  # the first step warms up
SPREAD = [0, 3, 4, 7, 1, 2, 5, 6]  # by length: two halves, each of short and long rows
# Median and 90th percentile of AlpacaEval's prompts and answers in SmolLM2's tokens (orpo_data prints them).
LENGTHS = {"prompt_ids": (53, 105), "chosen_ids": (248, 567), "rejected_ids": (153, 474)}


def size(row):
    return sum(len(row[field]) for field in LENGTHS)


def longest(row):
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def drawn_rows(count, max_length, seed=42):
    draw = random.Random(seed)
    rows = []
    while len(rows) < count:
        row = {}
        for field, (median, ninetieth) in LENGTHS.items():
            length = max(2, round(median * math.exp(draw.gauss(0, math.log(ninetieth / median) / 1.28155))))
            row[field] = [draw.randrange(3, 49000) for _ in range(length)]
        if longest(row) <= max_length:
            rows.append(row)
    return rows


def tokenised(args, file, scratch):
    """ids of every row that fits, by TRL's own tokenisation."""
    rows = [json.loads(line) for line in open(file, encoding="utf-8")]
    if "prompt_ids" not in rows[0]:
        ids = scratch / "ids.jsonl"
        peer(args, ["tokenise", "--data", file, "--out", ids], timed=False)
        rows = [json.loads(line) for line in open(ids, encoding="utf-8")]
    return [row for row in rows if longest(row) <= args.max_length]


def representative(rows):
    """The middles of ROWS equal parts by length."""
    ordered = sorted(rows, key=size)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * ROWS)] for i in SPREAD]


def write_rows(path, rows):
    path.write_text("".join(json.dumps({field: row[field] for field in LENGTHS}) + "\n" for row in rows))


def run(command, timed, args):
    command = [str(word) for word in (shlex.split(args.before) if timed else []) + command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"bench_peer: {' '.join(command[:4])} ... ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


def peer(args, words, timed=True):
    out = run([args.python, TOOLS / "bench_peer_trl.py", *words, "--model", args.model, "--threads", args.threads,
               "--max-length", args.max_length], timed, args)
    return json.loads(out.splitlines()[-1])


def ours(args, rows, pairs, steps, scratch):
    out = scratch / "out"
    run([args.program, "--model", args.model, "--data", rows, "--output", out, "--overwrite", "--batch-pairs", pairs,
         "--max-steps", steps, "--no-shuffle", "--dtype", "bf16", "--threads", args.threads, "--max-length",
         args.max_length], True, args)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"seconds": [pairs / line["pairs_per_second"] for line in lines], "losses": [line["loss"] for line in lines],
            "peak": max(line["peak_memory_bytes"] for line in lines), "mfu": [line["mfu"] for line in lines]}


class Side:
    """One setting over all rounds: the shortest time of each step, the largest memory."""

    def __init__(self, name, pairs, start):
        self.name, self.pairs, self.start = name, pairs, start
        self.seconds, self.peak, self.losses, self.mfu = None, 0, None, 0

    def go(self):
        got = self.start()
        self.seconds = got["seconds"] if self.seconds is None else list(map(min, self.seconds, got["seconds"]))
        self.peak, self.losses = max(self.peak, got["peak"]), got["losses"]
        self.mfu = max(self.mfu, *got.get("mfu", [0]))

    def rate(self):
        return self.pairs * (len(self.seconds) - 1) / sum(self.seconds[1:])

    def report(self):
        return {"name": self.name, "pairs_per_second": self.rate(), "peak_memory_bytes": self.peak,
                "first_loss": self.losses[0], "seconds": self.seconds, "best_mfu": self.mfu or None}


def compare(args, name, rows, scratch):
    rows = representative(rows)
    once, twice = scratch / "rows.jsonl", scratch / "twice.jsonl"
    write_rows(once, rows)
    write_rows(twice, rows * 2)
    sides = [
        Side("ours, 4 pairs a step", 4, lambda: ours(args, once, STEP_PAIRS, STEPS, scratch)),
        Side("TRL best: all bf16, 1 at a time", 4, lambda: peer(args, ["train", "--data", once, "--precision", "bf16",
                                                                      "--micro-pairs", 1, "--steps", STEPS])),
        Side("ours, 16 pairs a step", 16, lambda: ours(args, twice, 16, 2, scratch)),
        Side("TRL mixed: bf16 autocast, 4 at a time", 4, lambda: peer(args, ["train", "--data", once, "--precision",
                                                                            "mixed", "--micro-pairs", 4, "--steps",
                                                                            STEPS]))]
    sides = [side for side in sides if any(part in side.name for part in args.side)]
    for number in range(args.rounds):
        for side in sides:
            side.go()
            print(f"bench_peer: {name}, round {number + 1}: {side.name}: {side.rate():.3f} pairs/s", file=sys.stderr)
    tokens = sum(map(size, rows)) / len(rows)
    print(f"\n{name}: {len(rows)} rows, {tokens:.0f} tokens a pair, prompt once")
    print(f"{'':<40}{'pairs/s':>9}{'peak GB':>9}{'first loss':>12}")
    for side in sides:
        print(f"{side.name:<40}{side.rate():>9.3f}{side.peak / 1e9:>9.2f}{side.losses[0]:>12.4f}")
    for mine in sides:
        for its in sides:
            if mine.name.startswith("ours") and its.name.startswith("TRL"):
                print(f"{mine.name} against {its.name.split(':')[0]}: {mine.rate() / its.rate():.2f} times the "
                      f"pairs/s, {mine.peak / its.peak:.2f} of the memory")
    return {"rows": name, "tokens_a_pair": tokens, "sides": [side.report() for side in sides]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder that both sides train")
    parser.add_argument("--python", default=sys.executable, help="Python with torch, transformers and trl")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="JSON Lines: texts, messages or token ids")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", nargs="*", default=[""], help="only the settings whose names hold one of these")
    parser.add_argument("--before", default="", help="command in front of every timed run")
    parser.add_argument("--program", type=Path, default=TOOLS.parent / "orpo_train")
    parser.add_argument("--json", type=Path, help="the figures, one JSON object")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sets = [(file.name, tokenised(args, file, scratch)) for file in args.data] or \
               [("drawn with AlpacaEval's lengths", drawn_rows(200, args.max_length))]
        for name, rows in sets:
            if len(rows) < ROWS:
                sys.exit(f"bench_peer: {name}: {len(rows)} rows of at most {args.max_length} tokens; {ROWS} are needed")
            results.append(compare(args, name, rows, scratch))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
