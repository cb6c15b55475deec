"""Validation loss against minutes on this machine: nanoGPT's documented laptop run, and the preset shakespeare-char-cpu.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.shakespeare_time nanoGPT tiny_shakespeare.txt

nanoGPT runs as it is, with the options its README gives for a laptop (4 layers, 128 wide, 2000 iterations of 768 characters),
on the same split: the first 90% of the characters for training. The clock starts with each program and includes its
imports and its own evaluations, each of 20 batches. Off the clock nanoGPT's last model is scored on the whole split, and our
run is repeated, which on a CPU gives the same weights, to score it there every 50 steps. With --longer N the preset also runs
for N steps, to see how far it falls.
"""
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from common.errors import UserError, report_user_errors
from report import metrics
from shards import Shards, read_manifest
from tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
LAPTOP = ("--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 "
          "--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --always_save_checkpoint=True").split()
LOSSES = (2.5, 2.2, 2.0, 1.95, 1.9, 1.88, 1.85, 1.8, 1.75, 1.7, 1.65, 1.6)

Curve = list[tuple[float, float]]  # seconds since the program's start, validation loss


def main(checkout: tyro.conf.Positional[Path], text: tyro.conf.Positional[Path], rounds: int = 1, longer: int = 0):
    """Times both, one after the other, `rounds` times; the table has the medians."""
    for needed in checkout / "train.py", text:
        if not needed.exists():
            raise UserError(f"There is no {needed}: see the head of this file.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(text, folder)
        theirs, timed = [], []
        for i in range(rounds):
            timed.append(train(folder, f"timed{i}"))
            theirs.append(nanogpt(checkout.resolve(), folder))
        long = [train(folder, "long", "--max-steps", str(longer))] if longer else []
        # Off the clock
        checkpoint = folder / "out-shakespeare-char" / "ckpt.pt"
        shutil.copy(folder / "data" / "shakespeare_char" / "meta.pkl", checkpoint.parent)
        print("nanoGPT's last model on the whole split:", subprocess.run(
            [sys.executable, ROOT / "benchmarks" / "validation_loss.py", checkpoint, "data/tiny_shakespeare_char"], cwd=folder,
            check=True, capture_output=True, text=True).stdout.strip())
        ours = [scored(folder, seconds) for seconds in timed]
        long = [scored(folder, seconds, "--max-steps", str(longer)) for seconds in long]
    print("minutes | nanoGPT | shakespeare-char-cpu |" + f" with --max-steps {longer} |" * bool(longer))
    for loss in LOSSES:
        times = [np.median([reached(curve, loss) for curve in curves]) for curves in (theirs, ours, long) if curves]
        print(f"{loss} | " + " | ".join(f"{seconds / 60:.2f}" if seconds < np.inf else "not reached" for seconds in times) + " |")
    last = np.median([curve[-1][0] for curve in theirs])
    at_188 = np.median([reached(curve, 1.88) for curve in ours])
    print(f"nanoGPT's whole run takes {last:.0f} s; 1.88 is reached here after {at_188:.0f} s, {at_188 / last:.2f} of that")
    print(f"= {last / at_188:.2f} tiny Shakespeare to a loss of 1.88 against nanoGPT's laptop run")


def reached(curve: Curve, loss: float) -> float:
    """Seconds until the first measured loss that low, infinite where there is none."""
    return next((seconds for seconds, measured in curve if measured <= loss), np.inf)


def prepare(text: Path, folder: Path):
    """The data of both: ours, and nanoGPT's as its own prepare.py writes them, of the same characters with the same ids."""
    subprocess.run([sys.executable, ROOT / "prepare.py", "tiny_shakespeare", "--text", text.resolve()], cwd=folder, check=True,
                   capture_output=True)
    data = folder / "data" / "shakespeare_char"
    data.mkdir()
    chars = load_tokenizer(read_manifest(folder / "data" / "tiny_shakespeare_char")["tokenizer"]).chars
    for split in "train", "val":
        shards = Shards(folder / "data" / "tiny_shakespeare_char", split)
        shards.read(0, len(shards)).astype(np.uint16).tofile(data / f"{split}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({
        "vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}))


def nanogpt(checkout: Path, folder: Path) -> Curve:
    """nanoGPT's run, by its own estimates."""
    for name in ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(checkout / name, folder / name)
    began, curve = time.time(), []
    with subprocess.Popen([sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *LAPTOP], cwd=folder,
                          stdout=subprocess.PIPE, text=True) as program:
        for line in program.stdout:
            if found := re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
                curve.append((time.time() - began, float(found[1])))
    print("nanoGPT, seconds and its own estimates:", [(round(seconds), loss) for seconds, loss in curve], flush=True)
    return curve


def train(folder: Path, run: str, *options: str) -> pd.Series:
    """The preset's run: seconds since the program's start by step, as its log has them."""
    began = time.time()
    subprocess.run([sys.executable, ROOT / "train.py", "shakespeare-char-cpu", "--run", run, *options], cwd=folder, check=True,
                   capture_output=True)
    frame = metrics(folder / "log" / run)
    print(f"{run}: {frame['time'].max() - began:.0f} s; its own estimates:",
          [(int(row.step), round(row.val_loss, 3)) for row in frame.dropna(subset="val_loss").itertuples()], flush=True)
    return frame.groupby("step")["time"].max() - began


def scored(folder: Path, seconds: pd.Series, *options: str) -> Curve:
    """The losses on the whole split every 50 steps of the same run, at the seconds of those steps."""
    run = "-".join(["scored", *options]).replace("--", "")
    if not (folder / "log" / run).exists():
        train(folder, run, "--eval-every", "50", "--eval-tokens", str(10**9), "--micro-batch", "128", *options)
    losses = metrics(folder / "log" / run).dropna(subset="val_loss").set_index("step")["val_loss"]
    return [(seconds[step], loss) for step, loss in losses.items() if step in seconds]


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
