"""The step model's own test: its closed formulas against brute force, its errors on published runs against what is
stated here."""
from . import costs, measurements
from .kernels import KERNELS
from .machines import A100, H100
from .runs import RUNS
from .shapes import MISTRAL_7B, PAIRS, PHI_2, Batch, gpt, useful_flops
from .step import rates, step

# Largest error that is claimed, by a word of the run's name. Programs like ours: 15%.
CLAIMED = {"llm.c": 0.15, "FA2": 0.15, "MPT": 0.30, "fms-fsdp": 0.30, "torchtitan": 0.25}


def count_visible(batch):
    """(query, key) pairs, one by one"""
    count = 0
    for _ in range(batch.pairs):
        for branch, length in ((None, batch.prompt), (0, batch.chosen), (1, batch.rejected)):
            for position in range(length):
                before = 0 if branch is None else batch.prompt
                count += sum(1 for key in range(before + length) if key <= before + position)
    return count


def count_tiles(batch, query_rows, key_rows):
    """(query, key) pairs of the tiles that hold a visible one; a tile lies in the prompt or in one answer"""
    count = 0
    for before, length in ((0, batch.prompt), (batch.prompt, batch.chosen), (batch.prompt, batch.rejected)):
        tiles = {(q // query_rows, "prompt", key // key_rows) for q in range(length) for key in range(before)}
        tiles |= {(q // query_rows, "own", key // key_rows) for q in range(length) for key in range(q + 1)}
        count += len(tiles) * query_rows * key_rows
    return batch.pairs * count


def count_product_flops(model, batch, gradients):
    """multiplications and additions of every product, matrix by matrix"""
    flops = 0
    matrices = [(batch.rows, n, k) for _ in range(model.layers) for n, k in model.products()]
    matrices.append((batch.targets, model.vocab, model.width))
    for rows, n, k in matrices:
        flops += sum(2 * n * k for _ in range(rows)) * (3 if gradients else 1)
    return flops


def facts():
    """(what, holds) one after the other"""
    odd = Batch(pairs=2, prompt=5, chosen=9, rejected=7)
    yield "visible pairs, odd pairs", odd.visible() == count_visible(odd)
    yield "visible pairs, plain text", Batch(3, 33, 0, 0).visible() == 3 * sum(range(1, 34))
    for b in (odd, Batch(1, 130, 65, 64), Batch(2, 64, 1, 200)):
        yield f"attention's tiles, {b}", b.tile_pairs(64, 64) == count_tiles(b, 64, 64)
    yield "targets", odd.targets == 2 * (5 + 9 - 1 + 7)
    yield "Mistral-7B's parameters", sum(MISTRAL_7B.parameters()) == 7_241_732_096
    yield "Phi-2's parameters", abs(sum(PHI_2.parameters()) - 2_779_683_840) < 1e6  # its output matrix has a bias
    yield "GPT-2's parameters", sum(gpt("", 12, 768, 12, vocab=50257).parameters()) == 124_439_808
    small = gpt("small", 2, 48, 4, vocab=96)
    counted = count_product_flops(small, odd, gradients=True)
    attention = 12 * small.layers * small.width * odd.visible()
    yield "useful FLOPs", useful_flops(small, odd) == counted + attention
    listed = sum(p.count * p.flops for p in costs.products(costs.Job(small, odd)))
    yield "FLOPs of the products that run", listed == counted
    chunked = costs.Job(MISTRAL_7B, PAIRS)
    made, back, chunk = chunked.head_chunks()
    yield "logits: whole pairs fit a chunk", (made, back, chunk) == (8, 8, 1023)
    yield "logits: a pair in two chunks", costs.Job(PHI_2, PAIRS).head_chunks() == (24, 16, 512)
    yield "occupancy by warps", A100.occupancy(256, 32, 0) == (8, 64)
    yield "occupancy by registers", H100.occupancy(128, 168, 0) == (3, 12)
    yield "occupancy by shared memory", A100.occupancy(128, 32, 52224) == (3, 12)
    yield "occupancy: too much shared memory", A100.occupancy(128, 32, 164 << 10) == (0, 0)
    yield "interpolation", abs(measurements.interpolate(((1, 1), (4, 3)), 2) - 2) < 1e-12
    slow, fast = (step(chunked, rates(H100, which=w)).mfu for w in ("low", "high"))
    yield "slow below fast, both below the peak", 0 < slow < fast < 1
    yield "kernels have whole warps", all(
        k.threads % 32 == 0 and k.threads <= 1024 for k in KERNELS.values() if not callable(k.threads))
    for run in RUNS:
        found = step(run.job, rates(run.machine, run.attention)).rows_per_second
        claimed = next(c for word, c in CLAIMED.items() if word in run.name)
        yield (f"{run.name} {run.machine.name[:4]} within {claimed:.0%} of {run.source}",
               abs(found / run.tokens_per_second - 1) <= claimed)


def check():
    """Prints what fails and `N passed, N failed`; 0 where all hold."""
    passed = failed = 0
    for what, holds in facts():
        passed, failed = passed + bool(holds), failed + (not holds)
        if not holds:
            print(f"FAILED: {what}")
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)
