#!/usr/bin/env python3
"""What ptxas says of each kernel: registers, spills, shared memory. `make gpu-report` makes the logs.

  gpu_report.py LOG...     LOG: stderr of nvcc -Xptxas -v for one or more architectures

Prints a table. Exit status 1 where a kernel spills registers or a log cannot be read."""
import re
import subprocess
import sys


def demangle(names):
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    clean = lambda s: re.sub(r"^void |orpo::|\(anonymous namespace\)::|\((?:bool|int|orpo::Activation)\)", "", s)
    return dict(zip(names, (clean(s).split("(")[0] for s in plain)))


def kernels(text):
    """(kernel, architecture, registers, spilled bytes, shared bytes) in the order of the log. A file of host code alone
    has none; ValueError where a log is not one of ptxas's, or does not say of a kernel what it should."""
    if not re.search(r"^ptxas info +: \d+ bytes gmem", text, re.M):
        raise ValueError("not what ptxas -v prints")
    for entry in text.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)' for '(\w+)'", entry)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers([^\n]*)", entry)
        if not (name and spills and registers):
            raise ValueError(f"no registers or spills of the kernel {entry.splitlines()[0]}")
        shared = re.search(r"(\d+) bytes smem", registers[2])
        yield (name[1], name[2], int(registers[1]), int(spills[1]) + int(spills[2]), int(shared[1]) if shared else 0)


def main():
    bad = 0
    rows = []
    for path in sys.argv[1:]:
        try:
            rows += kernels(open(path).read())
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            bad = 1
    names = demangle(sorted({r[0] for r in rows}))
    print(f"{'kernel':60} {'':8} {'registers':>9} {'spilled':>8} {'shared':>7}")
    for name, arch, registers, spilled, shared in sorted(set(rows), key=lambda r: (names[r[0]], r[1])):
        print(f"{names[name][:60]:60} {arch:8} {registers:9} {spilled:8} {shared:7}" + (" SPILLS" if spilled else ""))
        bad |= spilled > 0
    print(f"{len(names)} kernels, {len({r[0] for r in rows if r[3]})} spill")
    return bad


sys.exit(main())
