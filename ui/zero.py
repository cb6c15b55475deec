"""Runs large models on ZeroGPU, a Hugging Face Space that lends a GPU for one decorated call.

`spaces.GPU` runs each call in a forked process that can use the GPU. Here a call is one request to
a large model: the forked process loads the model and generates, and the tokens come back to the
page's process. Small models run on the CPU as everywhere else.
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
from generate import LARGE_MODEL, Dtype, Engine
from model import GPT
from tokenizer import Tokenizer

# --------------------------------------------------------------------------------------------------
# In the GPU's process

@functools.lru_cache(maxsize=1)  # the process serves several calls, one after another
def gpu_engine(path: str) -> Engine:
    return Engine(*checkpoint.load_model(path, pick_device("auto"))[:2])


def events(path: str, ids: list[int], n: int, sampling: dict):
    """Yields the events of a request to the model at `path`."""
    yield from gpu_engine(path).submit(ids, n, **sampling)


if os.environ.get("SPACES_ZERO_GPU"):
    import spaces
    # at most this many seconds of a visitor's quota per call
    events = spaces.GPU(duration=60)(events)


# --------------------------------------------------------------------------------------------------
# In the page's process

class GPURequest(Request):
    """A request that the GPU's process generates; a thread forwards its events."""

    def __init__(self, path: str, scheduler: Scheduler, ids: list[int], n: int, sampling: Sampling):
        super().__init__(scheduler, ids, n, sampling)
        # `spaces` finds the visitor, whose quota pays for the call, in the context
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self.forward, path), daemon=True).start()

    def forward(self, path: str):
        try:
            settings = {**dataclasses.asdict(self.sampling), "seed": self.seed}
            for event in events(path, self.ids, self.n, settings):
                if not self.active:  # cancelled
                    return
                self.put(event)
        except Exception as error:  # raised again in the reader
            self.put(error)


class ZeroEngine(Engine):
    """Generates in the GPU's process; everything else, such as `inspect`, runs here on the CPU."""
    path: str

    def submit(self, prompt: str | list[int], n: int = 1, client: str | None = None,
               **sampling) -> GPURequest:
        ids = self.prompt_ids(prompt)
        return GPURequest(self.path, self.scheduler, ids, n, Sampling(**sampling))


def engine(path: str, model: GPT, tokenizer: Tokenizer, dtype: Dtype, **limits) -> Engine:
    """The engine for a model loaded from `path`: a `ZeroEngine` for a large model on ZeroGPU."""
    if not os.environ.get("SPACES_ZERO_GPU") or model.num_parameters() < LARGE_MODEL:
        return Engine(model, tokenizer, dtype, **limits)
    zero_engine = ZeroEngine(model, tokenizer, dtype, **limits)
    zero_engine.path = path
    return zero_engine
