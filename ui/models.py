"""The models that the page offers, loaded when they are first needed, and the sentences that a person's mistakes get."""
import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple, get_args

import gradio as gr
import numpy as np

import checkpoint
import report
from common.errors import UserError
from ddp import pick_device
from generate import Dtype, Engine
from training.config import TrainConfig
from ui import zero

KEPT = 2  # models in memory, those used last
MAX_TIME_S = 300  # of one text, its wait in the queue included
PREFIX_BYTES = 2**26  # of beginnings that a model keeps for texts that begin alike
BEGINNINGS = {  # of texts such as a model learned
    "bundled:edu": ["The history of", "Photosynthesis is the process by which", "It was a cold evening, and the old man"],
    "bundled:pushkin": ["Я вас любил", "Мороз и солнце; "],
    "bundled:shakespeare": ["ROMEO:\n", "First Citizen:\nBefore we proceed any further, hear me speak.\n",
                            "KING RICHARD III:\nNow is the"]}
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


class Loaded(NamedTuple):
    engine: Engine
    info: dict  # as checkpoint.load_model gives it
    limit: float | None  # tokens a second of one text if all that a token took were reading the weights; None on a GPU


class Models:
    """What can be written with: `names`, the default first. Each is loaded once, in a thread, and KEPT of them stay."""

    def __init__(self, asked: str | None, device: str = "auto", dtype: str = "auto"):
        if asked and (asked.startswith("bundled") or Path(asked).exists()):
            checkpoint.find_model(asked)  # says at once what is wrong with it; one of the Hub is fetched while the page is there
        self.asked, self.device, self.dtype = asked, pick_device(device), dtype
        self.lock, self.loaded = threading.RLock(), collections.OrderedDict()  # (name, dtype) -> Future of Loaded
        self.names = []
        self.list()

    def examples(self) -> list[list[str]]:
        """[a beginning, the model that it is for] of the bundled models."""
        return [[text, name] for name in self.names for text in BEGINNINGS.get(name, ())]

    def with_checkpoints(self) -> list[str]:
        return [each for name in self.list() for each in (name, *self.checkpoints(name).values())]

    def list(self) -> list[str]:
        """The one asked for, the runs, the bundled ones; anew, as a run may have begun since the page was opened."""
        bundled = [f"bundled:{name}" for name in checkpoint.list_bundled()]
        asked = bundled[:1] if self.asked == "bundled" else [self.asked] if self.asked else []
        names = [*asked, *checkpoint.list_runs(), *bundled]
        if not names:
            raise UserError("There is no model to show: train one, or name one with --model.")
        self.names[:] = dict.fromkeys(names)  # the same list: serve.py has it too
        return self.names

    def beginning(self) -> str:
        """A text for the first model to go on with."""
        if self.names[0] in BEGINNINGS:
            return BEGINNINGS[self.names[0]][0]
        with contextlib.suppress(OSError, UserError, KeyError):  # of what is no run
            return report.read_config(self.names[0])["sample_prompt"]
        return TrainConfig.sample_prompt

    def checkpoints(self, run: str) -> dict[int, str]:
        """step -> name, of the models that a run has saved."""
        path = Path(run) if run in checkpoint.list_runs() else None
        return {step: str(checkpoint.model_path(path, step)) for step in checkpoint.model_steps(path)} if path else {}

    def known(self, name: str) -> str:
        """The name, where it is one of ours: what a request names is never a path. Raises UserError."""
        if name not in self.names and name not in self.list() and name not in self.with_checkpoints():
            raise UserError("Choose a model of the list.")
        return name

    def future(self, name: str, dtype: str | None = None) -> concurrent.futures.Future[Loaded]:
        """The model, which is loaded when it is not there yet. Raises UserError for a name that is not ours."""
        key = self.known(name), dtype or self.dtype
        if key[1] not in get_args(Dtype):
            raise UserError(f"The precision is one of {', '.join(get_args(Dtype))}.")
        with self.lock:
            future = self.loaded.get(key)
            if future is None or (future.done() and future.exception()):
                future = self.loaded[key] = self.start_loading(*key)
            self.loaded.move_to_end(key)
            while len(set(self.loaded.values())) > KEPT:
                self.loaded.popitem(last=False)
            return future

    def start_loading(self, name: str, dtype: str) -> concurrent.futures.Future[Loaded]:
        """Loads a model in a thread of its own, which ends: OpenMP keeps workers for each that computed."""
        future = concurrent.futures.Future()
        threading.Thread(target=self.load, args=(name, dtype, future), daemon=True).start()
        return future

    def load(self, name: str, dtype: str, future: concurrent.futures.Future[Loaded]):
        try:
            model, tokenizer, info = checkpoint.load_model(name, self.device)
            engine = zero.engine(info["path"], model, tokenizer, dtype, deadline_s=MAX_TIME_S, prefix_bytes=PREFIX_BYTES)
            engine.forward  # noqa: B018 (compiles and packs)
            size = model.num_parameters() * WEIGHT_BYTES[engine.dtype]
            limit = read_bandwidth(size) / size if engine.device.type == "cpu" else None
            with self.lock:
                if self.loaded.get((name, dtype)) is future:  # "auto" and what it came to are one model
                    self.loaded.setdefault((name, engine.dtype), future)
            future.set_result(Loaded(engine, info, limit))
        except Exception as error:  # whoever waits for it is told
            future.set_exception(error)

    async def wait_for(self, name: str, dtype: str | None = None) -> Loaded:
        return await asyncio.shield(asyncio.wrap_future(self.future(name, dtype)))

    def engine(self, name: str, dtype: str | None = None) -> Engine:
        return self.future(name, dtype).result().engine

    def info(self, name: str) -> dict:
        return self.future(name).result().info

    def describe(self, name: str) -> str:
        """A line on a model."""
        engine, info, _ = self.future(name).result()
        return f"{checkpoint.describe(info)}, reads {engine.block_size:,} tokens at a time; {engine.dtype} on {engine.device}"

    def load_in_background(self):
        """Loads the first model while the page is already there."""
        def say(future):
            if future.exception():
                print(f"{self.names[0]} could not be loaded: {future.exception()}", file=sys.stderr)
        self.future(self.names[0]).add_done_callback(say)


@functools.cache
def read_bandwidth(size: int) -> float:
    """Bytes a second at which this machine's cores read so many bytes over and over: what fits a cache is read from there, as a
    model's weights are. A matrix is multiplied by a vector, as they are too; of what is larger than 64 MiB, only so much."""
    matrix = np.ones((max(1, min(size, 2**26) // 4096), 1024), np.float32)
    vector, best = np.ones(1024, np.float32), float("inf")
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(times := max(1, 2**24 // matrix.nbytes)):
            matrix @ vector
        best = min(best, (time.perf_counter() - began) / times)
    return matrix.nbytes / best


@contextlib.contextmanager
def sentences():
    """What a person can cause reaches them as the one sentence that says it."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
