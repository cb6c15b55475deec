"""What brings tiny Shakespeare's loss down soonest: sizes, batches and rates, each with its whole schedule, and a step's cost.

    python prepare.py tiny_shakespeare
    python -m benchmarks.shakespeare_sweep

The loss is over the first 20,000 validation characters, four times on the way. A step's cost is in the time of one thread, as a
share of a step of nanoGPT's laptop setting (4 layers, 128 wide, 12 x 64, AdamW); every round times each once.
"""


import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from dataloader import DataLoader
from model import GPT, GPTConfig
from training import optim

# layers, width, sequences, their length, optimizer, rate, characters in all
VARIANTS = [
    (4, 128, 16, 128, "muon", 4e-3, 360_000),
    (4, 128, 12, 64, "muon", 4e-3, 360_000),
    (4, 128, 12, 64, "muon", 8e-3, 360_000),
    (4, 128, 12, 64, "adamw", 5e-3, 360_000),
    (2, 128, 6, 64, "muon", 6e-3, 360_000),
    (2, 128, 6, 64, "adamw", 5e-3, 360_000),
    (2, 128, 12, 64, "muon", 1e-2, 540_000),
    (2, 128, 12, 64, "muon", 2e-2, 540_000),
    (2, 128, 6, 128, "muon", 1e-2, 540_000),
    (3, 96, 12, 64, "muon", 1e-2, 540_000),
    (2, 128, 12, 64, "muon", 1e-2, 768_000),
    (2, 96, 12, 64, "muon", 1e-2, 1_150_000),
]


def main(data: Path = Path("data/tiny_shakespeare_char")):
    torch.set_num_threads(1)
    laptop = (4, 128, 12, 64, "adamw", 1e-3, 0)
    steps = {variant[:5]: Step(*variant[:5]) for variant in [laptop, *VARIANTS]}
    for _ in range(15):
        for step in steps.values():
            x = torch.randint(65, (step.batch, step.length + 1))
            began = time.thread_time()
            step.take(x[:, :-1], x[:, 1:], 1e-4)
            step.seconds.append(time.thread_time() - began)
    cost = {name: statistics.median(step.seconds) for name, step in steps.items()}
    print("| layers, width, batch, optimizer, rate | characters: loss | cost of a step |\n| --- | --- | --- |")
    for *name, rate, chars in VARIANTS:
        losses = train(Step(*name), rate, chars, data)
        print(f"| {name[0]}, {name[1]}, {name[2]} x {name[3]}, {name[4]}, {rate:g} | {losses} | "
              f"{cost[tuple(name)] / cost[laptop[:5]]:.2f} |", flush=True)


class Step:
    def __init__(self, layers: int, width: int, batch: int, length: int, optimizer: str):
        torch.manual_seed(0)
        self.model = GPT(GPTConfig(length, 65, layers, width // 32, width))
        self.optimizers = optim.build_optimizers(self.model, optimizer, 0.1, (0.9, 0.99))
        self.batch, self.length, self.seconds = batch, length, []

    def take(self, x, y, rate: float):
        self.model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optim.set_learning_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def train(step: Step, rate: float, chars: int, data: Path) -> str:
    loader, steps, losses = DataLoader(data, "train", step.batch, step.length, 1), chars // (step.batch * step.length), []
    for i in range(steps):
        step.take(*loader.batch(i), optim.learning_rate(
            i, peak=rate, schedule="cosine", min_ratio=0.0, warmup_steps=20, max_steps=steps))
        if (i + 1) % (steps // 4) == 0:
            loss = validation_loss(step.model, DataLoader(data, "val", 1, step.length))
            losses.append(f"{(i + 1) * step.batch * step.length / 1000:.0f}k: {loss:.3f}")
    return ", ".join(losses)


@torch.no_grad()
def validation_loss(model: GPT, loader: DataLoader, chars: int = 20_000) -> float:
    x, y = loader.read(range(chars // loader.block_size))
    return F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item()


if __name__ == "__main__":
    tyro.cli(main)
