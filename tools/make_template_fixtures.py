#!/usr/bin/env python3
"""Writes tests/fixtures/template_cases.json: what transformers renders from Jinja templates on generated conversations.

    pip install transformers==5.23.0 jinja2
    python3 tools/make_template_fixtures.py tests/fixtures/template_cases.json
    python3 tools/make_template_fixtures.py --compare JINJA-FILE ...    (compares our templates with any Jinja files, such as the published ones)

The Jinja texts here are our own wording of what the published templates do; --compare is for the originals, which are not kept here.
"""
import json
import random
import subprocess
import sys
from pathlib import Path

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

ROLES = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles take turns') }}{% endif %}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou answer kindly.<|im_end|>\\n' }}{% endif %}"
ZEPHYR = """{% for m in messages %}
{% if m['role'] in ['user', 'system', 'assistant'] %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
ZEPHYR_LINE = "{% for turn in messages -%}\n    <|{{ turn.role }}|>\n{{ turn['content'] ~ eos_token }}{{ '\\n' }}\n{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}\n{%- endfor %}"
LLAMA2 = (
    "{% set rest = messages %}{% set first = '' %}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set first = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}{% endif %}"
    "{% for m in rest %}" + ROLES + "{% set text = m.content %}{% if loop.first %}{% set text = first + m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ text.strip() ~ ' [/INST]' }}{% else %}{{ ' ' ~ text | trim ~ ' ' ~ eos_token }}{% endif %}{% endfor %}")
LLAMA3 = ("{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
          "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}")
LLAMA3_ALWAYS = LLAMA3.replace("{%- if add_generation_prompt %}", "").removesuffix("{%- endif %}")


def mistral(close, before, between, system=""):
    """The [INST] templates; system: '' refuses it, 'first' and 'last' put it before that user turn ('last' only while it is unanswered)."""
    where = {"": "false", "first": "loop.first", "last": "loop.last"}[system]
    head = "" if not system else "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}{% set rest = messages[1:] %}{% endif %}"
    return ("{{ bos_token }}{% set rest = messages %}{% set said = none %}" + head + "{% for m in rest %}" + ROLES +
            "{% if m.role == 'user' %}{{ '[INST] ' }}{% if said is not none and " + where + " %}{{ said + '\\n\\n' }}{% endif %}{{ m.content + '" + close + "' }}"
            "{% elif m.role == 'assistant' %}{{ '" + before + "' + m.content + eos_token + '" + between + "' }}{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}")


PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
KNOWN = [
    ("chatml", CHATML), ("chatml", SYSTEM + CHATML), ("zephyr", ZEPHYR), ("zephyr", ZEPHYR_LINE), ("llama-2", LLAMA2), ("llama-3", LLAMA3),
    ("llama-3", LLAMA3_ALWAYS), ("mistral", mistral(" [/INST]", "", "")), ("mistral", mistral(" [/INST]", "", " ")), ("mistral", mistral("[/INST]", " ", "")),
    ("mistral", mistral(" [/INST]", " ", "", "first")), ("mistral", mistral("[/INST]", " ", "", "last")), ("plain", PLAIN)]
UNKNOWN = [
    CHATML.replace("im_end", "im_stop"), CHATML.replace("'<|im_end|>\\n'", "'<|im_end|>'"), CHATML.replace("m.content", "m.content | trim"),
    "{% for m in messages %}{{ 'Q: ' + m.content }}{% endfor %}", "{{ strftime_now('%d') }}" + CHATML, "{% macro x() %}{% endmacro %}" + CHATML, "{% for m in", "{{", "", "{{ messages }}"]
END = {"chatml": "<|im_end|>", "zephyr": "</s>", "llama-2": "</s>", "llama-3": "<|eot_id|>", "mistral": "</s>", "plain": "</s>"}


def conversations(count=12):
    rng = random.Random(11)
    texts = ["How are you?", "Tell me\nmore.", "  padded \t", "\n\nlines\n", "caf\u00e9 \u4f60\u597d \U0001F44D", "<b> & 'quotes' \"too\"", "{{ braces }} {% tags %}", "\u00a0\u2003wide\u3000", "a\x1c"]
    out = []
    for i in range(count):
        messages = [{"role": "system", "content": rng.choice(texts)}] if i % 3 == 2 else []
        for turn in range(rng.choice([1, 1, 3, 5])):
            messages.append({"role": "assistant" if turn % 2 else "user", "content": rng.choice(texts)})
        out.append({"messages": messages, "answer": rng.choice(texts)})
    out.append({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "answer": "c"})
    return out


def render(jinja, messages, generation):
    try:
        return render_jinja_template([messages], chat_template=jinja, add_generation_prompt=generation, bos_token="<s>", eos_token="</s>")[0][0]
    except Exception as refusal:  # the template's own refusals come as TemplateError
        if "emplate" not in type(refusal).__name__:
            raise
        return None


def expected(name, jinja):
    """[prompt, response] of each conversation, null where the template refuses."""
    out = []
    for c in conversations():
        prompt = render(jinja, c["messages"], True)
        whole = render(jinja, c["messages"] + [{"role": "assistant", "content": c["answer"]}], False)
        # A template that renders a conversation otherwise once it is answered counts as refusing it: no prompt serves both.
        if prompt is None or whole is None or not whole.startswith(prompt):
            out.append(None)
            continue
        answer = whole[len(prompt):]
        out.append([prompt, answer[:answer.index(END[name]) + len(END[name])]])
    return out


def compare(files):
    from compare_tokenizers import build_encoder
    wrong = 0
    for file in files:
        jinja = Path(file).read_text(encoding="utf-8")
        request = {"jinja": jinja, "bos": "<s>", "eos": "</s>", "conversations": conversations()}
        result = subprocess.run([str(build_encoder()), "--template"], input=json.dumps(request).encode(), capture_output=True, check=True)
        ours = json.loads(result.stdout)
        if ours["name"] is None:
            print(f"{file}: none of the named templates")
            continue
        theirs = expected(ours["name"], jinja)
        bad = sum(a != b for a, b in zip(ours["rendered"], theirs))
        wrong += bad
        print(f"{file}: {ours['name']}, {len(theirs)} conversations ({sum(t is None for t in theirs)} refused by both), {bad} rendered otherwise")
    return wrong


def main():
    if sys.argv[1] == "--compare":
        sys.exit(1 if compare(sys.argv[2:]) else 0)
    rows = [{"name": name, "jinja": jinja, "rendered": expected(name, jinja)} for name, jinja in KNOWN]
    made = f"tools/make_template_fixtures.py: transformers {transformers.__version__}"
    document = {"made_by": made, "bos": "<s>", "eos": "</s>", "conversations": conversations(), "templates": rows, "unknown": UNKNOWN}
    Path(sys.argv[1]).write_text(json.dumps(document, indent=0) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
