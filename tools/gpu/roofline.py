"""Measured operations (build/release/orpo_bench --only operations) beside what a GPU's memory and tensor cores allow."""
from . import costs
from .machines import MACHINES
from .shapes import Batch, Model


def machine_of(name):
    """The Machine that a GPU's name, as nvidia-smi prints it, stands for; None: no published figures here."""
    for machine in MACHINES:
        words = machine.name.split()  # "A100 80GB SXM": the first two, in any spelling
        if words[0] in name and words[1].rstrip("GB") in name:
            return machine
    return None


def job_of(shape):
    """One layer of the measured shape."""
    model = Model("measured", 1, shape["width"], shape["heads"], shape["kv_heads"], shape["head_dim"],
                  shape["intermediate"], shape["vocab"], gated=bool(shape["gated"]), rotary_dim=shape["rotary_dim"],
                  norm="layer" if shape["layer_norm"] else "rms", biases=bool(shape["biases"]),
                  positions=shape["prompt"] + max(shape["chosen"], shape["rejected"]) if shape["learned_positions"] else 0)
    batch = Batch(shape["pairs"], shape["prompt"], shape["chosen"], shape["rejected"])
    return costs.Job(model, batch, logits_bytes=4 * shape["vocab"] * shape["chunk"])


def work(name, job, shape, wide):
    """(bytes, FLOPs on tensor cores, other FLOPs) of one call; wide: fp32, whose entries are twice bf16's and which
    computes beside the tensor cores."""
    entries = shape["update_entries"]
    product = next((p for p in costs.products(job) if p.what == name), None)
    if product:
        operands = 2 * (product.rows * product.k + product.n * product.k + product.rows * product.n)
        return operands * (1 + wide) + product.extra_bytes * (not wide), product.flops * (not wide), product.flops * wide
    if name in ("zero", "sums_of_squares"):
        return 4 * entries, 0, 2 * entries * (name != "zero")
    if name == "adamw":
        return 28 * entries, 0, 15 * entries
    call = costs.calls(job)[name]
    fixed = name.startswith("head") or name == "preference"  # mostly fp32 in both
    scale = 2 if wide and not fixed else 1
    return call.bytes * scale, call.tensor_flops * (not wide), call.flops + call.tensor_flops * wide


def operations_table(shape_name, measured, gpu):
    """Markdown: each operation's time, its roofline time and the share it reaches of it. KeyError where an operation has
    no cost in costs.py."""
    shape, dtype = measured["shape"], measured["dtype"]
    machine, job = machine_of(gpu), job_of(measured["shape"])
    lines = [f"{shape_name}, {dtype}, {job.batch.rows:,} rows" +
             (f"; roofline of {machine.name}" if machine else f"; no published figures for {gpu or 'this device'}"), "",
             "| operation | us | GB/s | TFLOP/s | roofline us | share |", "|---|---|---|---|---|---|"]
    for operation in measured["operations"]:
        moved, tensor, other = work(operation["name"], job, shape, dtype == "fp32")
        seconds = max(operation["seconds"], 1e-12)
        bound = max(moved / machine.hbm, tensor / machine.bf16 + other / machine.fp32) if machine else 0
        lines.append(f"| {operation['name']} | {1e6 * seconds:.1f} | {moved / seconds / 1e9:.0f} | "
                     f"{(tensor + other) / seconds / 1e12:.1f} | " +
                     (f"{1e6 * bound:.1f} | {bound / seconds:.0%} |" if machine else "| |"))
    return "\n".join(lines)
