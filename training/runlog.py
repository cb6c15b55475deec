"""A run's folder during training: its lock, its configuration and its log files."""
import importlib
import json
import math
import re
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from common.errors import UserError
from common.files import read_json, write_json


def locked(folder: Path):
    """Locks a run's folder for this process, until the end of a `with` block.

    Raises UserError if another process holds the lock.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder.parent / f".{folder.name}.lock").acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another process is training {folder}: wait until it ends, or choose "
                        "another --name.") from None


def read_config(run: str | Path) -> dict:
    """The run's configuration and the description of its data, from its config.json."""
    try:
        return dict(read_json(Path(run) / "config.json"))
    except (ValueError, TypeError) as error:
        raise UserError(f"{run}/config.json is damaged ({type(error).__name__}): restore it, or "
                        "choose another run.") from None


def learns_fineweb_edu(config: dict) -> bool:
    """Whether a run trains on FineWeb-Edu with a vocabulary as large as GPT-2's."""
    corpus = re.sub("[-_]", "", f"{config.get('corpus')} {config.get('data')}".lower())
    vocab_size = config.get("vocab_size") or 50257
    is_large = isinstance(vocab_size, int) and vocab_size >= 50257
    return ("finewebedu" in corpus or "edufineweb" in corpus) and is_large


class Log:
    """Writes a run's config.json, metrics.jsonl and samples.jsonl.

    A new run creates the files. A resumed run appends to them, starting with a line that has
    "event": "resume", its step, and "measured": whether validation had finished at that step.
    Readers drop what an earlier attempt logged after that step, and if "measured" is false, its
    validation at that step too.
    """

    def __init__(self, folder: Path, config: dict, first_step: int, is_evaluated: bool,
                 track: str = "none", **machine):
        self.folder = folder
        self.config = config
        self.tracker = start_tracker(track, folder.name, config)
        folder.mkdir(parents=True, exist_ok=True)

        # a new run: remove the log of an attempt that saved no checkpoint
        if not first_step:
            for name in ("metrics.jsonl", "samples.jsonl", "best.json"):
                (folder / name).unlink(missing_ok=True)
            write_json(folder / "config.json", config)
            self.append("metrics.jsonl", event="start", step=0, **machine)
            return

        # a resumed run may have another max_steps; a full disk does not end it
        try:
            write_json(folder / "config.json", config)
        except OSError as error:
            warn(f"{error.filename} could not be written ({error.strerror})")

        # end a line that was cut off, and log the step at which the run resumes
        for name in ("metrics.jsonl", "samples.jsonl"):
            if not (folder / name).read_bytes().endswith(b"\n"):
                with open(folder / name, "a") as file:
                    file.write("\n")
            self.append(name, event="resume", step=first_step, measured=is_evaluated, **machine)

    def metrics(self, step: int, **values):
        """Logs the values of one step, and prints the validation loss if it is among them."""
        self.append("metrics.jsonl", step=step, **values)
        if self.tracker:
            try:
                self.tracker.log(values, step=step)
            except Exception as error:  # a third-party service can raise anything
                warn(f"tracking has stopped; the log files are still written ({error})")
                self.tracker = None
        if "val_loss" in values:
            message = f"step {step}: validation loss {values['val_loss']:.4f}"
            if "hellaswag" in values:
                message += f", HellaSwag {values['hellaswag']:.4f}"
            tqdm.write(message)

    def sample(self, step: int, prompt: str, text: str):
        """Logs and prints a sample."""
        self.append("samples.jsonl", step=step, prompt=prompt, text=text)
        tqdm.write(f"step {step}: {text}\n")

    def append(self, file_name: str, **fields):
        """Appends one line of JSON. If that fails, as on a full disk, warns and continues."""
        line = {"time": round(time.time(), 3)}
        for name, value in fields.items():
            is_finite = not isinstance(value, float) or math.isfinite(value)
            line[name] = value if is_finite else None  # JSON has no NaN
        text = json.dumps(line, ensure_ascii=False) + "\n"
        path = self.folder / file_name
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            warn(f"a line of {path} could not be written ({error.strerror})")


def start_tracker(package: str, run: str, config: dict):
    """Starts or resumes the run in trackio or wandb, which share an API. None for "none"."""
    if package == "none":
        return None
    identity = {"id": run} if package == "wandb" else {}  # trackio resumes by name
    try:
        return importlib.import_module(package).init(
            project="gpt2-from-scratch", name=run, config=config, resume="allow", **identity)
    except ModuleNotFoundError:
        raise UserError(f"--track {package} needs a package: pip install {package}.") from None
    except Exception as error:  # a third-party service can raise anything
        raise UserError(f"{package} did not start ({error}): fix this, or leave out --track to "
                        "train without it.") from None


def warn(message: str):
    """Prints a warning without breaking the progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)
