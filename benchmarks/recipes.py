"""Which recipe reaches the tuned AdamW's final validation loss with the fewest tokens, the architecture unchanged.

    python prepare.py edu_corpus.jsonl.zst --tokenizer bpe:4096 --val-share 0.01
    python -m benchmarks.recipes                  # trains every run that has no result yet, and reports
    python -m benchmarks.recipes adamw muon-lr    # only runs whose names begin so; several processes may share the work
    python -m benchmarks.recipes --only-report    # benchmarks/recipes/: runs.csv and curves.png out of curves/*.csv
    python -m benchmarks.recipes --times          # what a step of the baseline and of the winner takes

Each run is train.py's own loop in log/recipe-<name>/, goes on where it was stopped, and leaves its curve in
benchmarks/recipes/curves/<name>.csv. benchmarks/recipes/README.md says what came of it.
"""


import contextlib
import csv
import dataclasses
import itertools
import math
import re
import statistics
import time
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure

import ddp
import report
import train
from checkpoint import LOG
from common.errors import UserError, report_user_errors
from model import GPT
from training import optim, setup
from training.config import TrainConfig

FOLDER = Path(__file__).parent / "recipes"
CURVES = FOLDER / "curves"
TOKENS = 2**20  # of the baseline's run

BASE = TrainConfig(
    n_layer=4, n_head=4, n_embd=128, block_size=256, batch_tokens=2048, micro_batch=8, max_steps=TOKENS // 2048,
    learning_rate=2e-3, warmup_steps=32, eval_every=64, eval_tokens=2**16, sample_every=10**6, save_every=128, log_every=32,
    sample_prompt="The", dtype="float32")
HALF = {"optimizer": "muon", "max_steps": BASE.max_steps // 2, "learning_rate": 4e-3, "warmup_steps": 16}  # half of the tokens
WSD = {"schedule": "wsd", "min_lr_ratio": 0.0}


def variant(base: dict, **changes) -> dict:
    return {**base, **changes}


# Name: what differs from BASE; `trick` is one of TRICKS, which train.py does not have.
RUNS = {
    **{f"adamw-lr{lr:g}": {"learning_rate": lr} for lr in (1e-3, 2e-3, 4e-3, 8e-3)},
    "adamw-wsd": {"learning_rate": 4e-3, **WSD},
    "adamw-batch4096": {"learning_rate": 4e-3, "batch_tokens": 4096, "max_steps": BASE.max_steps // 2, "warmup_steps": 16,
                        "eval_every": 32},
    **{f"adamw-batch1024{name}": {"learning_rate": lr, "batch_tokens": 1024, "max_steps": 2 * BASE.max_steps, "warmup_steps": 64,
                                  "eval_every": 128} for name, lr in (("", 4e-3), ("-lr0.002", 2e-3))},
    **{f"muon-lr{lr:g}": variant(HALF, learning_rate=lr) for lr in (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)},
    "muon-cosine0": variant(HALF, min_lr_ratio=0.0),
    "muon-zero": variant(HALF, trick="zero"),
    "muon-qkv": variant(HALF, trick="qkv"),
    "muon-wd0": variant(HALF, weight_decay=0.0),
    "muon-wd0.3": variant(HALF, weight_decay=0.3),
    "muon-batch4096": variant(HALF, batch_tokens=4096, max_steps=HALF["max_steps"] // 2, warmup_steps=8, eval_every=32),
    "muon-embed2": variant(HALF, embedding_rate=2.0),
    "fast": variant(HALF, embedding_rate=4.0),
    "muon-embed8": variant(HALF, embedding_rate=8.0),
    "muon-wsd": variant(HALF, **WSD),
    "muon-wsd-embed4": variant(HALF, **WSD, embedding_rate=4.0),
    **{f"muon-wsd-lr{lr:g}": variant(HALF, **WSD, learning_rate=lr) for lr in (8e-3, 16e-3)},
    **{f"muon-wsd-lr0.008-embed{rate:g}": variant(HALF, **WSD, learning_rate=8e-3, embedding_rate=rate) for rate in (2.0, 4.0)},
}
RUNS |= {f"{name}-40": variant(RUNS[name], max_steps=round(0.4 * BASE.max_steps), warmup_steps=13)  # a whole schedule in 40%
         for name in ("fast", "muon-wsd-lr0.008")}
RUNS |= {f"{name}-s{seed}": variant(RUNS[name], seed=1336 + seed) for seed in (2, 3) for name in (
    "fast", "adamw-batch1024", "adamw-lr0.004", "adamw-lr0.002", "muon-lr0.004", "muon-lr0.008", "muon-lr0.016", "muon-zero",
    "muon-wsd-lr0.008", "muon-wsd-embed4")}


def zero_residuals(model, whole=GPT.initial):
    """First values by which each block begins as the identity: the residual projections are zero."""
    residual = {id(block) for layer in model.transformer.h for block in (layer.attn.c_proj.weight, layer.mlp.c_proj.weight)}
    return ((p, values * (id(p) not in residual)) for p, values in whole(model))


def orthogonalize_qkv(matrix: torch.Tensor, whole=optim.orthogonalize) -> torch.Tensor:
    """Queries', keys' and values' matrices each on their own, in the update of c_attn (3C, C)."""
    m, n = matrix.shape
    return torch.cat([whole(part) for part in matrix.split(n)]) / 3**0.5 if m == 3 * n else whole(matrix)


TRICKS = {
    None: contextlib.nullcontext,
    "zero": lambda: mock.patch.object(GPT, "initial", zero_residuals),
    "qkv": lambda: mock.patch.object(optim, "orthogonalize", orthogonalize_qkv),
}


def main(names: tyro.conf.Positional[tuple[str, ...]] = (), /, data: Path = Path("data/edu_corpus_bpe-4096"),
         only_report: bool = False, times: bool = False):
    """Trains the runs whose names begin with one of `names`, or all; --only-report only reads what there is."""
    if times:
        step_times()
        return
    CURVES.mkdir(parents=True, exist_ok=True)
    for name, changes in RUNS.items():
        if not only_report and name.startswith(names or ("",)) and not (CURVES / f"{name}.csv").exists():
            with contextlib.suppress(UserError) if names == () else contextlib.nullcontext():  # another process has it
                run(name, dict(changes), data)
    write_report()


def run(name: str, changes: dict, data: Path):
    with TRICKS[changes.pop("trick", None)](), ddp.join_world("cpu") as world:
        config = dataclasses.replace(BASE, data=data, run=f"recipe-{name}", **changes)
        train.train(config, world)
    measured = report.metrics(LOG / config.run).dropna(subset="val_loss")
    points = zip(measured["step"] * config.batch_tokens, measured["val_loss"].round(5))
    with open(CURVES / f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("tokens", "val_loss"), *points])


def step_times(rounds: int = 15):
    """Median seconds of an update of AdamW and of Muon beside it, each once a round; also in the time of this thread alone, which
    others that use the cores do not lengthen."""
    model = GPT(setup.sizes_of(BASE, 4096))
    x = torch.randint(4096, (BASE.batch_tokens // BASE.block_size, BASE.block_size))
    optimizers = {name: optim.build_optimizers(model, name, 0.1, (0.9, 0.95)) for name in ("adamw", "muon")}
    taken = {name: [] for name in optimizers}
    for _, (name, parts) in itertools.product(range(rounds), optimizers.items()):
        began = time.perf_counter(), time.thread_time()
        model(x, x)[1].backward()
        optim.set_learning_rate(parts, 1e-6)
        for part in parts:
            part.step()
        model.zero_grad(set_to_none=True)
        taken[name].append((time.perf_counter() - began[0], time.thread_time() - began[1]))
    for name, seconds in taken.items():
        wall, own = (statistics.median(column) for column in zip(*seconds))
        print(f"{name:6} {wall * 1000:6.0f} ms a step, {own * 1000:6.0f} ms of the main thread")


# ----------------------------------------------------------------------------------------------------------------
# What came of them

def write_report():
    """runs.csv and curves.png: each recipe over its seeds, and the tokens it took to the best AdamW's mean final loss."""
    recipes = {}
    for path in sorted(CURVES.glob("*.csv")):
        recipes.setdefault(re.sub(r"-s\d+$", "", path.stem), []).append(pd.read_csv(path))
    final = {name: statistics.mean(curve["val_loss"].iloc[-1] for curve in curves) for name, curves in recipes.items()}
    baselines = [name for name in recipes if name.startswith("adamw")]
    if not baselines:
        print("The report waits for a run of AdamW.")
        return
    baseline = min(baselines, key=final.get)
    rows = []
    for name in sorted(recipes, key=lambda name: (not name.startswith("adamw"), final[name])):
        ends = [curve["val_loss"].iloc[-1] for curve in recipes[name]]
        reached = [tokens_to(curve, final[baseline]) / TOKENS for curve in recipes[name]]
        rows.append({"recipe": name, "seeds": len(ends), "tokens": int(recipes[name][0]["tokens"].iloc[-1]),
                     "val_loss": round(final[name], 4), "sd": round(statistics.stdev(ends), 4) if len(ends) > 1 else "",
                     "share_of_tokens": round(statistics.mean(reached), 3) if max(reached) < math.inf else "",
                     "changes": " ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                                         for key, value in RUNS.get(name, {}).items())})
    frame = pd.DataFrame(rows)
    frame.to_csv(FOLDER / "runs.csv", index=False)
    print(frame.drop(columns="changes").to_string(index=False))
    draw(recipes, baseline, final[baseline]).savefig(FOLDER / "curves.png")


def tokens_to(curve: pd.DataFrame, loss: float) -> float:
    """Tokens until the curve, straight between its points, is that low; infinite where it never is."""
    points = list(zip(curve["tokens"], curve["val_loss"]))
    for (tokens, before), (later, after) in itertools.pairwise(points):
        if after <= loss:
            return tokens + (later - tokens) * (before - loss) / max(1e-9, before - after)
    return math.inf


def draw(recipes: dict[str, list[pd.DataFrame]], baseline: str, goal: float) -> Figure:
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes, colours = figure.subplots(), itertools.count()
    for name, curves in recipes.items():
        together = pd.concat(curves).groupby("tokens")["val_loss"].agg(["mean", "min", "max"])
        several = len(curves) > 1
        axes.plot(together.index, together["mean"], label=name if several or name == baseline else None, zorder=2 + several,
                  **({"color": f"C{next(colours)}", "linewidth": 2} if several or name == baseline else
                     {"color": "0.7", "linewidth": 0.8}))
        axes.fill_between(together.index, together["min"], together["max"], color=axes.lines[-1].get_color(), alpha=0.3,
                          linewidth=0)
    axes.axhline(goal, color="0.2", linestyle="--", linewidth=1, label=f"{baseline}'s final loss")
    axes.axvline(0.6 * TOKENS, color="0.2", linestyle=":", linewidth=1, label="60% of its tokens")
    axes.set_ylim(min(curve["val_loss"].min() for curves in recipes.values() for curve in curves) - 0.05, goal + 1)
    axes.set(xlabel="tokens seen", ylabel="validation loss, nats a token")
    axes.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
