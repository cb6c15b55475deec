"""Trains a small model on a visitor's text in a given time: prepare.py and train.py as processes.

The time and the speed of this machine decide everything:

1. train.py starts with the smallest model. If its first seconds show that a larger one could read
   enough text in the time, it starts again with that.
2. It trains at a constant learning rate, as long as the time allows. Then it is stopped, which
   saves a checkpoint.
3. It resumes with --max-steps such that the decay of the learning rate fills the rest of the time.
   With the schedule "wsd" (warm-up, stable, decay) the steps may be decided as late as this.

The text and its tokens are kept in a temporary folder until the training ends. The model stays, as
the run log/<name>.
"""
import atexit
import itertools
import math
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import checkpoint
import report
from common.errors import UserError
from training.config import TrainConfig

ROOT = Path(__file__).parent.parent
MIN_CHARS = 5_000
TOKENS_PER_PARAMETER = 1.5  # to read in the time; a model with more parameters learns less
MEASURE_S = 3  # of training, to know the speed
MAX_STEPS_PER_S = 200  # ends a training whose server was killed
# steps of the decay of "wsd" for each step before it
DECAY = TrainConfig.decay_ratio / (1 - TrainConfig.decay_ratio)
POLL_S = 0.2

# Options of train.py, and the time of a token, as a multiple of the first size's on two cores.
Size = namedtuple("Size", "n_layer n_head n_embd block_size micro_batch learning_rate cost")
# the first is that of the preset shakespeare-char-cpu, the third the bundled Shakespeare's
SIZES = (Size(2, 3, 96, 64, 12, 1e-2, 1), Size(3, 4, 128, 128, 8, 8e-3, 2),
         Size(4, 6, 192, 256, 8, 6e-3, 5.5), Size(6, 6, 384, 256, 32, 3e-3, 30))


class OwnTextTraining:
    """The training that was started from the page, one at a time for all visitors.

    It continues if a page is closed, and ends with the server.
    """

    name = ""  # of the run, log/<name>
    stage = ""  # what it does now, in plain words; empty if it has ended
    error = ""
    seconds = started_at = ended_at = 0.0
    process = None
    size = None  # of the model; None before the speed is known
    stopped = False  # by a visitor

    @property
    def run(self) -> Path:
        return checkpoint.LOG / self.name

    def start(self, title: str, text: str, seconds: float):
        """Starts to train on the text, in a thread. Raises UserError if that is not possible."""
        if self.stage:
            raise UserError(f"A training is under way ({self.name}): wait until it has ended, or "
                            "stop it.")
        if len(text) < MIN_CHARS:
            raise UserError(f"This text has {len(text):,} characters, too few to learn from: "
                            f"choose one of {MIN_CHARS:,} or more, such as a story or a book.")
        self.name = free_name(title)
        self.stage = "Reading the text …"
        self.error = ""
        self.seconds, self.started_at = seconds, time.time()
        self.stopped = False
        atexit.register(self.stop)
        threading.Thread(target=self.work, args=[text], daemon=True).start()

    def stop(self):
        """Stops the training, which saves what it has learned."""
        self.stopped = True
        if self.process:
            self.process.terminate()

    @property
    def elapsed_s(self) -> float:
        return (time.time() if self.stage else self.ended_at) - self.started_at

    def work(self, text: str):
        """Prepares the text and trains. A failure leaves a sentence in `error`, and no run."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.train(text, Path(folder))
        except UserError as error:
            self.error = str(error)
        except Exception as error:  # the thread has no other way to report a bug
            self.error = f"Something went wrong ({type(error).__name__}: {error})."
        finally:
            if not checkpoint.model_steps(self.run):
                shutil.rmtree(self.run, ignore_errors=True)
                self.error = self.error or "It ended before the model had learned anything."
            (checkpoint.LOG / f".{self.name}.lock").unlink(missing_ok=True)
            self.ended_at = time.time()
            self.stage = ""

    def train(self, text: str, folder: Path):
        # prepare the text, one token per character
        file, data = folder / f"{self.name}.txt", folder / f"{self.name}_char"
        file.write_text(text, encoding="utf-8")
        self.call("prepare.py", file, "--tokenizer=char", f"--out={data}")

        # train at a constant rate until the decay just fits into the rest of the time
        self.stage = "Learning"
        self.size = None
        options = [f"--name={self.name}", f"--data={data}", f"--sample-prompt={first_words(text)}",
                   "--schedule=wsd", "--dropout=0.1", "--log-every=5", "--eval-every=100",
                   "--sample-every=100", "--save-every=100"]
        self.train_size(SIZES[0], options)
        if self.size not in (None, SIZES[0]) and not self.stopped:
            shutil.rmtree(self.run)
            self.train_size(self.size, options)

        # resume with the decay
        saved = checkpoint.saved_steps(self.run)
        if saved and not self.stopped:
            self.stage = "Finishing"
            steps = math.ceil(saved[-1] * (1 + DECAY))
            self.train_size(self.size or SIZES[0], options, steps)

    def train_size(self, size: Size, options: list[str], steps: int | None = None):
        """Runs train.py up to a number of steps. Without it, until the decay must start, or until
        the speed shows that another size is better."""
        launched_at = time.time()

        def must_end() -> bool:
            if steps is not None:
                return False
            self.size = self.size or self.choose_size()
            return self.size not in (None, size) or self.decay_must_start(launched_at)

        values = {**size._asdict(), "batch_tokens": size.micro_batch * size.block_size,
                  "max_steps": steps or round(MAX_STEPS_PER_S * self.seconds)}
        del values["cost"]
        options = [*options, *(f"--{name}={value}" for name, value in values.items())]
        self.call("train.py", "shakespeare-char-cpu", *options, until=must_end)

    def decay_must_start(self, launched_at: float) -> bool:
        """Whether a restart of train.py and the decay take all of the time that is left."""
        lines = report.read_lines(self.run / "metrics.jsonl")
        if not any("train_loss" in line for line in lines):
            return False
        first_step_at = lines[0]["time"]
        restart_s = first_step_at - launched_at
        decay_s = DECAY * (time.time() - first_step_at)
        return self.elapsed_s + restart_s + decay_s >= self.seconds

    def choose_size(self) -> Size | None:
        """The largest size that reads enough in the time, by the speed of the run, which has the
        first size. None before the speed is known."""
        lines = report.read_lines(self.run / "metrics.jsonl")
        speeds = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
        if not speeds or lines[-1]["time"] - lines[0]["time"] < MEASURE_S:
            return None
        tokens = max(speeds) * (self.seconds - self.elapsed_s)  # that the first size would read
        chosen = SIZES[0]
        for size in SIZES:
            parameters = 12 * size.n_layer * size.n_embd**2  # without embeddings
            if tokens / size.cost >= TOKENS_PER_PARAMETER * parameters:
                chosen = size
        return chosen

    def call(self, program: str, *arguments, until: Callable = lambda: False):
        """Runs a program to its end, or until `until` is true or a visitor stops it.

        Raises UserError with the program's last line if it fails.
        """
        if self.stopped:
            return
        with tempfile.TemporaryFile() as output:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / program, *map(str, arguments)], stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, cwd=checkpoint.LOG.absolute().parent)
            while self.process.poll() is None:
                if until():
                    self.process.terminate()
                    self.process.wait()
                time.sleep(POLL_S)
            output.seek(0)
            said = output.read().decode("utf-8", errors="replace").strip() or "it said nothing"
        if self.process.returncode not in (0, 143, -15):  # SIGTERM: 143 once it trains
            raise UserError(said.splitlines()[-1].removeprefix("error: "))


# --------------------------------------------------------------------------------------------------
# The text and its name

def read_text(path: Path) -> str:
    """The text of a file in UTF-8, UTF-16 or Windows' code page. Raises UserError if it is not a
    text."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        has_utf16_mark = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if has_utf16_mark else "cp1252", errors="replace")
    if "\0" in text:
        raise UserError("This file is not plain text: save it as .txt first.")
    return text.replace("\r\n", "\n")


def free_name(title: str) -> str:
    """A name for a run that does not exist yet, after the text's title."""
    stem = re.sub(r"[^\w-]+", "-", title).strip("-_").lower()[:40] or "my-text"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not (checkpoint.LOG / name).exists())


def first_words(text: str) -> str:
    """The beginning of the text, from which the samples continue."""
    line = next(line for line in text.splitlines() if line.strip())
    return textwrap.shorten(line, 40, placeholder="") or line.strip()[:20]
