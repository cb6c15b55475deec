"""Validation loss against minutes on this machine: nanoGPT's documented laptop run, and the preset shakespeare-char-cpu.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/shakespeare_time.py nanoGPT tiny_shakespeare.txt

nanoGPT runs as it is, with the options its README gives for a laptop (4 layers, 128 wide, 2000 iterations of 768 characters),
on the same split: the first 90% of the characters for training. The clock starts with each program and includes its
imports and its own evaluations, each of 20 batches. Off the clock nanoGPT's last model is scored on the whole split, and our
run is repeated, which on a CPU gives the same weights, to score it there every 50 steps. With --longer N the preset also runs
for N steps, to see how far it falls.
"""
import sys

sys.path.append(sys.path.pop(0).removesuffix("benchmarks"))  # this folder has a file named as one of the standard library

import pickle
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

from errors import UserError, one_sentence
from report import metrics

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
    theirs, ours, long = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            ours.append(our_preset(text.resolve(), Path(folder, f"ours{i}")))
            theirs.append(nanogpt(checkout.resolve(), text, Path(folder, f"theirs{i}")))
            print(f"nanoGPT {theirs[-1]}\nours {ours[-1]}", flush=True)
        if longer:
            long.append(our_preset(text.resolve(), Path(folder, "long"), "--max-steps", str(longer)))
    print("minutes | nanoGPT | shakespeare-char-cpu |" + f" with --max-steps {longer} |" * bool(longer))
    for loss in LOSSES:
        times = [np.median([reached(curve, loss) for curve in curves]) for curves in (theirs, ours, long) if curves]
        print(f"{loss} | " + " | ".join(f"{seconds / 60:.2f}" if seconds < np.inf else "not reached" for seconds in times) + " |")
    last = np.median([curve[-1][0] for curve in theirs])
    at_188 = np.median([reached(curve, 1.88) for curve in ours])
    print(f"nanoGPT's whole run takes {last:.0f} s; 1.88 is reached here after {at_188:.0f} s, {at_188 / last:.2f} of that")


def reached(curve: Curve, loss: float) -> float:
    """Seconds until the first measured loss that low, infinite where there is none."""
    return next((seconds for seconds, measured in curve if measured <= loss), np.inf)


def nanogpt(checkout: Path, text: Path, folder: Path) -> Curve:
    """nanoGPT's run, with its data as its own prepare.py writes them; its last point is measured on the whole split."""
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(checkout / name, folder / name)
    content = text.read_text(encoding="utf-8")
    chars = sorted(set(content))
    ids = np.array([chars.index(c) for c in content], dtype=np.uint16)
    cut = int(len(ids) * 0.9)
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({
        "vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}))
    began, curve = time.time(), []
    with subprocess.Popen([sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *LAPTOP], cwd=folder,
                          stdout=subprocess.PIPE, text=True) as program:
        for line in program.stdout:
            if found := re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
                curve.append((time.time() - began, float(found[1])))
    checkpoint = folder / "out-shakespeare-char" / "ckpt.pt"
    shutil.copy(data / "meta.pkl", checkpoint.parent)
    scored = subprocess.run([sys.executable, ROOT / "benchmarks" / "validation_loss.py", checkpoint, data], check=True,
                            capture_output=True, text=True).stdout
    print(f"nanoGPT's last model on the whole split: {scored.strip()}")
    return curve


def our_preset(text: Path, folder: Path, *options: str) -> Curve:
    folder.mkdir()
    subprocess.run([sys.executable, ROOT / "prepare.py", "tiny_shakespeare", "--text", text], cwd=folder, check=True,
                   capture_output=True)
    train = [sys.executable, ROOT / "train.py", "shakespeare-char-cpu", *options]
    began = time.time()
    subprocess.run(train, cwd=folder, check=True, capture_output=True)
    subprocess.run([*train, "--run", "scored", "--eval-every", "50", "--eval-tokens", str(10**9)], cwd=folder, check=True,
                   capture_output=True)
    timed, scored = (metrics(folder / "log" / run) for run in ("shakespeare-char-cpu", "scored"))
    seconds = timed.groupby("step")["time"].max() - began
    scored = scored.dropna(subset="val_loss").set_index("step")["val_loss"]
    return [(round(seconds[step], 1), round(loss, 4)) for step, loss in scored.items() if step in seconds]


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main)
