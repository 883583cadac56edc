#!/usr/bin/env python3
"""What ptxas says of each kernel: registers, spills, shared memory. `make gpu-report` makes the logs.

  gpu_report.py LOG...     LOG: stderr of nvcc -Xptxas -v for one or more architectures

Prints a table. Exit status 1 where a kernel spills registers or a log holds no kernel."""
import re
import subprocess
import sys


def demangle(names):
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    clean = lambda s: re.sub(r"^void |orpo::|\(anonymous namespace\)::|\((?:bool|int)\)", "", s)
    return dict(zip(names, (clean(s).split("(")[0] for s in plain)))


def kernels(text):
    """(kernel, architecture, registers, spilled bytes, shared bytes) in the order of the log."""
    pattern = (r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
               r".*?Used (\d+) registers([^\n]*)")
    for name, arch, stores, loads, registers, rest in re.findall(pattern, text, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        yield name, arch, int(registers), int(stores) + int(loads), int(shared[1]) if shared else 0


def main():
    bad = 0
    rows = []
    for path in sys.argv[1:]:
        found = list(kernels(open(path).read()))
        if not found:
            print(f"{path}: no kernel in it", file=sys.stderr)
            bad = 1
        rows += found
    names = demangle(sorted({r[0] for r in rows}))
    print(f"{'kernel':60} {'':8} {'registers':>9} {'spilled':>8} {'shared':>7}")
    for name, arch, registers, spilled, shared in sorted(set(rows), key=lambda r: (names[r[0]], r[1])):
        print(f"{names[name][:60]:60} {arch:8} {registers:9} {spilled:8} {shared:7}" + (" SPILLS" if spilled else ""))
        bad |= spilled > 0
    print(f"{len(names)} kernels, {len({r[0] for r in rows if r[3]})} spill")
    return bad


sys.exit(main())
