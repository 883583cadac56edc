#!/usr/bin/env python3
"""Proofs that kernels are free of data races and of barriers that do not match, by sentryward (PyPI), which reads the
PTX that nvcc makes. No GPU. `make race-proof` runs all of them.

  race_proof.py [PATTERN]     only kernels whose name contains PATTERN

A proof holds for one launch (grid, block, scalars), every schedule and any contents of the tensors. So that races
between blocks and between rounds of a loop show, every launch has two blocks and two rounds at least. Not decided:
kernels where the contents of a tensor or of a list decide a branch or an address (rows by index, the head's target, the
optimiser's tensors). Not checked: bounds, unwritten memory, values.

Exit status 0: all free of races; 1: a race, or a kernel of the list that could not be decided."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

# file, kernel, grid, dynamic shared bytes, parameters: '*name' a pointer (equal names: the same memory), else a number
KERNELS = [
    ("norm", "norm_forward_kernel<true, false, orpo::bf16>", 2, 0,
     "*out *sum *mean *rstd *residual *branch *weight *bias 4104 1e-5"),
    ("norm", "norm_forward_kernel<false, true, float>", 2, 0,
     "*out *sum *mean *rstd *residual *branch *weight *bias 1027 1e-5"),
    ("norm", "norm_backward_kernel<true, false, float>", 2, 1032 * 4,
     "*dsum *partials *out *dout *sum *mean *rstd *weight *bias 5 1032 1032 false true"),
    ("norm", "norm_backward_kernel<false, true, orpo::bf16>", 2, 0,
     "*dsum *partials *dout *dout *sum *mean *rstd *weight *bias 5 2051 2056 true false"),
    ("norm", "add_partials_kernel", 2, 0, "*dweight *dbias *partials 3 300 304"),
    ("linear", "fill_rows_kernel<false, float, orpo::bf16>", 2, 0, "*out *bias 3 170 176"),
    ("linear", "fill_rows_kernel<true, orpo::bf16, orpo::bf16>", 2, 0, "*out *bias 3 170 176"),
    ("linear", "column_sums_kernel<true, orpo::bf16>", 2, 0, "*sums *x 30 504 512 17"),
    ("linear", "column_sums_kernel<false, float>", 2, 0, "*sums *x 30 201 203 17"),
    ("activation", "activation_forward_kernel<true, 0, orpo::bf16>", 2, 0, "*out *gate_up 3 1000 125"),
    ("activation", "activation_forward_kernel<false, 1, float>", 2, 0, "*out *gate_up 3 1000 125"),
    ("activation", "activation_backward_kernel<true, 0, orpo::bf16>", 2, 0, "*gate_up *dout *dout *gate_up 3 1000 125"),
    ("activation", "activation_backward_kernel<false, 2, float>", 2, 0, "*gate_up *dout *dout *gate_up 5 397 100"),
    ("attention_backward", "delta_kernel<true, orpo::bf16>", 2, 0, "*delta *dout *out 2 20 64 8"),
    ("attention_backward", "delta_kernel<false, float>", 2, 0, "*delta *dout *out 2 9 100 16"),
]
BLOCK = {"norm": 256, "linear": 256, "activation": 256, "attention_backward": 128}


def rewrite(ptx):
    """In terms of what sentryward reads: constant bfi by shifts and masks; source lines as comments."""
    def bfi(m):  # d = b with its bits [p, p + n) replaced by the low bits of a
        d, a, b, p, n = m[1], m[2], m[3], int(m[4]), int(m[5])
        mask = ((1 << n) - 1) << p & 0xFFFFFFFF
        signed = lambda v: v - (1 << 32) if v >> 31 else v
        return (f"{{ .reg .b32 %bfa, %bfb; shl.b32 %bfa, {a}, {p}; and.b32 %bfa, %bfa, {signed(mask)}; "
                f"and.b32 %bfb, {b}, {signed(~mask & 0xFFFFFFFF)}; or.b32 {d}, %bfa, %bfb; }}")

    ptx = re.sub(r"\bbfi\.b32\s+(%\w+), (%\w+), (%\w+), (\d+), (\d+);", bfi, ptx)
    return re.sub(r"^(\s*)\.loc\b", r"\1//.loc", ptx, flags=re.M)


def find_entry(ptx, name):
    """The kernel's mangled name and the types of its parameters (u64, u32, f32, ...)."""
    entries = dict(re.findall(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)", ptx))
    plain = subprocess.run(["c++filt", *entries], capture_output=True, text=True).stdout.splitlines()
    plain = [re.sub(r"\((?:int|bool|orpo::Activation)\)(?=[\w-])", "", p.replace("(anonymous namespace)::", "")) for p in plain]
    plain = [p.split("(")[0].removeprefix("void ").removeprefix("orpo::") for p in plain]
    hits = [e for e, p in zip(entries, plain) if p == name]
    if len(hits) != 1:
        raise LookupError(f"no kernel {name}; the file has {', '.join(plain)}")
    return hits[0], re.findall(r"\.param\s+(?:\.align \d+\s+)?\.(\w+)", entries[hits[0]])


def analyse(ptx_path, file, name, grid, shared, parameters, folder):
    """sentryward's report of one launch."""
    entry, types = find_entry(open(ptx_path).read(), name)
    given = parameters.split()
    if len(given) != len(types):
        raise LookupError(f"{name} has {len(types)} parameters, the list gives {len(given)}")
    number = lambda t, a: float(a) if t[0] == "f" else int({"true": "1", "false": "0"}.get(a, a))
    launch = {"grid_dim": [grid, 1, 1], "block_dim": [BLOCK[file], 1, 1]}
    if shared:
        launch["dynamic_shared_bytes"] = shared
    request = {
        "schema": "spverify.kernel-input/v1", "entry": entry, "launch": launch,
        "declarations": [{"parameter": i, "type": "pointer", "space": "global", "object": a[1:]}
                         for i, a in enumerate(given) if a[0] == "*"],
        "arguments": [{"parameter": i, "type": types[i], "value": number(types[i], a)}
                      for i, a in enumerate(given) if a[0] != "*"]}
    with open(folder + "/request.json", "w") as f:
        json.dump(request, f)
    tool = os.path.join(os.path.dirname(sys.executable), "sentryward")
    ran = subprocess.run([tool, ptx_path, "--input", folder + "/request.json", "--timeout", "300",
                          "--memory-limit-mib", "4000"], capture_output=True, text=True)
    return json.loads(ran.stdout) if ran.stdout.startswith("{") else {"result": (ran.stderr + ran.stdout)[-300:]}


def place(ptx, line):
    """The source line that a line of PTX comes from."""
    lines = ptx.splitlines()
    files = {m[1]: os.path.basename(m[2]) for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
    for text in reversed(lines[:line]):
        if m := re.match(r"\s*//\.loc\s+(\d+) ([1-9]\d*) ", text):
            return f"{files.get(m[1])}:{m[2]}"
    return f"PTX line {line}"


def verdict(report, ptx):
    if report["result"] == "race_free" and all(report["checks"][c] == "passed" for c in ("memory", "synchronization")):
        return "race free"
    if report["result"] == "potential_race":
        side = lambda a: f"{a['mode']} at {place(ptx, a['location']['line'])}"
        return "RACE: " + "; ".join(sorted({f"{side(r['first'])}, {side(r['second'])}" for r in report["races"]})[:3])
    why = "; ".join(f"{d.get('code')}: {d.get('message') or ''}" for d in report.get("diagnostics", [])[:2])[:300]
    return f"UNDECIDED ({report['result']}) {why}"


def main():
    wanted = [k for k in KERNELS if sys.argv[1:] == [] or sys.argv[1] in k[1]]
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:
        print("race_proof.py: needs nvcc")
        return 1
    proven = 0
    with tempfile.TemporaryDirectory() as folder:
        for file in dict.fromkeys(k[0] for k in wanted):
            path = f"{folder}/{file}.ptx"
            subprocess.run([nvcc, "-std=c++20", "-O3", "-ptx", "-lineinfo", "-arch=sm_80", "-I.", f"cuda/{file}.cu",
                            "-o", path], check=True)
            ptx = rewrite(open(path).read())
            open(path, "w").write(ptx)
            for _, name, grid, shared, parameters in (k for k in wanted if k[0] == file):
                start = time.time()
                try:
                    said = verdict(analyse(path, file, name, grid, shared, parameters, folder), ptx)
                except LookupError as error:  # the list above is older than the kernel
                    said = f"UNDECIDED: {error}"
                print(f"{name:48} {said} ({time.time() - start:.1f} s)", flush=True)
                proven += said == "race free"
    print(f"{proven} passed, {len(wanted) - proven} failed")
    return proven != len(wanted)


sys.exit(main())
