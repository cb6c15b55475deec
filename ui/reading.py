"""A visitor's text as a model reads it: its tokens, their names on the page, and a trace."""
import functools
from typing import NamedTuple

from common.errors import UserError
from engine.internals import Trace, trace_tokens
from generate import Engine
from ui.models import Models

SAMPLE = "Once upon a time, there was a little fox. The fox was very sad, because he had no"
MAX_TEXT = 4_000  # characters
MAX_TOKENS = 256  # traced at a time: the attention of T tokens takes T * T numbers for each head


def read(models: Models, text: str | None, name: str) -> tuple[Engine, list[int], str]:
    """The model's engine, the text's ids, and the text without characters that the model's
    vocabulary lacks."""
    text = text or ""
    if len(text) > MAX_TEXT:
        raise UserError(f"The text has {len(text):,} characters; at most {MAX_TEXT:,} are allowed.")
    engine = models.engine(name)
    # a lone surrogate, which UTF-8 cannot encode, becomes "?"
    text = text.encode(errors="replace").decode()
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


class Place(NamedTuple):
    """A token of a text, and what the model computes for the tokens around it."""
    engine: Engine
    trace: Trace  # of T tokens, <|endoftext|> first if the vocabulary has it
    row: int  # the token's row in the trace; T at the end of the text

    @property
    def reader(self) -> int:
        """The row whose attention is shown: the token's, or the last one at the end of the text."""
        return min(self.row, len(self.trace.ids) - 1)

    def name(self, row: int) -> str:
        return visible(self.engine, self.trace.ids[row])

    def names(self) -> list[str]:
        return [in_text(self.engine, i) for i in self.trace.ids]

    def logits(self):
        """Logits (V,) of the token at the place, which the tokens before it predict."""
        logits = self.trace.lens([self.row - 1])[-1, 0]
        return logits[:self.engine.tokenizer.vocab_size].cpu().numpy()


def place_in(models: Models, text: str | None, model: str, position: int | None) -> Place:
    """The token at a position, counted from 1; one past the end of the text means its end."""
    engine, ids, _ = read(models, text, model)
    start = [] if engine.tokenizer.eot is None else [engine.tokenizer.eot]
    row = len(start) + min(max(position or 1, 1) - 1, len(ids))
    ids = start + ids
    if not ids:
        ids = engine.empty_prompt()
        row = len(ids)
    # trace as many tokens as the model reads, the last ones before the position
    limit = min(MAX_TOKENS, engine.block_size)
    first = max(0, min(row + 1, len(ids)) - limit)
    return Place(engine, trace_of(engine, tuple(ids[first:first + limit])), row - first)


@functools.lru_cache(maxsize=2)
def trace_of(engine: Engine, ids: tuple[int, ...]) -> Trace:
    return trace_tokens(engine.model, list(ids))
