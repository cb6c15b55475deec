"""The loss over GPT-2's vocabulary and its gradients, without keeping all logits in memory.

    python -m benchmarks.loss_in_chunks

Compares all logits at once, our loss in chunks of rows, and torch's own chunked loss. Prints
seconds and GFLOP/s (6 N C V) of forward and backward: medians of rounds, each way once per round.
"""
import statistics
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.ratio import divide, print_ratio
from benchmarks.rounds import time_in_rounds
from training.loss import LOGIT_ROWS, ChunkedCrossEntropy

N, C, V = 2048, 768, 50_304  # rows, width, vocabulary
ROUNDS = 3


def main():
    torch.manual_seed(0)
    x = torch.randn(N, C, requires_grad=True)
    weight = torch.randn(V, C).mul_(0.02).requires_grad_()
    targets = torch.randint(V, (N,))

    # the ways to compute the loss
    losses = {"all at once": lambda: F.cross_entropy(F.linear(x, weight), targets)}
    for rows in 128, 256, 512, 1024:
        losses[f"{rows} rows at a time"] = partial(
            ChunkedCrossEntropy.apply, x, weight, targets, rows, True)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        losses["torch.nn.functional.linear_cross_entropy"] = partial(
            F.linear_cross_entropy, x, weight, targets, options=options)

    def both_passes(loss):
        x.grad = weight.grad = None
        loss().backward()

    ways = {name: partial(both_passes, loss) for name, loss in losses.items()}
    times = time_in_rounds(ways, ROUNDS)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:42} {median:6.2f} s {6 * N * C * V / median / 1e9:6.0f} GFLOP/s")
    chunked = times[f"{LOGIT_ROWS['cpu']} rows at a time"]
    print_ratio("loss in chunks", divide(times["all at once"], chunked), "times all logits at once")


if __name__ == "__main__":
    main()
