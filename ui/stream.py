"""What the tabs share: the settings of a text, validate_settings on the server, and texts while they are written."""
import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import get_args

import gradio as gr

from common.errors import UserError
from engine.sampling import Sampling
from generate import Dtype, Reader
from ui.models import Loaded, Models, sentences

MAX_BYTES = 40_000  # of a prompt
MAX_LENGTH = 2_000  # tokens
MAX_STOPS, MAX_STOP = 4, 100  # stop strings, and their characters
REFRESH_S = 0.05  # the page is sent a text at most this often, and less often with more than CROWD texts
CROWD = 8
DTYPES = list(get_args(Dtype))

# lowest, highest, step, default, label, what it means
RANGES = {"temperature": (0.1, 2.0, 0.05, 0.8, "Temperature", "Low: the likeliest tokens. High: surprises."),
          "top_k": (0, 200, 1, 0, "Top-k", "Among the k likeliest tokens; 0 allows all."),
          "top_p": (0.05, 1.0, 0.01, 0.9, "Top-p", "Among the fewest tokens that hold this share of the probability."),
          "length": (1, MAX_LENGTH, 1, 300, "Length", "Tokens to write."),
          "versions": (1, 4, 1, 1, "Versions", "Side by side, the likeliest first in the end."),
          "seed": (0, 2**53, 1, 42, "Seed", "The same seed and settings give the same text again.")}


def default_of(name: str) -> float:
    """What a visitor begins with, on the page and in its API."""
    return RANGES[name][3]


def slider(name: str, tab: str = "", **changes) -> gr.Slider | gr.Number:
    lowest, highest, step, value, label, info = RANGES[name]
    common = {"label": label, "info": info, "value": value, "elem_id": tab + name.replace("_", "-"), **changes}
    if name == "seed":
        return gr.Number(minimum=lowest, maximum=highest, precision=0, **common)
    return gr.Slider(lowest, highest, step=step, precision=0 if step == 1 else None, **common)


def model_box(models: Models, tab: str = "") -> gr.Dropdown:
    """Where a model is chosen; a line on it stands above, as soon as it is loaded."""
    def describe(name: str):
        with sentences():
            return gr.update(info=models.describe(name), choices=models.list())
    box = gr.Dropdown(models.names, value=models.names[0], label="Model", info="Loading …", elem_id=f"{tab}model")
    gr.on([gr.context.Context.root_block.load, box.change], describe, box, box, api_visibility="private", show_progress="hidden")
    return box


def figures_box(elem_id: str, placeholder: str) -> gr.Textbox:
    """Where a tab tells what its texts took."""
    return gr.Textbox(label="Figures", show_label=False, container=False, interactive=False, max_lines=8, elem_id=elem_id,
                      placeholder=placeholder)


def validate_settings(prompt: str, stop: list[str] = (), **numbers) -> Sampling:
    """The settings of a text, each of which is in its range. Raises UserError, naming the one that is not."""
    if not isinstance(prompt, str) or len(prompt.encode("utf-8", "replace")) > MAX_BYTES:
        raise UserError(f"The prompt is a text of at most {MAX_BYTES:,} bytes.")
    for name, value in numbers.items():
        lowest, highest, step, *_ = RANGES[name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and (step != 1 or value == value // 1)
        if not number or not lowest <= value <= highest:
            kind = "a whole number" if step == 1 else "a number"
            raise UserError(f"{RANGES[name][4]} is {kind} from {lowest} to {highest}, not {value!r:.40}.")
    strings = isinstance(stop, list | tuple) and all(isinstance(s, str) and len(s) <= MAX_STOP for s in stop)
    if not strings or len(stop) > MAX_STOPS:
        raise UserError(f"There are at most {MAX_STOPS} stop strings, of at most {MAX_STOP} characters each.")
    values = {name: int(value) if RANGES[name][2] == 1 else float(value) for name, value in numbers.items()}
    versions, length, top_k = values.pop("versions", 1), values.pop("length"), values.pop("top_k", 0)
    return Sampling(max_new_tokens=length, top_k=top_k or None, stop=tuple(stop), logprobs=0 if versions > 1 else None, **values)


def stop_strings(lines: str) -> list[str]:
    """The stop strings that a person wrote, one a line, \\n in it a line break."""
    return [line.replace("\\n", "\n") for line in (lines or "").splitlines() if line]


class Writing:
    """Texts that go on from one prompt, while they are made: `texts`, their `tokens`, the sums of their log-probabilities."""

    def __init__(self, loaded: Loaded, prompt: str | list[int], sampling: Sampling, versions: int = 1):
        self.engine, self.limit, self.began, self.first = loaded.engine, loaded.limit, time.perf_counter(), None
        self.ids, self.notices = (prompt, []) if isinstance(prompt, list) else self.engine.encode(prompt)
        self.sampling, self.request = sampling, None
        self.texts, self.tokens, self.logprobs, self.reasons = ([x] * versions for x in ("", 0, 0.0, None))
        self.last = self.began

    def submit(self):
        """Asks the scheduler. Raises Busy."""
        self.request = self.engine.submit(self.ids, len(self.texts), **dataclasses.asdict(self.sampling))
        self.request.wake = self.tick
        self.reader = Reader(self.engine.tokenizer, self.request)

    def tick(self):
        """The scheduler's thread says when there is something new."""
        self.last = time.perf_counter()
        self.first = self.first or self.last

    def read(self):
        """Takes in what has come. Raises what befell the request: Busy, say."""
        while not self.request.events.empty():
            event = self.request.events.get()
            if isinstance(event, Exception):
                raise event
            for i, text, token, reason in self.reader.read(event):
                self.texts[i] += text
                self.tokens[i] += token is not None
                self.logprobs[i] += token.logprob or 0 if token else 0
                self.reasons[i] = reason
                if reason:
                    self.request.cancel(i)

    @property
    def done(self) -> bool:
        return all(self.reasons)

    def ranked(self) -> list[int]:
        """The numbers of the texts; when all have ended by their mean log-probability, the likeliest first."""
        return sorted(range(len(self.texts)), key=self.mean_logprob, reverse=True) if self.done else list(range(len(self.texts)))

    def mean_logprob(self, i: int) -> float:
        return self.logprobs[i] / max(1, self.tokens[i])

    def context(self) -> str:
        """How much of its context the model reads for the first text now, by the engine's rule for going on past it."""
        used, size = len(self.ids) + self.tokens[0], self.engine.block_size
        half = max(1, size // 2)
        over = used - size - 1
        return f"context {half + over % (size + 1 - half) if over >= 0 else used:,} of {size:,}"

    def figures(self) -> str:
        """What the texts took so far, in a line; or what they wait for."""
        place, tokens, took = self.request.place(), sum(self.tokens), self.last - (self.first or self.last)
        if place:
            return f"Number {place} in the queue: {len(self.request.scheduler.running)} texts are being written."
        if not tokens and not self.done:
            return "Reading the prompt …"
        parts = [f"{tokens:,} tokens", f"first after {((self.first or self.last) - self.began) * 1000:,.0f} ms"]
        if tokens > len(self.texts) and took > 0:
            speed = (tokens - len(self.texts)) / took
            share = 100 * speed / len(self.texts) / self.limit if self.limit else 0
            # Above 100 the cores were busy with something else when reading was measured, which then says nothing.
            limit = f" ({share:.2g}% of what reading the weights allows here)" if 0 < share <= 100 else ""
            parts.append(f"{speed:,.0f} tokens/s{limit}")
        ends = ["ended after the longest time a text may take"] * ("deadline" in self.reasons)
        return "  ".join([" · ".join([*parts, self.context(), f"seed {self.request.seed}", *ends]), *self.notices])


async def follow(*writings: Writing) -> AsyncIterator[None]:
    """Has the texts written, and comes back whenever there may be more to show, until all have ended; they end too when nobody
    reads on. Raises what befalls them: Busy, say."""
    try:
        for writing in writings:
            writing.submit()
        while True:
            for writing in writings:
                writing.read()
            yield
            if all(writing.done for writing in writings):
                return
            await asyncio.sleep(REFRESH_S * max(1, max(len(writing.request.scheduler.running) for writing in writings) / CROWD))
    finally:
        for writing in writings:
            if writing.request:
                writing.request.cancel()
