#!/usr/bin/env python3
"""Writes tests/fixtures/real_smollm2.json: what TRL makes of generated pairs (real_smollm2_rows.jsonl), real model.

    python3 -m pip install torch transformers==5.23.0 trl==1.16.0 datasets accelerate gguf
    python3 tools/get_model.py build/smollm2
    python3 tools/make_real_golden.py build/smollm2 [OUT]        (default: tests/fixtures)

The rows are sentences of the demonstration's grammar as token ids of the real tokenizer: short and long ones, one
without a prompt, one whose answers are one token, one whose answers begin alike, one of about 250 tokens a side.  The
numbers are those of TRL's ORPOTrainer in float32, weights being the bf16 folder's: per-pair statistics, the loss of all
rows as one batch, norm and a few entries of each tensor's gradient, and each tensor's change by three AdamW steps.
"""
import argparse
import copy
import json
import random
from pathlib import Path

import make_demonstration as demonstration
import torch
from orpo_reference import (backward, gradients, per_pair, relative, train, trl_backward, trl_per_pair, trl_trainer,
                            versions)
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 7
LAMBDA = 0.1
TRAINING = {"steps": 3, "learning_rate": 2e-5, "weight_decay": 0.0, "max_grad_norm": 1.0}


def make_rows(tokenizer):
    """Pairs in the model's own chat format, the end-of-turn token closing an answer."""
    rng = random.Random(SEED)

    def draw(count):
        return demonstration.pairs(rng, demonstration.TRAIN_SUBJECTS, count)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(turns):
        return ids(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def row(turns, chosen, rejected, end=tokenizer.eos_token):
        return {"prompt_ids": prompt(turns) if turns else [],
                "chosen_ids": ids(chosen + end), "rejected_ids": ids(rejected + end)}

    def ask(text):
        return [{"role": "user", "content": text}]

    rows = [row(ask(pair["prompt"]), pair["chosen"], pair["rejected"]) for pair in draw(3)]
    (pair,) = draw(1)
    rows.append(row([], pair["chosen"], pair["rejected"]))
    rows.append(row(ask("Are you all right? Answer with one word."), "Yes", "No", end=""))
    (pair,) = draw(1)
    rows.append(row(ask(pair["prompt"]), pair["chosen"] + " " + pair["rejected"], pair["chosen"]))
    first, second = draw(2)
    rows.append(row(ask(first["prompt"]) + [{"role": "assistant", "content": first["chosen"]}] + ask(second["prompt"]),
                    second["chosen"], second["rejected"]))
    many = draw(12)
    rows.append(row(ask(" ".join(pair["prompt"] for pair in many[:6])), " ".join(pair["chosen"] for pair in many),
                    " ".join(pair["rejected"] for pair in many[:9])))
    if [len(rows[4][side]) for side in ("chosen_ids", "rejected_ids")] != [1, 1]:
        raise SystemExit("the one-word answers are not one token each")
    return rows


def number(x):
    return float(f"{float(x):.7g}")


def picks(gradient):
    """Three entries whose gradients stand out of 64 spread over the tensor: rounding does not turn their Adam steps."""
    flat = gradient.flatten()
    spread = torch.tensor([7919 * k % flat.numel() for k in range(64)]).unique()
    return sorted(spread[flat[spread].abs().topk(min(3, len(spread))).indices].tolist())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", nargs="?", type=Path,
                        default=Path(__file__).resolve().parent.parent / "tests" / "fixtures")
    args = parser.parse_args()
    rows = make_rows(AutoTokenizer.from_pretrained(args.model))
    start = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    trainer = trl_trainer(copy.deepcopy(start), rows, LAMBDA, **TRAINING)
    model = trainer.model.eval()
    pairs, loss = trl_per_pair(trainer, rows), trl_backward(trainer, rows)
    grads = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "nll_loss" in entry]
    begin = dict(start.named_parameters())
    changes = {name: (p - begin[name]).detach() for name, p in model.named_parameters()}

    result = {"made_by": {"command": "python3 tools/make_real_golden.py MODEL", **versions(), "arithmetic": "float32",
                          "model": "SmolLM2-135M-Instruct by tools/get_model.py, bf16 folder read as float32"},
              "lambda": LAMBDA, "loss": number(loss),
              "per_pair": [{k: v if k == "row" else number(v) for k, v in pair.items()} for pair in pairs],
              "grad_norm": number(torch.stack([g.norm() for g in grads.values()]).norm()),
              "training": {**TRAINING, "losses": [entry["loss"] for entry in steps],
                           "grad_norms": [entry["grad_norm"] for entry in steps]},
              "tensors": {}}
    for name, g in grads.items():
        at = picks(g)
        result["tensors"][name] = {
            "gradient_norm": number(g.norm()), "change_norm": number(changes[name].norm()), "entries": at,
            "gradients": [number(g.flatten()[i]) for i in at],
            "changes": [number(changes[name].flatten()[i]) for i in at]}
    (args.out / "real_smollm2_rows.jsonl").write_text(
        "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    (args.out / "real_smollm2.json").write_text(json.dumps(result, separators=(",", ":")).replace(
        '},"model.', '},\n"model.') + "\n")

    # How far plain transformers, sequence by sequence, is from TRL's padded batch: the rounding to expect of anyone.
    plain = per_pair(start, rows, LAMBDA, "full")
    print("per pair, largest difference", max(abs(a[k] - b[k]) for a, b in zip(plain, pairs) for k in a))
    print("loss, difference", abs(backward(start, rows, LAMBDA, "full") - loss))
    print("gradients, largest relative difference", max(relative(g, grads[n]) for n, g in gradients(start).items()))
    moved = copy.deepcopy(start)
    losses, norms = train(moved, rows, LAMBDA, "full", **TRAINING)
    print("losses", losses, steps[-1]["loss"], "norms", norms)
    apart = {n: relative(p.detach() - begin[n].detach(), changes[n]) for n, p in moved.named_parameters()}
    print("changes, largest relative difference", max(apart.items(), key=lambda item: item[1]))
    at = [(abs(float((p - begin[n]).detach().flatten()[i]) - c) / abs(c), n) for n, p in moved.named_parameters()
          for i, c in zip(result["tensors"][n]["entries"], result["tensors"][n]["changes"])]
    print("changes at the entries, largest relative difference", max(at))


if __name__ == "__main__":
    main()
