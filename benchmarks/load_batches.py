"""How fast `dataloader.py` makes batches, with nothing to wait for them.

    python -m benchmarks.load_batches edu_fineweb10B         # or any folder of token shards

For several shapes: tokens a second of `batch(step)` in a loop, and of `batches`, which reads ahead in the background;
then how long a loader takes from nothing to its batch at step 15,000. Every round times each way once; the median counts.
"""
import statistics
import sys
import time

import torch

from dataloader import DataLoader

ROUNDS = 5
TOKENS = 20_000_000  # a timing


def direct(loader: DataLoader, first: int, steps: int):
    for step in range(first, first + steps):
        loader.batch(step)


def ahead(loader: DataLoader, first: int, steps: int):
    for _ in loader.batches(first, first + steps, torch.device("cpu")):
        pass


def main():
    data = sys.argv[1]
    print(f"{data}: {len(DataLoader(data, 'train', 1, 128).shards):,} tokens for training")
    for batch_size, block_size in (512, 1024), (64, 1024), (64, 256), (16, 128):
        steps = max(1, TOKENS // (batch_size * block_size))
        speeds = {"batch": [], "batches": []}
        for number in range(ROUNDS):
            for name, work in ("batch", direct), ("batches", ahead):
                loader = DataLoader(data, "train", batch_size, block_size)
                began = time.perf_counter()
                work(loader, number * steps, steps)
                speeds[name].append(steps * batch_size * block_size / (time.perf_counter() - began) / 1e6)
        print(f"{batch_size:4} x {block_size:4}: " + ", ".join(
            f"{name} {statistics.median(values):5.0f}M tokens/s" for name, values in speeds.items()))
    starts = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        DataLoader(data, "train", 512, 1024).batch(15_000)
        starts.append(time.perf_counter() - began)
    print(f"a loader at step 15,000: {statistics.median(starts) * 1000:.0f} ms")


if __name__ == "__main__":
    main()
