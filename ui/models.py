"""The models that the page offers, loaded when they are first needed, and the sentences that a person's mistakes get."""
import contextlib
import functools
import threading

import gradio as gr

import checkpoint
from ddp import pick_device
from errors import UserError
from generate import Engine


class Models:
    """What can be written with: `names`, the default first. Two models stay in memory, those used last."""

    def __init__(self, asked: str | None, device: str = "auto", dtype: str = "auto"):
        self.asked, self.device, self.dtype = asked, device, dtype
        self.load = functools.lru_cache(maxsize=2)(self.load)
        self.names = self.list()

    def list(self) -> list[str]:
        """The one asked for, the runs, the bundled ones; anew, as a run may have begun since the page was opened."""
        bundled = [f"bundled:{name}" for name in checkpoint.list_bundled()]
        asked = bundled[:1] if self.asked == "bundled" else [self.asked] if self.asked else []
        names = [*asked, *checkpoint.list_runs(), *bundled]
        if not names:
            raise UserError("There is no model to show: train one, or name one with --model.")
        return list(dict.fromkeys(names))

    def load(self, name: str, dtype: str) -> tuple[Engine, dict]:
        model, tokenizer, info = checkpoint.load_model(name, pick_device(self.device))
        return Engine(model, tokenizer, dtype), info

    def engine(self, name: str, dtype: str | None = None) -> Engine:
        return self.load(self.known(name), dtype or self.dtype)[0]

    def info(self, name: str) -> dict:
        return self.load(self.known(name), self.dtype)[1]

    def known(self, name: str) -> str:
        """The name, where it is one of ours: what a request names is never a path. Raises UserError."""
        if name not in self.names:
            self.names = self.list()
        if name not in self.names:
            raise UserError("Choose a model of the list.")
        return name

    def describe(self, name: str) -> str:
        """A line on a model."""
        engine = self.engine(name)
        return (f"{checkpoint.describe(self.info(name))}, reads {engine.block_size:,} tokens at a time; "
                f"{engine.dtype} on {engine.device}")

    def load_in_background(self):
        """Loads the first model while the page is already there."""
        threading.Thread(target=self.engine, args=(self.names[0],), daemon=True).start()


@contextlib.contextmanager
def sentences():
    """What a person can cause reaches them as the one sentence that says it."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
