"""What a training step does, operation by operation (src/model.cpp, src/head.cpp): FLOPs, and bytes that must cross
the GPU's memory, each tensor once for each time an operation reads or writes it. bf16 weights and activations, fp32
gradients, moments and logits."""
from dataclasses import dataclass, replace
from math import ceil

from .shapes import Batch, Model

LOGITS_BYTES = 128 << 20  # a chunk of logits (src/head.h)


@dataclass(frozen=True)
class Call:
    """One call, made `count` times a micro-batch (a step, where per_step). flops: outside the tensor cores."""
    count: int
    bytes: float
    flops: float = 0
    tensor_flops: float = 0
    per_step: bool = False


def in_runs(most, all_tensors):
    """A call's launches where one takes `most` tensors; all_tensors: their number, and bytes and flops of all together."""
    runs = -(-all_tensors.count // most)
    return replace(all_tensors, count=runs, bytes=all_tensors.bytes / runs, flops=all_tensors.flops / runs)


@dataclass(frozen=True)
class Product:
    """rows x k times k x n, `count` times a micro-batch; extra_bytes: beyond operands and a bf16 result, each time."""
    what: str
    count: int
    rows: int
    n: int
    k: int
    extra_bytes: float = 0

    @property
    def flops(self):
        return 2 * self.rows * self.n * self.k


@dataclass(frozen=True)
class Job:
    """A micro-batch of a model on one of `gpus`, `micros` of them a step; moments and masters are dealt to the GPUs
    (ZeRO stage 1)."""
    model: Model
    batch: Batch
    micros: int = 1
    gpus: int = 8
    logits_bytes: int = LOGITS_BYTES
    logit_bytes: int = 4    # of an entry of logits
    gradient_bytes: int = 4  # of an entry of a weight's gradient
    layer_recompute: float = 0  # of a layer's forward calls, once more in the backward pass

    def head_chunks(self):
        """(chunks whose logits are made, chunks of the backward pass, rows of a full one): whole pairs whose targets
        fit the budget, or one pair in several chunks, whose logits are made twice but for the last one's."""
        rows = max(1, self.logits_bytes // (4 * self.model.vocab))
        a_pair = self.batch.targets // self.batch.pairs
        if a_pair <= rows:
            together = min(self.batch.pairs, rows // a_pair)
            chunks = ceil(self.batch.pairs / together)
            return chunks, chunks, together * a_pair
        chunks = ceil(a_pair / rows)
        return self.batch.pairs * (2 * chunks - 1), self.batch.pairs * chunks, ceil(a_pair / chunks)


def products(job):
    m, rows = job.model, job.batch.rows
    accumulate = lambda n, k: (2 * job.gradient_bytes - 2) * n * k  # the gradient is read and written
    for (n, k), name in zip(m.products(), ("query, key, value", "attention output", "gate, up" if m.gated else "up",
                                           "down")):
        again = job.layer_recompute if name != "down" else 0
        yield Product(name + ", forward", m.layers * (1 + again), rows, n, k)
        yield Product(name + ", input's gradient", m.layers, rows, k, n)
        yield Product(name + ", weight's gradient", m.layers, n, k, rows, accumulate(n, k))
    forward, backward, chunk = job.head_chunks()
    yield Product("logits, forward", forward, chunk, m.vocab, m.width, (job.logit_bytes - 2) * chunk * m.vocab)
    yield Product("logits, input's gradient", backward, chunk, m.width, m.vocab)
    yield Product("logits, weight's gradient", backward, m.vocab, m.width, chunk, accumulate(m.vocab, m.width))


def attention_flops(job):
    """forward: two products over visible pairs. The backward pass has five (one makes the scores again)."""
    m = job.model
    return 4 * job.batch.visible() * m.heads * m.head_dim


def calls(job):
    """operation -> Call; attention's too, products apart."""
    m, b = job.model, job.batch
    rows, row = b.rows, 2 * m.width  # bytes of a row of the residual stream
    forward, backward, chunk = job.head_chunks()
    again = 1 + job.layer_recompute
    heads = m.heads * m.head_dim
    weights = sum(m.parameters())
    tensors = len(m.parameters())
    own = weights / job.gpus  # entries whose moments this GPU has
    rotated = rows * (m.heads + m.kv_heads) * m.rotary_dim
    gelu = 4 if m.gated else 10
    return {
        "embedding_forward": Call(1, 2 * rows * row + (rows * row if m.positions else 0)),
        "norm_forward": Call(int(m.norms * again), 4 * rows * row, 5 * rows * m.width),
        "rope_forward": Call(int(m.layers * again) if m.rotary_dim else 0, 4 * rotated, 3 * rotated),
        "attention_forward": Call(int(m.layers * again), 2 * rows * (m.qkv + heads) + 4 * rows * m.heads,
                                  tensor_flops=attention_flops(job)),
        "activation_forward": Call(m.layers, 2 * rows * (m.up + m.intermediate), gelu * rows * m.intermediate),
        "gather": Call(forward, 2 * chunk * row),
        "head_forward": Call(forward, 4 * chunk * m.vocab * job.logit_bytes / 4, 4 * chunk * m.vocab),
        "preference": Call(backward, 8 * chunk),
        "head_backward": Call(backward, chunk * m.vocab * (job.logit_bytes + 2), 3 * chunk * m.vocab),
        "scatter_add": Call(backward, 3 * chunk * row),
        "activation_backward": Call(m.layers, 2 * rows * (2 * m.up + 2 * m.intermediate),
                                    3 * gelu * rows * m.intermediate),
        "norm_backward": Call(m.norms, 5 * rows * row, 10 * rows * m.width),
        "bias_gradients": Call(m.layers if m.biases else 0, 2 * rows * sum(n for n, _ in m.products()),
                               rows * sum(n for n, _ in m.products())),
        "attention_backward": Call(m.layers, 2 * rows * (2 * m.qkv + 2 * heads) + 8 * rows * m.heads,
                                   tensor_flops=2.5 * attention_flops(job)),
        "rope_backward": Call(m.layers if m.rotary_dim else 0, 4 * rotated, 3 * rotated),
        "embedding_backward": Call(1, rows * row + 2 * 4 * rows * m.width),
        "zero": Call(tensors, job.gradient_bytes * weights / tensors, per_step=True),
        # launches of as many tensors as a kernel's parameters hold (adamw.cu)
        "sums_of_squares": in_runs(192, Call(tensors, job.gradient_bytes * own, 2 * own, per_step=True)),
        # weight, correction and both moments read and written, the gradient read
        "adamw": in_runs(64, Call(tensors, (2 * (2 + 2 + 4 + 4) + job.gradient_bytes) * own, 15 * own, per_step=True)),
    }
