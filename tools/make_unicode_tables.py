#!/usr/bin/env python3
"""Writes tokenizer/unicode_tables.inc: the character classes and compositions that Hugging Face tokenizers work with.

    pip install tokenizers==0.23.3 && python3 tools/make_unicode_tables.py tokenizer/unicode_tables.inc

The classes are not taken from one Unicode version: each is measured by asking the tokenizers library about every code
point, because its regular expression engine, its standard library and its normaliser each carry a version of their own.
"""
import sys
import unicodedata

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

POINTS = [c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]  # NUL is set by hand below: no class


def matched_by(pattern, size=4096):
    """Code points that a one-character pattern of the regular expression engine matches."""
    remove = pre_tokenizers.Split(Regex(pattern), "removed")
    found = set()
    for i in range(0, len(POINTS), size):
        block = POINTS[i:i + size]
        kept = {ord(x) for text, _ in remove.pre_tokenize_str("".join(map(chr, block))) for x in text}
        found.update(c for c in block if c not in kept)
    return found


def digits(size=2048):
    """Code points that the Digits pre-tokenizer isolates."""
    split = pre_tokenizers.Digits(individual_digits=True)
    found = set()
    for i in range(0, len(POINTS), size):
        text = "A".join(map(chr, POINTS[i:i + size]))
        found.update(ord(p) for p, _ in split.pre_tokenize_str(text) if len(p) == 1 and p != "A")
    return found


def word_characters():
    """Code points that stop a single_word added token when they stand before it."""
    tokenizer = Tokenizer(models.BPE(vocab={"x": 0}, merges=[]))
    tokenizer.add_tokens([AddedToken("@@", single_word=True, normalized=False)])
    found = set()
    for i in range(0, len(POINTS), 8192):
        block = POINTS[i:i + 8192]
        encoded = tokenizer.encode_batch([chr(c) + "@@" for c in block], add_special_tokens=False)
        found.update(c for c, e in zip(block, encoded) if 1 not in e.ids)
    return found


def canonical():
    """First-level canonical decompositions (code point, first, second or 0, composes) and combining classes."""
    nfc = normalizers.NFC()
    rows = []
    for c in POINTS:
        parts = unicodedata.decomposition(chr(c)).split()
        if not parts or parts[0].startswith("<"):
            continue
        parts = [int(p, 16) for p in parts]
        text = "".join(map(chr, parts))
        composes = len(parts) == 2 and nfc.normalize_str(unicodedata.normalize("NFC", text)) == chr(c)
        if nfc.normalize_str(text) != unicodedata.normalize("NFC", text):
            if nfc.normalize_str(text) != text or nfc.normalize_str(chr(c)) != chr(c):
                raise SystemExit(f"U+{c:04X}: the library composes otherwise than this Python's Unicode")
            continue  # younger than the library's tables: it leaves both spellings alone
        rows.append((c, parts[0], parts[1] if len(parts) == 2 else 0, int(composes)))
    classes = {c: unicodedata.combining(chr(c)) for c in POINTS if unicodedata.combining(chr(c))}
    below, above = chr(0x0323), chr(0x0345)  # classes 220 and 240 bracket nearly all others
    for c in list(classes):
        probes = ["x" + below + chr(c), "x" + chr(c) + below, "x" + above + chr(c), "x" + chr(c) + above]
        if any(nfc.normalize_str(p) != unicodedata.normalize("NFC", p) for p in probes):
            if any(nfc.normalize_str(p) != p for p in probes):
                raise SystemExit(f"U+{c:04X}: the library orders it otherwise than this Python's Unicode")
            del classes[c]  # younger than the library's tables: a starter there
    return rows, classes


def ranges(values):
    """{code point: value} to [(first, last, value)]."""
    out = []
    for c in sorted(values):
        if out and out[-1][1] == c - 1 and out[-1][2] == values[c]:
            out[-1][1] = c
        else:
            out.append([c, c, values[c]])
    return out


def table(name, type_name, rows):
    lines, line = [], " "
    for row in rows:
        item = " {" + ",".join(f"0x{x:x}" if x > 9 else str(x) for x in row) + "},"
        if len(line) + len(item) > 119:
            lines.append(line)
            line = " "
        line += item
    lines.append(line)
    return f"constexpr {type_name} {name}[] = {{\n" + "\n".join(lines) + "\n};\n"


def main():
    letters, numbers, spaces = matched_by(r"\p{L}"), matched_by(r"\p{N}"), matched_by(r"\s")
    numerics, words = digits(), word_characters()
    decompositions, combining = canonical()
    # What can change under NFC: marks, second halves of compositions, and characters that do not compose back.
    check = set(combining) | {b for _, _, b, composes in decompositions if composes and b}
    check |= {c for c, _, _, composes in decompositions if not composes} | set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))
    classes = {}
    for bit, members in enumerate((letters, numbers, spaces, numerics, words, check)):
        for c in members:
            classes[c] = classes.get(c, 0) | 1 << bit
    with open(sys.argv[1], "w", encoding="ascii") as out:
        out.write("// Written by tools/make_unicode_tables.py: measured on tokenizers " + tokenizers.__version__
                  + ", compositions from Unicode " + unicodedata.unidata_version + ". Do not edit.\n")
        out.write(table("class_ranges", "ClassRange", ranges(classes)))
        out.write(table("combining_ranges", "ClassRange", ranges(combining)))
        out.write(table("decompositions", "Decomposition", decompositions))


if __name__ == "__main__":
    main()
