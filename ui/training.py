"""The Training tab: train a small model on a text of one's own, and see the runs under log/.

Only this machine's own browser may train, and nobody on a public Space or behind a proxy, unless
the environment has ALLOW_TRAINING=1.
"""
import contextlib
import os
import time
from pathlib import Path
from types import MethodType

import gradio as gr
import pandas as pd

import checkpoint
import report
from api.guard import may_train, require_may_train
from common.errors import UserError
from corpus import sources
from training.runlog import locked
from ui.own_text import OwnTextTraining, read_text
from ui.settings import QUIET, TEXTS

POLL_S = 2  # how often the page looks for new measurements
MAX_POINTS = 300  # drawn per curve
STALLED_S = 600  # a run that has written nothing for this long is not training any more
MINUTES = {"1 minute": 1, "5 minutes": 5, "20 minutes": 20}
MAX_BYTES = 10_000_000  # of a text

# column of metrics.jsonl -> title of its plot
CURVES = {"val_loss": "Validation loss, nats per token",
          "train_loss": "Training loss, nats per token", "hellaswag": "HellaSwag, acc_norm",
          "learning_rate": "Learning rate", "grad_norm": "Gradient norm",
          "tokens_per_s": "Tokens per second"}

# --------------------------------------------------------------------------------------------------
# The page

def build(_models) -> tuple[gr.Button, gr.Textbox]:
    """Lays out the tab and connects its events.

    Returns what app.py connects to the other tabs: the button to write with the model that was
    trained here last, and that model's name, which is empty until it can write.
    """
    training = OwnTextTraining()
    gr.Markdown(TEXTS["training is off"], visible=not may_train())
    with gr.Column(visible=may_train()):
        status, *own_text = build_own_text(training)
    with gr.Accordion("All runs on this machine", open=not may_train(), elem_id="all-runs"):
        gr.Markdown(TEXTS["runs"])
        runs = gr.Dropdown(list_runs(), value=[], label="Runs", multiselect=True,
                           allow_custom_value=True, elem_id="runs")
        progress = gr.Dataframe(headers=["run", "step", "state", "validation loss", "tokens/s"],
                                label="Progress", interactive=False, wrap=True,
                                elem_id="runs-progress")
        with gr.Row():
            plots = [gr.LinePlot(title=title, height=240, min_width=300, visible=False,
                                 elem_id=f"plot-{column}") for column, title in CURVES.items()]
    seen = gr.State()  # what the page shows: per run, whether it trains and when it last wrote

    def update(chosen: list[str], seen: list | None):
        now = [(training.name, training.stage)]
        for run in folders(list_runs()):
            with contextlib.suppress(FileNotFoundError):  # a failed run has just been removed
                times = [log.stat().st_mtime for log in run.glob("*.jsonl")]
                now.append((run.name, is_training(run), *times))
        if now == seen:
            return {status: describe(training)}
        return [now, gr.Dropdown(list_runs()), *show(chosen), describe(training),
                *show_own_text(training)]

    # one at a time, so that the page ends with the result of the latest request
    in_order = {"concurrency_limit": 1, "concurrency_id": "runs", "show_progress": "hidden"}
    runs.change(show, runs, [progress, *plots], api_name="runs", api_visibility="undocumented",
                **in_order)
    opened = gr.context.Context.root_block.load
    gr.on([opened, gr.Timer(POLL_S).tick], update, [runs, seen],
          [seen, runs, progress, *plots, status, *own_text], api_visibility="private", **in_order)
    opened(lambda: list_runs()[:1], None, runs, **QUIET)  # choose the newest one
    return own_text[0], own_text[-1]


def build_own_text(training: OwnTextTraining) -> tuple:
    """The form, and below it the training: (status, *what `show_own_text` updates)."""
    gr.Markdown(TEXTS["training"])
    with gr.Row():
        file = gr.File(label="Your text (.txt)", file_types=["text"], height=140,
                       elem_id="train-file")
        with gr.Column(min_width=240):
            minutes = gr.Radio(list(MINUTES), value="1 minute", label="How long to train",
                               elem_id="train-minutes")
            start_button = gr.Button("Train", variant="primary", elem_id="train-start")
            shakespeare_button = gr.Button("Or train on tiny Shakespeare", size="sm",
                                           elem_id="train-shakespeare")
            stop_button = gr.Button("Stop and keep what it has learned", variant="stop",
                                    visible=False, elem_id="train-stop")
    status = gr.Markdown(label="Status", elem_id="train-status")
    write_button = gr.Button("Write with it", variant="primary", visible=False,
                             elem_id="train-write")
    with gr.Column(visible=False) as results:
        with gr.Row():
            loss = gr.LinePlot(title="Loss, nats per letter", x_title="letters read", height=260,
                               min_width=300, elem_id="train-loss")
            box = {"lines": 9, "max_lines": 9, "min_width": 240, "interactive": False}
            first = gr.Textbox(label="What it wrote first", elem_id="train-first", **box)
            last = gr.Textbox(label="What it writes now", elem_id="train-now", **box)
        gr.Markdown(TEXTS["loss"])
    model = gr.Textbox(visible="hidden")

    one_by_one = {"concurrency_limit": 1, "concurrency_id": "train", "show_progress": "hidden"}
    started = start_button.click(MethodType(start, training), [file, minutes], status,
                                 api_name="train", **one_by_one)
    started.then(lambda: None, None, file, **QUIET)  # also after an error: the file is deleted
    shakespeare_button.click(MethodType(start_shakespeare, training), minutes, status,
                             api_visibility="private", **one_by_one)
    stop_button.click(MethodType(stop, training), **QUIET)
    return status, write_button, start_button, stop_button, results, loss, first, last, model


# --------------------------------------------------------------------------------------------------
# Reading the runs

def list_runs() -> list[str]:
    """Names of the runs that have a log, the one that wrote last first."""
    logs = sorted(checkpoint.LOG.glob("*/metrics.jsonl"), key=os.path.getmtime, reverse=True)
    return [path.parent.name for path in logs]


def folders(runs: list[str] | None) -> list[Path]:
    """The folders of the runs that exist: a visitor must not open other paths."""
    existing = list_runs()
    return [checkpoint.LOG / run for run in runs or [] if run in existing]


def show(runs: list[str]):
    """Returns the runs' progress and their plots. What is empty is hidden."""
    frames = {run: measurements(run) for run in folders(runs)}
    # draw the published curves if a run learns the same data
    with_published = any(report.learns_fineweb_edu(report.read_config(run)) for run in frames)
    progress = [progress_of(run, frame) for run, frame in frames.items()]
    plots = [plot(column, frames, with_published) for column in CURVES]
    return gr.Dataframe(progress, visible=bool(progress)), *plots


def plot(column: str, frames: dict[Path, pd.DataFrame], with_published: bool) -> gr.LinePlot:
    """The runs' curves of one measurement over the tokens seen; hidden if there are none."""
    value = "loss" if column == "val_loss" else column  # its name in the published curves
    curves = [report.curve(frame, column, value, run.name) for run, frame in frames.items()]
    if with_published and any(map(len, curves)):
        curves += report.published_curves(value)
    return line_plot(curves, value)


def line_plot(curves: list[pd.DataFrame], value: str) -> gr.LinePlot:
    """The curves (tokens, `value`, curve) that have points; hidden if none has."""
    curves = [curve.iloc[::max(1, len(curve) // MAX_POINTS)] for curve in curves if len(curve)]
    if not curves:
        return gr.LinePlot(visible=False)
    return gr.LinePlot(pd.concat(curves), x="tokens", y=value, color="curve", visible=True)


def measurements(run: Path) -> pd.DataFrame:
    """A run's metrics; an empty table if it has just started."""
    with contextlib.suppress(UserError):
        return report.metrics(run)
    return pd.DataFrame(columns=["step", "tokens", "time"])


def progress_of(run: Path, frame: pd.DataFrame) -> list[str]:
    """A run's row in the table: name, step, state, validation loss, tokens per second."""
    if frame.empty:
        return [run.name, "0", "starting", "", ""]
    step = int(frame["step"].iloc[-1])
    last_step = report.read_config(run).get("max_steps", 0)

    state = "training" if is_training(run) else "stopped" if step < last_step else "complete"
    table = frame.reindex(columns=["val_loss", "tokens_per_s"])
    losses, speeds = table["val_loss"].dropna(), table["tokens_per_s"].dropna()
    loss = f"{losses.iloc[-1]:.4f}, best {losses.min():.4f}" if len(losses) else ""
    speed = f"{speeds.iloc[-1]:,.0f}" if len(speeds) else ""
    return [run.name, f"{step:,} of {last_step:,}", state, loss, speed]


def is_training(run: Path) -> bool:
    """Whether a process trains the run: it has written recently and holds the run's lock."""
    if time.time() - os.path.getmtime(run / "metrics.jsonl") > STALLED_S:
        return False
    with contextlib.suppress(UserError), locked(run):
        return False
    return True


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02} s"


# --------------------------------------------------------------------------------------------------
# Training on one's own text

def start(training: OwnTextTraining, file: str | None, minutes: str, request: gr.Request) -> str:
    """Starts to train on a text file, and deletes the file. Returns what happens now."""
    require_may_train(request)
    if not file:
        raise UserError("Choose a text file first.")
    path = Path(file)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"This file is larger than {MAX_BYTES // 10**6} MB: choose a smaller "
                            "one.")
        text = read_text(path)
    finally:
        path.unlink()
    training.start(path.stem, text, 60 * MINUTES[minutes])
    return describe(training)


def start_shakespeare(training: OwnTextTraining, minutes: str, request: gr.Request) -> str:
    require_may_train(request)
    try:
        path = sources.download("tiny_shakespeare")
    except UserError:
        raise UserError("Tiny Shakespeare could not be downloaded: drop a text file of your own "
                        "instead.") from None
    training.start("shakespeare", read_text(path), 60 * MINUTES[minutes])
    return describe(training)


def stop(training: OwnTextTraining, request: gr.Request):
    require_may_train(request)
    training.stop()


def describe(training: OwnTextTraining) -> str:
    """What the training does or how it ended, as Markdown."""
    elapsed = duration(training.elapsed_s)
    if training.stage:
        return f"**{training.stage}** {elapsed} of {duration(training.seconds)}"
    if training.error:
        return f"**That did not work.** {training.error}"
    if not training.name:
        return ""
    ended = "Stopped" if training.stopped else "Done"
    return f"**{ended} after {elapsed}.** Your model is called **{training.name}**."


def show_own_text(training: OwnTextTraining) -> list:
    """Updates the form and the training below it."""
    under_way = bool(training.stage)
    frame = measurements(training.run) if training.name else pd.DataFrame()
    curves, first, last = [], gr.skip(), gr.skip()
    if len(frame):
        curves = [report.curve(frame, "train_loss", "loss", "text it learns"),
                  report.curve(frame, "val_loss", "loss", "unseen text")]
        samples = report.samples(training.run)
        if len(samples):
            first = samples["text"].iloc[0]
            label = f"What it writes now, after {samples['step'].iloc[-1]:,} steps"
            last = gr.Textbox(samples["text"].iloc[-1], label=label)
    can_write = not under_way and bool(checkpoint.model_steps(training.run))
    return [gr.Button(visible=can_write), gr.Button(interactive=not under_way),
            gr.Button(visible=under_way), gr.Column(visible=bool(curves)),
            line_plot(curves, "loss"), first, last, str(training.run) if can_write else ""]
