"""What the tabs share: the settings of a text and their validation, and the streaming of texts."""
import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import NamedTuple, get_args

import gradio as gr

from common.errors import UserError
from engine.reader import Piece, PieceStream, Reader
from engine.sampling import Sampling
from generate import Dtype
from ui.models import Loaded, Models, show_user_errors

MAX_BYTES = 40_000  # in a prompt
MAX_LENGTH = 2_000  # tokens
MAX_STOPS = 4
MAX_STOP_CHARS = 100  # in one stop string
REFRESH_S = 0.05  # the page is updated at most this often,
CROWD = 8  # and less often if more than this many texts are being generated
DTYPES = list(get_args(Dtype))


# --------------------------------------------------------------------------------------------------
# Settings

class Range(NamedTuple):
    minimum: float
    maximum: float
    step: float
    default: float
    label: str
    info: str


RANGES = {
    "temperature": Range(
        0.1, 2.0, 0.05, 0.7, "Temperature",
        "Lower is more predictable, higher is more surprising."),
    "top_k": Range(
        0, 200, 1, 0, "Top-k",
        "Sample from the k most likely tokens only. 0 turns this off."),
    "top_p": Range(
        0.05, 1.0, 0.01, 0.9, "Top-p",
        "Sample from the smallest set of tokens with this total probability. 1 turns this off."),
    "length": Range(
        1, MAX_LENGTH, 1, 300, "Length",
        "How many tokens to write. A token is a word or a part of one."),
    "versions": Range(
        1, 4, 1, 1, "Versions",
        "Number of continuations. The most likely one comes first when all have ended."),
    "seed": Range(
        0, 2**53, 1, 42, "Seed",
        "The same seed and settings give the same text."),
}


def default_of(name: str) -> float:
    """The default of a setting, on the page and in its API."""
    return RANGES[name].default


def in_range(name: str, value) -> bool:
    """Whether a value from outside is a valid number for a setting."""
    limits = RANGES[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    valid = number and limits.minimum <= value <= limits.maximum
    return valid and (limits.step != 1 or value == value // 1)


def slider(name: str, tab: str = "", **changes) -> gr.Slider | gr.Number:
    """The component for a setting. `tab` prefixes its element id; `changes` override options."""
    limits = RANGES[name]
    options = {
        "label": limits.label,
        "info": limits.info,
        "value": limits.default,
        "elem_id": tab + name.replace("_", "-"),
        "precision": 0 if limits.step == 1 else None,
        **changes,
    }
    if name == "seed":
        return gr.Number(**options)
    return gr.Slider(limits.minimum, limits.maximum, step=limits.step, **options)


def model_box(models: Models, tab: str = "", value: str | None = None) -> gr.Dropdown:
    """The list of models, with a line about the selected one as soon as it is loaded."""
    def describe(name: str):
        with show_user_errors():
            return gr.update(info=models.describe(name), choices=models.list_names())

    box = gr.Dropdown(models.names, value=value or models.default, label="Model",
                      info="Loading …", elem_id=f"{tab}model")
    gr.on([gr.context.Context.root_block.load, box.change], describe, box, box,
          api_visibility="private", show_progress="hidden", trigger_mode="always_last")
    return box


def figures_box(elem_id: str, placeholder: str) -> gr.Textbox:
    """The line below a text that shows its length and speed."""
    return gr.Textbox(label="Figures", show_label=False, container=False, interactive=False,
                      max_lines=8, elem_id=elem_id, elem_classes="plain", placeholder=placeholder)


def validate_settings(prompt: str, stop: list[str] = (), **numbers) -> Sampling:
    """The sampling settings from a visitor's input.

    `numbers` are values for the names in RANGES; "length" is required. Raises UserError, naming the
    setting, if a value is not valid.
    """
    # the prompt
    if not isinstance(prompt, str) or len(prompt.encode("utf-8", "replace")) > MAX_BYTES:
        raise UserError(f"The prompt must be a text of at most {MAX_BYTES:,} bytes.")

    # the numbers
    values = {}
    for name, value in numbers.items():
        limits = RANGES[name]
        whole = limits.step == 1
        if not in_range(name, value):
            kind = "a whole number" if whole else "a number"
            raise UserError(f"{limits.label} must be {kind} from {limits.minimum} to "
                            f"{limits.maximum}, not {value!r:.40}.")
        values[name] = int(value) if whole else float(value)

    # the stop strings
    valid = isinstance(stop, list | tuple) and len(stop) <= MAX_STOPS
    if not valid or not all(isinstance(s, str) and len(s) <= MAX_STOP_CHARS for s in stop):
        raise UserError(f"Give at most {MAX_STOPS} stop strings, "
                        f"each of at most {MAX_STOP_CHARS} characters.")

    versions = values.pop("versions", 1)
    return Sampling(
        max_new_tokens=values.pop("length"),
        top_k=values.pop("top_k", 0) or None,
        stop=tuple(stop),
        logprobs=0 if versions > 1 else None,  # several versions are ranked by log-probability
        **values,
    )


def stop_strings(lines: str) -> list[str]:
    """The stop strings in a text box: one per line, with \\n for a line break."""
    return [line.replace("\\n", "\n") for line in (lines or "").splitlines() if line]


# --------------------------------------------------------------------------------------------------
# Streaming

class Writing:
    """One or more continuations of a prompt while they are generated.

    `texts`, `tokens` (counts), `logprobs` (sums, nats) and `reasons` (None until the text has
    ended) have an entry for each version.
    """

    def __init__(self, loaded: Loaded, prompt: str | list[int], sampling: Sampling,
                 versions: int = 1):
        self.started_at = time.perf_counter()
        self.engine, self.sampling = loaded.engine, sampling
        if isinstance(prompt, list):
            self.ids, self.notices = prompt, []
        else:
            self.ids, self.notices = self.engine.encode(prompt)
        self.texts = [""] * versions
        self.tokens = [0] * versions
        self.logprobs = [0.0] * versions
        self.reasons = [None] * versions
        self.request = None

    def submit(self) -> Reader:
        """Sends the request to the engine. Raises Busy."""
        settings = dataclasses.asdict(self.sampling)
        self.request = self.engine.submit(self.ids, len(self.texts), **settings)
        return Reader(self.engine.tokenizer, self.request)

    def add(self, piece: Piece):
        self.texts[piece.index] += piece.text
        self.reasons[piece.index] = piece.reason
        if piece.token:
            self.tokens[piece.index] += 1
            self.logprobs[piece.index] += piece.token.logprob or 0

    @property
    def done(self) -> bool:
        return all(self.reasons)

    def ranked(self) -> list[int]:
        """The indices of the versions. Once all have ended, the most likely one comes first."""
        indices = list(range(len(self.texts)))
        if self.done:
            indices.sort(key=self.mean_logprob, reverse=True)
        return indices

    def mean_logprob(self, i: int) -> float:
        """The mean log-probability of a version's tokens, in nats."""
        return self.logprobs[i] / max(1, self.tokens[i])

    def context(self) -> dict[str, int]:
        """How many tokens of its context the model uses for the first version: "used" of "size"."""
        size = self.engine.block_size
        used = len(self.ids) + self.tokens[0]
        if used > size:
            # at size + 1 tokens the engine keeps half of the context, which then fills up again
            half = max(1, size // 2)
            used = half + (used - size - 1) % (size + 1 - half)
        return {"used": used, "size": size}

    def figures(self) -> str:
        """Length and speed so far, or what the request is waiting for."""
        position = self.request.queue_position()
        if position:
            running, _ = self.request.scheduler.load()
            return f"Number {position} in the queue: {running} texts are being written."
        tokens = sum(self.tokens)
        if not tokens and not self.done:
            return "Reading the prompt …"

        first_at = self.request.first_event_at or self.started_at
        last_at = self.request.last_event_at or self.started_at
        parts = [f"{tokens:,} token{'s' * (tokens != 1)}",
                 f"first after {(first_at - self.started_at) * 1000:,.0f} ms"]
        after_first = tokens - len(self.texts)
        if after_first > 0 and last_at > first_at:
            parts.append(f"{after_first / (last_at - first_at):,.0f} tokens/s")
        context = "context {used:,} of {size:,}".format(**self.context())
        parts += [context, f"seed {self.request.seed}"]
        if "deadline" in self.reasons:
            parts.append("stopped at the time limit")
        return "  ".join([" · ".join(parts), *self.notices])


async def follow(*writings: Writing) -> AsyncIterator[None]:
    """Starts the writings, and yields whenever there is something new to show.

    Ends when all have ended; cancels them if the consumer leaves. Raises the engine's errors, such
    as Busy.
    """
    try:
        readers = [writing.submit() for writing in writings]
        async for batch in PieceStream(readers, REFRESH_S):
            for i, piece in batch:
                writings[i].add(piece)
            yield
            if not all(writing.done for writing in writings):
                # give a crowd fewer updates, so that the computation keeps its cores
                running = max(writing.request.scheduler.load()[0] for writing in writings)
                await asyncio.sleep(REFRESH_S * max(1, running / CROWD))
    finally:
        for writing in writings:
            if writing.request:
                writing.request.cancel()
