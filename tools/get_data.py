#!/usr/bin/env python3
"""Real preference pairs from two public repositories, as rows that orpo_train reads.

    git clone https://github.com/anthropics/hh-rlhf HH && git -C HH checkout 354e5c3cb8960630860dd5774a6ac2a58313bf4d
    git clone https://github.com/tatsu-lab/alpaca_eval AE && git -C AE checkout cd543a149df89434d8a54582c0151c0b945c3d20
    python3 tools/get_data.py --hh HH --alpaca AE --out DIR

hh_harmless_{train,eval}.jsonl: messages; which of two replies people found less harmful.  MIT licence.  The texts may
be offensive, and the preferred reply is often still a poor one.
alpaca_prefs_{train,eval}.jsonl: strings; which of two answers a GPT-4 judge preferred.  Such judges favour the longer
answer.  Non-commercial (CC BY-NC 4.0).

Rows are cleaned by fixed rules, counted on stderr, and split by a fixed seed so that no conversation opening and no
instruction (nor one that says nearly the same) is on both sides.  Standard library only.
"""
import argparse
import gzip
import json
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

SEED = 20240312
HH_ROWS, HH_EVAL_SHARE = 2055, 0.1
ALPACA_PAIRS_AN_INSTRUCTION, ALPACA_EVAL_SHARE = 6, 0.15
NEARLY_THE_SAME, LARGEST_EVAL_CLUSTER = 0.7, 5

# (rows read, rows usable) at the commits above: anything else is another version of the data.
HH_EXPECTED, ALPACA_EXPECTED = (2312, 2255), (17710, 13460)
ANNOTATIONS = {
    "alpaca_eval_gpt4": [
        "alpaca-7b", "alpaca-farm-ppo-human", "gpt-3.5-turbo-0301", "guanaco-65b", "llama-2-7b-chat-hf", "minichat-3b",
        "phi-2", "text_davinci_001", "vicuna-13b", "zephyr-7b-beta"],
    "alpaca_eval_gpt4_turbo_fn": ["Ein-70B-v0.1", "Mixtral-8x7B-Instruct-v0.1", "Samba-CoE-v0.2", "gemini-pro"],
    "weighted_alpaca_eval_gpt4_turbo": [
        "FuseChat-Gemma-2-9B-Instruct", "FuseChat-Llama-3.1-8B-Instruct", "FuseChat-Qwen-2.5-7B-Instruct",
        "OpenHermes-2.5-Mistral-7B", "Qwen-14B-Chat", "claude-2.1"],
    "alpaca_eval_cot_gpt4_turbo_fn": ["gpt4", "tulu-2-dpo-70b"],
}
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLE_INSIDE = re.compile(r"Human:|Assistant:")
CHAT_MARKER = re.compile(r"###\s*(Human|Assistant)|<(user|assistant)>")
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ufffd]")


def fail(message):
    print(f"get_data: {message}", file=sys.stderr)
    sys.exit(2)


def report(name, read, dropped, expected):
    usable = read - sum(dropped.values())
    print(f"{name}: {read} rows read, {usable} usable; dropped:", file=sys.stderr)
    for reason, count in dropped.most_common():
        print(f"  {reason}: {count}", file=sys.stderr)
    if (read, usable) != expected:
        fail(f"{name}: expected {expected[0]} rows and {expected[1]} usable: check out the commit that --help names")


def write(out, name, rows):
    with open(out / name, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"wrote {out / name}: {len(rows)} rows")


# HH-RLHF

def turns(transcript):
    """[(Human or Assistant, text)] of a transcript."""
    parts = TURN.split(transcript)
    return [(role, text.strip()) for role, text in zip(parts[1::2], parts[2::2])]


def hh_pair(row):
    """(prompt messages, chosen, rejected), or the reason why the row is dropped."""
    chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
    if chosen[:-1] != rejected[:-1]:
        return "transcripts differ before the last turn"
    roles = [role for role, _ in chosen]
    if roles != ["Human", "Assistant"] * (len(roles) // 2) or rejected[-1][0] != "Assistant":
        return "turns do not alternate"
    if any(ROLE_INSIDE.search(text) for _, text in chosen + rejected):
        return "role marker left inside a turn"
    if not chosen[-1][1] or not rejected[-1][1]:
        return "empty response"
    prompt = [{"role": "user" if role == "Human" else "assistant", "content": text} for role, text in chosen[:-1]]
    return prompt, chosen[-1][1], rejected[-1][1]


def hh(clone, out):
    path = clone / "harmless-base" / "test.jsonl.gz"
    if not path.is_file():
        fail(f"{path} is missing: --hh takes a checked-out clone of anthropics/hh-rlhf")
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as f:
        pairs = [hh_pair(json.loads(line)) for line in f]
    dropped = Counter(pair for pair in pairs if isinstance(pair, str))
    report("hh_harmless", len(pairs), dropped, HH_EXPECTED)
    rng = random.Random(SEED)
    groups = defaultdict(list)  # by the first user turn
    for prompt, chosen, rejected in rng.sample([pair for pair in pairs if not isinstance(pair, str)], HH_ROWS):
        groups[prompt[0]["content"]].append({
            "prompt": prompt, "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}]})
    openings = list(groups)
    rng.shuffle(openings)
    train, evaluation = [], []
    for opening in openings:
        small = len(evaluation) + len(groups[opening]) <= HH_EVAL_SHARE * HH_ROWS
        (evaluation if small else train).extend(groups[opening])
    for name, rows in (("train", train), ("eval", evaluation)):
        rng.shuffle(rows)
        write(out, f"hh_harmless_{name}.jsonl", rows)


# AlpacaEval

def tidy(text):
    return text.replace("\r\n", "\n").strip()


def folded(text):
    """Two answers that differ only in white space and case are the same answer."""
    return " ".join(text.lower().split())


def alpaca_pair(annotation):
    """A dict of one clear preference, or the reason why the annotation is dropped."""
    preference = annotation["preference"]
    if preference is None or not (1 <= preference <= 1.1 or 1.9 <= preference <= 2):
        return "no clear preference"
    sides = [(tidy(annotation[f"output_{i}"]), annotation[f"generator_{i}"]) for i in (1, 2)]
    if any(not 20 <= len(text) <= 3000 for text, _ in sides):
        return "a response outside 20..3000 characters"
    if any(CHAT_MARKER.search(text) for text, _ in sides):
        return "chat-template token in a response"
    if any(UNPRINTABLE.search(text) for text, _ in sides):
        return "control or replacement character"
    if folded(sides[0][0]) == folded(sides[1][0]):
        return "identical responses"
    (chosen, chosen_model), (rejected, rejected_model) = sides if preference < 1.5 else reversed(sides)
    return {"prompt": tidy(annotation["instruction"]), "chosen": chosen, "rejected": rejected,
            "source": {"chosen_model": chosen_model, "rejected_model": rejected_model},
            "dataset": annotation["dataset"], "baseline": annotation["generator_1"], "model": annotation["generator_2"]}


def alpaca_usable(clone):
    """All usable pairs: each once, none judged both ways."""
    read, dropped, unique = 0, Counter(), {}
    for annotator, models in ANNOTATIONS.items():
        for model in models:
            path = clone / "results" / model / annotator / "annotations.json"
            if not path.is_file():
                fail(f"{path} is missing: --alpaca takes a checked-out clone of tatsu-lab/alpaca_eval")
            for annotation in json.loads(path.read_text(encoding="utf-8")):
                read += 1
                pair = alpaca_pair(annotation)
                if isinstance(pair, str):
                    dropped[pair] += 1
                    continue
                key = pair["prompt"], folded(pair["chosen"]), folded(pair["rejected"])
                if key in unique:
                    dropped["duplicate pair"] += 1
                unique.setdefault(key, pair)
    usable = [pair for (prompt, chosen, rejected), pair in unique.items() if (prompt, rejected, chosen) not in unique]
    dropped["pair judged both ways"] = len(unique) - len(usable)
    report("alpaca_prefs", read, dropped, ALPACA_EXPECTED)
    return usable


def pick(rng, pairs):
    """At most a few pairs an instruction; always of the rarest cell (baseline, did it win), then the rarest model."""
    by_prompt = defaultdict(list)
    for pair in pairs:
        by_prompt[pair["prompt"]].append(pair)
    prompts = list(by_prompt)
    rng.shuffle(prompts)
    cells, models, picked = Counter(), Counter(), []

    def cell(pair):
        return pair["baseline"], pair["source"]["chosen_model"] == pair["baseline"]

    for prompt in prompts:
        rest = by_prompt[prompt]
        rng.shuffle(rest)
        for _ in range(min(len(rest), ALPACA_PAIRS_AN_INSTRUCTION)):
            best = min(rest, key=lambda pair: (cells[cell(pair)], models[pair["model"]]))
            rest.remove(best)
            cells[cell(best)] += 1
            models[best["model"]] += 1
            picked.append(best)
    return picked


def clusters(prompts):
    """Lists of prompts linked by word sets that overlap by 0.7 (Jaccard) or more."""
    words = [set(re.findall(r"\w+", prompt.lower())) for prompt in prompts]
    leader = list(range(len(prompts)))

    def find(i):
        while leader[i] != i:
            i = leader[i]
        return i

    for i, a in enumerate(words):
        for j in range(i):
            both = len(a & words[j])
            if both and both >= NEARLY_THE_SAME * len(a | words[j]):
                leader[find(i)] = find(j)
    result = defaultdict(list)
    for i, prompt in enumerate(prompts):
        result[find(i)].append(prompt)
    return list(result.values())


def held_out(rng, dataset_of):
    """Prompts of the eval side: of each of AlpacaEval's data sets the same share."""
    groups = clusters(sorted(dataset_of))
    rng.shuffle(groups)
    room = {dataset: round(ALPACA_EVAL_SHARE * n) for dataset, n in Counter(dataset_of.values()).items()}
    chosen = set()
    for group in groups:
        needed = Counter(dataset_of[prompt] for prompt in group)
        if len(group) <= LARGEST_EVAL_CLUSTER and all(room[dataset] >= n for dataset, n in needed.items()):
            room = {dataset: n - needed[dataset] for dataset, n in room.items()}
            chosen.update(group)
    return chosen


def alpaca(clone, out):
    rng = random.Random(SEED)
    pairs = pick(rng, alpaca_usable(clone))
    evaluation = held_out(rng, {pair["prompt"]: pair["dataset"] for pair in pairs})
    rng.shuffle(pairs)
    for name, wanted in (("train", False), ("eval", True)):
        write(out, f"alpaca_prefs_{name}.jsonl",
              [{key: pair[key] for key in ("prompt", "chosen", "rejected", "source")}
               for pair in pairs if (pair["prompt"] in evaluation) == wanted])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", type=Path, metavar="CLONE")
    parser.add_argument("--alpaca", type=Path, metavar="CLONE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not args.hh and not args.alpaca:
        parser.error("give --hh CLONE, --alpaca CLONE or both")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.hh:
        hh(args.hh, args.out)
    if args.alpaca:
        alpaca(args.alpaca, args.out)


if __name__ == "__main__":
    main()
