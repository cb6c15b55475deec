"""The Training tab: the runs under log/ with their curves and samples, updated while they train.

Visitors can also train a small model here, unless the page is a public Space.
"""
import dataclasses
import functools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gradio as gr
import pandas as pd

import checkpoint
import report
from api import guard
from common.errors import UserError
from generate import Engine
from training.config import validate
from training.presets import PRESETS
from training.runlog import locked
from ui.models import Models, show_user_errors
from ui.stream import default_of

POLL_S = 2  # how often the page looks for new measurements
MAX_POINTS = 1000  # drawn per curve
STALLED_S = 600  # a run that has written nothing for this long is not training any more
LENGTH = 300  # tokens to write with a checkpoint
REFRESH_TOKENS = 4  # update the text on the page after this many tokens
TRAIN = Path(__file__).parent.parent / "train.py"

# what two CPU cores can train
SMALL_PRESETS = [name for name, preset in PRESETS.items() if preset.n_embd <= 192]

# column of metrics.jsonl -> title of its plot
CURVES = {"val_loss": "validation loss, nats per token",
          "train_loss": "training loss, nats per token", "hellaswag": "HellaSwag, acc_norm",
          "learning_rate": "learning rate", "grad_norm": "gradient norm",
          "tokens_per_s": "tokens per second"}

# --------------------------------------------------------------------------------------------------
# The page

def build(models: Models, training: bool = "SPACE_ID" not in os.environ):
    """Lays out the tab and connects its events. Without `training`, visitors cannot start runs;
    this is the default on a Space, which sets SPACE_ID."""
    process = TrainingProcess()
    all_runs = list_runs()

    with gr.Accordion("Train a model here", open=not all_runs, visible=training):
        gr.Markdown(
            "This starts `python train.py` on this machine. Prepare the data first: "
            "`python prepare.py tiny_shakespeare`. To resume a stopped run, start it again under "
            "the same name.")
        with gr.Row():
            preset = gr.Dropdown(SMALL_PRESETS, value=SMALL_PRESETS[0], label="Preset",
                                 min_width=160, elem_id="train-preset")
            name = gr.Textbox("mine", label="Name", max_length=60, min_width=120,
                              elem_id="train-name")
            steps = gr.Number(PRESETS[SMALL_PRESETS[0]].max_steps, label="Steps", precision=0,
                              minimum=1, maximum=100_000, min_width=100, elem_id="train-steps")
            start_button = gr.Button("Start", variant="primary", min_width=90,
                                     elem_id="train-start")
            stop_button = gr.Button("Stop and save", variant="stop", min_width=90,
                                    elem_id="train-stop")
        status = gr.Textbox(label="Output", placeholder="The output of the run appears here.",
                            show_label=False, container=False, interactive=False, max_lines=3,
                            elem_id="train-status")

    runs = gr.Dropdown(all_runs, value=all_runs[:1], label="Runs", multiselect=True,
                       info="Choose several to compare their curves.", allow_custom_value=True,
                       elem_id="runs")
    progress = gr.Dataframe(headers=["run", "step", "state", "validation loss", "tokens/s"],
                            label="Progress", interactive=False, wrap=True, elem_id="runs-progress")
    plots = []
    columns = list(CURVES)
    for row in columns[:3], columns[3:]:
        with gr.Row():
            for column in row:
                plots.append(gr.Plot(show_label=False, min_width=300, visible=False,
                                     elem_id=f"plot-{column}"))
    samples = gr.Dataframe(headers=["run", "step", "text"],
                           label="Samples written during training, newest first",
                           column_widths=["20%", "12%", "68%"], max_height=320, interactive=False,
                           wrap=True, elem_id="runs-samples")
    with gr.Row():
        with gr.Column(scale=2, min_width=240):
            prompt = gr.Textbox(label="Prompt", placeholder="Leave empty for the run's own prompt.",
                                lines=3, max_length=2_000, elem_id="runs-prompt")
            write_button = gr.Button("Write with the newest checkpoint of the first run",
                                     elem_id="runs-write")
        text = gr.Textbox(label="Text", lines=6, max_lines=12, interactive=False, scale=3,
                          min_width=240, buttons=["copy"], elem_id="runs-text")

    seen = gr.State()  # what the page shows: per run, whether it trains and when it last wrote
    shown = [progress, *plots, samples]

    def update(chosen: list[str], seen: dict | None):
        now = {}
        for run in folders(list_runs()):
            times = [log.stat().st_mtime for log in run.glob("*.jsonl")]
            now[run.name] = [is_training(run), *times]
        if now == seen:
            return process.status(), gr.skip(), gr.skip(), *[gr.skip()] * len(shown)
        changes = {"choices": list(now)}
        # a page that has just been opened shows the newest run
        if seen is None and not folders(chosen):
            chosen = list(now)[:1]
            changes["value"] = chosen
        return process.status(), gr.update(**changes), now, *show(chosen)

    # one at a time, so that the page ends with the result of the latest request
    in_order = {"concurrency_limit": 1, "concurrency_id": "runs", "show_progress": "hidden"}
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    runs.change(show, runs, shown, api_name="runs", **in_order)
    timer = gr.Timer(POLL_S)
    gr.on([gr.context.Context.root_block.load, timer.tick], update, inputs=[runs, seen],
          outputs=[status, runs, seen, *shown], api_visibility="private", **in_order)
    write_button.click(functools.partial(write_sample, models), [runs, prompt], text,
                       concurrency_limit=4, **quiet)
    if training:
        start_button.click(process.start, [preset, name, steps, runs], [status, runs], **quiet)
        stop_button.click(process.stop, None, status, **quiet)
        preset.change(lambda name: PRESETS[name].max_steps, preset, steps, **quiet)


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
    """Returns the runs' progress, their plots and their samples."""
    with show_user_errors():
        frames = {run: measurements(run) for run in folders(runs)}
        # draw the published curves if a run learns the same data
        with_published = any(report.learns_fineweb_edu(report.read_config(run)) for run in frames)
        progress = [progress_of(run, frame) for run, frame in frames.items()]
        plots = [plot(column, frames, with_published) for column in CURVES]
        samples = []
        for run in frames:
            newest_first = report.samples(run)[::-1]
            for step, text in zip(newest_first["step"], newest_first["text"]):
                samples.append([run.name, step, text])
    return progress, *plots, samples


def plot(column: str, frames: dict[Path, pd.DataFrame], with_published: bool) -> gr.Plot:
    """The runs' curves of one measurement over the tokens seen; hidden if there are none."""
    value = "loss" if column == "val_loss" else column  # its name in the published curves
    curves = []
    for run, frame in frames.items():
        curve = report.curve(frame, column, value, run.name)
        if len(curve):
            curves.append(curve.iloc[::max(1, len(curve) // MAX_POINTS)])
    if not curves:
        return gr.Plot(None, visible=False)
    if with_published:
        curves += report.published_curves(value)
    return gr.Plot(report.plot(pd.concat(curves), CURVES[column], (4.6, 3.2)), visible=True)


def measurements(run: Path) -> pd.DataFrame:
    """A run's metrics; an empty table if it has just started."""
    try:
        return report.metrics(run)
    except UserError:
        return pd.DataFrame(columns=["step", "tokens", "time"])


def progress_of(run: Path, frame: pd.DataFrame) -> list[str]:
    """A run's row in the table: name, step, state, validation loss, tokens per second."""
    if frame.empty:
        return [run.name, "0", "starting", "", ""]
    step = int(frame["step"].iloc[-1])
    last_step = report.read_config(run).get("max_steps", 0)

    if step >= last_step:
        state = "complete"
    elif not is_training(run):
        state = "stopped"
    else:
        # time left, from the median pace of the last 20 measurements
        new_steps = frame["step"].diff()
        seconds_per_step = (frame["time"].diff() / new_steps)[new_steps > 0].tail(20).median()
        state = "training"
        if seconds_per_step > 0:
            state += f", {duration(seconds_per_step * (last_step - step))} left"

    table = frame.reindex(columns=["val_loss", "tokens_per_s"])
    losses, speeds = table["val_loss"].dropna(), table["tokens_per_s"].dropna()
    loss = f"{losses.iloc[-1]:.4f}, best {losses.min():.4f}" if len(losses) else ""
    speed = f"{speeds.iloc[-1]:,.0f}" if len(speeds) else ""
    return [run.name, f"{step:,} of {last_step:,}", state, loss, speed]


def is_training(run: Path) -> bool:
    """Whether a process trains the run: it has written recently and holds the run's lock."""
    if time.time() - os.path.getmtime(run / "metrics.jsonl") > STALLED_S:
        return False
    try:
        with locked(run):
            return False
    except UserError:
        return True


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


# --------------------------------------------------------------------------------------------------
# Training on this machine

class TrainingProcess:
    """The run that was started from the page, one at a time. It continues if the page is closed."""
    process = None

    def start(self, preset: str, name: str, steps: int, runs: list[str], request: gr.Request):
        """Starts a run; returns the status and the list of runs with the new one first."""
        with show_user_errors():
            guard.require_local(request)
            if self.process and self.process.poll() is None:
                raise UserError(f"{self.name} is still training: stop it first, or wait until it "
                                "is complete.")
            if preset not in SMALL_PRESETS:
                raise UserError("Choose a preset from the list.")
            validate(dataclasses.replace(PRESETS[preset], name=name or "", max_steps=steps or 1))
        checkpoint.LOG.mkdir(exist_ok=True)
        self.name = name
        self.output = checkpoint.LOG / f".{name}.out"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, TRAIN, preset, f"--name={name}", f"--max-steps={steps or 1}"],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                cwd=checkpoint.LOG.absolute().parent)
        choices = [name, *(run for run in list_runs() if run != name)]
        chosen = [name, *(run for run in runs or [] if run != name)]
        return f"{name} is starting.", gr.Dropdown(
            choices=choices, value=chosen, allow_custom_value=True)

    def stop(self, request: gr.Request) -> str:
        """Stops the run and waits until it has saved a checkpoint; returns the status."""
        with show_user_errors():
            guard.require_local(request)
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        return self.status() or "No run has been started here."

    def status(self) -> str | None:
        """How the run ended, or the last line of its output."""
        if self.process is None:
            return None
        exit_code = self.process.poll()
        if exit_code == 0:
            return f"{self.name} is complete."
        if exit_code == 143:  # 128 + SIGTERM
            return f"{self.name} was stopped and its checkpoint saved."
        output = self.output.read_text(encoding="utf-8", errors="replace")
        lines = re.split(r"[\r\n]+", output[-2000:].strip())
        return lines[-1] or f"{self.name} is starting."


# --------------------------------------------------------------------------------------------------
# Writing with a checkpoint

@functools.lru_cache(maxsize=1)
def load_engine(path: Path, mtime: float, device) -> Engine:
    """The engine of a checkpoint; `mtime` makes a file that has changed load again."""
    model, tokenizer, _ = checkpoint.load_model(path, device)
    return Engine(model, tokenizer)


def write_sample(models: Models, runs: list[str], prompt: str):
    """Streams a prompt and its continuation by the newest checkpoint of the first run."""
    with show_user_errors():
        run = next(iter(folders(runs)), None)
        steps = checkpoint.model_steps(run) if run else []
        if not steps:
            raise UserError("The run has no checkpoint yet: wait for the first one, or stop the "
                            "run, which saves one.")
        path = checkpoint.model_path(run, steps[-1])
        engine = load_engine(path, path.stat().st_mtime, models.device)
        text = prompt or report.read_config(run).get("sample_prompt", "")
        ids, _ = engine.encode(text[:2_000])
        pieces = engine.stream(ids, max_new_tokens=LENGTH, temperature=default_of("temperature"),
                               top_p=default_of("top_p"))
        for count, piece in enumerate(pieces):
            text += piece
            if count % REFRESH_TOKENS == 0:
                yield text
    yield text
