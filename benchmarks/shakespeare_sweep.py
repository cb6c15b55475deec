"""Which model size, batch and learning rate bring the loss on tiny Shakespeare down soonest.

    python prepare.py tiny_shakespeare
    python -m benchmarks.shakespeare_sweep

Each variant of the preset shakespeare-char-cpu trains with a complete schedule, in log/sweep-…. Its
loss is measured at four points of the run, over the first 20,000 validation characters. The cost of
a step is the CPU time of one thread, relative to a step of nanoGPT's laptop setting: 4 layers,
128 wide, 12 x 64 characters, AdamW. Each round times each variant once.
"""
import dataclasses
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

import ddp
import report
import train
from benchmarks.rounds import time_in_rounds
from benchmarks.train_throughput import build_run
from checkpoint import LOG
from training.config import TrainConfig
from training.presets import PRESETS

VOCAB_SIZE = 65
ROUNDS = 15  # of timing


class Setting(NamedTuple):
    """All that determines the cost of a step."""
    n_layer: int
    n_embd: int
    batch_size: int
    block_size: int
    optimizer: str

    def __str__(self):
        return (f"{self.n_layer}, {self.n_embd}, {self.batch_size} x {self.block_size}, "
                f"{self.optimizer}")


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
    lines = ["| layers, width, batch, optimizer, rate | characters: loss | cost of a step |",
             "| --- | --- | --- |"]
    for setting, rate, characters in VARIANTS:
        losses = train_one(setting, rate, characters, data)
        cost = seconds[setting] / seconds[LAPTOP]
        lines.append(f"| {setting}, {rate:g} | {losses} | {cost:.2f} |")
    print("\n".join(lines))


def configure(setting: Setting, **options) -> TrainConfig:
    batch_tokens = setting.batch_size * setting.block_size
    return dataclasses.replace(
        PRESETS["shakespeare-char-cpu"], n_layer=setting.n_layer, n_head=setting.n_embd // 32,
        n_embd=setting.n_embd, block_size=setting.block_size, vocab_size=VOCAB_SIZE,
        batch_tokens=batch_tokens, micro_batch=setting.batch_size, optimizer=setting.optimizer,
        **options)


def step_seconds() -> dict[Setting, float]:
    """Median seconds of a step in each setting."""
    steps = {}
    for setting in (LAPTOP, *(setting for setting, _, _ in VARIANTS)):
        run = build_run(configure(setting), ddp.SINGLE_PROCESS)
        x = torch.randint(VOCAB_SIZE, (setting.batch_size, setting.block_size))  # (B, T)
        steps[setting] = partial(train.train_step, run, x, x, 0)
    times = time_in_rounds(steps, ROUNDS, time.thread_time)
    return {setting: statistics.median(seconds) for setting, seconds in times.items()}


def train_one(setting: Setting, rate: float, characters: int, data: Path) -> str:
    """The validation losses of a run at four points, as text."""
    max_steps = characters // (setting.batch_size * setting.block_size)
    name = f"sweep-{setting}-{rate:g}-{characters}".replace(", ", "-").replace(" ", "")
    config = configure(
        setting, data=data, name=name, learning_rate=rate, max_steps=max_steps,
        eval_every=math.ceil(max_steps / 4), eval_tokens=20_000, save_every=max_steps)
    with ddp.join_world("cpu") as world:
        train.train(config, world)
    log = report.metrics(LOG / name).dropna(subset="val_loss").query("step > 0")
    return ", ".join(f"{row.tokens / 1000:.0f}k: {row.val_loss:.3f}" for row in log.itertuples())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
