"""Published training runs, for trying the step model on. None of its rates comes from them."""
from dataclasses import dataclass

from .costs import Job
from .machines import A100, H100
from .shapes import Batch, Model, gpt

WHOLE = 1 << 40  # logits in one piece


@dataclass(frozen=True)
class Run:
    name: str
    machine: object
    job: Job
    attention: str
    tokens_per_second: float  # of all of the job's GPUs
    source: str
    alike: bool  # C++ and CUDA like ours: fused calls, cuBLASLt; else PyTorch, which moves more bytes than counted here


def text(sequences, length):
    return Batch(sequences, length, 0, 0)


def llm_c(name, machine, layers, width, heads, sequences, micros, seconds):
    """llm.c's scripts: bf16 gradients and logits, the latter whole; ZeRO stage 1; cuDNN attention"""
    job = Job(gpt(name, layers, width, heads), text(sequences, 1024), micros, logits_bytes=WHOLE, logit_bytes=2,
              gradient_bytes=2)
    return Run("llm.c " + name, machine, job, "cuDNN", 8 * micros * job.batch.rows / seconds,
               f"karpathy/llm.c, scripts/run_gpt2_{name.split()[1]}.sh: {seconds} s a step", True)


def flash(name, layers, width, heads, length, tflops):
    """FlashAttention-2, table 1: TFLOP/s by 6 length parameters + 12 layers width length^2; micro-batch not given"""
    model = gpt(name, layers, width, heads, positions=length)
    per_token = 6 * sum(model.parameters()) + 12 * layers * width * length
    return Run(f"FA2 {name} {length}", A100, Job(model, text(16384 // length, length), 4, logits_bytes=WHOLE,
                                                 logit_bytes=2, gradient_bytes=2),
               "mma.sync", 8 * tflops * 1e12 / per_token, f"arXiv 2307.08691, table 1: {tflops} TFLOP/s", False)


def foundry(name, machine, layers, width, heads, sequences, micros, tokens_per_second):
    model = Model("MPT " + name, layers, width, heads, heads, width // heads, 4 * width, 50432, gated=False,
                  norm="layer", tied=True)
    return Run(f"llm-foundry MPT-{name}", machine, Job(model, text(sequences, 2048), micros, logits_bytes=WHOLE),
               "mma.sync", tokens_per_second, "mosaicml/llm-foundry, scripts/train/benchmarking/README.md", False)


LLAMA_2_7B = Model("Llama-2 7B", 32, 4096, 32, 32, 128, 11008, 32000, rotary_dim=128)
LLAMA_2_13B = Model("Llama-2 13B", 40, 5120, 40, 40, 128, 13824, 32000, rotary_dim=128)

RUNS = (
    llm_c("GPT2 124M", A100, 12, 768, 12, 64, 1, 0.300),
    llm_c("GPT2 350M", A100, 24, 1024, 16, 64, 1, 0.820),
    llm_c("GPT2 774M", A100, 36, 1280, 20, 32, 2, 1.7),
    llm_c("GPT2 1558M", H100, 48, 1600, 25, 16, 8, 2.80),
    flash("GPT3 1.3B", 24, 2048, 16, 2048, 196),
    flash("GPT3 1.3B", 24, 2048, 16, 8192, 220),
    flash("GPT3 2.7B", 32, 2560, 32, 2048, 205),
    flash("GPT3 2.7B", 32, 2560, 32, 8192, 225),
    foundry("1b", A100, 24, 2048, 16, 14, 4, 164109),
    foundry("3b", A100, 32, 2560, 20, 10, 2, 86491),
    foundry("7b", A100, 32, 4096, 32, 6, 2, 37130),
    foundry("1b", H100, 24, 2048, 16, 14, 1, 363645),
    foundry("7b", H100, 32, 4096, 32, 6, 1, 85144),
    Run("fms-fsdp Llama-2 7B", A100, Job(LLAMA_2_7B, text(2, 4096)), "mma.sync", 8 * 3760,
        "foundation-model-stack/fms-fsdp, README: 3,760 tokens/s a GPU on 128", False),
    Run("torchtitan Llama-2 13B", A100, Job(LLAMA_2_13B, text(2, 4096)), "mma.sync", 8 * 2162,
        "pytorch/torchtitan, docs/performance.md: 2,162 tokens/s a GPU on 64", False),
)
