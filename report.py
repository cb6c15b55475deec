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
from pathlib import Path

import pandas as pd
import tyro
from matplotlib.figure import Figure

from devices import find_device
from errors import UserError, one_sentence
from files import read_json

REFERENCE = Path(__file__).parent / "assets" / "reference"

# Published runs of GPT-2 124M on FineWeb-Edu: their file of step, validation loss and HellaSwag, and the tokens of a step.
CURVES = {"allenporter/nano-gpt": ("allenporter_nano-gpt.csv", 2**19), "samkeet/GPT_124M": ("samkeet_gpt_124m.csv", 590_000)}

# Published models, as build-nanogpt's notebook and the GPT-3 paper (arXiv 2005.14165) state them.
LINES = {"loss": {"OpenAI's GPT-2 124M": 3.2924}, "hellaswag": {"OpenAI's GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}}

KG_CO2E_PER_KWH = 0.473  # of the world's electricity in 2024: Ember, Global Electricity Review 2025


# ----------------------------------------------------------------------------------------------------------------
# Tables

def read_lines(path: Path) -> list[dict]:
    """The objects of a metrics.jsonl or samples.jsonl; a line that the end of a process cut off is none."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def that_count(lines: list[dict]) -> list[dict]:
    """The measurements among a log's lines, without those that an earlier attempt wrote beyond the step of a resumption."""
    kept = []
    for line in lines:
        if line.get("event") == "resume":
            kept = [earlier for earlier in kept if earlier["step"] <= line["step"]]
        elif "event" not in line:
            kept.append(line)
    return kept


def metrics(run: str | Path) -> pd.DataFrame:
    """One row a line of the run's metrics.jsonl: step, tokens, time and what was measured, NaN for what was not."""
    lines, config = that_count(read_lines(Path(run) / "metrics.jsonl")), read_json(Path(run) / "config.json")
    if not lines or "batch_tokens" not in config:
        raise UserError(f"{run} is no run with measurements: it needs config.json and metrics.jsonl, as train.py writes them.")
    frame = pd.DataFrame(lines)
    return frame.assign(tokens=frame["step"] * config["batch_tokens"])


def samples(run: str | Path) -> pd.DataFrame:
    """What the model wrote on the way: step, prompt, text."""
    return pd.DataFrame(that_count(read_lines(Path(run) / "samples.jsonl")), columns=["step", "prompt", "text"])


def curve(frame: pd.DataFrame, column: str, value: str, name: str) -> pd.DataFrame:
    """(step, tokens, `value`, curve) of the rows of `frame` that have `column`."""
    frame = frame.reindex(columns=["step", "tokens", column]).dropna()
    return frame.set_axis(["step", "tokens", value], axis=1).assign(curve=name)


def loss(run: str | Path) -> pd.DataFrame:
    """Training and validation loss, nats a token, and the published runs' where this one learns the same text."""
    frame = metrics(run)
    own = [curve(frame, "train_loss", "loss", "training"), curve(frame, "val_loss", "loss", "validation")]
    return pd.concat(own + references(run, "loss"), ignore_index=True)


def hellaswag(run: str | Path) -> pd.DataFrame:
    """HellaSwag's acc_norm, and the published runs'."""
    own = curve(metrics(run), "hellaswag", "hellaswag", "HellaSwag")
    return pd.concat([own, *references(run, "hellaswag")] if len(own) else [own], ignore_index=True)


def throughput(run: str | Path) -> pd.DataFrame:
    """Tokens a second of training."""
    return curve(metrics(run), "tokens_per_s", "throughput", "training")


def references(run: str | Path, value: str) -> list[pd.DataFrame]:
    """The published curves of `value` with which the run's compare: none unless it learns FineWeb-Edu in GPT-2's tokens."""
    if not on_fineweb_edu(read_json(Path(run) / "config.json")):
        return []
    frames = []
    for name, (file, batch_tokens) in CURVES.items():
        frame = pd.read_csv(REFERENCE / file).rename(columns={"val_loss": "loss"})
        frames.append(curve(frame.assign(tokens=frame["step"] * batch_tokens), value, value, name))
    return [frame for frame in frames if len(frame)]


def on_fineweb_edu(config: dict) -> bool:
    corpus = config.get("corpus", {})
    names = f"{corpus.get('source', {}).get('name', '')} {config.get('data', '')}".lower().replace("-", "").replace("_", "")
    return "finewebedu" in names or "edufineweb" in names


def summary(run: str | Path) -> dict[str, str]:
    """What came of the run, in a person's words: its figures by their names."""
    frame = metrics(run)
    measured = frame.reindex(columns=["step", "val_loss", "hellaswag", "tokens_per_s"])
    validated, scored = measured.dropna(subset="val_loss"), measured.dropna(subset="hellaswag")
    found = {"steps": f"{frame['step'].max():,} ({frame['tokens'].max():,} tokens)"}
    if len(validated):
        best, last = validated.loc[validated["val_loss"].idxmin()], validated.iloc[-1]
        found["best validation loss"] = f"{best['val_loss']:.4f} nats a token (step {best['step']:,.0f})"
        found["last validation loss"] = f"{last['val_loss']:.4f} nats a token (step {last['step']:,.0f})"
    if len(scored):
        found["HellaSwag, acc_norm"] = f"{scored['hellaswag'].iloc[-1]:.4f} (step {scored['step'].iloc[-1]:,.0f})"
    if measured["tokens_per_s"].any():
        found["throughput, median"] = f"{measured['tokens_per_s'].median():,.0f} tokens/s"
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
        processes, name = session.get("processes", 1), session.get("device", "an unknown device")
        device = find_device(name)
        seconds += spent_s
        kwh += processes * device.watts / 1000 * spent_s / 3600 if device else math.nan
        machines.append(f"{processes} x {name}")
    found = {"time": f"{seconds / 3600:,.2f} hours, evaluation included", "machine": ", ".join(dict.fromkeys(machines))}
    if math.isnan(kwh):
        return {**found, "energy, CO2e": "not stated: the draw of such a device is not known here"}
    return {**found, "energy": f"{kwh:,.1f} kWh at most, of the devices alone",
            "CO2e": f"{kwh * KG_CO2E_PER_KWH:,.1f} kg, at the world's mean of {KG_CO2E_PER_KWH} kg a kWh"}


# ----------------------------------------------------------------------------------------------------------------
# Plots

LABELS = {"loss": "loss, nats a token", "hellaswag": "HellaSwag, acc_norm", "throughput": "tokens a second, training"}
STYLES = {"training": {"color": "C0", "alpha": 0.4, "linewidth": 1}, "validation": {"color": "C3", "linewidth": 2},
          "HellaSwag": {"color": "C3", "linewidth": 2}}
GREYS = ("0.35", "0.6")


def plot(frame: pd.DataFrame) -> Figure:
    """The curves of one of the frames above over the tokens seen, with published models' values as lines."""
    value = frame.columns[2]
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes, greys = figure.subplots(), iter(GREYS)
    for name, points in frame.groupby("curve", sort=False):
        style = STYLES.get(name) or {"color": next(greys), "linewidth": 1.2}
        axes.plot(points["tokens"], points[value], label=name, marker="o" * (len(points) == 1), **style)
    if value == "hellaswag" or set(CURVES) & set(frame["curve"]):
        for (name, y), line in zip(LINES.get(value, {}).items(), ("--", ":")):
            axes.axhline(y, color="0.2", linestyle=line, linewidth=1, label=f"{name}: {y}")
    if value == "loss":  # the fall of the first steps would flatten all the rest
        axes.set_ylim(frame[value].min() - 0.05, frame.loc[frame["tokens"] >= 0.02 * frame["tokens"].max(), value].max() + 0.05)
    elif value == "throughput":
        axes.set_ylim(bottom=0)
    else:
        axes.margins(y=0.08)
    axes.set_xlim(left=0)
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_formatter(lambda number, _: short(number))
    axes.set(xlabel="tokens seen", ylabel=LABELS[value])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize="small")
    return figure


def short(number: float) -> str:
    """2.5B for 2,500,000,000."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


def save_plots(run: str | Path, folder: str | Path) -> list[str]:
    """Writes loss.png, hellaswag.png and throughput.png into `folder`, those for which the run has measurements; their names."""
    names = []
    for of in loss, hellaswag, throughput:
        if len(frame := of(run)):
            names.append(f"{of.__name__}.png")
            plot(frame).savefig(Path(folder) / names[-1])
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
    with one_sentence():
        main(tyro.cli(ReportConfig))
