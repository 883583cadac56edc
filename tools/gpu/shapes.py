"""The models and batches that the reports speak of, and the counts that follow from them."""
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int            # rows of the output matrix, padding included
    gated: bool = True    # gate and up, else up alone
    rotary_dim: int = 0   # 0: none (learned positions)
    norm: str = "rms"     # or "layer"
    biases: bool = False  # of the four products of a layer
    parallel: bool = False  # attention and MLP read one norm (Phi)
    tied: bool = False
    positions: int = 0    # learned ones

    @property
    def qkv(self):
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def up(self):
        return self.intermediate * (2 if self.gated else 1)

    @property
    def norms(self):
        """norm operations of a forward pass"""
        return self.layers * (1 if self.parallel else 2) + 1

    def products(self):
        """(out, in) of the matrix products of a layer"""
        return [(self.qkv, self.width), (self.width, self.heads * self.head_dim), (self.up, self.width),
                (self.width, self.intermediate)]

    def matrix_weights(self):
        """of all layers, the output matrix aside"""
        return self.layers * sum(n * k for n, k in self.products())

    def parameters(self):
        """tensors of the model as (entries): matrices, embedding, output, norms, biases"""
        tensors = [n * k for n, k in self.products()] * self.layers
        if self.biases:
            tensors += [n for n, _ in self.products()] * self.layers
        tensors += [self.width] * (self.norms * (2 if self.norm == "layer" else 1))
        tensors += [self.vocab * self.width] * (1 if self.tied else 2)
        if self.positions:
            tensors.append(self.positions * self.width)
        return tensors


MISTRAL_7B = Model("Mistral-7B", 32, 4096, 32, 8, 128, 14336, 32000, rotary_dim=128)
PHI_2 = Model("Phi-2", 32, 2560, 32, 32, 80, 10240, 51200, gated=False, rotary_dim=32, norm="layer", biases=True,
              parallel=True)


def gpt(name, layers, width, heads, vocab=50304, positions=1024):
    """GPT-2's and GPT-3's block: layer norms, GELU, biases, learned positions, tied embeddings."""
    return Model(name, layers, width, heads, heads, width // heads, 4 * width, vocab, gated=False, norm="layer",
                 biases=True, tied=True, positions=positions)


@dataclass(frozen=True)
class Batch:
    """A micro-batch on one GPU: pairs of a shared prompt, a chosen and a rejected answer (tokens each). Plain text:
    answers of 0."""
    pairs: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def rows(self):
        return self.pairs * (self.prompt + self.chosen + self.rejected)

    @property
    def targets(self):
        """scored with --nll-scope full: each token of the chosen sequence but its first, and the rejected answer"""
        return self.pairs * (self.prompt + self.chosen - 1 + self.rejected)

    @property
    def longest(self):
        return self.prompt + max(self.chosen, self.rejected)

    def visible(self):
        """(query, key) pairs under the causal mask; an answer sees the prompt and itself"""
        part = lambda before, n: n * before + n * (n + 1) // 2
        return self.pairs * (part(0, self.prompt) + part(self.prompt, self.chosen) + part(self.prompt, self.rejected))

    def tile_pairs(self, query_rows, key_rows):
        """(query, key) pairs that attention's tiles multiply: whole tiles, masked entries included"""
        total = 0
        for before, n in ((0, self.prompt), (self.prompt, self.chosen), (self.prompt, self.rejected)):
            for first in range(0, n, query_rows):
                own = first + min(query_rows, n - first)
                total += query_rows * key_rows * (ceil(before / key_rows) + ceil(own / key_rows))
        return self.pairs * total


# Chat preference pairs: 256 prompt tokens and two answers of 384. Eight of them are a micro-batch of 8,192 rows.
PAIRS = Batch(pairs=8, prompt=256, chosen=384, rejected=384)


def useful_flops(model, batch):
    """6 x matrix weights x rows, the output matrix for rows with a target only, and attention's two products (four in
    the backward pass) over visible pairs; nothing that is computed twice. The project's MFU counts these."""
    products = 6 * (model.matrix_weights() * batch.rows + model.vocab * model.width * batch.targets)
    return products + 12 * model.layers * model.heads * model.head_dim * batch.visible()
