"""The Training tab: the runs under log/, over each other and while they go on, and a small one from its start to its texts."""
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
from common.errors import UserError
from generate import Engine
from training.config import check
from training.presets import PRESETS
from training.runlog import locked
from ui.models import Models, sentences
from ui.stream import default_of

EVERY_S = 2  # how often the page asks whether a run has written
POINTS = 1000  # of a curve that are drawn
RECENT_S = 600  # a run that has written nothing for so long does not go on
LENGTH = 300  # tokens that are written with a checkpoint
REFRESH_TOKENS = 4  # they are sent after so many
TRAIN = Path(__file__).parent.parent / "train.py"

SMALL = [name for name, preset in PRESETS.items() if preset.n_embd <= 192]  # what two cores can train
CURVES = {"val_loss": "validation loss, nats a token", "train_loss": "training loss, nats a token",
          "hellaswag": "HellaSwag, acc_norm", "learning_rate": "learning rate", "grad_norm": "norm of the gradient",
          "tokens_per_s": "tokens a second"}


def build(models: Models, training: bool = "SPACE_ID" not in os.environ):
    """Lays the tab out and connects it; with `training` people start runs, which the visitors of a public Space should not."""
    started = Started()
    with gr.Accordion("Train a model here", open=not list_runs(), visible=training):
        gr.Markdown("`python train.py` in a process of its own on this machine's cores. Its data come first: `python prepare.py "
                    "tiny_shakespeare`. Stopping saves, and starting the same name again goes on from there.")
        with gr.Row():
            preset = gr.Dropdown(SMALL, value=SMALL[0], label="Preset", min_width=160, elem_id="train-preset")
            name = gr.Textbox("mine", label="Name", max_length=60, min_width=120, elem_id="train-name")
            steps = gr.Number(PRESETS[SMALL[0]].max_steps, label="Steps", precision=0, minimum=1, maximum=100_000, min_width=100,
                              elem_id="train-steps")
            start = gr.Button("Start", variant="primary", min_width=90, elem_id="train-start")
            stop = gr.Button("Stop and save", variant="stop", min_width=90, elem_id="train-stop")
        said = gr.Textbox(label="What the run says", show_label=False, container=False, interactive=False, max_lines=3,
                          placeholder="What the run says appears here.", elem_id="train-said")
    runs = gr.Dropdown(list_runs(), value=list_runs()[:1], multiselect=True, allow_custom_value=True, label="Runs",
                       info="Several are drawn over each other.", elem_id="runs")
    where = gr.Dataframe(headers=["run", "step", "state", "validation loss", "tokens/s"], label="Where they are",
                         interactive=False, wrap=True, elem_id="runs-where")
    plots = []
    for columns in list(CURVES)[:3], list(CURVES)[3:]:
        with gr.Row():
            plots += [gr.Plot(show_label=False, min_width=300, visible=False, elem_id=f"plot-{column}") for column in columns]
    samples = gr.Dataframe(headers=["run", "step", "text"], label="What they wrote on the way, the latest first",
                           interactive=False, wrap=True, max_height=320, column_widths=["20%", "12%", "68%"],
                           elem_id="runs-samples")
    with gr.Row():
        with gr.Column(scale=2, min_width=240):
            prompt = gr.Textbox(label="Prompt", lines=3, max_length=2_000, placeholder="The run's own when empty",
                                elem_id="runs-prompt")
            write = gr.Button("Write with the first run's newest checkpoint", elem_id="runs-write")
        text = gr.Textbox(label="Text", lines=6, max_lines=12, interactive=False, scale=3, min_width=240, buttons=["copy"],
                          elem_id="runs-text")

    seen, timer = gr.State(), gr.Timer(EVERY_S)
    shown, quiet = [where, *plots, samples], {"show_progress": "hidden", "api_visibility": "private"}

    def tick(chosen: list[str], seen):
        now = {run.name: [goes_on(run), *(path.stat().st_mtime for path in run.glob("*.jsonl"))] for run in folders(list_runs())}
        if now == seen:
            return started.says(), *[gr.skip()] * (2 + len(shown))
        choices = {"choices": list(now)}
        if seen is None and not folders(chosen):  # a page that was just opened
            choices["value"] = chosen = list(now)[:1]
        return started.says(), gr.update(**choices), now, *show(chosen)

    in_order = {"concurrency_limit": 1, "concurrency_id": "runs", "show_progress": "hidden"}  # what was asked last is seen last
    runs.change(show, runs, shown, api_name="runs", **in_order)
    gr.on([gr.context.Context.root_block.load, timer.tick], tick, [runs, seen], [said, runs, seen, *shown], **in_order,
          api_visibility="private")
    write.click(functools.partial(write_with, models), [runs, prompt], text, concurrency_limit=4, **quiet)
    if training:
        start.click(started.start, [preset, name, steps, runs], [said, runs], **quiet)
        stop.click(started.stop, None, said, **quiet)
        preset.change(lambda name: PRESETS[name].max_steps, preset, steps, **quiet)


# ----------------------------------------------------------------------------------------------------------------
# What the runs have written

def list_runs() -> list[str]:
    """Names of the runs that have a log, the one that wrote last first."""
    logs = sorted(checkpoint.LOG.glob("*/metrics.jsonl"), key=os.path.getmtime, reverse=True)
    return [path.parent.name for path in logs]


def folders(runs: list[str] | None) -> list[Path]:
    """The folders of those runs that are in the list: what a request names is never a path."""
    there = list_runs()
    return [checkpoint.LOG / run for run in runs or () if run in there]


def show(runs: list[str]):
    """Where the runs are, their curves, with the published ones beside those that compare, and their samples."""
    with sentences():
        frames = {run: measurements(run) for run in folders(runs)}
        compares = any(report.learns_fineweb_edu(report.read_config(run)) for run in frames)
        texts = [[run.name, step, text] for run in frames for step, _, text in report.samples(run)[::-1].itertuples(index=False)]
        where = [standing(run, frame) for run, frame in frames.items()]
    return where, *(plot(column, frames, compares) for column in CURVES), texts


def plot(column: str, frames: dict[Path, pd.DataFrame], compares: bool) -> gr.Plot:
    """The runs' curves of a measurement over the tokens seen, with what was published where it compares."""
    value = {"val_loss": "loss"}.get(column, column)  # as report.py calls it
    curves = [report.curve(frame, column, value, run.name) for run, frame in frames.items()]
    curves = [curve.iloc[::max(1, len(curve) // POINTS)] for curve in curves if len(curve)]
    if not curves:
        return gr.Plot(None, visible=False)
    return gr.Plot(report.plot(pd.concat(curves + report.published(value) * compares), CURVES[column], (4.6, 3.2)), visible=True)


def measurements(run: Path) -> pd.DataFrame:
    """A run's metrics; none yet where it has just begun."""
    try:
        return report.metrics(run)
    except UserError:
        return pd.DataFrame(columns=["step", "tokens", "time"])


def standing(run: Path, frame: pd.DataFrame) -> list[str]:
    """A run's row in the table: how far it is, its last measurements, whether it goes on and for how long."""
    if frame.empty:
        return [run.name, "0", "begins", "", ""]
    step, last = int(frame["step"].iloc[-1]), report.read_config(run).get("max_steps", 0)
    losses, speeds = (frame.reindex(columns=[column])[column].dropna() for column in ("val_loss", "tokens_per_s"))
    state = "complete" if step >= last else "stopped"
    if step < last and goes_on(run):
        pace = (frame["time"].diff() / frame["step"].diff())[frame["step"].diff() > 0].tail(20).median()  # s a step
        state = f"goes on, {duration(pace * (last - step))} left" if pace > 0 else "goes on"
    return [run.name, f"{step:,} of {last:,}", state, f"{losses.iloc[-1]:.4f}, best {losses.min():.4f}" if len(losses) else "",
            f"{speeds.iloc[-1]:,.0f}" if len(speeds) else ""]


def goes_on(run: Path) -> bool:
    """Whether a process trains it: it has written of late and holds the run's lock."""
    if time.time() - os.path.getmtime(run / "metrics.jsonl") > RECENT_S:
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


# ----------------------------------------------------------------------------------------------------------------
# A run of one's own

class Started:
    """The run that was started from the page, one at a time; it goes on when the page is closed."""
    process = None

    def start(self, preset: str, name: str, steps: int, runs: list[str]):
        with sentences():
            if self.process and self.process.poll() is None:
                raise UserError(f"{self.name} is being trained: stop it first, or wait until it is complete.")
            if preset not in SMALL:
                raise UserError("Choose a preset of the list.")
            check(dataclasses.replace(PRESETS[preset], run=name or "", max_steps=steps or 1))
        checkpoint.LOG.mkdir(exist_ok=True)
        self.name, self.output = name, checkpoint.LOG / f".{name}.out"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen([sys.executable, TRAIN, preset, f"--run={name}", f"--max-steps={steps or 1}"],
                                            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                            cwd=checkpoint.LOG.absolute().parent)
        others, there = ([run for run in some if run != name] for some in (runs or [], list_runs()))
        return f"{name} begins.", gr.Dropdown(choices=[name, *there], value=[name, *others], allow_custom_value=True)

    def stop(self) -> str:
        """Has it save the step that it is at, and end; waits until it has."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        return self.says() or "No run was started here."

    def says(self) -> str | None:
        """The last line that the run has written, or how it ended."""
        if self.process is None:
            return None
        ended = {0: f"{self.name} is complete.", 143: f"{self.name} was stopped, and its checkpoint saved."}
        lines = re.split(r"[\r\n]+", self.output.read_text(encoding="utf-8", errors="replace")[-2000:].strip())
        return ended.get(self.process.poll()) or lines[-1] or f"{self.name} begins."


@functools.lru_cache(maxsize=1)
def engine_of(path: Path, written: float, device) -> Engine:
    return Engine(*checkpoint.load_model(path, device)[:2])


def write_with(models: Models, runs: list[str], prompt: str):
    """Streams what the newest checkpoint of the first of the runs makes of a prompt."""
    with sentences():
        run = next(iter(folders(runs)), None)
        if run is None or not checkpoint.model_steps(run):
            raise UserError("There is no checkpoint yet: wait for the run's first, or stop the run, which saves one.")
        path = checkpoint.model_path(run, checkpoint.model_steps(run)[-1])
        engine = engine_of(path, path.stat().st_mtime, models.device)
        written = prompt or report.read_config(run).get("sample_prompt", "")
        ids, _ = engine.encode(written[:2_000])
        settings = {name: default_of(name) for name in ("temperature", "top_p")}
        for count, piece in enumerate(engine.stream(ids, max_new_tokens=LENGTH, **settings)):
            written += piece
            if count % REFRESH_TOKENS == 0:
                yield written
    yield written
