"""What a training step costs on this machine's CPU, and which of its ways is the fastest.

    python -m benchmarks.train_step_cpu

Tokens a second of forward and backward of the bundled model's size, for each precision, compiled or not, and for
several micro-batches; then the seconds of an optimizer step. Every round times each way once, so that a drifting
machine drifts for all; the median counts.
"""
import statistics
import time

import torch

from model import GPT, GPTConfig
from training.optim import build_optimizers, set_learning_rate

CONFIG = GPTConfig(block_size=256, vocab_size=65, n_layer=4, n_head=6, n_embd=192)
ROUNDS = 5


def forward_backward(model, micro_batch: int, dtype: str):
    x = torch.randint(0, CONFIG.vocab_size, (micro_batch, CONFIG.block_size))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        model(x, x)[1].backward()


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main():
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    ways = [*(("float32", False, micro_batch) for micro_batch in (1, 2, 4, 8, 16, 32)),
            ("float32", True, 8), ("bfloat16", False, 8)]
    models = {False: GPT(CONFIG), True: GPT(CONFIG)}
    models[True].compile()
    times = {way: [] for way in ways}
    for round in range(ROUNDS + 1):  # the first warms up
        for dtype, compiled, micro_batch in ways:
            taken = seconds(lambda: forward_backward(models[compiled], micro_batch, dtype))  # noqa: B023
            if round:
                times[dtype, compiled, micro_batch].append(taken)
    for (dtype, compiled, micro_batch), taken in times.items():
        speed = micro_batch * CONFIG.block_size / statistics.median(taken)
        print(f"{dtype:8} {'compiled' if compiled else 'eager':8} micro-batch {micro_batch:2}: {speed:8,.0f} tokens/s")

    model = models[False]
    optimizers = {"AdamW, all parameters": build_optimizers(model, "adamw", 0.1, (0.9, 0.95)),
                  "our Muon, hidden matrices": build_optimizers(model, "muon", 0.1, (0.9, 0.95))[1:]}
    if hasattr(torch.optim, "Muon"):
        hidden = optimizers["our Muon, hidden matrices"][0].param_groups[0]["params"]
        optimizers["torch.optim.Muon, the same"] = [torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")]
    taken = {}
    for name, parts in optimizers.items():
        set_learning_rate(parts, 1e-6)
        steps = [seconds(lambda: [part.step() for part in parts]) for _ in range(ROUNDS + 1)][1:]  # noqa: B023
        taken[name] = statistics.median(steps)
        print(f"{name:28} {taken[name] * 1000:8,.1f} ms a step")
    if "torch.optim.Muon, the same" in taken:
        ratio = taken["torch.optim.Muon, the same"] / taken["our Muon, hidden matrices"]
        print(f"= {ratio:.2f} our Muon against torch.optim.Muon")


if __name__ == "__main__":
    main()
