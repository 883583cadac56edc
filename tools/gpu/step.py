"""Seconds of a training step on eight GPUs, from what it does (costs.py) and what others measured (measurements.py).

    products      FLOPs / (rate x share with few rows x k / (k + fill)) + bytes of fp32 results / bandwidth
    attention     FLOPs / the measured rate at the sequence's length
    other calls   max(bytes / bandwidth, FLOPs / peak)
    launches      a gap each
    collectives   gradients summed over the GPUs (reduce-scatter), weights given out (all-gather): (n - 1) / n x bytes /
                  bus bandwidth each, but for what computing hides"""
from dataclasses import dataclass, replace

from . import measurements as measured
from .costs import Job, attention_flops, calls, products
from .shapes import useful_flops


@dataclass(frozen=True)
class Rates:
    """What a kind of operation reaches on a machine."""
    machine: object
    gemm: float             # FLOP/s with many rows and a long k
    fill: float
    attention: str          # a program of measurements.ATTENTION
    attention_share: float
    hbm: float              # bytes/s
    bus: float
    gap: float
    exposed: float
    fp8: float = 1.0        # products' rate over bf16's, the head's aside
    hbm_passes: float = 1.0  # of what the calls beside products move: fusing saves some

    def product_seconds(self, p):
        few = measured.interpolate(measured.GEMM_ROWS, min(p.rows, p.n, 8192))
        rate = self.gemm * few * p.k / (p.k + self.fill) * (1 if p.what.startswith("logits") else self.fp8)
        return p.count * (p.flops / rate + p.extra_bytes / self.hbm + self.gap)


def rates(machine, attention="mma.sync", which="mid"):
    """which: low (slow everywhere), mid, high."""
    pick = lambda v: getattr(v, which)
    slow = lambda v: getattr(v, {"low": "high", "mid": "mid", "high": "low"}[which])  # a cost: its high is slow
    return Rates(machine, 1e12 * pick(measured.GEMM[machine]), slow(measured.GEMM_FILL), attention,
                 pick(measured.ATTENTION_SHARE) if attention == "mma.sync" else 1.0,
                 machine.hbm * pick(measured.HBM_SHARE), 1e9 * pick(measured.BUS[machine]), slow(measured.LAUNCH_GAP),
                 slow(measured.EXPOSED))


def step_seconds(job: Job, r: Rates):
    """part -> seconds of a whole step"""
    parts = {"products": sum(r.product_seconds(p) for p in products(job) if not p.what.startswith("logits")),
             "head's products": sum(r.product_seconds(p) for p in products(job) if p.what.startswith("logits"))}
    listed = calls(job)
    forward, backward = measured.attention_rate(r.attention, r.machine, job.model.head_dim, job.batch.longest)
    again = listed["attention_forward"].count
    parts["attention"] = attention_flops(job) / r.attention_share * (
        again / forward + 2.5 * job.model.layers / backward) + (again + job.model.layers) * r.gap
    once = {"other calls": 0.0, "optimizer": 0.0}
    for name, c in listed.items():
        if name.startswith("attention"):
            continue
        bytes_moved = c.bytes * (1 if c.per_step else r.hbm_passes)
        once["optimizer" if c.per_step else "other calls"] += c.count * (
            max(bytes_moved / r.hbm, c.flops / r.machine.fp32) + r.gap)
    parts["other calls"] = once["other calls"]
    parts = {name: seconds * job.micros for name, seconds in parts.items()}
    parts["optimizer"] = once["optimizer"]
    weights = sum(job.model.parameters())
    dealt = (job.gpus - 1) / job.gpus * weights * (job.gradient_bytes + 2)  # reduce-scatter, all-gather
    parts["collectives"] = dealt / r.bus * r.exposed
    return parts


@dataclass(frozen=True)
class Result:
    seconds: float
    parts: dict
    rows_per_second: float  # of all GPUs
    mfu: float


def step(job, r):
    parts = step_seconds(job, r)
    seconds = sum(parts.values())
    return Result(seconds, parts, job.gpus * job.micros * job.batch.rows / seconds,
                  job.micros * useful_flops(job.model, job.batch) / seconds / r.machine.bf16)


def memory(job):
    """name -> bytes on a GPU, ZeRO stage 1: weights bf16 and gradients fp32 whole, corrections and moments dealt"""
    m, weights = job.model, sum(job.model.parameters())
    stream = (0 if m.parallel else 1) + 1
    kept = stream * m.width + m.qkv + m.heads * m.head_dim + m.up
    again = 2 * m.width + m.intermediate  # what a layer's backward pass holds besides
    return {"weights": 2 * weights, "gradients": job.gradient_bytes * weights,
            "masters, moments": 10 * weights / job.gpus,
            "activations": 2 * job.batch.rows * (m.layers * kept + again), "logits": job.logits_bytes}


__all__ = ["Rates", "Result", "memory", "rates", "replace", "step"]
