"""The models that the page offers. A model is loaded in the background when it is first used."""
import asyncio
import collections
import concurrent.futures
import contextlib
import sys
import threading
from pathlib import Path
from typing import get_args

import checkpoint
import report
from common.errors import UserError
from common.files import read_json
from ddp import pick_device
from engine.scheduler import Busy
from generate import Dtype, Engine
from training.config import TrainConfig
from ui import zero

MAX_LOADED = 2  # models in memory; the least recently used one that writes nothing goes first
MAX_AT_ONCE = 4  # models that load, and models in memory if all of them write
MAX_TIME_S = 300  # for one text, including its wait in the queue
PREFIX_BYTES = 2**26  # per model, for the KV caches that later prompts reuse
DTYPES = list(get_args(Dtype))

# model -> prompts that resemble what it was trained on
BEGINNINGS = read_json(Path(__file__).parents[1] / "assets" / "beginnings.json")

Loaded = tuple[Engine, dict]  # with the model's info, as load_model returns it


def is_idle(future: concurrent.futures.Future[Loaded]) -> bool:
    """Whether a model is loaded, or has failed to load, and writes nothing."""
    if not future.done():
        return False
    if future.exception():
        return True
    engine, _ = future.result()
    return engine.scheduler.load() == (0, 0)


class Models:
    """The models by name.

    `names` lists them, the default first. A model is loaded once per precision, in its own thread,
    and at most MAX_LOADED stay in memory, or up to MAX_AT_ONCE while they load or write.
    """

    def __init__(self, requested: str | None, device: str = "auto", dtype: str = "auto"):
        # report a wrong local name at once; a model on the Hub is downloaded after the page opens
        if requested and (requested.startswith("bundled") or Path(requested).exists()):
            checkpoint.find_model(requested)
        self.requested = requested
        self.device = pick_device(device)
        self.dtype = dtype
        self.lock = threading.RLock()
        self.loaded = collections.OrderedDict()  # (name, dtype) -> Future of Loaded
        self.loading = set()  # Futures
        self.names = []
        self.default = self.list_names()[0]  # runs that start later do not change it

    # ----------------------------------------------------------------------------------------------
    # Names

    def list_names(self) -> list[str]:
        """Names of all models: the requested one, the runs under log/, the bundled ones.

        The list is read again each time, because a run may have started in the meantime.
        """
        bundled = [f"bundled:{name}" for name in checkpoint.list_bundled()]
        first = bundled[0] if self.requested == "bundled" else self.requested
        names = [name for name in (first, *checkpoint.list_runs(), *bundled) if name]
        if not names:
            raise UserError("No model found: train one, or name one with --model.")
        self.names[:] = dict.fromkeys(names)  # in place, because serve.py holds the same list
        return self.names

    def checkpoints(self, run: str) -> dict[int, str]:
        """The checkpoints that a run has saved: step -> model name. Empty if it is not a run."""
        steps = checkpoint.model_steps(Path(run)) if run in checkpoint.list_runs() else []
        return {step: str(checkpoint.model_path(Path(run), step)) for step in steps}

    def list_with_checkpoints(self) -> list[str]:
        """All models, each run followed by its checkpoints."""
        return [name for run in self.list_names()
                for name in (run, *self.checkpoints(run).values())]

    # ----------------------------------------------------------------------------------------------
    # Prompts

    def beginnings(self, name: str) -> list[str]:
        """Prompts that suit a model."""
        if name in BEGINNINGS:
            return BEGINNINGS[name]
        with contextlib.suppress(OSError, UserError, KeyError):  # not a run
            return [report.read_config(name)["sample_prompt"]]
        return [TrainConfig.sample_prompt]

    def chat_model(self) -> str:
        """The model that Chat opens with: the bundled chat model, if there is one."""
        return "bundled:chat" if "bundled:chat" in self.names else self.default

    # ----------------------------------------------------------------------------------------------
    # Loading

    def future(self, name: str, dtype: str | None = None) -> concurrent.futures.Future[Loaded]:
        """The model, which starts to load if it is not in memory.

        Raises UserError for a name or a precision that is not offered, and Busy.
        """
        # a visitor must not open other paths
        if name not in self.names and name not in self.list_with_checkpoints():
            raise UserError("Choose a model from the list.")
        dtype = dtype or self.dtype
        if dtype not in DTYPES:
            raise UserError(f"The precision must be one of {', '.join(DTYPES)}.")
        key = name, dtype
        with self.lock:
            future = self.loaded.get(key)
            # load a model that is not in memory; try a failed one again
            if future is None or (future.done() and future.exception()):
                self.make_room()
                future = self.loaded[key] = self.start_loading(name, dtype)
            self.loaded.move_to_end(key)
            return future

    def make_room(self):
        """Drops the least recently used models that nobody waits for or writes with."""
        models = list(dict.fromkeys(self.loaded.values()))
        idle = [future for future in models if is_idle(future)]
        dropped = idle[:max(0, len(models) - MAX_LOADED + 1)]
        if len(models) - len(dropped) >= MAX_AT_ONCE:
            raise Busy("The server has no room for another model now: try again later.")
        for key, future in list(self.loaded.items()):
            if future in dropped:
                del self.loaded[key]

    def start_loading(self, name: str, dtype: str) -> concurrent.futures.Future[Loaded]:
        """Loads a model without keeping it. Raises Busy if many are being loaded."""
        future = concurrent.futures.Future()
        with self.lock:
            if len(self.loading) >= MAX_AT_ONCE:
                raise Busy("The server is loading other models: try again later.")
            self.loading.add(future)
        future.add_done_callback(self.loading.discard)
        # a new thread for each load: OpenMP keeps its workers for every thread that has computed.
        # Not a daemon: Python's exit waits for it, because torch aborts when a thread is cut off.
        threading.Thread(target=self.load, args=(name, dtype, future), daemon=False).start()
        return future

    def load(self, name: str, dtype: str, future: concurrent.futures.Future[Loaded]):
        """Loads a model and sets the future's result, or its exception."""
        try:
            model, tokenizer, info = checkpoint.load_model(name, self.device)
            limits = {"deadline_s": MAX_TIME_S, "prefix_bytes": PREFIX_BYTES}
            engine = zero.engine(info["path"], model, tokenizer, dtype, **limits)
            engine.forward  # noqa: B018 (compiles the kernels and packs the weights)
            with self.lock:
                # "auto" and the precision that it chose share one model
                if self.loaded.get((name, dtype)) is future:
                    self.loaded.setdefault((name, engine.dtype), future)
            if not threading.main_thread().is_alive():
                # Python exits: a text that began now would be cut off, and torch abort
                raise UserError("The server is shutting down.")
            future.set_result((engine, info))
        except Exception as error:  # raised again in whoever waits for the future
            future.set_exception(error)

    async def wait_for(self, name: str, dtype: str | None = None) -> Loaded:
        # shielded: a visitor who leaves must not cancel the loading for the others
        return await asyncio.shield(asyncio.wrap_future(self.future(name, dtype)))

    def engine(self, name: str, dtype: str | None = None) -> Engine:
        """The model's engine; waits until it is loaded."""
        return self.future(name, dtype).result()[0]

    def describe(self, name: str) -> str:
        """One line about a model, for the page."""
        engine, info = self.future(name).result()
        return (f"{checkpoint.describe(info)}, context of {engine.block_size:,} tokens; "
                f"{engine.dtype} on {engine.device}")

    def load_in_background(self):
        """Starts to load the default model, so that it is ready when the first visitor writes."""
        def report_failure(future):
            if future.exception() and threading.main_thread().is_alive():
                print(f"{self.default} could not be loaded: {future.exception()}", file=sys.stderr)

        self.future(self.default).add_done_callback(report_failure)
