#!/usr/bin/env python3
"""Step time, tokens/s and MFU on eight GPUs, from counts of what a step does (gpu/costs.py) and rates that others
measured (gpu/measurements.py). No GPU has run this code: these are predictions.

  step_model.py            on published runs that it was not fitted to; Mistral-7B and Phi-2 with their range; what
                           would close the distance to 65% of peak
  step_model.py --check    its own test: counts against brute force, errors on the published runs as stated here

Exit status 1 where a check fails."""
import sys
from dataclasses import replace

from gpu.check import check
from gpu.costs import Job
from gpu.machines import A100, H100, MACHINES
from gpu.measurements import FP8_OVER_BF16, GEMM
from gpu.runs import RUNS
from gpu.shapes import MISTRAL_7B, PAIRS, PHI_2
from gpu.step import memory, rates, step


def percent(x):
    return f"{100 * x:.0f}%"


def published():
    print("\nPublished runs, tokens/s of 8 GPUs. alike: C++ and CUDA, fused as ours. The others: PyTorch, which moves\n"
          "more bytes than counted and gathers weights layer by layer (FSDP): the model, being ours, is above them.")
    print(f"  {'run':24} {'GPU':5} {'published':>10} {'predicted':>10} {'error':>7}   {'range':21} alike")
    for run in RUNS:
        low, mid, high = (step(run.job, rates(run.machine, run.attention, w)).rows_per_second
                          for w in ("low", "mid", "high"))
        error = 100 * (mid / run.tokens_per_second - 1)
        print(f"  {run.name:24} {run.machine.name[:4]:5} {run.tokens_per_second:10,.0f} {mid:10,.0f} {error:+6.1f}%   "
              f"{low:9,.0f} to {high:9,.0f} {'yes' if run.alike else 'no'}")
    print("  sources:")
    for source in dict.fromkeys(run.source for run in RUNS):
        print(f"    {source}")


def ours():
    b = PAIRS
    print(f"\nThis trainer: bf16, fp32 gradients, AdamW, ZeRO stage 1, no recomputation; pairs of {b.prompt} prompt, "
          f"{b.chosen} chosen and {b.rejected}\nrejected tokens, {b.rows:,} rows a micro-batch on each of 8 GPUs. "
          "Attention at FlashAttention-2's rates. Not written yet:\ncollectives; Phi-2's block. MFU against dense bf16 "
          "peak, useful FLOPs only.")
    print(f"  {'model':10} {'GPU':4} {'pairs a step':>12} {'step s':>7} {'tokens/s':>9} {'range':>19} {'MFU':>4} "
          f"{'range':>10}  where a step's time goes")
    for model in (MISTRAL_7B, PHI_2):
        for machine in MACHINES:
            for micros in (1, 8):
                job = Job(model, b, micros)
                low, mid, high = (step(job, rates(machine, which=w)) for w in ("low", "mid", "high"))
                parts = ", ".join(f"{name} {percent(s / mid.seconds)}" for name, s in mid.parts.items())
                print(f"  {model.name:10} {machine.name[:4]:4} {8 * micros * b.pairs:12} {mid.seconds:7.2f} "
                      f"{mid.rows_per_second:9,.0f} {low.rows_per_second:8,.0f} to {high.rows_per_second:7,.0f} "
                      f"{percent(mid.mfu):>4} {percent(low.mfu)} to {percent(high.mfu)}  {parts}")
        held = memory(Job(model, b))
        print(f"  {model.name} on a GPU: " + ", ".join(f"{what} {x / 1e9:.1f}" for what, x in held.items()) +
              f": {sum(held.values()) / 1e9:.1f} GB")


def steps_to_65():
    """name -> (change of the job, change of the rates)"""
    same = lambda x: x
    wgmma = lambda r: replace(r, attention="wgmma", attention_share=1.0)
    best = lambda r: replace(r, gemm=1e12 * GEMM[r.machine].high)
    fp8 = lambda r: replace(r, fp8=FP8_OVER_BF16.mid)
    hidden = lambda r: replace(r, exposed=0.0)
    fused = lambda r: replace(r, hbm_passes=2 / 3)
    chunks = lambda j: replace(j, logits_bytes=1 << 30)
    return {
        "as it is": (same, same),
        "attention by wgmma and TMA, at FlashAttention-3's rates": (same, wgmma),
        "products at the best rate measured, not the usual one": (same, best),
        "collectives hidden": (same, hidden),
        "a third less traffic in the other calls (norm, activation, rotary fused into products)": (same, fused),
        "logits in chunks of 1 GiB, not 128 MiB": (chunks, same),
        "all of these": (chunks, lambda r: wgmma(best(hidden(fused(r))))),
        "fp8 products of the layers, scaled by rows": (same, fp8),
        "fp8 and all of the others": (chunks, lambda r: fp8(wgmma(best(hidden(fused(r)))))),
    }


def distance():
    print("\nWhat would close the distance to 65% of peak on the H100: MFU with 64 and 512 pairs a step, fp8's too of "
          "bf16's peak.")
    print(f"  {'':88} {'Mistral-7B':>12} {'Phi-2':>12}")
    for name, (change_job, change_rates) in steps_to_65().items():
        shares = [percent(step(change_job(Job(model, PAIRS, micros)), change_rates(rates(H100))).mfu)
                  for model in (MISTRAL_7B, PHI_2) for micros in (1, 8)]
        print(f"  {name:88} {shares[0]:>5}, {shares[1]:>5} {shares[2]:>5}, {shares[3]:>5}")
    for model in (MISTRAL_7B, PHI_2):
        needed = next((tflops for tflops in range(500, 990)
                       if step(Job(model, PAIRS, 8), replace(rates(H100), gemm=tflops * 1e12)).mfu >= 0.65), None)
        print(f"  {model.name}, 512 pairs: 65% needs products at " +
              (f"{needed} TFLOP/s" if needed else "more than the peak") +
              f", all else as it is; measured: {GEMM[H100].low:.0f} to {GEMM[H100].high:.0f}.")
    a100 = step(Job(MISTRAL_7B, PAIRS, 8), rates(A100)).mfu
    print(f"  The A100 is past it where products reach {GEMM[A100].mid:.0f} TFLOP/s: Mistral-7B {percent(a100)}.")


def main():
    if sys.argv[1:] == ["--check"]:
        return check()
    if sys.argv[1:]:
        print(__doc__, file=sys.stderr)
        return 2
    published()
    ours()
    distance()
    return 0


if __name__ == "__main__":
    sys.exit(main())
