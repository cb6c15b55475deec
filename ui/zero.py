"""ZeroGPU, a Space whose GPU is there only while a decorated call runs, in a process that is forked for it.

Small models write on the CPU there as everywhere; a request to a large one is such a call, in which the same engine runs.
"""
import contextvars
import dataclasses
import functools
import os
import threading

import checkpoint
from ddp import pick_device
from engine.sampling import Sampling
from engine.scheduler import Request, Scheduler
from generate import LARGE, Dtype, Engine
from model import GPT
from tokenizer import Tokenizer

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces
    gpu = spaces.GPU(duration=60)  # seconds of a visitor's quota that a call may take
else:
    def gpu(function):
        return function


@functools.lru_cache(maxsize=1)  # of that process, which serves one call after another
def engine_there(path: str) -> Engine:
    return Engine(*checkpoint.load_model(path, pick_device("auto"))[:2])


@gpu
def events(path: str, ids: list[int], n: int, sampling: dict):
    yield from engine_there(path).submit(ids, n, **sampling)


class Call(Request):
    """A request that is written there: a thread hands on what comes."""

    def __init__(self, path: str, scheduler: Scheduler, ids: list[int], n: int, sampling: Sampling):
        super().__init__(scheduler, ids, n, sampling)
        visitor = contextvars.copy_context()  # whose quota it is
        threading.Thread(target=visitor.run, args=(self.read, path), daemon=True).start()

    def read(self, path: str):
        try:
            options = dataclasses.asdict(self.sampling) | {"seed": self.seed}
            for event in events(path, self.ids, self.n, options):
                if not self.left:  # nobody reads on
                    return
                self.put(event)
        except Exception as error:  # whatever it is, the reader is told
            self.put(error)


class ZeroEngine(Engine):
    """Looks into texts here, on the CPU, and writes where the GPU is."""
    path: str

    def submit(self, prompt: str | list[int], n: int = 1, **sampling) -> Call:
        return Call(self.path, self.scheduler, self.prompt_ids(prompt), n, Sampling(**sampling))


def engine(path: str, model: GPT, tokenizer: Tokenizer, dtype: Dtype, **limits) -> Engine:
    """The engine for a model, which was loaded from `path`, on this machine."""
    if not os.environ.get("SPACES_ZERO_GPU") or model.num_parameters() < LARGE:
        return Engine(model, tokenizer, dtype, **limits)
    here = ZeroEngine(model, tokenizer, dtype, **limits)
    here.path = path
    return here
