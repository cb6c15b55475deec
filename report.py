"""A run's measurements as tables and plots.

    python report.py log/gpt2-124m                           # a table on the screen; loss.png, hellaswag.png, throughput.png

    frame = report.loss("log/gpt2-124m")                     # step, tokens, loss, curve: for the page and the notebook
    report.plot(frame).savefig("loss.png")                   # for the model card and the docs

A frame holds one curve after another, each point with the tokens seen until then, so that runs with other batches compare.
"""
import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from common.devices import KG_CO2E_PER_KWH, find_device
from common.errors import UserError, report_user_errors
from common.files import read_json

REFERENCE = Path(__file__).parent / "assets" / "reference"

# Published runs of GPT-2 124M on FineWeb-Edu: their file of step, validation loss and HellaSwag, and the tokens of a step.
CURVES = {"allenporter/nano-gpt": ("allenporter_nano-gpt.csv", 2**19), "samkeet/GPT_124M": ("samkeet_gpt_124m.csv", 590_000)}

# Published models, as build-nanogpt's notebook and the GPT-3 paper (arXiv 2005.14165) state them.
LINES = {"loss": {"OpenAI's GPT-2 124M": 3.2924}, "hellaswag": {"OpenAI's GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}}


# ----------------------------------------------------------------------------------------------------------------
# Tables

def read_config(run: str | Path) -> dict:
    try:
        return dict(read_json(Path(run) / "config.json"))
    except (ValueError, TypeError) as error:
        raise UserError(f"{run}/config.json is damaged ({type(error).__name__}).") from None


def read_lines(path: Path) -> list[dict]:
    """The objects of a metrics.jsonl or samples.jsonl; a line that the end of a process cut off is none."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"]), "time": float(line["time"])})
    return lines


def that_count(lines: list[dict]) -> list[dict]:
    """The measurements among a log's lines, without those that an earlier attempt wrote beyond the step of a resumption."""
    kept = []
    for line in lines:
        if line.get("event") == "resume":
            measured = line.get("measured", True)  # else what stands there of that step's validation comes again
            kept = [earlier for earlier in kept if earlier["step"] < line["step"] or (
                earlier["step"] == line["step"] and (measured or "train_loss" in earlier))]
        elif "event" not in line:
            kept.append(line)
    return kept


def metrics(run: str | Path) -> pd.DataFrame:
    """One row a line of the run's metrics.jsonl: step, tokens, time and what was measured, NaN for what was not."""
    lines, config = that_count(read_lines(Path(run) / "metrics.jsonl")), read_config(run)
    if not lines or not isinstance(config.get("batch_tokens"), int):
        raise UserError(f"{run} is no run with measurements: it needs config.json and metrics.jsonl, as train.py writes them.")
    frame = pd.DataFrame(lines).apply(pd.to_numeric, errors="coerce").replace([math.inf, -math.inf], math.nan)
    return frame.assign(tokens=frame["step"] * config["batch_tokens"])


def samples(run: str | Path) -> pd.DataFrame:
    """What the model wrote on the way: step, prompt, text."""
    lines = that_count(read_lines(Path(run) / "samples.jsonl"))
    lines = [line for line in lines if isinstance(line.get("prompt"), str) and isinstance(line.get("text"), str)]
    return pd.DataFrame(lines, columns=["step", "prompt", "text"])


def curve(frame: pd.DataFrame, column: str, value: str, name: str) -> pd.DataFrame:
    """(step, tokens, `value`, curve) of the rows of `frame` that have `column`."""
    frame = frame.reindex(columns=["step", "tokens", column]).dropna()
    return frame.set_axis(["step", "tokens", value], axis=1).assign(curve=name)


def loss(run: str | Path) -> pd.DataFrame:
    """Training and validation loss, nats a token, and the published runs' where this one learns the same tokens."""
    frame = metrics(run)
    own = pd.concat([curve(frame, "train_loss", "loss", "training"), curve(frame, "val_loss", "loss", "validation")])
    return beside_published(run, own)


def hellaswag(run: str | Path) -> pd.DataFrame:
    """HellaSwag's acc_norm, and the published runs'."""
    return beside_published(run, curve(metrics(run), "hellaswag", "hellaswag", "HellaSwag"))


def throughput(run: str | Path) -> pd.DataFrame:
    """Tokens a second of training."""
    return curve(metrics(run), "tokens_per_s", "throughput", "training")


def beside_published(run: str | Path, own: pd.DataFrame) -> pd.DataFrame:
    """A run's own curves and, where it learns FineWeb-Edu in GPT-2's tokens, the published ones of the same measurement."""
    comparable = len(own) and learns_fineweb_edu(read_config(run))
    return pd.concat([own, *published(own.columns[2])] if comparable else [own], ignore_index=True)


def published(value: str) -> list[pd.DataFrame]:
    """The published runs' curves of "loss" or "hellaswag", those that there are."""
    frames = []
    for name, (file, batch_tokens) in CURVES.items():
        frame = pd.read_csv(REFERENCE / file).rename(columns={"val_loss": "loss"})
        frames.append(curve(frame.assign(tokens=frame["step"] * batch_tokens), value, value, name))
    return [frame for frame in frames if len(frame)]


def compared(tokens: int, val_loss: float) -> str:
    """Where a validation loss on FineWeb-Edu stands among the published runs' after as many tokens."""
    there = [np.interp(tokens, frame["tokens"], frame["loss"]) for frame in published("loss")]
    if min(there) <= val_loss <= max(there):
        return f"between the published runs' {min(there):.2f} and {max(there):.2f}"
    off, way = (val_loss - max(there), "above") if val_loss > max(there) else (min(there) - val_loss, "below")
    return f"{off:.2f} {way} the published runs after {tokens:,} tokens"


def learns_fineweb_edu(config: dict) -> bool:
    names = re.sub("[-_]", "", f"{config.get('corpus')} {config.get('data')}".lower())
    return ("finewebedu" in names or "edufineweb" in names) and (config.get("vocab_size") or 50257) >= 50257


def summary(run: str | Path) -> dict[str, str]:
    """What came of the run, in a person's words: its figures by their names."""
    frame = metrics(run)
    measured = frame.reindex(columns=["step", "val_loss", "hellaswag", "tokens_per_s"])
    validated, scored = measured.dropna(subset="val_loss"), measured.dropna(subset="hellaswag")
    last = read_config(run).get("max_steps", 0)
    unfinished = f" of {last:,}" if isinstance(last, int) and frame["step"].max() < last else ""
    found = {"steps": f"{frame['step'].max():,}{unfinished} ({frame['tokens'].max():,} tokens)"}
    if len(validated):
        best, last = validated.loc[validated["val_loss"].idxmin()], validated.iloc[-1]
        found["best validation loss"] = f"{best['val_loss']:.4f} nats a token (step {best['step']:,.0f})"
        found["last validation loss"] = f"{last['val_loss']:.4f} nats a token (step {last['step']:,.0f})"
    if len(scored):
        found["HellaSwag, acc_norm"] = f"{scored['hellaswag'].iloc[-1]:.4f} (step {scored['step'].iloc[-1]:,.0f})"
    if measured["tokens_per_s"].any():
        found["throughput, median"] = f"{measured['tokens_per_s'].median():,.0f} tokens/s"
    if "skipped" in frame:
        found["updates skipped"] = f"{frame['skipped'].sum():,.0f}, whose gradients were not finite"
    return {**found, **effort(run)}


def effort(run: str | Path) -> dict[str, str]:
    """Hours, machines, and an upper bound of their energy: the draw of the devices by their data sheets, over the times in the
    log, lost attempts included; without the rest of the machines and their cooling."""
    lines = read_lines(Path(run) / "metrics.jsonl")
    seconds, kwh, machines, before, session = 0.0, 0.0, [], lines[0]["time"], {}
    for line in lines:
        if "event" in line:
            session, before = line, line["time"]
        spent_s, before = line["time"] - before, line["time"]
        processes, name = session.get("processes", 1), str(session.get("device", "an unknown device"))
        device = find_device(name)
        seconds += spent_s
        kwh += processes * device.watts / 1000 * spent_s / 3600 if device else math.nan
        machines.append(f"{processes} x {name}")
    spent = f"{seconds / 3600:,.2f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"
    found = {"time": f"{spent}, evaluation included", "machine": ", ".join(dict.fromkeys(machines))}
    if math.isnan(kwh):
        return {**found, "energy, CO2e": "not stated: the draw of such a device is not known here"}
    return {**found, "energy": f"{kwh:,.1f} kWh at most, of the devices alone",
            "CO2e": f"{kwh * KG_CO2E_PER_KWH:,.1f} kg, at the world's mean of {KG_CO2E_PER_KWH} kg a kWh"}


# ----------------------------------------------------------------------------------------------------------------
# Plots

LABELS = {"loss": "loss, nats a token", "hellaswag": "HellaSwag, acc_norm", "throughput": "tokens a second, training"}
STYLES = {"training": {"color": "C0", "alpha": 0.5, "linewidth": 1}, "validation": {"color": "C3", "linewidth": 2},
          "HellaSwag": {"color": "C3", "linewidth": 2}}
GREY = "0.5"  # reads on a light page and on a dark one, as the background is the page's
PUBLISHED = dict(zip(CURVES, ("-.", ":")))


def plot(frame: pd.DataFrame, label: str | None = None, size: tuple[float, float] = (7, 4.2)):
    """A matplotlib figure of `size` inches: the curves of a frame such as those above over the tokens seen, in grey the published
    ones and, where those compare, published models' values as lines."""
    value = frame.columns[2]
    from matplotlib.figure import Figure  # noqa: PLC0415 (takes a second, and neither a training run nor the first page needs it)
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="none")
    axes, own = figure.subplots(), frame[~frame["curve"].isin(CURVES)]
    for name, points in frame.groupby("curve", sort=False):
        style = {"color": GREY, "linestyle": PUBLISHED[name]} if name in CURVES else STYLES.get(name, {"linewidth": 1.6})
        axes.plot(points["tokens"], points[value], label=name, marker="o" * (len(points) == 1), **style)
    if value == "hellaswag" or len(own) < len(frame):
        for (name, y), line in zip(LINES.get(value, {}).items(), ("--", ":")):
            axes.axhline(y, color=GREY, linestyle=line, linewidth=1, label=f"{name}: {y}")
    last = (own if len(own) else frame)["tokens"].max()
    right = min(1.25 * last, frame["tokens"].max()) or 1
    if "loss" in value:  # the fall of the first steps would flatten all the rest
        shown = frame[(frame["tokens"] >= min(0.02 * last, frame["tokens"].nlargest(3).min())) & (frame["tokens"] <= right)]
        axes.set_ylim(shown[value].min() - 0.05, shown[value].max() + 0.05)
    elif value == "throughput":
        axes.set_ylim(bottom=0)
    else:
        axes.margins(y=0.08)
    axes.set_xlim(-0.01 * right, 1.01 * right)
    axes.set_facecolor("none")
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_formatter(lambda number, _: short(number))
    axes.set_xlabel("tokens seen", color=GREY)
    axes.set_title(label or LABELS[value], color=GREY)
    axes.tick_params(colors=GREY)
    axes.spines[:].set_color(GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize="small", labelcolor=GREY)
    return figure


def short(number: float) -> str:
    """2.5B for 2,500,000,000."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


def plots_of(run: str | Path) -> list[Callable]:
    """Those of `loss`, `hellaswag` and `throughput` for which the run has measurements."""
    return [of for of in (loss, hellaswag, throughput) if len(of(run))]


def save_plots(run: str | Path, folder: str | Path) -> list[str]:
    """Writes loss.png, hellaswag.png and throughput.png into `folder`, those that there are; their names."""
    names = []
    for of in plots_of(run):
        names.append(f"{of.__name__}.png")
        plot(of(run)).savefig(Path(folder) / names[-1])
    return names


@dataclasses.dataclass
class ReportConfig:
    """Shows what came of a run."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    out: Path | None = None
    """Folder for the plots; the run's own when not given."""


def main(config: ReportConfig):
    for name, value in summary(config.run).items():
        print(f"{name:>22}  {value}")
    out = config.out or config.run
    out.mkdir(parents=True, exist_ok=True)
    for name in save_plots(config.run, out):
        print(f"{'plot':>22}  {out / name}")


if __name__ == "__main__":
    with report_user_errors():
        main(tyro.cli(ReportConfig))
