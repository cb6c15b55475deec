"""Which training recipe reaches the tuned AdamW's final validation loss in the fewest tokens.

    python prepare.py edu_corpus.jsonl.zst --tokenizer bpe:4096 --val-share 0.01
    python -m benchmarks.recipes                  # train every run without a result, then report
    python -m benchmarks.recipes adamw muon-lr    # only runs whose names start with one of these
    python -m benchmarks.recipes --only-report    # write runs.csv and curves.png from curves/*.csv

The architecture stays the same. Each run uses train.py's own loop in log/recipe-<name>/, resumes
after an interruption, and writes benchmarks/recipes/curves/<name>.csv. Several processes may share
the work. benchmarks/recipes/README.md describes the results.
"""
import contextlib
import csv
import dataclasses
import itertools
import math
import re
import statistics
from pathlib import Path
from unittest import mock

from common.program import report_user_errors

import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure

import ddp
import report
import train
from checkpoint import LOG
from common.errors import UserError
from model import GPT
from training import optim
from training.config import TrainConfig

FOLDER = Path(__file__).parent / "recipes"
CURVES = FOLDER / "curves"
TOKENS = 2**20  # of the baseline's run

# --------------------------------------------------------------------------------------------------
# The runs, by name: how each differs from BASE

BASE = TrainConfig(
    n_layer=4, n_head=4, n_embd=128, block_size=256, batch_tokens=2048, micro_batch=8,
    max_steps=TOKENS // 2048, learning_rate=2e-3, warmup_steps=32, dtype="float32",
    eval_every=64, eval_tokens=2**16, save_every=128, log_every=32,
    sample_every=10**6, sample_prompt="The")

# half of the tokens, with a complete schedule
HALF = {"optimizer": "muon", "max_steps": BASE.max_steps // 2, "learning_rate": 4e-3,
        "warmup_steps": 16}
WSD = {"schedule": "wsd", "min_lr_ratio": 0.0}
BATCH_1024 = {"batch_tokens": 1024, "max_steps": 2 * BASE.max_steps, "warmup_steps": 64,
              "eval_every": 128}
BATCH_4096 = {"batch_tokens": 4096, "max_steps": BASE.max_steps // 2, "warmup_steps": 16,
              "eval_every": 32}

RUNS = {
    # AdamW
    "adamw-lr0.001": {"learning_rate": 1e-3},
    "adamw-lr0.002": {"learning_rate": 2e-3},
    "adamw-lr0.004": {"learning_rate": 4e-3},
    "adamw-lr0.008": {"learning_rate": 8e-3},
    "adamw-wsd": {"learning_rate": 4e-3, **WSD},
    "adamw-batch4096": {"learning_rate": 4e-3, **BATCH_4096},
    "adamw-batch1024": {"learning_rate": 4e-3, **BATCH_1024},
    "adamw-batch1024-lr0.002": {"learning_rate": 2e-3, **BATCH_1024},

    # Muon in half of the tokens; `trick` is one of TRICKS below, which train.py does not have
    "muon-lr0.002": HALF | {"learning_rate": 2e-3},
    "muon-lr0.004": HALF | {"learning_rate": 4e-3},
    "muon-lr0.008": HALF | {"learning_rate": 8e-3},
    "muon-lr0.016": HALF | {"learning_rate": 16e-3},
    "muon-lr0.032": HALF | {"learning_rate": 32e-3},
    "muon-cosine0": HALF | {"min_lr_ratio": 0.0},
    "muon-zero": HALF | {"trick": "zero"},
    "muon-qkv": HALF | {"trick": "qkv"},
    "muon-wd0": HALF | {"weight_decay": 0.0},
    "muon-wd0.3": HALF | {"weight_decay": 0.3},
    "muon-batch4096": HALF | BATCH_4096 | {"max_steps": HALF["max_steps"] // 2, "warmup_steps": 8},

    # a higher learning rate for the embeddings
    "muon-embed2": HALF | {"embedding_rate": 2.0},
    "fast": HALF | {"embedding_rate": 4.0},
    "muon-embed8": HALF | {"embedding_rate": 8.0},

    # WSD
    "muon-wsd": HALF | WSD,
    "muon-wsd-embed4": HALF | WSD | {"embedding_rate": 4.0},
    "muon-wsd-lr0.008": HALF | WSD | {"learning_rate": 8e-3},
    "muon-wsd-lr0.016": HALF | WSD | {"learning_rate": 16e-3},
    "muon-wsd-lr0.008-embed2": HALF | WSD | {"learning_rate": 8e-3, "embedding_rate": 2.0},
    "muon-wsd-lr0.008-embed4": HALF | WSD | {"learning_rate": 8e-3, "embedding_rate": 4.0},
}

# a complete schedule in 40% of the baseline's tokens
for _name in "fast", "muon-wsd-lr0.008":
    RUNS[f"{_name}-40"] = RUNS[_name] | {
        "max_steps": round(0.4 * BASE.max_steps), "warmup_steps": 13}

# two more seeds
for _seed in 2, 3:
    for _name in ("fast", "adamw-batch1024", "adamw-lr0.004", "adamw-lr0.002", "muon-lr0.004",
                  "muon-lr0.008", "muon-lr0.016", "muon-zero", "muon-wsd-lr0.008",
                  "muon-wsd-embed4"):
        RUNS[f"{_name}-s{_seed}"] = RUNS[_name] | {"seed": 1336 + _seed}


def zero_residuals(model: GPT, initial_weights=GPT.initial_weights):
    """Initial weights with zero residual projections: each block starts as the identity."""
    projections = set()
    for block in model.transformer.h:
        projections |= {id(block.attn.c_proj.weight), id(block.mlp.c_proj.weight)}
    for p, values in initial_weights(model):
        yield p, torch.zeros_like(values) if id(p) in projections else values


def orthogonalize_qkv(matrix: torch.Tensor, orthogonalize=optim.orthogonalize) -> torch.Tensor:
    """Orthogonalize queries, keys and values separately in the update of c_attn (3C, C)."""
    m, n = matrix.shape
    if m != 3 * n:
        return orthogonalize(matrix)
    return torch.cat([orthogonalize(part) for part in matrix.split(n)]) / 3**0.5


TRICKS = {
    None: contextlib.nullcontext,
    "zero": lambda: mock.patch.object(GPT, "initial_weights", zero_residuals),
    "qkv": lambda: mock.patch.object(optim, "orthogonalize", orthogonalize_qkv),
}


def main(names: tyro.conf.Positional[tuple[str, ...]] = (), /,
         data: Path = Path("data/edu_corpus_bpe-4096"), only_report: bool = False):
    """Trains the runs whose names start with one of `names`, or all of them, and reports."""
    if not only_report:
        train_missing(names, data)
    write_report()


def train_missing(names: tuple[str, ...], data: Path):
    CURVES.mkdir(parents=True, exist_ok=True)
    for name, changes in RUNS.items():
        if not name.startswith(names or ("",)) or (CURVES / f"{name}.csv").exists():
            continue
        try:
            train_one(name, changes, data)
        except UserError:
            if names:
                raise
            # without names, leave a run that another process is training to it


def train_one(name: str, changes: dict, data: Path):
    changes = dict(changes)
    trick = TRICKS[changes.pop("trick", None)]
    config = dataclasses.replace(BASE, data=data, name=f"recipe-{name}", **changes)
    with trick(), ddp.join_world("cpu") as world:
        train.train(config, world)
    log = report.metrics(LOG / config.name).dropna(subset="val_loss")
    points = zip(log["step"] * config.batch_tokens, log["val_loss"].round(5))
    with open(CURVES / f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("tokens", "val_loss"), *points])


# --------------------------------------------------------------------------------------------------
# The report

def write_report():
    """Writes runs.csv, a line per recipe, and curves.png.

    The baseline is the AdamW recipe with the lowest mean final loss.
    """
    # the curves of each recipe, one per seed
    recipes: dict[str, list[pd.DataFrame]] = {}
    for path in sorted(CURVES.glob("*.csv")):
        recipe = re.sub(r"-s\d+$", "", path.stem)
        recipes.setdefault(recipe, []).append(pd.read_csv(path))

    # the final losses, and the baseline's as the goal
    final_losses, means = {}, {}
    for recipe, curves in recipes.items():
        final_losses[recipe] = [curve["val_loss"].iloc[-1] for curve in curves]
        means[recipe] = statistics.mean(final_losses[recipe])
    baselines = [recipe for recipe in recipes if recipe.startswith("adamw")]
    if not baselines:
        print("No report yet: it needs the result of an AdamW run.")
        return
    baseline = min(baselines, key=means.get)
    goal = means[baseline]

    # a row per recipe, AdamW first, the best first
    rows = []
    for recipe in sorted(recipes, key=lambda name: (not name.startswith("adamw"), means[name])):
        curves, losses = recipes[recipe], final_losses[recipe]
        shares = [tokens_to(curve, goal) / TOKENS for curve in curves]
        rows.append({
            "recipe": recipe,
            "seeds": len(curves),
            "tokens": int(curves[0]["tokens"].iloc[-1]),
            "val_loss": round(means[recipe], 4),
            "sd": round(statistics.stdev(losses), 4) if len(losses) > 1 else "",
            "share_of_tokens": round(statistics.mean(shares), 3) if max(shares) < math.inf else "",
            "changes": changes_text(RUNS.get(recipe, {})),
        })
    frame = pd.DataFrame(rows)
    frame.to_csv(FOLDER / "runs.csv", index=False)
    print(frame.drop(columns="changes").to_string(index=False))
    draw(recipes, baseline, goal).savefig(FOLDER / "curves.png")


def changes_text(changes: dict) -> str:
    parts = []
    for key, value in changes.items():
        parts.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
    return " ".join(parts)


def tokens_to(curve: pd.DataFrame, loss: float) -> float:
    """Tokens until the interpolated curve reaches the loss; infinite if it never does."""
    points = list(zip(curve["tokens"], curve["val_loss"]))
    for (tokens, before), (next_tokens, after) in itertools.pairwise(points):
        if after <= loss:
            share = (before - loss) / max(1e-9, before - after)
            return tokens + (next_tokens - tokens) * share
    return math.inf


def draw(recipes: dict[str, list[pd.DataFrame]], baseline: str, goal: float) -> Figure:
    """The curves: recipes with several seeds in colour, with their range; the others in grey."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours = (f"C{i}" for i in itertools.count())
    for recipe, curves in recipes.items():
        points = pd.concat(curves).groupby("tokens")["val_loss"].agg(["mean", "min", "max"])
        several_seeds = len(curves) > 1
        if several_seeds or recipe == baseline:
            style = {"label": recipe, "color": next(colours), "linewidth": 2}
        else:
            style = {"color": "0.7", "linewidth": 0.8}
        axes.plot(points.index, points["mean"], zorder=2 + several_seeds, **style)
        axes.fill_between(points.index, points["min"], points["max"], color=style["color"],
                          alpha=0.3, linewidth=0)
    axes.axhline(goal, color="0.2", linestyle="--", linewidth=1, label=f"{baseline}'s final loss")
    axes.axvline(0.6 * TOKENS, color="0.2", linestyle=":", linewidth=1, label="60% of its tokens")
    lowest = min(curve["val_loss"].min() for curves in recipes.values() for curve in curves)
    axes.set_ylim(lowest - 0.05, goal + 1)
    axes.set(xlabel="tokens seen", ylabel="validation loss, nats per token")
    axes.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
