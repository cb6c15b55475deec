"""A run's folder while it is trained: who may write in it, its log, and the signals that end a run early."""
import contextlib
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from common.errors import UserError
from common.files import write_json


@contextlib.contextmanager
def locked(run: Path):
    """Keeps other processes out of the run's folder. Raises UserError where one is in it."""
    run.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.parent / f".{run.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process trains {run}: wait for it, or give this run another name with --run.") from None
    try:
        yield
    finally:
        lock.release()


class StopSignals:
    """Within a `with`: SIGTERM and SIGINT are kept in `received` instead of ending the process; a second SIGINT ends it."""
    received = 0

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.keep) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def keep(self, number, _frame):
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class Log:
    """A run's config.json, metrics.jsonl and samples.jsonl. Once it has a checkpoint, lines are only appended: resuming says so
    in a line of its own, and readers drop what the earlier attempt wrote beyond that step, or at it where it was not measured."""

    def __init__(self, run: Path, config: dict, resume_step: int | None, measured: bool, track: str = "none", **machine):
        self.run, self.tracker = run, tracker(track, run.name, config)
        run.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            for name in ("metrics.jsonl", "samples.jsonl", "best.json"):
                (run / name).unlink(missing_ok=True)  # of an attempt that saved no checkpoint
            write_json(run / "config.json", config)
            self.append("metrics.jsonl", event="start", step=0, **machine)
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            if not (run / name).read_bytes().endswith(b"\n"):  # the end of the run cut its last line off
                with open(run / name, "a") as file:
                    file.write("\n")
            self.append(name, event="resume", step=resume_step, measured=measured, **machine)

    def metrics(self, **values):
        self.append("metrics.jsonl", **values)
        try:
            if self.tracker:
                self.tracker.log({name: value for name, value in values.items() if name != "step"}, step=values["step"])
        except Exception as error:  # whatever a service of others raises
            warn(f"the log is no longer tracked ({error})")
            self.tracker = None
        if "val_loss" in values:
            accuracy = f", HellaSwag {values['hellaswag']:.4f}" if values.get("hellaswag") is not None else ""
            tqdm.write(f"step {values['step']}: validation loss {values['val_loss']:.4f}{accuracy}")

    def sample(self, step: int, prompt: str, text: str):
        self.append("samples.jsonl", step=step, prompt=prompt, text=text)
        tqdm.write(f"step {step}: {text}\n")

    def append(self, name: str, **line):
        """Writes a line, null for a number that is none; a full disk costs the line and not the run."""
        line = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in line.items()}
        text = json.dumps({"time": round(time.time(), 3), **line}, ensure_ascii=False) + "\n"
        try:
            with open(self.run / name, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            warn(f"a line of {self.run / name} could not be written ({os.strerror(error.errno)})")


def tracker(name: str, run: str, config: dict):
    """trackio or wandb, which have the same two calls and end by themselves, with this run opened or gone on with; None for
    "none"."""
    if name == "none":
        return None
    known_by = {"name": run} if name == "trackio" else {"name": run, "id": run}
    try:
        return importlib.import_module(name).init(project="gpt2-from-scratch", config=config, resume="allow", **known_by)
    except ModuleNotFoundError:
        raise UserError(f"--track {name} needs its package: pip install {name}.") from None
    except Exception as error:  # whatever a service of others raises
        raise UserError(f"{name} could not be started ({error}): --track none trains without it.") from None


def warn(what: str):
    tqdm.write(f"warning: {what}", file=sys.stderr)
