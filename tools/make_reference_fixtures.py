#!/usr/bin/env python3
"""Writes tests/fixtures/reference_*: a tiny model or two of every family, rows, and what transformers and torch make of them.

    python3 -m pip install torch transformers==5.23.0 trl==1.16.0 datasets accelerate
    python3 tools/make_reference_fixtures.py [OUT] [--only NAME ...]        (default: all, in tests/fixtures)

Each folder is a Hugging Face folder with

    rows.jsonl           pre-tokenised pairs: no prompt, one-token answers, answers that begin alike, long answers
    expected.json        logits, per-pair statistics, loss, gradients and weights after three AdamW steps
    gradients.safetensors, trained.safetensors    all gradients and trained weights, for reference_grouped only

Expected numbers are float64 throughout except the rotary frequencies, which transformers rounds to float32.  The script
stops if transformers in plain float32, or TRL's ORPOTrainer (NLL scope full), disagrees with them.

reference_gpt2 is stored as the published GPT-2 is: the bare decoder's names, and the buffers of older versions.

The weights are wide and the answers drawn from the models themselves, so that mean log-probabilities lie in
[-3, -0.05], where the odds ratio matters.
"""
import argparse
import copy
import json
import shutil
from pathlib import Path

import torch
from orpo_reference import (backward, gradients, per_pair, read_rows, relative, train, trl_backward, trl_per_pair,
                            trl_trainer, versions, without_key_bias)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

LAMBDA = 0.1
TRAINING = {"steps": 3, "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
VOCABULARY = 123
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**TOKENS, "model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 160, "pad_token_id": None,
         "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
GPT2 = {**TOKENS, "model_type": "gpt2", "n_layer": 2, "n_positions": 70, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0}
OPT = {**TOKENS, "model_type": "opt", "num_hidden_layers": 2, "max_position_embeddings": 67, "dropout": 0.0,
       "pad_token_id": 34}
MODELS = {
    "grouped": {**LLAMA, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
                "intermediate_size": 52, "tie_word_embeddings": False},
    "odd": {**LLAMA, "hidden_size": 20, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6,
            "intermediate_size": 27, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
            "pad_token_id": 34},  # occurs in the rows: torch gives a padding token's embedding no gradient as input
    "biased": {**LLAMA, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 37,
               "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "gpt2": {**GPT2, "n_embd": 21, "n_head": 3, "n_inner": 37, "activation_function": "gelu_new",
             "pad_token_id": 34},  # occurs in the rows: GPT-2's embedding takes its gradient all the same
    "gpt2_scaled": {**GPT2, "n_embd": 16, "n_head": 2, "activation_function": "gelu", "tie_word_embeddings": False,
                    "scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
    # Waves that are kept, mixed and stretched: 8 positions of context at first, 3 pairs of frequencies and more.
    "llama3": {**LLAMA, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12,
               "intermediate_size": 31, "tie_word_embeddings": True,
               "rope_parameters": {"rope_type": "llama3", "rope_theta": 60.0, "factor": 5.0, "low_freq_factor": 0.5,
                                   "high_freq_factor": 3.0, "original_max_position_embeddings": 24}},
    "mistral": {**LLAMA, "model_type": "mistral", "hidden_size": 24, "num_attention_heads": 6,
                "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 29, "tie_word_embeddings": False,
                "sliding_window": 7},
    "qwen2": {**LLAMA, "model_type": "qwen2", "hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 1,
              "intermediate_size": 33, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 11,
              "max_window_layers": 1, "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}},
    "phi": {**TOKENS, "model_type": "phi", "num_hidden_layers": 2, "max_position_embeddings": 160, "hidden_size": 30,
            "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 41, "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}},
    "phi_grouped": {**TOKENS, "model_type": "phi", "num_hidden_layers": 3, "max_position_embeddings": 160,
                    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 23,
                    "hidden_act": "gelu", "pad_token_id": 34},
    "opt": {**OPT, "hidden_size": 20, "num_attention_heads": 4, "ffn_dim": 35},
    "opt_350m": {**OPT, "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3, "ffn_dim": 26,
                 "word_embed_proj_dim": 14, "do_layer_norm_before": False},
}
# As the published folders write them: older fields, and what has a default left out.
REWRITTEN = {
    "phi_grouped": lambda c: c | {"partial_rotary_factor": c.pop("rope_parameters")["partial_rotary_factor"],
                                  "rope_theta": 10000.0, "rope_scaling": None},
    "llama3": lambda c: c | {"rope_theta": c["rope_parameters"].pop("rope_theta"),
                             "rope_scaling": c.pop("rope_parameters")},
    "qwen2": lambda c: c | {"rope_theta": c["rope_parameters"].pop("rope_theta"), "layer_types": None,
                            "rope_scaling": {"type": c["rope_parameters"].pop("rope_type")} | c.pop("rope_parameters")},
}
SHARDED, COMPLETE, PUBLISHED = "biased", "grouped", "gpt2"
# (prompt, tokens shared by both answers, rest of chosen, rest of rejected) in tokens
ROWS = [(5, 0, 6, 9), (0, 0, 4, 6), (7, 0, 1, 1), (6, 4, 5, 3), (6, 0, 61, 58), (33, 0, 2, 3), (1, 0, 5, 4),
        (4, 3, 6, 0)]


def random_model(name, seed):
    """Weights wide enough for peaked predictions; norms around 1, biases around 0."""
    options = dict(MODELS[name])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=random)
            if parameter_name.endswith("bias"):
                p.copy_(0.2 * draw)
            elif p.dim() == 1:
                p.copy_(1 + 0.2 * draw)
            else:
                table = "lm_head" in parameter_name or parameter_name.endswith(("embed_tokens.weight", "wte.weight"))
                wide = 2.8 if table else 1.0
                inputs = p.shape[0] if ".c_" in parameter_name else p.shape[1]
                p.copy_(wide * draw / inputs ** 0.5)
    return model.eval()


def continuation(model, ids, count, temperature, random):
    ids = list(ids)
    for _ in range(count):
        if ids:
            weights = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1] / temperature, -1)
        else:
            weights = torch.ones(VOCABULARY)
        ids.append(int(torch.multinomial(weights, 1, generator=random)))
    return ids[len(ids) - count:] if count else []


@torch.no_grad()
def random_rows(model, seed):
    """Chosen answers drawn a little cooler than rejected ones; rows drawn again until every mean is in range."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for prompt_length, common, chosen, rejected in ROWS:
        for _ in range(1000):
            prompt = torch.randint(3, VOCABULARY, (prompt_length,), generator=random).tolist()
            begin = continuation(model, prompt, common, 0.8, random)
            row = {"prompt_ids": prompt,
                   "chosen_ids": begin + continuation(model, prompt + begin, chosen, 0.6, random),
                   "rejected_ids": begin + continuation(model, prompt + begin, rejected, 0.9, random)}
            means = per_pair(model, [row], LAMBDA, "full")[0]
            if row["chosen_ids"] != row["rejected_ids"] and all(
                    -3 <= means[name] <= -0.05 for name in ("logps/chosen", "logps/rejected")):
                break
        else:
            raise SystemExit(f"no row of lengths {prompt_length, common, chosen, rejected} with means in range")
        rows.append(row)
    return rows


def double_norm(norm, x):
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def in_double(model):
    """transformers computes RMS norms in float32 whatever the weights' type."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = double_norm.__get__(module)
    return model


def number(x):
    return float(f"{float(x):.9g}")


def digest(tensors):
    """Norm and a few entries [row-major index, value] of each tensor."""
    result = {}
    for name, t in tensors.items():
        flat = t.detach().flatten()
        picks = [(7919 * k + 13) % flat.numel() for k in range(5)]
        result[name] = {"norm": number(flat.norm()), "entries": [[i, number(flat[i])] for i in dict.fromkeys(picks)]}
    return result


def rounded(rows):
    return [{name: value if name == "row" else number(value) for name, value in row.items()} for row in rows]


def check_close(what, ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        for name in a:
            if abs(a[name] - b[name]) > tolerance:
                raise SystemExit(f"{what}: row {a['row']}: {name} is {b[name]}, expected {a[name]}")


def check_gradients(what, config, expected, found, tolerance):
    for name, g in expected.items():
        error = relative(without_key_bias(config, name, found[name]), without_key_bias(config, name, g))
        if not error <= tolerance:
            raise SystemExit(f"{what}: gradient of {name} is off by {error:.2g}, relative")


def expectations(model, rows, folder, complete):
    double = in_double(model)
    ids = torch.tensor([rows[0]["prompt_ids"] + rows[0]["chosen_ids"]])
    logits = double(input_ids=ids).logits[0].tolist()
    result = {"made_by": {"command": "python3 tools/make_reference_fixtures.py", **versions(), "arithmetic": "float64"},
              "lambda": LAMBDA,
              "logits": {"ids": ids[0].tolist(), "values": [[float(f"{x:.7g}") for x in line] for line in logits]}}
    for scope in ("full", "response"):
        double.zero_grad()
        loss = backward(double, rows, LAMBDA, scope)
        pairs = per_pair(double, rows, LAMBDA, scope)
        check_close("transformers in float32", pairs, per_pair(model, rows, LAMBDA, scope), 1e-5)
        if scope == "full":
            trainer = trl_trainer(copy.deepcopy(model), rows, LAMBDA)
            check_close("TRL", pairs, trl_per_pair(trainer, rows), 1e-5)
            if abs(trl_backward(trainer, rows) - loss) > 1e-5:
                raise SystemExit("TRL: the step's loss differs")
            check_gradients("TRL", model.config, gradients(double), gradients(trainer.model), 1e-4)
            if complete:
                save_file({name: g.float() for name, g in gradients(double).items()}, folder / "gradients.safetensors")
        result[scope] = {"loss": number(loss), "per_pair": rounded(pairs),
                         "gradients": digest({n: without_key_bias(model.config, n, g)
                                              for n, g in gradients(double).items()})}
    losses, norms = train(double, rows, LAMBDA, "full", **TRAINING)
    if min(norms) <= TRAINING["max_grad_norm"]:
        raise SystemExit(f"clipping is not active: gradient norms {norms}")
    trainer = trl_trainer(copy.deepcopy(model), rows, LAMBDA, **TRAINING)
    trainer.train()
    start, trained = dict(model.named_parameters()), dict(double.named_parameters())
    for name, p in trainer.model.named_parameters():
        change = trained[name] - start[name]
        error = without_key_bias(model.config, name, p.double() - trained[name])
        if error.norm() > 1e-3 * change.norm():
            raise SystemExit(f"TRL: {name} after {TRAINING['steps']} steps differs")
    result["training"] = {**TRAINING, "losses": [number(x) for x in losses], "grad_norms": [number(x) for x in norms],
                          "weights": digest(trained)}
    if complete:
        save_file({name: p.detach().float() for name, p in trained.items()}, folder / "trained.safetensors")
    return result


def write(folder, name, seed):
    shutil.rmtree(folder, ignore_errors=True)
    model = random_model(name, seed)
    rows = random_rows(model, seed)
    model.save_pretrained(folder, max_shard_size="24KB" if name == SHARDED else "5GB")
    (folder / "generation_config.json").unlink()
    if name == PUBLISHED:
        tensors = {key.removeprefix("transformer."): t for key, t in load_file(folder / "model.safetensors").items()}
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 3, 3).tril() for i in range(GPT2["n_layer"])}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if name in REWRITTEN:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(REWRITTEN[name](config), indent=2) + "\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = expectations(model, read_rows(folder / "rows.jsonl"), folder, name == COMPLETE)
    (folder / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path,
                        default=Path(__file__).resolve().parent.parent / "tests" / "fixtures")
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    args = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for seed, name in enumerate(MODELS, 11):
        if name in args.only:
            write(args.out / f"reference_{name}", name, seed)


if __name__ == "__main__":
    main()
