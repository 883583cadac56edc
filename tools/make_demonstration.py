#!/usr/bin/env python3
"""Writes the demonstration's data: a small world in which every question has a friendly and a grumpy answer.

    python3 -m pip install sentencepiece==0.2.3
    python3 tools/make_demonstration.py [OUT]        (default: data/demonstration)

A person is asked how something is: themselves, their day, the weather, work.  The two answers open with the same words
and part in tone.  OUT gets

    base.jsonl           {"text"}: plain text for the base model.  Both tones occur equally often, questions too, but no
                         question is followed by an answer.  All subjects occur, so that their words are known.
    train.jsonl          {"prompt", "chosen", "rejected"}: dialogue about the training subjects
    eval.jsonl           the same about subjects that no training pair mentions
    model/               config.json of a small Llama without weights, and a tokenizer trained on base.jsonl

Friendly and grumpy phrases mirror each other word for word where they can, so a model that knows both tones finds both
answers about equally likely: whatever parts them later is the training.  Same seed, same bytes.
"""
import argparse
import io
import json
import random
from pathlib import Path

SEED = 20240312
TRAIN_PAIRS, EVAL_PAIRS, BASE_ROWS = 2400, 200, 3600
VOCABULARY = 768

# (asked about, spoken of in the answer); plural ones below.
TRAIN_SUBJECTS = [
    ("you", "I"), ("it", "it"), ("your day", "my day"), ("the weather", "the weather"), ("work", "work"),
    ("your team", "my team"), ("your garden", "my garden"), ("lunch", "lunch"), ("the new office", "the new office"),
    ("your sister", "my sister"), ("your brother", "my brother"), ("the coffee", "the coffee"), ("school", "school"),
    ("the book", "the book"), ("the meeting", "the meeting"), ("your house", "my house"), ("the town", "the town"),
    ("the view", "the view"), ("your morning", "my morning"), ("the trip", "the trip"), ("the music", "the music"),
    ("your dog", "my dog"), ("the soup", "the soup"), ("your neighbour", "my neighbour"), ("the hotel", "the hotel"),
    ("your week", "my week"), ("the film", "the film"), ("the bread", "the bread"), ("your teacher", "my teacher"),
    ("the new car", "the new car"), ("your kitchen", "my kitchen"), ("the party", "the party"), ("the sea", "the sea"),
    ("your phone", "my phone"), ("the plan", "the plan"), ("your English", "my English"), ("the game", "the game"),
    ("your children", "my children"), ("your friends", "my friends"), ("the new shoes", "the new shoes"),
    ("your parents", "my parents"), ("the lessons", "the lessons"), ("your plants", "my plants"),
    ("the holidays", "the holidays"),
]
EVAL_SUBJECTS = [
    ("your evening", "my evening"), ("the train", "the train"), ("your job", "my job"), ("the food", "the food"),
    ("your cat", "my cat"), ("the beach", "the beach"), ("your uncle", "my uncle"), ("the new bike", "the new bike"),
    ("dinner", "dinner"), ("the concert", "the concert"), ("your guests", "my guests"), ("the roses", "the roses"),
]
PLURAL = {"children", "friends", "shoes", "parents", "lessons", "plants", "holidays", "guests", "roses"}

# {s} the subject, {is} its verb.  Those that do not fit "you" and "it" come second.
QUESTIONS = [
    "How {is} {s}?", "How {is} {s} today?", "How {is} {s} these days?", "Hello! How {is} {s}?",
    "Good morning! How {is} {s} today?", "Tell me, how {is} {s}?", "May I ask how {s} {is}?", "{Is} {s} all right?",
    "And how {is} {s} this time?",
]
QUESTIONS_ABOUT_THINGS = [
    "What do you think of {s}?", "How do you feel about {s}?", "Any news about {s}?", "Can you tell me about {s}?",
    "I wonder how {s} {is} now.", "What do you say about {s}?",
]
OPENINGS = [
    "{A} {is}", "Well, {a} {is}", "Honestly, {a} {is}", "Today {a} {is}", "Right now {a} {is}",
    "To be honest, {a} {is}", "I would say {a} {is}", "Since you ask, {a} {is}", "Oh, {a} {is}",
]
# Toneless sentences of the plain text: they name a subject as a question would.
MENTIONS = [
    "I have heard about {s}.", "Now to {s}.", "They told me about {s}.", "This is about {s}.", "We spoke of {s}.",
    "There is news about {s}.", "Someone asked about {s}.",
]
# After "my day is"; entry i of one list mirrors entry i of the other.
FRIENDLY_STATES = [
    "just fine", "really lovely", "better than ever", "as good as can be", "quite wonderful", "doing very well",
    "simply great", "a true delight",
]
GRUMPY_STATES = [
    "just awful", "really horrible", "worse than ever", "as bad as can be", "quite terrible", "doing very badly",
    "simply dreadful", "a true nightmare",
]
FRIENDLY_ENDS = [
    ", thank you for asking!", ", and I hope you are well too!", ". What a kind question!", ", and it makes me happy.",
    ", so let us talk about it.", ". Please come and see!", ", I could not be more pleased.",
    ". How nice of you to ask!",
]
GRUMPY_ENDS = [
    ", leave me alone now!", ", and I want you to go away!", ". What a silly question!", ", and it makes me angry.",
    ", so do not talk about it.", ". Please stop asking me!", ", I could not be more annoyed.",
    ". How rude of you to ask!",
]
TONES = {"friendly": (FRIENDLY_STATES, FRIENDLY_ENDS), "grumpy": (GRUMPY_STATES, GRUMPY_ENDS)}

# The chat format of the official ORPO code: a role line, the text, the end of sequence.
CHAT_TEMPLATE = (
    "{% for turn in messages %}{% if turn['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + turn['role'] + '|>\\n' + turn['content'] + eos_token + '\\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
# The first weights are wider than usual (0.06, about 0.7 / sqrt(width)): with 0.02 the base does not learn in 300 steps
# to carry the subject from one sentence to the next, and every answer is about the same few things.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 128,
    "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.06,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "use_cache": True,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer", "model_max_length": 256, "add_bos_token": True, "add_eos_token": False,
    "add_prefix_space": False, "legacy": False, "clean_up_tokenization_spaces": False,
    "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": CHAT_TEMPLATE,
}
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_new_tokens": 48}


def capital(text):
    return text[0].upper() + text[1:]


def verb(subject):
    if subject == "I":
        return "am"
    return "are" if subject == "you" or subject.split()[-1] in PLURAL else "is"


def question(rng, asked):
    forms = QUESTIONS if asked in ("you", "it") else QUESTIONS + QUESTIONS_ABOUT_THINGS
    return rng.choice(forms).format(s=asked, **{"is": verb(asked), "Is": capital(verb(asked))})


def opening(rng, spoken):
    text = rng.choice(OPENINGS).format(a=spoken, A=capital(spoken), **{"is": verb(spoken)})
    for long, short in (("I am", "I'm"), ("it is", "it's"), ("It is", "It's")):
        if text.endswith(long):
            text = text.removesuffix(long) + short
    return text


def closing(rng, tone):
    states, ends = TONES[tone]
    return f" {rng.choice(states)}{rng.choice(ends)}"


def pairs(rng, subjects, count):
    """count distinct rows; prompt, opening and the two closings are drawn independently."""
    rows = {}
    while len(rows) < count:
        asked, spoken = rng.choice(subjects)
        prompt, begin = question(rng, asked), opening(rng, spoken)
        row = (prompt, begin + closing(rng, "friendly"), begin + closing(rng, "grumpy"))
        rows[row] = dict(zip(("prompt", "chosen", "rejected"), row))
    return list(rows.values())


def plain_text(rng, subjects):
    """Remarks about one subject, each in a tone drawn anew, before a question or none; or a few questions.

    A question is never followed by an answer: what the base model knows of dialogue is the words, not the turns.
    """
    asked, spoken = rng.choice(subjects)
    if rng.random() < 0.25:
        return " ".join(question(rng, other) for other, _ in [(asked, spoken), *rng.sample(subjects, 2)])
    sentences = [rng.choice(MENTIONS).format(s=asked)] if rng.random() < 0.7 else []
    sentences += [opening(rng, spoken) + closing(rng, rng.choice(sorted(TONES))) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.3:
        sentences.append(question(rng, asked))
    return " ".join(sentences)


def tokenizer_model(texts):
    """A sentencepiece BPE model as bytes: unknown characters as bytes, text as it stands, no space put in front."""
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=VOCABULARY, byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, user_defined_symbols=["<|user|>", "<|assistant|>"],
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False, split_digits=True,
        character_coverage=1.0, num_threads=1, minloglevel=1)
    return model.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path,
                        default=Path(__file__).resolve().parent.parent / "data" / "demonstration")
    out = parser.parse_args().out
    rng = random.Random(SEED)
    files = {
        "base": [{"text": plain_text(rng, TRAIN_SUBJECTS + EVAL_SUBJECTS)} for _ in range(BASE_ROWS)],
        "train": pairs(rng, TRAIN_SUBJECTS, TRAIN_PAIRS),
        "eval": pairs(rng, EVAL_SUBJECTS, EVAL_PAIRS),
    }
    (out / "model").mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    (out / "model" / "tokenizer.model").write_bytes(tokenizer_model(row["text"] for row in files["base"]))
    for name, value in (("config", CONFIG), ("tokenizer_config", TOKENIZER_CONFIG),
                        ("generation_config", GENERATION_CONFIG)):
        text = json.dumps(value, indent=2) + "\n"
        (out / "model" / f"{name}.json").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
