"""Which model size, batch and learning rate bring the loss on tiny Shakespeare down soonest.

    python prepare.py tiny_shakespeare
    python -m benchmarks.shakespeare_sweep

Each variant trains with a complete schedule. Its loss is measured at four points of the run, over
the first 20,000 validation characters. The cost of a step is the CPU time of one thread, relative
to a step of nanoGPT's laptop setting: 4 layers, 128 wide, 12 x 64 characters, AdamW. Each round
times each variant once.
"""
import statistics
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro

from benchmarks.rounds import time_in_rounds
from dataloader import DataLoader
from model import GPT, GPTConfig
from training import optim

VOCAB_SIZE = 65
ROUNDS = 15  # of timing


class Setting(NamedTuple):
    """All that determines the cost of a step."""
    n_layer: int
    n_embd: int
    batch_size: int
    block_size: int
    optimizer: str


LAPTOP = Setting(4, 128, 12, 64, "adamw")  # nanoGPT's README
VARIANTS = [  # setting, peak learning rate, characters in all
    (Setting(4, 128, 16, 128, "muon"), 4e-3, 360_000),
    (Setting(4, 128, 12, 64, "muon"), 4e-3, 360_000),
    (Setting(4, 128, 12, 64, "muon"), 8e-3, 360_000),
    (Setting(4, 128, 12, 64, "adamw"), 5e-3, 360_000),
    (Setting(2, 128, 6, 64, "muon"), 6e-3, 360_000),
    (Setting(2, 128, 6, 64, "adamw"), 5e-3, 360_000),
    (Setting(2, 128, 12, 64, "muon"), 1e-2, 540_000),
    (Setting(2, 128, 12, 64, "muon"), 2e-2, 540_000),
    (Setting(2, 128, 6, 128, "muon"), 1e-2, 540_000),
    (Setting(3, 96, 12, 64, "muon"), 1e-2, 540_000),
    (Setting(2, 128, 12, 64, "muon"), 1e-2, 768_000),
    (Setting(2, 96, 12, 64, "muon"), 1e-2, 1_150_000),
]


def main(data: Path = Path("data/tiny_shakespeare_char")):
    torch.set_num_threads(1)
    seconds = step_seconds()
    print("| layers, width, batch, optimizer, rate | characters: loss | cost of a step |")
    print("| --- | --- | --- |")
    for setting, rate, characters in VARIANTS:
        losses = train(setting, rate, characters, data)
        n_layer, n_embd, batch_size, block_size, optimizer = setting
        print(f"| {n_layer}, {n_embd}, {batch_size} x {block_size}, {optimizer}, {rate:g} | "
              f"{losses} | {seconds[setting] / seconds[LAPTOP]:.2f} |", flush=True)


def step_seconds() -> dict[Setting, float]:
    """Median seconds of a step in each setting."""
    steps = {}
    for setting in (LAPTOP, *(setting for setting, _, _ in VARIANTS)):
        tokens = torch.randint(VOCAB_SIZE, (setting.batch_size, setting.block_size + 1))
        steps[setting] = partial(Step(setting).take, tokens[:, :-1], tokens[:, 1:], 1e-4)
    times = time_in_rounds(steps, ROUNDS, time.thread_time)
    return {setting: statistics.median(seconds) for setting, seconds in times.items()}


class Step:
    """A model and its optimizers."""

    def __init__(self, setting: Setting):
        torch.manual_seed(0)
        n_head = setting.n_embd // 32
        self.model = GPT(GPTConfig(
            setting.block_size, VOCAB_SIZE, setting.n_layer, n_head, setting.n_embd))
        self.optimizers = optim.build_optimizers(self.model, setting.optimizer, 0.1, (0.9, 0.99))

    def take(self, x: torch.Tensor, y: torch.Tensor, rate: float):
        """Forward, backward and update on inputs x and targets y, (B, T) each."""
        self.model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optim.set_learning_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def train(setting: Setting, rate: float, characters: int, data: Path) -> str:
    """The validation losses of a run at four points, as text."""
    step, losses = Step(setting), []
    train_loader = DataLoader(data, "train", setting.batch_size, setting.block_size, 1)
    val_loader = DataLoader(data, "val", 1, setting.block_size)
    batch_characters = setting.batch_size * setting.block_size
    max_steps = characters // batch_characters
    for i in range(max_steps):
        step.take(*train_loader.batch(i), optim.learning_rate(
            i, peak=rate, schedule="cosine", min_ratio=0.0, warmup_steps=20, max_steps=max_steps))
        if (i + 1) % (max_steps // 4) == 0:
            loss = validation_loss(step.model, val_loader)
            losses.append(f"{(i + 1) * batch_characters / 1000:.0f}k: {loss:.3f}")
    return ", ".join(losses)


@torch.no_grad()
def validation_loss(model: GPT, loader: DataLoader, characters: int = 20_000) -> float:
    x, y = loader.read(range(characters // loader.block_size))
    logits = model(x)[0]  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
