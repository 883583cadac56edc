"""Every kernel of cuda/: threads of a block, dynamic shared memory, and what a launch does in a training step. The one
table that `make gpu-report` takes them from; a kernel that is not in it fails the report.

Kernel: threads; shared(args, job): dynamic bytes; work(args, job): a Call (costs.py) and its blocks, or None where a
training step in bf16 with aligned rows does not launch that instance. args: the template's arguments as text."""
from dataclasses import dataclass
from math import ceil
from typing import Callable

from .costs import Call, calls


@dataclass(frozen=True)
class Kernel:
    threads: int
    work: Callable
    shared: Callable = lambda args, job: 0


def operation(name, args, blocks):
    """The operation's call itself, by the instance with these template arguments; blocks(job)."""
    def work(given, job):
        call = calls(job)[name]
        return (call, blocks(job)) if given == args and call.count else None
    return work


def either(*works):
    """One kernel of several operations: the first whose arguments fit."""
    return lambda args, job: next((w for w in (work(args, job) for work in works) if w), None)


def never(args, job):
    """fp32's kernels, decoding's, unaligned ones: a training step in bf16 does not launch them."""
    return None


def rows(job):
    return job.batch.rows


def chunk(job):
    return job.head_chunks()[2]


def per_tensor(job):
    return sum(job.model.parameters()) / len(job.model.parameters()) / job.gpus


def chain_rows(args, job):
    n = rows(job)  # the embedding's; the head's chunks chain theirs too, an eighth of the rows each
    return Call(1, 12 * n, n * n), ceil(n / 4)


def add_partials(args, job):
    blocks = min(256, rows(job))
    return Call(job.model.norms, 4 * job.model.width * (blocks + 2), job.model.width * blocks), ceil(job.model.width / 256)


def padded_head(job):
    return next((d for d in (32, 64, 80, 96, 128, 256) if job.model.head_dim <= d), 0)


def key_rows(head):
    return 64 if head <= 128 else 32


def query_tiles(job):
    b = job.batch
    return b.rows // 64 + 3 * b.pairs


def attention_forward(args, job):
    if args != [str(padded_head(job)), "true"]:
        return None
    return calls(job)["attention_forward"], query_tiles(job) * job.model.heads


def attention_shared(args, job):
    head = int(args[0])
    return (64 + 2 * key_rows(head)) * (head + 8) * 2


def list_tiles(args, job):
    return Call(job.model.layers, 16 * job.batch.pairs + 24 * query_tiles(job)), 1


def norm_backward_shared(args, job):
    columns = 4 * job.model.width
    return columns if columns <= 96 << 10 else 0


BF16 = ["true", "bf16"]
KERNELS = {
    # rows.cuh
    "copy_rows_kernel": Kernel(128, either(operation("embedding_forward", BF16, rows))),
    "chain_rows_kernel": Kernel(128, chain_rows),
    "add_rows_kernel": Kernel(128, either(
        operation("embedding_backward", ["true", "float", "bf16"], lambda j: rows(j) * ceil(j.model.width / 1024)),
        operation("scatter_add", ["true", "bf16", "bf16"], lambda j: chunk(j) * ceil(j.model.width / 1024)))),
    # norm.cu
    "norm_forward_kernel": Kernel(256, operation("norm_forward", BF16, rows)),
    "norm_backward_kernel": Kernel(256, operation("norm_backward", BF16, lambda j: min(256, rows(j))),
                                   norm_backward_shared),
    "add_partials_kernel": Kernel(256, add_partials),
    # rope.cu
    "rotate_kernel": Kernel(128, operation("rope_forward", BF16, rows), lambda args, job: 4 * job.model.rotary_dim),
    # activation.cu
    "activation_forward_kernel": Kernel(256, operation(
        "activation_forward", BF16, lambda j: ceil(rows(j) * j.model.intermediate / 8 / 256))),
    "activation_backward_kernel": Kernel(256, operation(
        "activation_backward", BF16, lambda j: ceil(rows(j) * j.model.intermediate / 8 / 256))),
    # attention.cu, tiles.cuh
    "list_tiles_kernel": Kernel(32, list_tiles),
    "attention_forward_kernel": Kernel(128, attention_forward, attention_shared),
    "attention_forward_fp32_kernel": Kernel(128, never),
    # head.cu
    "log_probability_kernel": Kernel(256, operation("head_forward", ["true"], chunk)),
    "preference_kernel": Kernel(32, operation("preference", [], lambda j: max(1, j.batch.pairs // j.head_chunks()[1]))),
    "softmax_gradient_kernel": Kernel(256, operation("head_backward", BF16, chunk)),
    # adamw.cu
    "squares_kernel": Kernel(256, operation("sums_of_squares", ["true", "float"],
                                            lambda j: ceil(per_tensor(j) / (1 << 14)))),
    "total_kernel": Kernel(256, operation("sums_of_squares", ["none"], lambda j: 1)),
    "adamw_kernel": Kernel(256, operation("adamw", BF16, lambda j: ceil(per_tensor(j) / 1024))),
}
