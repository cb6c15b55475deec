"""The loss over GPT-2's vocabulary and its gradients: all logits at once, model.py's few rows at a time, and torch's own.

    python -m benchmarks.loss_in_chunks

Seconds and GFLOP/s (6 N C V) of forward and backward, median of rounds in which each way ran once.
"""


import statistics
import time

import torch
import torch.nn.functional as F

from training.loss import LOGIT_ROWS, ChunkedCrossEntropy

N, C, V = 2048, 768, 50_304
ROUNDS = 3


def main():
    torch.manual_seed(0)
    x, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C).mul_(0.02).requires_grad_()
    targets = torch.randint(V, (N,))
    ways = {"all at once": lambda: F.cross_entropy(F.linear(x, weight), targets)}
    for rows in 128, 256, 512, 1024:
        ways[f"{rows} rows at a time"] = lambda rows=rows: ChunkedCrossEntropy.apply(x, weight, targets, rows, True)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        ways["torch.nn.functional.linear_cross_entropy"] = lambda: F.linear_cross_entropy(x, weight, targets, options=options)
    taken = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, loss in ways.items():
            x.grad = weight.grad = None
            began = time.perf_counter()
            loss().backward()
            taken[way].append(time.perf_counter() - began)
    for way, seconds in taken.items():
        print(f"{way:42} {statistics.median(seconds):6.2f} s {6 * N * C * V / statistics.median(seconds) / 1e9:6.0f} GFLOP/s")
    ratios = [whole / chunks for whole, chunks in zip(taken["all at once"], taken[f"{LOGIT_ROWS['cpu']} rows at a time"])]
    print(f"= {statistics.median(ratios):.2f} the loss in chunks against all logits at once; "
          f"{min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
