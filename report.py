"""Shows a run's measurements as tables and plots.

    python report.py log/gpt2-124m              # prints figures; writes loss.png, hellaswag.png, …

    frame = report.loss("log/gpt2-124m")        # columns: step, tokens, loss, curve
    report.plot(frame).savefig("loss.png")

A frame holds one or more curves. Each point has the number of tokens seen so far, so that runs
with different batch sizes can be compared.
"""
import contextlib
import functools
import json
import math
from collections import Counter
from pathlib import Path

from common.program import report_user_errors

import numpy as np
import pandas as pd
import tyro

from common.devices import KG_CO2E_PER_KWH, find_device
from common.errors import UserError
from common.files import parse_json
from training.runlog import learns_fineweb_edu, read_config

REFERENCE = Path(__file__).parent / "assets" / "reference"

# published runs of GPT-2 124M on FineWeb-Edu: a file of step, validation loss and HellaSwag, and
# the tokens per step
PUBLISHED_RUNS = {"allenporter/nano-gpt": ("allenporter_nano-gpt.csv", 2**19),
                  "samkeet/GPT_124M": ("samkeet_gpt_124m.csv", 590_000)}

# published models, from build-nanogpt's notebook and the GPT-3 paper (arXiv 2005.14165)
PUBLISHED_VALUES = {"loss": {"OpenAI's GPT-2 124M": 3.2924},
                    "hellaswag": {"OpenAI's GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}}


# --------------------------------------------------------------------------------------------------
# Reading a run's files

def read_lines(path: Path) -> list[dict]:
    """The objects of a metrics.jsonl or samples.jsonl, without damaged or incomplete lines."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
                line = parse_json(text)
                line |= {"step": int(line["step"]), "time": float(line["time"])}
                # pandas refuses a lone surrogate and an integer beyond the range of a float
                json.dumps(line, ensure_ascii=False).encode()
                for value in line.values():
                    if isinstance(value, int):
                        float(value)
                lines.append(line)
    return lines


def drop_lost_steps(lines: list[dict]) -> list[dict]:
    """The measurements in a log, without those that a resume repeats.

    A run resumes from its last checkpoint, which may be older than its last measurement.
    """
    kept = []
    for line in lines:
        if line.get("event") == "resume":
            step = line["step"]
            # validation at the step of the checkpoint is repeated if it had not finished there
            validated = line.get("measured", True)
            kept = [earlier for earlier in kept
                    if earlier["step"] < step
                    or (earlier["step"] == step and (validated or "train_loss" in earlier))]
        elif "event" not in line:
            kept.append(line)
    return kept


# --------------------------------------------------------------------------------------------------
# Tables

def metrics(run: str | Path) -> pd.DataFrame:
    """One row per line of the run's metrics.jsonl: step, tokens, time and measurements.

    What a line does not measure is NaN. Raises UserError if the folder is not a run.
    """
    lines = drop_lost_steps(read_lines(Path(run) / "metrics.jsonl"))
    batch_tokens = read_config(run).get("batch_tokens")
    is_count = isinstance(batch_tokens, int) and 0 < batch_tokens < 2**63
    if not lines or not is_count:
        raise UserError(f"{run} is not a run with measurements: give a folder that train.py wrote, "
                        "with config.json and metrics.jsonl.")
    frame = pd.DataFrame(lines).apply(pd.to_numeric, errors="coerce")
    frame = frame.assign(tokens=frame["step"] * batch_tokens)
    return frame.replace([math.inf, -math.inf], math.nan)


def samples(run: str | Path) -> pd.DataFrame:
    """Texts that the model generated during training: step, prompt, text."""
    lines = drop_lost_steps(read_lines(Path(run) / "samples.jsonl"))
    lines = [line for line in lines
             if isinstance(line.get("prompt"), str) and isinstance(line.get("text"), str)]
    return pd.DataFrame(lines, columns=["step", "prompt", "text"])


def curve(frame: pd.DataFrame, column: str, value: str, name: str) -> pd.DataFrame:
    """(step, tokens, `value`, curve) from the rows of `frame` in which `column` is measured."""
    frame = frame.reindex(columns=["step", "tokens", column]).dropna()
    return frame.set_axis(["step", "tokens", value], axis=1).assign(curve=name)


def loss(run: str | Path) -> pd.DataFrame:
    """Training and validation loss in nats per token, with the published runs if comparable."""
    frame = metrics(run)
    training = curve(frame, "train_loss", "loss", "training")
    validation = curve(frame, "val_loss", "loss", "validation")
    return add_published_curves(run, "loss", training, validation)


def hellaswag(run: str | Path) -> pd.DataFrame:
    """HellaSwag's acc_norm, with the published runs if comparable."""
    accuracy = curve(metrics(run), "hellaswag", "hellaswag", "HellaSwag")
    return add_published_curves(run, "hellaswag", accuracy)


def tables(run: str | Path) -> dict[str, pd.DataFrame]:
    """The frames of "loss", "hellaswag" and "throughput", without those that are empty."""
    throughput = curve(metrics(run), "tokens_per_s", "throughput", "training")
    frames = {"loss": loss(run), "hellaswag": hellaswag(run), "throughput": throughput}
    return {name: frame for name, frame in frames.items() if len(frame)}


def add_published_curves(run: str | Path, value: str, *curves: pd.DataFrame) -> pd.DataFrame:
    """The run's curves, and the published ones if it trains on FineWeb-Edu with GPT-2's tokens."""
    if any(map(len, curves)) and learns_fineweb_edu(read_config(run)):
        curves += published_curves(value)
    return pd.concat(curves, ignore_index=True)


@functools.cache
def published_curves(value: str) -> tuple[pd.DataFrame, ...]:
    """The curves of "loss" or "hellaswag" of the published runs that have one.

    They are cached, so do not change them.
    """
    curves = []
    for name, (file, batch_tokens) in PUBLISHED_RUNS.items():
        frame = pd.read_csv(REFERENCE / file).rename(columns={"val_loss": "loss"})
        frame = frame.assign(tokens=frame["step"] * batch_tokens)
        curves.append(curve(frame, value, value, name))
    return tuple(frame for frame in curves if len(frame))


def compare_to_published(tokens: int, val_loss: float) -> str:
    """Compares a validation loss on FineWeb-Edu with the published runs' after as many tokens."""
    lowest, highest = sorted(np.interp(tokens, frame["tokens"], frame["loss"])
                             for frame in published_curves("loss"))
    if val_loss > highest:
        return f"{val_loss - highest:.2f} above the published runs after {tokens:,} tokens"
    if val_loss < lowest:
        return f"{lowest - val_loss:.2f} below the published runs after {tokens:,} tokens"
    return f"between the published runs' {lowest:.2f} and {highest:.2f}"


# --------------------------------------------------------------------------------------------------
# A run's figures

def summary(run: str | Path) -> dict[str, str]:
    """The run's results as text, by name: steps, losses, HellaSwag, throughput, time, energy."""
    frame = metrics(run)
    measured = frame.reindex(columns=["step", "val_loss", "hellaswag", "tokens_per_s"])
    validated = measured.dropna(subset="val_loss")
    scored = measured.dropna(subset="hellaswag")

    # progress
    last_step = frame["step"].max()
    max_steps = read_config(run).get("max_steps")
    is_unfinished = isinstance(max_steps, int) and last_step < max_steps
    planned = f" of {max_steps:,}" if is_unfinished else ""
    figures = {"steps": f"{last_step:,}{planned} ({frame['tokens'].max():,} tokens)"}

    # quality
    if len(validated):
        best = validated.loc[validated["val_loss"].idxmin()]
        last = validated.iloc[-1]
        for name, row in ("best", best), ("last", last):
            figures[f"{name} validation loss"] = (
                f"{row['val_loss']:.4f} nats per token (step {row['step']:,.0f})")
    if len(scored):
        last = scored.iloc[-1]
        figures["HellaSwag, acc_norm"] = f"{last['hellaswag']:.4f} (step {last['step']:,.0f})"

    # speed and cost
    if measured["tokens_per_s"].any():
        figures["throughput, median"] = f"{measured['tokens_per_s'].median():,.0f} tokens/s"
    if "skipped" in frame:
        skipped = frame["skipped"].sum()
        figures["updates skipped"] = f"{skipped:,.0f}, because of non-finite gradients"
    return {**figures, **cost(run)}


def cost(run: str | Path) -> dict[str, str]:
    """The run's time, its machines, and an upper bound on their energy.

    The energy is the devices' maximum power over the time in the log. It includes what was lost to
    interruptions, but not the rest of the machine or its cooling.
    """
    seconds = Counter()  # on each machine: (number of processes, device)
    machine = (1, "an unknown device")
    previous_time = math.inf
    for line in read_lines(Path(run) / "metrics.jsonl"):
        # the line that starts or resumes a session names its machine
        if "device" in line:
            processes = line.get("processes")
            is_count = isinstance(processes, int) and 0 < processes < 1e6
            machine = (processes if is_count else 1, str(line["device"]))
        # add the time since the line before, which was not spent on training if a session starts or
        # resumes, and is negative if the clock was set back
        is_training = "event" not in line
        seconds[machine] += max(0, line["time"] - previous_time) if is_training else 0
        previous_time = line["time"]

    total = sum(seconds.values())
    kwh = 0.0
    for (processes, name), duration in seconds.items():
        device = find_device(name)
        watts = device.watts if device else math.nan
        kwh += processes * watts * duration / 3.6e6

    if total >= 3600:
        time = f"{total / 3600:,.2f} hours"
    else:
        time = f"{total / 60:,.1f} minutes"
    machines = ", ".join(f"{processes:,} x {name}" for processes, name in seconds)
    figures = {"time": f"{time}, including evaluation", "machine": machines}
    if math.isnan(kwh):
        figures["energy, CO2e"] = "not stated, because this device's power is not known"
    else:
        figures["energy"] = f"{kwh:,.1f} kWh at most, for the devices only"
        figures["CO2e"] = (f"{kwh * KG_CO2E_PER_KWH:,.1f} kg, at the world average of "
                           f"{KG_CO2E_PER_KWH} kg per kWh")
    return figures


# --------------------------------------------------------------------------------------------------
# Plots

LABELS = {"loss": "loss (nats per token)", "hellaswag": "HellaSwag, acc_norm",
          "throughput": "training throughput (tokens/s)"}
GREY = "0.5"  # readable on light and dark pages: the plot's background is transparent
STYLES = {"training": {"color": "C0", "alpha": 0.5, "linewidth": 1},
          "validation": {"color": "C3", "linewidth": 2},
          "HellaSwag": {"color": "C3", "linewidth": 2},
          "allenporter/nano-gpt": {"color": GREY, "linestyle": "-."},
          "samkeet/GPT_124M": {"color": GREY, "linestyle": ":"}}


def plot(frame: pd.DataFrame):
    """A matplotlib Figure of the curves in a frame over the tokens seen.

    Published runs are grey. Published models are horizontal lines, for HellaSwag and if the frame
    has published runs.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 (app.py starts faster without it)

    value = frame.columns[2]
    own = frame[~frame["curve"].isin(PUBLISHED_RUNS)]
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained", facecolor="none")
    axes = figure.subplots()

    # draw the curves; a single point needs a marker to be visible
    for name, points in frame.groupby("curve", sort=False):
        marker = "o" if len(points) == 1 else ""
        axes.plot(points["tokens"], points[value], label=name, marker=marker,
                  **STYLES.get(name, {}))

    # draw the published models
    if value == "hellaswag" or len(own) < len(frame):
        models = PUBLISHED_VALUES.get(value, {}).items()
        for (name, y), line in zip(models, ("--", ":")):
            axes.axhline(y, color=GREY, linestyle=line, linewidth=1, label=f"{name}: {y}")

    # limit the axes to the run's own range
    last = (own if len(own) else frame)["tokens"].max()
    right = min(1.25 * last, frame["tokens"].max()) or 1
    axes.set_xlim(-0.01 * right, 1.01 * right)
    if value == "loss":
        # leave out the first steps, whose high loss would flatten the rest
        left = min(0.02 * last, frame["tokens"].nlargest(3).min())
        visible = frame[(frame["tokens"] >= left) & (frame["tokens"] <= right)]
        axes.set_ylim(visible[value].min() - 0.05, visible[value].max() + 0.05)
    elif value == "throughput":
        axes.set_ylim(bottom=0)
    else:
        axes.margins(y=0.08)

    # labels and colors
    axes.set_facecolor("none")
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_formatter(format_count)
    axes.set_xlabel("tokens seen", color=GREY)
    axes.set_title(LABELS[value], color=GREY)
    axes.tick_params(colors=GREY)
    axes.spines[:].set_color(GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize="small", labelcolor=GREY)
    return figure


def format_count(number: float, _position: int) -> str:
    """A tick's label: 2.5B for 2,500,000,000."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


def save_plots(run: str | Path, folder: Path) -> list[Path]:
    """Writes loss.png, hellaswag.png and throughput.png, and returns those that are not empty."""
    paths = []
    for name, frame in tables(run).items():
        paths.append(folder / f"{name}.png")
        plot(frame).savefig(paths[-1])
    return paths


# --------------------------------------------------------------------------------------------------
# Command line

def main(run: tyro.conf.Positional[Path], out: Path | None = None):
    """Prints a run's results and draws its plots.

    Args:
        run: The run's folder.
        out: The folder to write the plots to; the run's folder by default.
    """
    for name, value in summary(run).items():
        print(f"{name:>22}  {value}")
    out = out or run
    out.mkdir(parents=True, exist_ok=True)
    for path in save_plots(run, out):
        print(f"{'plot':>22}  {path}")


if __name__ == "__main__":
    with report_user_errors():
        tyro.cli(main)
