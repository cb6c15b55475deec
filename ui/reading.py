"""A visitor's text as a model reads it: its tokens, their names on the page, and a trace."""
import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from common.errors import UserError
from engine.internals import Trace, trace_tokens
from engine.sampling import top_ids, weigh
from generate import Engine
from ui.models import Models

SAMPLE = "Once upon a time, there was a little fox. The fox was very sad, because he had no"
MAX_TEXT = 4_000  # characters
# for events of Look inside: while one request runs, remember only the last change
LATEST = {"show_progress": "hidden", "concurrency_limit": 2, "concurrency_id": "look",
          "trigger_mode": "always_last"}
# classes of a token by the probability that the model gave it: label and lowest probability
CLASSES = {"above 50%": 0.5, "10 to 50%": 0.1, "1 to 10%": 0.01, "0.1 to 1%": 0.001,
           "below 0.1%": 0.0}
MAX_TOKENS = 256  # traced at a time: the attention of T tokens takes T * T numbers for each head


def read(models: Models, text: str, name: str) -> tuple[Engine, list[int], str]:
    """The model's engine, the text's ids, and the text without characters that the model's
    vocabulary lacks."""
    if len(text) > MAX_TEXT:
        raise UserError(f"The text has {len(text):,} characters; at most {MAX_TEXT:,} are allowed.")
    engine = models.engine(name)
    text, _ = engine.tokenizer.replace_unknown(text)
    return engine, engine.tokenizer.encode(text), text


def visible(engine: Engine, token: int) -> str:
    """A token's text with visible spaces, line breaks and incomplete characters."""
    text = engine.tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def in_text(engine: Engine, token: int) -> str:
    """A token's text within a coloured text: the colour shows a space, so it need not be marked."""
    name = visible(engine, token)
    return name.replace("␣", " ") if name.strip("␣") else name


def class_of(logprob: float) -> int:
    """The index of a token's class in CLASSES."""
    return next(i for i, lowest in enumerate(CLASSES.values()) if math.exp(logprob) >= lowest)


class Place(NamedTuple):
    """A position in a text, what the model reads before it, and what it computes around it."""
    engine: Engine
    ids: tuple[int, ...]  # the text, after <|endoftext|> if the vocabulary has it
    start: int  # index of the text's first token
    index: int  # of the token at the position; len(ids) at the end of the text
    first: int  # index of the first traced token

    @property
    def token(self) -> int | None:
        """The token at the position; None at the end of the text."""
        return self.ids[self.index] if self.index < len(self.ids) else None

    @property
    def trace(self) -> Trace:
        """The trace of T tokens around the position."""
        length = min(MAX_TOKENS, self.engine.block_size)
        return trace_of(self.engine, self.ids[self.first:self.first + length])

    @property
    def row(self) -> int:
        """The position's row in the trace; T at the end of the text."""
        return self.index - self.first

    def lens(self, rows: list[int]) -> torch.Tensor:
        """Logits (L + 1, R, V) of the tokens after these rows, see `Trace.lens`."""
        return self.trace.lens(rows)[..., :self.engine.tokenizer.vocab_size]

    def logits(self) -> np.ndarray:
        """Logits (V,) of the token at the position, which the tokens before it predict."""
        return self.lens([self.row - 1])[-1, 0].cpu().numpy()

    def likeliest(self, logits, count: int = 10) -> dict[str, int]:
        """The `count` most likely tokens, the first one first: name on the page -> id.

        `logits` (V,) may also be log-probabilities. Of tokens that look the same, only the most
        likely one is included.
        """
        names = {}
        for token in top_ids(logits, min(count, len(logits))).tolist():
            names.setdefault(visible(self.engine, token), token)
        return names


def place_in(models: Models, text: str, model: str, position: int | None) -> Place:
    """The place of a position, counted from 1; one past the end of the text means its end."""
    engine, ids, _ = read(models, text, model)
    index = min(max(position or 1, 1) - 1, len(ids))
    # a model without <|endoftext|> still needs something to read before the first token
    start = engine.empty_prompt() if index == 0 or engine.tokenizer.eot is not None else []
    ids, index = start + ids, len(start) + index
    # trace at most as many tokens as the model reads, up to the position and as far as they go
    first = max(0, min(index + 1, len(ids)) - min(MAX_TOKENS, engine.block_size))
    return Place(engine, tuple(ids), len(start), index, first)


@functools.lru_cache(maxsize=2)
def trace_of(engine: Engine, ids: tuple[int, ...]) -> Trace:
    return trace_tokens(engine.model, list(ids))


def probabilities(logits, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0):
    """The distribution (V,) from which these settings sample, from logits or log-probabilities."""
    weights, ids = weigh(logits, temperature, top_k, top_p)
    p = np.zeros(len(logits))
    p[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    return p
