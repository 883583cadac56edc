"""Rates that others measured, each with its source; what no source was found for is an Assumption with a range. The
step model takes its efficiencies from here alone. None of them comes from the runs that it is tried on (runs.py).

TFLOP/s and GB/s throughout."""
from bisect import bisect_left
from dataclasses import dataclass

from .machines import A100, H100


@dataclass(frozen=True)
class Value:
    low: float
    mid: float
    high: float
    source: str
    assumed: bool = False  # no measurement was found: a guess, and its range


MAMF = "stas00/ml-engineering, compute/accelerator, table of maximum achievable matmul FLOPS"
FA2 = "FlashAttention-2 (arXiv 2307.08691)"
FA3 = "FlashAttention-3 (arXiv 2407.08608)"

# bf16 matrix products of thousands of rows.
#   A100: cuBLAS 258 at 8192^3, 257 for normally distributed inputs (thonking.ai, "Strangely, Matrix Multiplications on
#   GPUs Run Faster When Given Predictable Data"); 271.2 at the best shape of a search (MAMF: 1024 x 10240 x 5120).
#   H100: torch's bf16 product beside vLLM's fp8 kernels on an H100 80GB HBM3: n 2112, k 7168 and 4096 / 8192 rows 716 /
#   666, another n and 8192 / 16384 rows 703 / 715 (vllm-project/vllm pull request 23280); 794.5 at the best shape of a
#   search (MAMF: 2048 x 2048 x 13312); 585 at 8192^3 on a card held to 500 W (pytorch/FBGEMM pull request 2546).
GEMM = {
    A100: Value(245, 257, 271, "thonking.ai; " + MAMF),
    H100: Value(585, 700, 794, "vllm pull request 23280; FBGEMM pull request 2546; " + MAMF),
}
# The same with few rows, as a share of the rate with 8,192: 566, 620 and 648 of 700 with 512, 1,024 and 2,048 rows
# (vLLM, as above; the A100, with fewer processors to fill, is taken to be the same).
GEMM_ROWS = ((512, 0.81), (1024, 0.886), (2048, 0.926), (8192, 1.0))
# A tile's loop over k fills its pipeline before it multiplies at full rate: k / (k + fill).
GEMM_FILL = Value(64, 128, 192, "four stages of 32", assumed=True)
# fp8 on the H100, scaling of the rows included: 932 at 8192^3, 1024 at 65536 x 8192 x 7168, where bf16 reached 585 and
# 575 on the same card of 500 W: 1.6 to 1.78 times (pytorch/FBGEMM pull request 2546). 1402.6 at the best shape (MAMF).
FP8_OVER_BF16 = Value(1.6, 1.69, 1.78, "pytorch/FBGEMM pull request 2546")

# Attention under a causal mask by sequence length, TFLOP/s with half the square counted; backward: 2.5 x forward.
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
H100_FORWARD_64 = (180, 229, 262, 284, 295, 299)   # FA3, figure 5: FlashAttention-2, head size 64, causal
H100_FORWARD_128 = (191, 260, 298, 319, 333, 335)  # the same, head size 128
H100_FULL_64 = (282, 306, 318, 321, 322, 324)      # the same without a mask
H100_FULL_128 = (309, 350, 362, 368, 370, 370)
H100_BACKWARD_64 = (198, 238, 264, 279, 287, 291)  # FA3, figure 6, backward without a mask
H100_BACKWARD_128 = (214, 260, 291, 310, 318, 322)
A100_BOTH_64 = (88, 119, 140, 156, 165, 171)       # FA2, figure 4c: forward and backward, head size 64, causal
CUDNN_FORWARD_64 = (225, 288, 334, 363, 379, 388)  # FA3, figure 5: cuDNN on the H100, causal
CUDNN_FULL_64 = (335, 373, 395, 408, 412, 413)
CUDNN_BACKWARD_64 = (266, 348, 395, 417, 432, 433)
FA3_FORWARD_128 = (292, 423, 521, 579, 602, 616)   # FA3, figure 5: FlashAttention-3, causal
FA3_FULL_128 = (467, 565, 625, 638, 646, 648)
FA3_BACKWARD_128 = (316, 424, 501, 542, 559, 561)


def masked(backward, forward, full):
    """A backward rate under the mask, from the one without it: it is taken to lose what the forward pass loses."""
    return tuple(b * f / u for b, f, u in zip(backward, forward, full))


def wider(rates):
    """From head size 64 to 128 on the A100: taken to gain what it gains on the H100."""
    return tuple(r * w / n for r, w, n in zip(rates, H100_FORWARD_128, H100_FORWARD_64))


# program -> machine -> (smallest head size, forward, backward) in ascending order of head size
ATTENTION = {
    "mma.sync": {  # FlashAttention-2's kernels, what ours are modelled on
        A100: ((64, A100_BOTH_64, A100_BOTH_64), (80, wider(A100_BOTH_64), wider(A100_BOTH_64))),
        H100: ((64, H100_FORWARD_64, masked(H100_BACKWARD_64, H100_FORWARD_64, H100_FULL_64)),
               (80, H100_FORWARD_128, masked(H100_BACKWARD_128, H100_FORWARD_128, H100_FULL_128))),
    },
    "cuDNN": {  # no figures for the A100 were found: taken to be FlashAttention-2's
        A100: ((64, A100_BOTH_64, A100_BOTH_64), (80, wider(A100_BOTH_64), wider(A100_BOTH_64))),
        H100: ((64, CUDNN_FORWARD_64, masked(CUDNN_BACKWARD_64, CUDNN_FORWARD_64, CUDNN_FULL_64)),),
    },
    "wgmma": {  # FlashAttention-3's
        H100: ((64, FA3_FORWARD_128, masked(FA3_BACKWARD_128, FA3_FORWARD_128, FA3_FULL_128)),),
    },
}
# What another kernel of the same kind reaches of those rates.
ATTENTION_SHARE = Value(0.7, 1.0, 1.0, "ours has not run: at worst this share of FlashAttention-2's", assumed=True)

# Collectives of eight GPUs behind NVSwitches, bus bandwidth (nccl-tests' definition).
#   A100: 200 (NVIDIA/nccl-tests issue 149), 220 (issue 228).
#   H100: all-reduce 480 with the switches' own sums, 370 for the others (the maintainer in NVIDIA/nccl-tests issue 212;
#   482 and 368 on the H200's same links, stas00/ml-engineering, network/benchmarks/results/all-reduce-8xH200).
BUS = {
    A100: Value(200, 210, 220, "NVIDIA/nccl-tests issues 149, 228"),
    H100: Value(340, 370, 370, "NVIDIA/nccl-tests issue 212; stas00/ml-engineering, all-reduce-8xH200"),
}
# Of the memory's published bandwidth. BabelStream's triad on a GH200 reached 3.31 of 4.0 TB/s, its copy 2.98
# (UoB-HPC/BabelStream issue 194); nothing for kernels like ours.
HBM_SHARE = Value(0.75, 0.85, 0.92, "around UoB-HPC/BabelStream issue 194", assumed=True)
LAUNCH_GAP = Value(1e-6, 2e-6, 4e-6, "seconds between two kernels of a stream", assumed=True)
# Share of the collectives' time that computing does not hide.
EXPOSED = Value(0.0, 0.3, 1.0, "none hidden at worst; our collectives are not written", assumed=True)


def interpolate(points, x):
    """Between (x, y) points in log x; the ends hold beyond them."""
    from math import log
    xs = [p[0] for p in points]
    i = bisect_left(xs, x)
    if i == 0 or i == len(points):
        return points[min(i, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * log(x / x0) / log(x1 / x0)


def attention_rate(program, machine, head, length):
    """(forward, backward) FLOP/s under a causal mask"""
    table = [t for t in ATTENTION[program][machine] if t[0] <= max(head, 64)][-1]
    return tuple(1e12 * interpolate(tuple(zip(LENGTHS, rates)), length) for rates in table[1:])
