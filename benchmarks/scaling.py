"""A loss law fitted to small models trained here, what it says of the bundled one, and what published laws say of eight A100s.

    python prepare.py edu_corpus.jsonl.zst --tokenizer bpe:4096 --val-share 0.01
    python -m benchmarks.scaling                  # trains every model that has no result yet: 15 minutes on two quiet cores
    python -m benchmarks.scaling --only-report    # fits and draws what is there

Each model is the preset edu-bundled with other sizes and steps, trained by train.py's own loop. Losses go into
benchmarks/scaling/runs.csv, the plot beside it, the tables into docs/scaling.md, which explains them.
"""


import dataclasses
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure

import ddp
import report
import train
from checkpoint import LOG
from common.devices import DEVICES
from common.errors import report_user_errors
from model import GPT, SIZES
from training import setup
from training.presets import PRESETS

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "benchmarks" / "scaling", ROOT / "docs" / "scaling.md"
NAME = "edu-bundled"
BUNDLED = PRESETS[NAME]
RUNS = [(shape, 2**power) for shape, powers in (
    ((2, 64, 2), (18, 19, 20, 21)), ((3, 96, 3), (18, 19, 20)), ((4, 128, 4), (18, 19, 20)), ((6, 192, 6), (18, 19)))
    for power in powers]  # (layers, width, heads), tokens


class Law(NamedTuple):
    """Loss of a model of N parameters after D tokens: E + A / N^alpha + B / D^beta, nats a token (Hoffmann et al. 2022,
    arXiv 2203.15556, equation 2)."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, D):
        return self.E + self.A / N**self.alpha + self.B / D**self.beta


HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # the same paper, equation 10
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # the same data fitted anew: arXiv 2404.10102


def fit(N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> Law:
    """The law with the least squares of the error. Given its exponents it is linear, so those alone are searched, on a grid; a
    law whose terms are not all positive is none."""
    best, least = None, np.inf
    for alpha, beta in itertools.product(np.arange(0.05, 1.2, 0.01), repeat=2):
        terms = np.stack([np.ones(len(N)), N**-alpha, D**-beta], axis=1)  # (runs, 3)
        factors = np.linalg.lstsq(terms, loss, rcond=None)[0]
        error = np.square(terms @ factors - loss).sum()
        if error < least and (factors > 0).all():
            best, least = Law(*factors.tolist(), float(alpha), float(beta)), error
    return best


def main(data: Path = BUNDLED.data, only_report: bool = False):
    """Trains what has no result yet, and reports."""
    FOLDER.mkdir(exist_ok=True)
    for shape, tokens in () if only_report else RUNS:
        found = results()
        if found.query("n_layer == @shape[0] and tokens == @tokens").empty:
            pd.concat([found, train_one(shape, tokens, data)]).to_csv(FOLDER / "runs.csv", index=False)
    write_report(results())


def results() -> pd.DataFrame:
    columns = ["n_layer", "n_embd", "parameters", "tokens", "val_loss"]
    return pd.read_csv(FOLDER / "runs.csv") if (FOLDER / "runs.csv").exists() else pd.DataFrame(columns=columns)


def train_one(shape: tuple[int, int, int], tokens: int, data: Path) -> pd.DataFrame:
    n_layer, n_embd, n_head = shape
    steps = tokens // BUNDLED.batch_tokens
    config = dataclasses.replace(
        BUNDLED, data=data, run=f"scaling-{n_layer}x{n_embd}-{tokens}", n_layer=n_layer, n_embd=n_embd, n_head=n_head,
        max_steps=steps, warmup_steps=min(BUNDLED.warmup_steps, steps // 8), eval_every=steps, save_every=steps,
        sample_every=10**6)
    with ddp.join_world("cpu") as world:
        train.train(config, world)
    loss = report.metrics(LOG / config.run)["val_loss"].dropna().iloc[-1]
    return pd.DataFrame([{"n_layer": n_layer, "n_embd": n_embd, "parameters": sized(config).num_parameters(), "tokens": tokens,
                          "val_loss": round(loss, 4)}])


def sized(config) -> GPT:
    with torch.device("meta"):
        return GPT(setup.sizes_of(config, config.vocab_size or 4096))


# ----------------------------------------------------------------------------------------------------------------
# What follows from them

def write_report(runs: pd.DataFrame):
    """docs/scaling.md between its marks, and law.png."""
    N, D, loss = (runs[column].to_numpy(float) for column in ("parameters", "tokens", "val_loss"))
    law = fit(N, D, loss)
    model, last = sized(BUNDLED), BUNDLED.max_steps * BUNDLED.batch_tokens
    bundled = model.num_parameters()
    ends = [fit(*(np.delete(column, i) for column in (N, D, loss))).loss(bundled, last) for i in range(len(runs))]
    measured = measured_curve()
    lines = [f"L(N, D) = {law.E:.2f} + {law.A:.3g} / N^{law.alpha:.2f} + {law.B:.3g} / D^{law.beta:.2f}: its error over the "
             f"{len(runs)} models is {np.sqrt(np.mean(np.square(law.loss(N, D) - loss))):.3f} nats a token on average.", "",
             "| | nats a token |", "| --- | --- |",
             f"| the law for the bundled model: {bundled / 1e6:.1f}M parameters, {last / 1e6:.1f}M tokens | "
             f"**{law.loss(bundled, last):.2f}** ({min(ends):.2f} to {max(ends):.2f} when any one of the models is left out) |"]
    if len(measured):
        tokens, at = measured[["tokens", "loss"]].iloc[-1]
        lines.append(f"| measured, after {tokens / 1e6:.1f}M tokens | **{at:.2f}** |")
    lines += ["", *best_size(law, last * model.flops_per_token(BUNDLED.block_size)), "", *eight_a100s()]
    page = PAGE.read_text(encoding="utf-8")
    block = "\n".join(lines) + "\n"
    PAGE.write_text(re.sub(r"(?s)(?<=<!-- law -->\n).*(?=<!-- end of law -->)", lambda _: block, page), encoding="utf-8")
    print(block)
    draw(runs, law, measured, bundled).savefig(FOLDER / "law.png")


def measured_curve() -> pd.DataFrame:
    """The bundled model's validation loss over tokens: of its run where that is here, else as it was kept."""
    kept = FOLDER / "bundled.csv"
    if (LOG / NAME / "metrics.jsonl").exists():
        report.loss(LOG / NAME).query("curve == 'validation'")[["tokens", "loss"]].to_csv(kept, index=False)
    return pd.read_csv(kept).query("tokens > 0") if kept.exists() else pd.DataFrame(columns=["tokens", "loss"])


def best_size(law: Law, flops: float) -> list[str]:
    """What the law says of other sizes for the same FLOPs."""
    lines = [f"The same {flops:.1e} FLOPs in other sizes, by the law:", "", "| layers x width | parameters | tokens | loss |",
             "| --- | --- | --- | --- |"]
    for n_layer, n_embd in (3, 96), (4, 128), (6, 192), (6, 256), (8, 320), (8, 448):
        model = sized(dataclasses.replace(BUNDLED, n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 32))
        N, D = model.num_parameters(), flops / model.flops_per_token(BUNDLED.block_size)
        lines.append(f"| {n_layer} x {n_embd} | {N / 1e6:.1f}M | {D / 1e6:.0f}M | {law.loss(N, D):.2f} |")
    return lines


def eight_a100s(hours: float = 2.0, mfu: float = 0.5) -> list[str]:
    """Sizes of the papers for the FLOPs that eight A100s give in that time, by the published laws."""
    flops = 8 * DEVICES["A100"].flops * mfu * 3600 * hours
    lines = [f"Eight A100s for {hours:g} hours at {mfu:.0%} of their peak are {flops:.1e} FLOPs:", "",
             "| size | parameters | tokens | Hoffmann et al. | the same data fitted anew |", "| --- | --- | --- | --- | --- |"]
    for name in "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl":
        with torch.device("meta"):
            model = GPT(SIZES[name])
        N, D = model.num_parameters(), flops / model.flops_per_token(SIZES[name].block_size)
        lines.append(f"| `{name}` | {N / 1e6:,.0f}M | {D / 1e9:.1f}B | {HOFFMANN.loss(N, D):.2f} | {BESIROGLU.loss(N, D):.2f} |")
    return lines


def draw(runs: pd.DataFrame, law: Law, measured: pd.DataFrame, bundled: int) -> Figure:
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes, tokens = figure.subplots(), np.geomspace(2**17.5, 2**25, 100)
    for colour, (N, group) in enumerate(runs.groupby("parameters")):
        axes.plot(group["tokens"], group["val_loss"], "o", color=f"C{colour}", label=f"{N / 1e6:.1f}M parameters")
        axes.plot(tokens, law.loss(N, tokens), color=f"C{colour}", linewidth=1, alpha=0.6)
    if len(measured):
        axes.plot(measured["tokens"], measured["loss"], color="0.2", linewidth=1.5, label="the bundled model while it learned")
        axes.plot(measured["tokens"].iloc[-1:], measured["loss"].iloc[-1:], "*", color="0.2", markersize=12,
                  label="and at its end")
    axes.set(xscale="log", xlabel="tokens seen", ylabel="validation loss, nats a token",
             title=f"Points are models at their end; lines the law, the bundled model's of {bundled / 1e6:.1f}M the lowest",
             ylim=(law.E if law.E > 3 else 3.2, runs["val_loss"].max() + 0.3))
    axes.title.set_fontsize("medium")
    axes.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
