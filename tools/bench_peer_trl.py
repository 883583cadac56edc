#!/usr/bin/env python3
"""The peer's side of bench_peer.py: TRL's ORPOTrainer on the CPU. The last line on stdout is one JSON object.

    bench_peer_trl.py tokenise --model DIR --data TEXTS.jsonl --out IDS.jsonl
    bench_peer_trl.py train --model DIR --data IDS.jsonl --precision bf16|mixed --micro-pairs 1 --steps 3
"""
import argparse
import json
import resource
import time

from orpo_reference import read_rows, trl_trainer
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


def conversational(row):
    if isinstance(row["prompt"], str):
        return {"prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}]}
    return {side: row[side] for side in ("prompt", "chosen", "rejected")}


def tokenise(args):
    """The ids that TRL would train on, through its own code, for each row of texts."""
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [conversational(row) for row in read_rows(args.data)]
    config = ORPOConfig(output_dir="unused", use_cpu=True, report_to=[], disable_tqdm=True, max_length=args.max_length,
                        remove_unused_columns=False, save_strategy="no", bf16=False, gradient_checkpointing=False)
    tiny = AutoModelForCausalLM.from_pretrained(args.model)
    data = ORPOTrainer(model=tiny, args=config, processing_class=tokenizer,
                       train_dataset=Dataset.from_list(rows)).train_dataset
    with open(args.out, "w", encoding="utf-8") as out:
        for row in data:
            prompt = len(row["prompt_input_ids"])
            out.write(json.dumps({"prompt_ids": list(row["prompt_input_ids"]),
                                  "chosen_ids": list(row["chosen_input_ids"][prompt:]),
                                  "rejected_ids": list(row["rejected_input_ids"][prompt:])}) + "\n")
    return {"rows": len(data)}


class Watch(TrainerCallback):
    def __init__(self):
        self.seconds, self.losses, self.begin = [], [], 0.0

    def on_step_begin(self, *_, **__):
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.begin)

    def on_log(self, _args, _state, _control, logs=None, **__):
        if "nll_loss" in logs:
            self.losses.append(logs["loss"])


def train(args):
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    watch = Watch()
    trainer = trl_trainer(model, read_rows(args.data), 0.1, args.steps, micro_pairs=args.micro_pairs,
                          batch_pairs=args.batch_pairs, mixed=args.precision == "mixed")
    trainer.add_callback(watch)
    trainer.train()
    return {"seconds": watch.seconds, "losses": watch.losses,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", choices=["tokenise", "train"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out")
    parser.add_argument("--precision", choices=["bf16", "mixed"], default="bf16")
    parser.add_argument("--micro-pairs", type=int, default=1)
    parser.add_argument("--batch-pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-length", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(tokenise(args) if args.work == "tokenise" else train(args)))


if __name__ == "__main__":
    main()
