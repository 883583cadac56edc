"""ORPO by transformers and torch, for the tools that make fixtures and compare: written to be read, not to be fast.

Conventions are those of the trainer: per-pair means over the response tokens, NLL a token mean over the whole step,
log odds in double.  Every sequence runs alone, so there is no padding, no packing and no shared prompt to be wrong.
TRL's ORPOTrainer, over rows that are token ids already, is here as well (trl_trainer).
"""
import json
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.functional as F

CLAMP = -(2.0 ** -24)  # mean log-probabilities are cut here, so that 1 - p stays above 0
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}


def read_rows(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def versions():
    import transformers
    import trl
    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "trl": trl.__version__}


def relative(ours, theirs):
    """|ours - theirs| / |theirs|, in double; nothing equals nothing."""
    difference, size = float((ours.double() - theirs.double()).norm()), float(theirs.double().norm())
    return difference / size if difference else 0.0


def without_key_bias(config, name, change):
    """The change (or gradient), 0 for the part of a key bias that no rotation turns: what is added to every key alike
    cancels in the softmax, so that its gradient is 0 but for rounding, of which Adam makes steps."""
    change = change.detach().clone()
    if name.endswith("c_attn.bias"):
        size = len(change) // 3
        change[size:2 * size] = 0
    elif name.endswith("k_proj.bias"):
        size = config.hidden_size // config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {"partial_rotary_factor": 0.0}
        change.view(-1, size)[:, int(size * rope.get("partial_rotary_factor", 1.0)):] = 0
    return change


def sequence(row, side):
    """Token ids [T] of prompt and answer, and the number of leading tokens that are not scored as answer."""
    prompt = row["prompt_ids"]
    return torch.tensor(prompt + row[f"{side}_ids"]), max(len(prompt), 1)  # without a prompt the first token is context


def token_logps(model, ids):
    """log p(token t | tokens before) for t = 1..T-1."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return F.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]


def log_odds(lw, ll):
    """D of equation (4) in log space, double."""
    lw, ll = lw.double().clamp(max=CLAMP), ll.double().clamp(max=CLAMP)
    return (lw - ll) - (torch.log(-torch.expm1(lw)) - torch.log(-torch.expm1(ll)))


def pair_terms(model, row, scope):
    """(lw, ll, NLL sum, NLL tokens) of one pair; scope: full or response."""
    ids, start = sequence(row, "chosen")
    chosen = token_logps(model, ids)
    rejected_ids, rejected_start = sequence(row, "rejected")
    rejected = token_logps(model, rejected_ids)[rejected_start - 1:]
    counted = chosen if scope == "full" else chosen[start - 1:]
    return chosen[start - 1:].mean(), rejected.mean(), -counted.sum(), counted.numel()


def per_pair(model, rows, lambda_, scope):
    """One dict a row, with the names that `orpo_eval --per-pair` writes."""
    result = []
    with torch.no_grad():
        for number, row in enumerate(rows, 1):
            lw, ll, nll_sum, nll_tokens = pair_terms(model, row, scope)
            nll, d = float(nll_sum) / nll_tokens, log_odds(lw, ll)
            result.append({"row": number, "logps/chosen": float(lw), "logps/rejected": float(ll), "nll": nll,
                           "log_odds": float(d), "loss": nll + lambda_ * float(F.softplus(-d))})
    return result


def backward(model, rows, lambda_, scope):
    """Adds the gradients of the step's loss to the model's; returns the loss. Counts are global: all rows, one step."""
    nll_tokens = 0
    for row in rows:
        ids, start = sequence(row, "chosen")
        nll_tokens += len(ids) - (1 if scope == "full" else start)
    loss = 0.0
    for row in rows:
        lw, ll, nll_sum, _ = pair_terms(model, row, scope)
        part = nll_sum / nll_tokens + lambda_ * F.softplus(-log_odds(lw, ll)) / len(rows)
        part.backward()
        loss += float(part.detach())
    return loss


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def train(model, rows, lambda_, scope, steps, learning_rate, weight_decay, max_grad_norm):
    """AdamW on all rows as one batch, decay on matrices alone; returns the losses and the norms before clipping."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}], lr=learning_rate, **ADAM)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(backward(model, rows, lambda_, scope))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)))
        optimizer.step()
    return losses, norms


def trl_trainer(model, rows, lambda_, steps=1, learning_rate=5e-6, weight_decay=0.0, max_grad_norm=1.0,
                micro_pairs=None, batch_pairs=None, mixed=False):
    """TRL's own trainer on these token ids on the CPU, rows in their order, in the model's own precision or, mixed,
    under bf16 autocast; all rows one batch unless micro_pairs and batch_pairs say otherwise.

    TRL tokenises texts itself; it is given one word of text, and its data set is then replaced by the rows.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    words = Tokenizer(models.WordLevel({"pad": 0, "begin": 1, "end": 2, "word": 3}, unk_token="word"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", bos_token="begin", eos_token="end")
    config = ORPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl"), use_cpu=True, report_to=[], disable_tqdm=True, bf16=mixed,
        per_device_train_batch_size=micro_pairs or len(rows),
        gradient_accumulation_steps=(batch_pairs or len(rows)) // (micro_pairs or len(rows)), max_steps=steps,
        learning_rate=learning_rate, lr_scheduler_type="constant", weight_decay=weight_decay,
        max_grad_norm=max_grad_norm, beta=lambda_,
        disable_dropout=True, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
        remove_unused_columns=False)
    text = Dataset.from_list([{"prompt": "word", "chosen": "word", "rejected": "word word"}])

    class InOrder(ORPOTrainer):
        def _get_train_sampler(self, *_, **__):
            return SequentialSampler(self.train_dataset)

    trainer = InOrder(model=model, args=config, processing_class=tokenizer, train_dataset=text)
    trainer.train_dataset = Dataset.from_list([trl_features(row) for row in rows])
    return trainer


def trl_features(row):
    features = {"prompt_input_ids": row["prompt_ids"], "prompt_attention_mask": [1] * len(row["prompt_ids"])}
    for side in ("chosen", "rejected"):
        ids = row["prompt_ids"] + row[f"{side}_ids"]
        features |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids),
                     f"{side}_labels": [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]}
    return features


def trl_per_pair(trainer, rows):
    """What per_pair gives (NLL scope full), by TRL's own functions, one row a batch."""
    result = []
    with torch.no_grad():
        for number, row in enumerate(rows, 1):
            batch = trainer.data_collator([trl_features(row)])
            lw, ll, _, _, nll = trainer.concatenated_forward(trainer.model, batch)[:5]
            d = trainer.odds_ratio_loss(lw, ll)[4]
            loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
            result.append({"row": number, "logps/chosen": float(lw), "logps/rejected": float(ll), "nll": float(nll),
                           "log_odds": float(d), "loss": float(loss)})
    return result


def trl_backward(trainer, rows):
    """Gradients of TRL's loss over all rows as one batch; returns the loss."""
    trainer.model.zero_grad()
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator([trl_features(row) for row in rows]))
    loss.backward()
    return float(loss.detach())
