"""Fit a loss law to small models trained here, and apply it and published laws to larger runs.

    python prepare.py edu_corpus.jsonl.zst --tokenizer bpe:4096 --val-share 0.01
    python -m benchmarks.scaling                 # train the missing models: 15 minutes on two cores
    python -m benchmarks.scaling --only-report   # fit and draw the results so far

Each model is the preset edu-bundled with other sizes and fewer steps, trained by train.py's own
loop. The losses go into benchmarks/scaling/runs.csv, the plot next to it, and the tables into
docs/scaling.md, which explains them.
"""
import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

from common.program import report_user_errors

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure

import ddp
import report
import train
from benchmarks.pages import write_lines
from checkpoint import LOG
from common.devices import DEVICES
from model import GPT, SIZES
from training.config import TrainConfig
from training.presets import PRESETS
from training.setup import model_sizes

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "scaling"
PAGE = ROOT / "docs" / "scaling.md"
NAME = "edu-bundled"
BUNDLED = PRESETS[NAME]
VOCAB_SIZE = 4096

RUNS = [  # (layers, width, heads), tokens
    ((2, 64, 2), 2**18), ((2, 64, 2), 2**19), ((2, 64, 2), 2**20), ((2, 64, 2), 2**21),
    ((3, 96, 3), 2**18), ((3, 96, 3), 2**19), ((3, 96, 3), 2**20),
    ((4, 128, 4), 2**18), ((4, 128, 4), 2**19), ((4, 128, 4), 2**20),
    ((6, 192, 6), 2**18), ((6, 192, 6), 2**19),
]


# --------------------------------------------------------------------------------------------------
# The law

class Law(NamedTuple):
    """Loss in nats per token of a model with N parameters after D tokens:
    E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv 2203.15556, equation 2)."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, D):
        return self.E + self.A / N**self.alpha + self.B / D**self.beta


HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # arXiv 2203.15556, equation 10
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # the same data, arXiv 2404.10102


def fit(N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> Law:
    """The law with the least squared error and only positive terms.

    For given exponents the law is linear, so only the exponents are searched, on a grid.
    """
    best, least = None, np.inf
    for alpha, beta in itertools.product(np.arange(0.05, 1.2, 0.01), repeat=2):
        terms = np.stack([np.ones(len(N)), N**-alpha, D**-beta], axis=1)  # (runs, 3)
        factors = np.linalg.lstsq(terms, loss, rcond=None)[0]
        error = np.square(terms @ factors - loss).sum()
        if error < least and (factors > 0).all():
            best, least = Law(*factors.tolist(), float(alpha), float(beta)), error
    return best


# --------------------------------------------------------------------------------------------------
# Training

def main(data: Path = BUNDLED.data, only_report: bool = False):
    """Trains the models without a result, and reports."""
    FOLDER.mkdir(exist_ok=True)
    if not only_report:
        for shape, tokens in RUNS:
            results = read_results()
            if results.query("n_layer == @shape[0] and tokens == @tokens").empty:
                result = train_one(shape, tokens, data)
                pd.concat([results, result]).to_csv(FOLDER / "runs.csv", index=False)
    write_report(read_results())


def read_results() -> pd.DataFrame:
    path = FOLDER / "runs.csv"
    if path.exists():
        return pd.read_csv(path)
    return pd.DataFrame(columns=["n_layer", "n_embd", "parameters", "tokens", "val_loss"])


def train_one(shape: tuple[int, int, int], tokens: int, data: Path) -> pd.DataFrame:
    n_layer, n_embd, n_head = shape
    steps = tokens // BUNDLED.batch_tokens
    config = dataclasses.replace(
        BUNDLED, data=data, name=f"scaling-{n_layer}x{n_embd}-{tokens}",
        n_layer=n_layer, n_embd=n_embd, n_head=n_head,
        max_steps=steps, warmup_steps=min(BUNDLED.warmup_steps, steps // 8),
        eval_every=steps, save_every=steps, sample_every=10**6)
    with ddp.join_world("cpu") as world:
        train.train(config, world)
    loss = report.metrics(LOG / config.name)["val_loss"].dropna().iloc[-1]
    return pd.DataFrame([{
        "n_layer": n_layer, "n_embd": n_embd, "parameters": model_of(config).num_parameters(),
        "tokens": tokens, "val_loss": round(loss, 4)}])


def model_of(config: TrainConfig) -> GPT:
    """The model of a configuration, without memory for its weights."""
    with torch.device("meta"):
        return GPT(model_sizes(config, VOCAB_SIZE))


# --------------------------------------------------------------------------------------------------
# The report

def write_report(runs: pd.DataFrame):
    """Writes the tables of docs/scaling.md, between their marks, and law.png."""
    N, D, loss = (runs[column].to_numpy(float) for column in ("parameters", "tokens", "val_loss"))
    law = fit(N, D, loss)
    rms_error = np.sqrt(np.mean(np.square(law.loss(N, D) - loss)))

    # the prediction for the bundled model, and its range when any one run is left out
    model = model_of(BUNDLED)
    parameters = model.num_parameters()
    tokens = BUNDLED.max_steps * BUNDLED.batch_tokens
    predictions = []
    for i in range(len(runs)):
        law_without = fit(*(np.delete(column, i) for column in (N, D, loss)))
        predictions.append(law_without.loss(parameters, tokens))

    lines = [
        f"L(N, D) = {law.E:.2f} + {law.A:.3g} / N^{law.alpha:.2f} + "
        f"{law.B:.3g} / D^{law.beta:.2f},",
        f"with a root-mean-square error of {rms_error:.3f} nats per token over {len(runs)} models.",
        "",
        "| | nats per token |",
        "| --- | --- |",
        f"| the law's prediction for the bundled model: {parameters / 1e6:.1f}M parameters, "
        f"{tokens / 1e6:.1f}M tokens | **{law.loss(parameters, tokens):.2f}** "
        f"({min(predictions):.2f} to {max(predictions):.2f} if any one model is left out) |",
    ]
    measured = measured_curve()
    last_tokens, last_loss = measured[["tokens", "loss"]].iloc[-1]
    lines.append(f"| measured after {last_tokens / 1e6:.1f}M tokens | **{last_loss:.2f}** |")
    flops = tokens * model.flops_per_token(BUNDLED.block_size)
    lines += ["", *size_table(law, flops), "", *a100_table()]

    print("\n".join(lines))
    write_lines(PAGE, "law", lines)
    draw(runs, law, measured, parameters).savefig(FOLDER / "law.png")


def measured_curve() -> pd.DataFrame:
    """The bundled model's validation loss by tokens: of its run if it is here, else bundled.csv."""
    path = FOLDER / "bundled.csv"
    if (LOG / NAME / "metrics.jsonl").exists():
        curve = report.loss(LOG / NAME).query("curve == 'validation'")
        curve[["tokens", "loss"]].to_csv(path, index=False)
    return pd.read_csv(path).query("tokens > 0")


def size_table(law: Law, flops: float) -> list[str]:
    """The law's predictions for other sizes with the same FLOPs."""
    lines = [f"Other sizes with the same {flops:.1e} FLOPs, predicted by the law:", "",
             "| layers x width | parameters | tokens | loss |", "| --- | --- | --- | --- |"]
    for n_layer, n_embd in (3, 96), (4, 128), (6, 192), (6, 256), (8, 320), (8, 448):
        model = model_of(dataclasses.replace(
            BUNDLED, n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 32))
        N, D = model.num_parameters(), flops / model.flops_per_token(BUNDLED.block_size)
        lines.append(f"| {n_layer} x {n_embd} | {N / 1e6:.1f}M | {D / 1e6:.0f}M | "
                     f"{law.loss(N, D):.2f} |")
    return lines


def a100_table(hours: float = 2.0, mfu: float = 0.5) -> list[str]:
    """The published laws' predictions for GPT-2's sizes with the FLOPs of eight A100s."""
    flops = 8 * DEVICES["A100"].flops * mfu * 3600 * hours
    lines = [
        f"Eight A100s for {hours:g} hours at {mfu:.0%} of their peak do {flops:.1e} FLOPs:", "",
        "| size | parameters | tokens | Hoffmann et al. | Besiroglu et al., same data |",
        "| --- | --- | --- | --- | --- |"]
    for name in "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl":
        with torch.device("meta"):
            model = GPT(SIZES[name])
        N, D = model.num_parameters(), flops / model.flops_per_token(SIZES[name].block_size)
        lines.append(f"| `{name}` | {N / 1e6:,.0f}M | {D / 1e9:.1f}B | "
                     f"{HOFFMANN.loss(N, D):.2f} | {BESIROGLU.loss(N, D):.2f} |")
    return lines


def draw(runs: pd.DataFrame, law: Law, measured: pd.DataFrame, bundled_parameters: int) -> Figure:
    """The final losses and the law for each size, and the bundled model's curve."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    tokens = np.geomspace(2**17.5, 2**25, 100)
    for i, (N, group) in enumerate(runs.groupby("parameters")):
        axes.plot(group["tokens"], group["val_loss"], "o", color=f"C{i}",
                  label=f"{N / 1e6:.1f}M parameters")
        axes.plot(tokens, law.loss(N, tokens), color=f"C{i}", linewidth=1, alpha=0.6)
    axes.plot(measured["tokens"], measured["loss"], color="0.2", linewidth=1.5,
              label="the bundled model during training")
    axes.plot(measured["tokens"].iloc[-1:], measured["loss"].iloc[-1:], "*", color="0.2",
              markersize=12, label="the bundled model at its end")
    axes.set(xscale="log", xlabel="tokens seen", ylabel="validation loss, nats per token",
             title="Points are final losses, lines the law; the lowest line is for the bundled "
                   f"model's {bundled_parameters / 1e6:.1f}M",
             ylim=(law.E if law.E > 3 else 3.2, runs["val_loss"].max() + 0.3))
    axes.title.set_fontsize("medium")
    axes.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
