"""Minutes to a validation loss on this machine: nanoGPT's laptop run and our shakespeare-char-cpu.

    git clone https://github.com/karpathy/nanoGPT
    python -m benchmarks.shakespeare_time nanoGPT tiny_shakespeare.txt

nanoGPT runs unchanged, with the options its README gives for a laptop: 4 layers, 128 wide, 2000
iterations of 768 characters. Both train on the first 90% of the characters. The clock starts with
each program and includes its imports and its own evaluations, each over 20 batches.

Afterwards, off the clock, nanoGPT's last model is scored on the whole validation split. Our run is
repeated, which on a CPU gives the same weights, and scored on the whole split every 50 steps.
"""
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.program import report_user_errors

import numpy as np
import pandas as pd
import tyro

from benchmarks.ratio import print_ratio
from common.errors import UserError
from report import metrics
from shards import Shards, read_manifest
from tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
LAPTOP = [  # nanoGPT's README
    "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64",
    "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000",
    "--lr_decay_iters=2000", "--dropout=0.0", "--always_save_checkpoint=True"]
LOSSES = (2.5, 2.2, 2.0, 1.95, 1.9, 1.88, 1.85, 1.8, 1.75, 1.7, 1.65, 1.6)
GOAL = 1.88  # the loss that nanoGPT's README reports for this run

Curve = list[tuple[float, float]]  # seconds since the program's start, validation loss


def main(checkout: tyro.conf.Positional[Path], text: tyro.conf.Positional[Path], rounds: int = 1):
    """Times both `rounds` times, one after the other; the table has the medians."""
    for path in checkout / "train.py", text:
        if not path.exists():
            raise UserError(f"{path} does not exist: give a checkout of nanoGPT and a text file.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_data(text, folder)

        # on the clock
        nanogpt_curves, timed = [], []
        for i in range(rounds):
            timed.append(train(folder, f"timed{i}"))
            nanogpt_curves.append(train_nanogpt(checkout.resolve(), folder))

        # off the clock
        print("nanoGPT's last model on the whole split:", score_nanogpt(folder))
        losses = score_ours(folder)
        curves = [pd.concat([seconds, losses], axis=1, join="inner").to_numpy()
                  for seconds in timed]

    print_table({"nanoGPT": nanogpt_curves, "shakespeare-char-cpu": curves})
    whole_run = np.median([curve[-1][0] for curve in nanogpt_curves])
    goal = np.median([seconds_to(GOAL, curve) for curve in curves])
    print(f"nanoGPT's run takes {whole_run:.0f} s; ours reaches {GOAL} after {goal:.0f} s, "
          f"{goal / whole_run:.2f} of that")
    print_ratio(f"tiny Shakespeare to a loss of {GOAL}", [whole_run / goal],
                "times nanoGPT's laptop run")


def print_table(columns: dict[str, list[Curve]]):
    """Minutes to each loss, a column for each program."""
    print(f"minutes | {' | '.join(columns)} |")
    for loss in LOSSES:
        cells = []
        for curves in columns.values():
            seconds = np.median([seconds_to(loss, curve) for curve in curves])
            cells.append(f"{seconds / 60:.2f}" if seconds < np.inf else "not reached")
        print(f"{loss} | {' | '.join(cells)} |")


def seconds_to(loss: float, curve: Curve) -> float:
    """Seconds to the first point at or below the loss, infinite if there is none."""
    return next((seconds for seconds, value in curve if value <= loss), np.inf)


# --------------------------------------------------------------------------------------------------
# The runs

def prepare_data(text: Path, folder: Path):
    """Writes our shards, and the same characters with the ids of nanoGPT's prepare.py."""
    subprocess.run(
        [sys.executable, ROOT / "prepare.py", "tiny_shakespeare", "--text", text.resolve()],
        cwd=folder, check=True, capture_output=True)
    shards = folder / "data" / "tiny_shakespeare_char"
    data = folder / "data" / "shakespeare_char"
    data.mkdir()
    for split in "train", "val":
        tokens = Shards(shards, split)
        tokens.read(0, len(tokens)).astype(np.uint16).tofile(data / f"{split}.bin")
    chars = load_tokenizer(read_manifest(shards)["tokenizer"]).chars
    (data / "meta.pkl").write_bytes(pickle.dumps({
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {char: i for i, char in enumerate(chars)}}))


def train_nanogpt(checkout: Path, folder: Path) -> Curve:
    """Runs nanoGPT; the losses are its own estimates."""
    for name in "train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py":
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(checkout / name, folder / name)
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *LAPTOP]
    began, curve = time.time(), []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if match := re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
                curve.append((time.time() - began, float(match[1])))
    print("nanoGPT, seconds and its own estimates:",
          [(round(seconds), loss) for seconds, loss in curve], flush=True)
    return curve


def score_nanogpt(folder: Path) -> str:
    """The loss of nanoGPT's last model on the whole validation split, as text."""
    checkpoint = folder / "out-shakespeare-char" / "ckpt.pt"
    shutil.copy(folder / "data" / "shakespeare_char" / "meta.pkl", checkpoint.parent)
    # not in `folder`, whose model.py and train.py are nanoGPT's
    command = [sys.executable, "-m", "benchmarks.validation_loss", checkpoint,
               folder / "data" / "tiny_shakespeare_char"]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return result.stdout.strip()


def train(folder: Path, name: str, *options: str) -> pd.Series:
    """Runs the preset; the seconds from the program's start to each step, as its log has them."""
    began = time.time()
    command = [sys.executable, ROOT / "train.py", "shakespeare-char-cpu", "--name", name, *options]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    log = metrics(folder / "log" / name)
    estimates = [(int(row.step), round(row.val_loss, 3))
                 for row in log.dropna(subset="val_loss").itertuples()]
    print(f"{name}: {log['time'].max() - began:.0f} s; its own estimates: {estimates}", flush=True)
    return log.groupby("step")["time"].max() - began


def score_ours(folder: Path) -> pd.Series:
    """The losses of a repeated run on the whole split, by step."""
    train(folder, "scored", "--eval-every", "50", "--eval-tokens", str(10**9),
          "--micro-batch", "128")
    log = metrics(folder / "log" / "scored").dropna(subset="val_loss")
    return log.set_index("step")["val_loss"]


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
