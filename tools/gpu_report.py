#!/usr/bin/env python3
"""What can be known of the kernels without a GPU. `make gpu-report` compiles them and passes the logs.

  gpu_report.py LOG...     LOG: stderr of nvcc -Xptxas -v for sm_80 and sm_90a

First every kernel as ptxas sees it (registers, spills, shared memory) and how many blocks an SM holds; then what one
launch does in training Mistral-7B and Phi-2 and its roofline time, the time that it cannot be faster than. Whole steps
are tools/step_model.py's.

Exit status 1 where a kernel spills registers or fits no SM, a log cannot be read, or tools/gpu/kernels.py does not know
a kernel, or a step's operation has none."""
import re
import subprocess
import sys

from gpu.costs import Job, calls
from gpu.kernels import ELSEWHERE, KERNELS
from gpu.machines import A100, H100, MACHINES
from gpu.shapes import MISTRAL_7B, PAIRS, PHI_2

JOBS = (Job(MISTRAL_7B, PAIRS), Job(PHI_2, PAIRS))


def demangle(names):
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    clean = lambda s: re.sub(r"^void |orpo::|\(anonymous namespace\)::|\((?:bool|int|orpo::Activation)\)", "", s)
    return dict(zip(names, (clean(s).split("(")[0] for s in plain)))


def parse(text):
    """(mangled kernel, architecture, registers, spilled bytes, shared bytes) in the order of the log. A file of host
    code alone has none; ValueError where a log is not one of ptxas's, or does not say of a kernel what it should."""
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


def read(paths):
    """({plain name: {architecture: (registers, spilled, shared)}}, complaints)"""
    rows, complaints = [], []
    for path in paths:
        try:
            rows += parse(open(path).read())
        except ValueError as error:
            complaints.append(f"{path}: {error}")
    names = demangle(sorted({r[0] for r in rows}))
    kernels = {}
    for name, arch, *numbers in rows:
        kernels.setdefault(names[name], {})[arch] = tuple(numbers)
    return kernels, complaints


def split(name):
    """copy_rows_kernel<true, float> -> its name and its template's arguments"""
    base, _, rest = name.partition("<")
    return base, [a.strip() for a in rest.rstrip(">").split(",")] if rest else []


def resources(kernels):
    """Prints the first table; returns complaints."""
    complaints = []
    print("Each kernel on sm_80 (A100) and sm_90a (H100). shared: static + dynamic bytes of a block, Mistral-7B's where")
    print("they depend on the model; blocks and warps: what an SM holds, of 64 warps at most.")
    print(f"  {'kernel':52} {'threads':>7} {'registers':>10} {'spilled':>8} {'shared':>15} {'blocks':>8} {'warps':>8}")
    for name, found in sorted(kernels.items()):
        base, args = split(name)
        if base not in KERNELS:
            complaints.append(f"{name}: not in the table of tools/gpu/kernels.py (threads, shared memory, costs)")
            continue
        kernel = KERNELS[base]
        dynamic, threads = kernel.shared(args, JOBS[0]), kernel.threads_of(args)
        columns = []
        for machine in MACHINES:
            if machine.arch not in found:
                complaints.append(f"{name}: not compiled for {machine.arch}")
                continue
            registers, spilled, static = found[machine.arch]
            blocks, warps = machine.occupancy(threads, registers, static + dynamic)
            columns.append((registers, spilled, static, blocks, warps))
            if spilled:
                complaints.append(f"{name}: spills {spilled} bytes of registers on {machine.arch}")
            if blocks == 0:
                complaints.append(f"{name}: no block fits an SM of {machine.arch}")
        if len(columns) == len(MACHINES):
            pair = lambda i: " ".join(str(c[i]) for c in columns)
            print(f"  {name:52} {threads:7} {pair(0):>10} {pair(1):>8} {f'{columns[0][2]} + {dynamic}':>15} "
                  f"{pair(3):>8} {pair(4):>8}")
    unused = sorted(set(KERNELS) - {split(name)[0] for name in kernels})
    complaints += [f"{name}: in the table of tools/gpu/kernels.py, in no log" for name in unused]
    return complaints


def amount(x):
    for prefix in " kMGT":
        if x < 999.5:
            return f"{x:.3g}{prefix}"
        x /= 1000
    return f"{x:.3g}P"


def launches(kernels):
    """Prints the second table; returns complaints."""
    complaints = []
    b = PAIRS
    tera = lambda x: f"{x / 1e12:.4g}"
    print(f"\nA launch in training: bf16, a micro-batch of {b.pairs} pairs ({b.prompt} prompt, {b.chosen} chosen, "
          f"{b.rejected} rejected tokens), {b.rows:,} rows,\n{b.targets:,} targets; logits in chunks of 128 MiB, the "
          "optimizer's tensors dealt to 8 GPUs. times: a micro-batch (optimizer: a step).\nRoofline: the longer of "
          f"bytes / {tera(A100.hbm)} and {tera(H100.hbm)} TB/s and FLOPs / {tera(A100.bf16)} and {tera(H100.bf16)} "
          f"TFLOP/s of tensor cores, {tera(A100.fp32)} and {tera(H100.fp32)} of others.")
    for job in JOBS:
        print(f"\n  {job.model.name:35} {'kernel':42} {'times':>5} {'blocks':>7} {'FLOPs':>8} {'bytes':>8} "
              f"{'A100 us':>7} {'H100 us':>7}")
        done = set(ELSEWHERE)
        for name in sorted(kernels):
            base, args = split(name)
            for what, call, blocks in KERNELS[base].works(args, job) if base in KERNELS else []:
                done.add(what)
                times = [1e6 * max(call.bytes / m.hbm, call.tensor_flops / m.bf16 + call.flops / m.fp32)
                         for m in MACHINES]
                flops = call.flops + call.tensor_flops
                print(f"  {what:35} {name:42} {call.count:5} {blocks:7,} {amount(flops):>8} {amount(call.bytes):>8} "
                      f"{times[0]:7.1f} {times[1]:7.1f}")
        complaints += [f"{job.model.name}: no kernel launches {what} (tools/gpu/kernels.py)"
                       for what, call in calls(job).items() if call.count and what not in done]
        more = job.batch.tile_pairs(64, 64) / job.batch.visible()
        print(f"  attention's tiles of 64 x 64 multiply {more:.2f} times the visible pairs, which alone count")
    print("  not by kernels of ours: " + "; ".join(f"{what} ({why})" for what, why in ELSEWHERE.items()))
    return complaints


def main():
    kernels, complaints = read(sys.argv[1:])
    complaints += resources(kernels)
    complaints += launches(kernels)
    spilling = sum(any(s for _, s, _ in found.values()) for found in kernels.values())
    print(f"\n{len(kernels)} kernels, {spilling} spill")
    for line in complaints:
        print(line, file=sys.stderr)
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
