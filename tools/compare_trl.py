#!/usr/bin/env python3
"""Our programs against TRL's ORPOTrainer, side by side in float32: exits 1 when they differ beyond rounding.

    python3 -m pip install torch transformers==5.23.0 trl==1.16.0 datasets accelerate
    make && python3 tools/compare_trl.py MODEL ROWS [--lambda 0.1] [--learning-rate 2e-5] [--steps 3] [--keep DIR]

MODEL is a Hugging Face folder of any dtype (read as float32 by both), ROWS a pre-tokenised file (prompt_ids,
chosen_ids, rejected_ids), all of it one batch.  Compared are each pair's statistics, the gradient of every tensor, and
the loss of each of a few AdamW steps with the weights after them.
"""
import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from orpo_reference import (gradients, read_rows, relative, trl_backward, trl_per_pair, trl_trainer,
                            without_key_bias)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

STATISTICS = 2e-4  # absolute: mean log-probabilities, NLL, loss
GRADIENTS = 2e-3   # per tensor, |difference| / |TRL's gradient|
CHANGES = 5e-2     # per tensor, of what the steps changed; Adam turns the rounding of tiny gradients into whole steps


class Report:
    def __init__(self):
        self.failed = False

    def line(self, what, differences, tolerance):
        """differences: {where: value}; NaN counts as largest and as beyond."""
        where, worst = max(differences.items(), key=lambda item: (item[1] != item[1], item[1]))
        beyond = sum(not value <= tolerance for value in differences.values())
        self.failed |= beyond > 0
        print(f"{'FAIL' if beyond else 'ok  '} {what:<28} largest difference {worst:.3g} ({where}), "
              f"{beyond} of {len(differences)} beyond {tolerance:g}", flush=True)


def run(*command):
    print("+", *command, file=sys.stderr)
    done = subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"compare_trl: {command[0]} ended with status {done.returncode}")


def run_ours(programs, args, rows, out):
    """Leaves per_pair.jsonl, gradients.safetensors and trained/ in out."""
    common = ["--model", args.model, "--data", args.rows, "--lambda", args.lambda_, "--dtype", "fp32"]
    step = [*common, "--batch-pairs", rows, "--no-shuffle", "--learning-rate", args.learning_rate,
            "--weight-decay", args.weight_decay, "--epochs", args.steps, "--save-dtype", "fp32"]
    run(programs / "orpo_eval", *common, "--per-pair", out / "per_pair.jsonl")
    run(programs / "orpo_train", *step, "--output", out / "unused", "--save-gradients", out / "gradients.safetensors")
    run(programs / "orpo_train", *step, "--output", out / "trained")


def compare_per_pair(report, ours, theirs):
    if [pair["row"] for pair in ours] != [pair["row"] for pair in theirs]:
        sys.exit("compare_trl: orpo_eval --per-pair left out rows: " + str([pair["row"] for pair in ours]))
    for name in ("logps/chosen", "logps/rejected", "nll", "log_odds", "loss"):
        differences = {f"row {b['row']}": abs(a[name] - b[name]) for a, b in zip(ours, theirs)}
        report.line(name, differences, STATISTICS * (2 if name == "log_odds" else 1))


def compare_tensors(report, what, ours, theirs, tolerance):
    if ours.keys() != theirs.keys():
        sys.exit(f"compare_trl: {what}: different tensors: {sorted(ours.keys() ^ theirs.keys())}")
    report.line(what, {name: relative(ours[name], t) for name, t in theirs.items()}, tolerance)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--programs", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--keep", type=Path, help="keep what our programs wrote in this new folder")
    args = parser.parse_args()
    rows, report = read_rows(args.rows), Report()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.keep or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        run_ours(args.programs, args, len(rows), out)

        start = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        trainer = trl_trainer(copy.deepcopy(start), rows, args.lambda_, args.steps, args.learning_rate,
                              args.weight_decay)
        model = trainer.model.eval()
        compare_per_pair(report, read_rows(out / "per_pair.jsonl"), trl_per_pair(trainer, rows))
        trl_backward(trainer, rows)
        compare_tensors(report, "gradients, relative", load_file(out / "gradients.safetensors"), gradients(model),
                        GRADIENTS)
        model.zero_grad()
        trainer.train()
        theirs = [entry["loss"] for entry in trainer.state.log_history if "nll_loss" in entry]
        steps = [json.loads(line) for line in (out / "trained" / "metrics.jsonl").read_text().splitlines()]
        ours = [entry["loss"] for entry in steps if "loss" in entry]
        if len(ours) != len(theirs):
            sys.exit(f"compare_trl: {len(ours)} steps logged, TRL made {len(theirs)}")
        report.line("loss of each step", {f"step {i}": abs(a - b) for i, (a, b) in enumerate(zip(ours, theirs), 1)},
                    STATISTICS)
        trained = AutoModelForCausalLM.from_pretrained(out / "trained", dtype=torch.float32)
        begin = dict(start.named_parameters())

        def changes(of):
            return {name: without_key_bias(of.config, name, (p - begin[name]).detach())
                    for name, p in of.named_parameters()}

        compare_tensors(report, f"change by {args.steps} steps, relative", changes(trained), changes(model), CHANGES)
    sys.exit(report.failed)


if __name__ == "__main__":
    main()
