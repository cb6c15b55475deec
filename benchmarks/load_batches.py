"""How fast dataloader.py makes batches when nothing consumes them.

    python -m benchmarks.load_batches edu_fineweb10B         # or any folder of token shards

For several shapes: tokens/s of `batch(step)` in a loop, and of `batches`, which reads ahead in the
background. Then the time from creating a loader to its batch of step 15,000. All figures are
medians of rounds in which each way runs once.
"""
import statistics
import sys
import time

import torch

from dataloader import DataLoader

ROUNDS = 5
TOKENS = 20_000_000  # per timing
SHAPES = [(512, 1024), (64, 1024), (64, 256), (16, 128)]  # sequences, tokens in each


def load_one_by_one(loader: DataLoader, start: int, stop: int):
    for step in range(start, stop):
        loader.batch(step)


def read_ahead(loader: DataLoader, start: int, stop: int):
    for _ in loader.batches(start, stop, torch.device("cpu")):
        pass


def main():
    data = sys.argv[1]
    print(f"{data}: {len(DataLoader(data, 'train', 1, 128).shards):,} tokens for training")

    # tokens/s for each shape
    for batch_size, block_size in SHAPES:
        steps = max(1, TOKENS // (batch_size * block_size))
        speeds = {"batch": [], "batches": []}
        for number in range(ROUNDS):
            for name, load in ("batch", load_one_by_one), ("batches", read_ahead):
                loader = DataLoader(data, "train", batch_size, block_size)
                began = time.perf_counter()
                load(loader, number * steps, (number + 1) * steps)
                seconds = time.perf_counter() - began
                speeds[name].append(steps * batch_size * block_size / seconds / 1e6)
        medians = [f"{name} {statistics.median(values):5.0f}M tokens/s"
                   for name, values in speeds.items()]
        print(f"{batch_size:4} x {block_size:4}: {', '.join(medians)}")

    # the time to a batch late in the run
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        DataLoader(data, "train", 512, 1024).batch(15_000)
        times.append(time.perf_counter() - began)
    print(f"a new loader's batch of step 15,000: {statistics.median(times) * 1000:.0f} ms")


if __name__ == "__main__":
    main()
