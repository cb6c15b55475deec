"""What a training step costs on this machine's CPU, and which way is the fastest.

    python -m benchmarks.train_step_cpu

Tokens/s of forward and backward for a model of the bundled model's size: by precision, compiled or
not, and by micro-batch; then the time of an optimizer step. Medians of rounds in which each way
runs once, so that a drift of the machine affects all ways.
"""
import statistics
from functools import partial

import torch

from benchmarks.ratio import divide, print_ratio
from benchmarks.rounds import time_in_rounds
from model import GPT, GPTConfig
from training.config import TrainConfig
from training.optim import build_optimizers, set_learning_rate

CONFIG = GPTConfig(block_size=256, vocab_size=65, n_layer=4, n_head=6, n_embd=192)
ROUNDS = 5
WAYS = [  # precision, compiled, micro-batch
    *(("float32", False, micro_batch) for micro_batch in (1, 2, 4, 8, 16, 32)),
    ("float32", True, 8),
    ("bfloat16", False, 8),
]


def forward_backward(model: GPT, micro_batch: int, dtype: str):
    x = torch.randint(0, CONFIG.vocab_size, (micro_batch, CONFIG.block_size))  # (B, T)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        model(x, x)[1].backward()


def main():
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
          f"{torch.get_num_threads()} threads")
    eager, compiled = GPT(CONFIG), GPT(CONFIG)
    compiled.compile()
    time_forward_backward(eager, compiled)
    time_optimizers(eager)


def time_forward_backward(eager: GPT, compiled: GPT):
    ways = {}
    for way in WAYS:
        dtype, is_compiled, micro_batch = way
        model = compiled if is_compiled else eager
        ways[way] = partial(forward_backward, model, micro_batch, dtype)
    for (dtype, is_compiled, micro_batch), seconds in time_in_rounds(ways, ROUNDS).items():
        speed = micro_batch * CONFIG.block_size / statistics.median(seconds)
        print(f"{dtype:8} {'compiled' if is_compiled else 'eager':8} "
              f"micro-batch {micro_batch:2}: {speed:8,.0f} tokens/s")


def time_optimizers(model: GPT):
    optimizers = {
        "AdamW, all parameters": build_optimizers(model, TrainConfig()),
        "our Muon, hidden matrices": build_optimizers(model, TrainConfig(optimizer="muon"))[1:],
    }
    if hasattr(torch.optim, "Muon"):
        hidden = optimizers["our Muon, hidden matrices"][0].param_groups[0]["params"]
        optimizers["torch.optim.Muon, the same"] = [
            torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")]

    def take_step(parts):
        for part in parts:
            part.step()

    for parts in optimizers.values():
        set_learning_rate(parts, 1e-6)
    ways = {name: partial(take_step, parts) for name, parts in optimizers.items()}
    times = time_in_rounds(ways, ROUNDS)
    for name, seconds in times.items():
        print(f"{name:28} {statistics.median(seconds) * 1000:8,.1f} ms per step")
    if "torch.optim.Muon, the same" in times:
        ratios = divide(times["torch.optim.Muon, the same"], times["our Muon, hidden matrices"])
        print_ratio("our Muon", ratios, "times torch.optim.Muon")


if __name__ == "__main__":
    main()
