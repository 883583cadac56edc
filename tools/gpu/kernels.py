"""Every kernel of cuda/: threads of a block, dynamic shared memory, and what its launches do in a training step. The
one table that `make gpu-report` takes them from. A kernel that is not in it fails the report; so does an operation of a
training step that no kernel launches and ELSEWHERE does not name.

Kernel: threads, or threads(args); shared(args, job): dynamic bytes; works(args, job): (what, Call of costs.py, blocks)
of each launch of that instance in a training step in bf16 with aligned rows, or none. args: the template's arguments as
text."""
from dataclasses import dataclass
from math import ceil
from typing import Callable

from .costs import Call, attention_flops, calls

# Operations of a step that no kernel of ours launches.
ELSEWHERE = {"zero": "the runtime's memset"}


@dataclass(frozen=True)
class Kernel:
    threads: int | Callable
    works: Callable
    shared: Callable = lambda args, job: 0

    def threads_of(self, args):
        return self.threads(args) if callable(self.threads) else self.threads


def operation(name, args, blocks):
    """The operation's call, launched by the instance whose arguments are args(job), or args."""
    def works(given, job):
        call = calls(job)[name]
        wanted = args(job) if callable(args) else args
        return [(name, call, blocks(job))] if given == wanted and call.count else []
    return works


def several(*works):
    return lambda args, job: [launch for work in works for launch in work(args, job)]


def part(name, cost):
    """A kernel that is part of an operation: cost(job) is its Call and blocks."""
    return lambda args, job: [(name, *cost(job))]


def never(args, job):
    """fp32's kernels and decoding's: a training step in bf16 does not launch them."""
    return []


def rows(job):
    return job.batch.rows


def chunk(job):
    return job.head_chunks()[2]


def parameters(job):
    return sum(job.model.parameters()) / job.gpus


def sort_rows(job):
    n = rows(job)  # the embedding's; the head's chunks sort theirs too, an eighth of the rows each
    passes = ceil(job.model.vocab.bit_length() / 8)
    return Call(1, 20 * n * passes), 1


def totals(args, job):
    """sums_of_squares' second launch: of fp32's gradients alone"""
    n = runs(192)(job)
    call = Call(n, 8 * parameters(job) / n / (1 << 14), per_step=True)
    return [("sums_of_squares: a tensor's", call, 192)] if args == ["float"] else []


def runs(most):
    """launches that take the model's tensors, `most` each (adamw.cu)"""
    return lambda job: ceil(len(job.model.parameters()) / most)


def norm_sums(job):
    """of dweight, and of dbias where a layer norm has one"""
    return 2 if job.model.norm == "layer" else 1


def add_partials(job):
    width, blocks, sums = job.model.width, min(256, rows(job)), norm_sums(job)
    return (Call(job.model.norms, 4 * sums * width * (blocks + 2), sums * width * blocks), sums * ceil(width / 256))


def stretches(job):
    """that the rows are cut into for a bias gradient"""
    return ceil(rows(job) / max(32, ceil(rows(job) / 64)))


def column_blocks(job):
    """of a product with mean outputs"""
    outputs = [n for n, _ in job.model.products()]
    return ceil(sum(ceil(n / 256) for n in outputs) / len(outputs))


def add_stretches(args, job):
    outputs, count = [n for n, _ in job.model.products()], stretches(job)
    call = Call(job.model.layers, 4 * sum(outputs) * (count + 2), sum(outputs) * count)
    return [("bias_gradients: stretches", call, column_blocks(job))] if job.model.biases else []


def padded_head(job):
    return next((d for d in (32, 64, 80, 96, 128, 256) if job.model.head_dim <= d), 0)


def key_rows(head):
    return 64 if head <= 64 else 32


def query_tiles(job):
    b = job.batch
    return b.rows // 64 + 3 * b.pairs


def attention_shared(args, job):
    head = int(args[0])
    return (64 + 2 * key_rows(head)) * (head + 8) * 2


def list_tiles(job):
    return Call(2 * job.model.layers, 16 * job.batch.pairs + 32 * query_tiles(job)), 1


def backward_step(head):
    return 32 if head <= 128 else 16


def warps_of(two_blocks):
    """threads of 64 rows, 16 a warp; 32 a warp where two_blocks(head, aligned)"""
    return lambda args: 64 if two_blocks(int(args[0]), args[1] == "true") else 128


def attention_backward_shared(owned):
    """bytes where a block owns owned(head) rows and meets others in two buffers"""
    def shared(args, job):
        head = int(args[0])
        return (2 * owned(head) + 4 * backward_step(head)) * (head + 8) * 2
    return shared


def attention_backward(what, products, heads, tiles):
    """A kernel of the backward pass: its products over visible pairs; qkv and dout read, its part of dqkv written."""
    def works(args, job):
        m = job.model
        row = 2 * (m.qkv + m.heads * m.head_dim + heads(m) * m.head_dim) + 8 * m.heads
        call = Call(m.layers, job.batch.rows * row, tensor_flops=products / 2 * attention_flops(job))
        blocks = query_tiles(job) * tiles(m)
        return [(what, call, blocks)] if args == [str(padded_head(job)), "true"] else []
    return works


def delta(args, job):
    m, n = job.model, job.batch.rows * job.model.heads
    call = Call(m.layers, 4 * n * m.head_dim + 4 * n, 2 * n * m.head_dim)
    return [("attention_backward: delta", call, job.batch.rows)] if args == ["true", "bf16"] else []


def norm_backward_shared(args, job):
    columns = norm_sums(job) * 4 * ceil(job.model.width / 8) * 8
    return columns if columns <= 96 << 10 else 0


def bf16_norm(job):
    return ["true", "true" if job.model.norm == "layer" else "false", "bf16"]


def bf16_activation(job):
    """Activation's order in src/backend.h: SwiGLU, GELU, its approximation, ReLU"""
    return ["true", "0" if job.model.gated else "2", "bf16"]


def bf16_embedding(job):
    return ["true", "true" if job.model.positions else "false", "bf16"]


def eights(job):
    """threads that take 8 entries of the MLP's rows each, in blocks"""
    return ceil(rows(job) * job.model.intermediate / 8 / 256)


KERNELS = {
    # rows.cuh
    "copy_rows_kernel": Kernel(128, several(operation("embedding_forward", bf16_embedding, rows),
                                            operation("gather", ["true", "false", "bf16"], chunk))),
    "sort_rows_kernel": Kernel(1024, part("embedding_backward: rows of a token", sort_rows)),
    "add_rows_kernel": Kernel(128, several(
        operation("embedding_backward", ["true", "float", "bf16"], lambda j: rows(j) * ceil(j.model.width / 1024)),
        operation("scatter_add", ["true", "bf16", "bf16"], lambda j: chunk(j) * ceil(j.model.width / 1024)))),
    # partials.cuh
    "add_partials_kernel": Kernel(256, several(part("norm_backward: dweight", add_partials),
                                               add_stretches)),
    # linear.cu
    "fill_rows_kernel": Kernel(256, never),  # where the products add no bias
    "column_sums_kernel": Kernel(256, operation("bias_gradients", ["true", "bf16"],
                                                lambda j: stretches(j) * column_blocks(j))),
    # norm.cu
    "norm_forward_kernel": Kernel(256, operation("norm_forward", bf16_norm, rows)),
    "norm_backward_kernel": Kernel(256, operation("norm_backward", bf16_norm, lambda j: min(256, rows(j))),
                                   norm_backward_shared),
    # rope.cu
    "rotate_kernel": Kernel(128, several(operation("rope_forward", ["true", "bf16"], rows),
                                         operation("rope_backward", ["true", "bf16"], rows)),
                            lambda args, job: 4 * job.model.rotary_dim),
    # activation.cu
    "activation_forward_kernel": Kernel(256, operation("activation_forward", bf16_activation, eights)),
    "activation_backward_kernel": Kernel(256, operation("activation_backward", bf16_activation, eights)),
    # attention.cu, tiles.cuh
    "list_tiles_kernel": Kernel(32, part("attention: its tiles", list_tiles)),
    "attention_forward_kernel": Kernel(
        warps_of(lambda head, aligned: head <= 128),
        operation("attention_forward", lambda j: [str(padded_head(j)), "true"],
                  lambda j: query_tiles(j) * j.model.heads), attention_shared),
    "attention_forward_fp32_kernel": Kernel(128, never),
    # attention_backward.cu
    "delta_kernel": Kernel(128, delta),
    "attention_backward_keys_kernel": Kernel(
        warps_of(lambda head, aligned: head <= 64 and aligned),
        attention_backward("attention_backward", 4, lambda m: 2 * m.kv_heads,
                           lambda m: m.kv_heads * (2 if m.head_dim > 128 else 1)),
        attention_backward_shared(lambda head: 64 if head <= 128 else 32)),
    "attention_backward_queries_kernel": Kernel(
        warps_of(lambda head, aligned: head <= 96),
        attention_backward("attention_backward: dQ", 3, lambda m: m.heads, lambda m: m.heads),
        attention_backward_shared(lambda head: 64)),
    "attention_backward_keys_fp32_kernel": Kernel(128, never),
    "attention_backward_queries_fp32_kernel": Kernel(128, never),
    # attention_decode.cu
    "keep_kernel": Kernel(128, never),
    "attend_kernel": Kernel(128, never),
    "join_kernel": Kernel(64, never),
    # head.cu
    "log_probability_kernel": Kernel(256, operation("head_forward", ["true"], chunk)),
    "preference_kernel": Kernel(32, operation("preference", [], lambda j: max(1, j.batch.pairs // j.head_chunks()[1]))),
    "softmax_gradient_kernel": Kernel(256, operation("head_backward", ["true", "bf16"], chunk)),
    # adamw.cu
    "squares_kernel": Kernel(256, operation("sums_of_squares", ["true", "float"],
                                            lambda j: ceil(parameters(j) / runs(192)(j) / (1 << 14)))),
    "total_kernel": Kernel(256, totals),
    "adamw_kernel": Kernel(256, operation("adamw", ["true", "bf16"],
                                          lambda j: ceil(parameters(j) / runs(64)(j) / (1 << 12)))),
}
