"""The Look inside tab: a text token by token as a model reads it, what else it expected at each place, and a fork there."""
import functools
import math

import gradio as gr
import numpy as np
import pandas as pd

from common.errors import UserError
from engine.sampling import top_ids, weigh
from generate import Engine
from ui.models import Models, sentences
from ui.stream import slider

MAX_TEXT = 4_000  # characters
CHOICES = 10  # alternatives that are shown
LENGTH = 100  # tokens of a fork
REFRESH_TOKENS = 4  # a fork is sent after so many

SAMPLE = "It is the east, and Juliet is the sun. The sun is a star, and the earth moves around it.\n"
BINS = {"above 50%": 0.5, "10 to 50%": 0.1, "1 to 10%": 0.01, "0.1 to 1%": 0.001, "below 0.1%": 0.0}
COLOURS = dict(zip(BINS, ("#5eead4", "#bef264", "#fde047", "#fdba74", "#fca5a5")))


def build(models: Models) -> gr.Textbox:
    """Lays the tab out and connects it; the box with its text, which is read anew whenever it changes."""
    narrow = {"min_width": 180, "buttons": [], "info": None}
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            text = gr.Textbox(SAMPLE, label="Text", lines=4, max_lines=10, max_length=MAX_TEXT, elem_id="look-text",
                              info="Written by a model or by anybody; it is read again as you type.")
            model = gr.Dropdown(models.names, value=models.names[0], label="Model", elem_id="look-model")
            summary = gr.Textbox(label="Of the text", show_label=False, container=False, interactive=False, max_lines=3,
                                 elem_id="look-summary")
            tokens = gr.HighlightedText(label="Tokens, by the probability that the model gave them: click on one",
                                        color_map=COLOURS, show_legend=True, elem_id="look-tokens")
            surprisal = gr.BarPlot(x="token", y="bits", label="Surprisal of each token, bits", x_title="place", y_title="bits",
                                   height=170, tooltip="all", elem_id="look-surprisal")
            with gr.Row():
                temperature, top_k, top_p = (slider(name, "look-", **narrow) for name in ("temperature", "top_k", "top_p"))
        with gr.Column(scale=4, min_width=320):
            place = gr.Number(1, label="Place", info="Of the token, from 1; the arrow keys go on to the next.", precision=0,
                              minimum=1, maximum=MAX_TEXT, elem_id="look-place")
            found = gr.Textbox(label="Of the token", show_label=False, container=False, interactive=False, max_lines=3,
                               elem_id="look-found")
            with gr.Row():
                expected = gr.Label(label="By the model", show_heading=False, min_width=150, elem_id="look-expected")
                drawn = gr.Label(label="As drawn", show_heading=False, min_width=150, elem_id="look-drawn")
            fork = gr.Textbox(label="Fork: click on an alternative, and the text goes on from it", lines=4, max_lines=10,
                              interactive=False, buttons=["copy"], elem_id="look-fork")
            again = gr.Button("Look inside the fork", size="sm", elem_id="look-again")

    def show_fork(choice: gr.SelectData, *values):
        yield from fork_at(models, str(choice.value), *values)

    settings = [text, model, place, temperature, top_k, top_p]
    begin = gr.context.Context.root_block.load
    quiet = {"show_progress": "hidden", "concurrency_limit": 2, "concurrency_id": "look", "trigger_mode": "always_last"}
    gr.on([begin, text.change, model.change], functools.partial(inspect, models), [text, model], [summary, tokens, surprisal],
          api_name="inspect", **quiet)
    gr.on([begin, *(each.change for each in settings)], functools.partial(alternatives, models), settings,
          [found, expected, drawn], api_name="alternatives", **quiet)
    tokens.select(place_of, None, place, api_visibility="private", show_progress="hidden")
    gr.on([expected.select, drawn.select], show_fork, settings, fork, api_visibility="private", show_progress="hidden",
          concurrency_limit=32, concurrency_id="engine")
    again.click(None, fork, text, js="text => text", api_visibility="private")
    return text


def place_of(token: gr.SelectData) -> int:
    return token.index + 1


def read(models: Models, text: str | None, name: str) -> tuple[Engine, list[int], str]:
    """(the engine, the text's ids, the text as the model's vocabulary can spell it)."""
    text = text or ""
    if len(text) > MAX_TEXT:
        raise UserError(f"The text has {len(text):,} characters, and the page looks into {MAX_TEXT:,}.")
    engine = models.engine(name)
    text, _ = engine.tokenizer.replace_unknown(text.encode(errors="replace").decode())
    return engine, engine.tokenizer.encode(text), text


def shown(engine: Engine, token: int) -> str:
    """A token as one can see it: spaces and line breaks too, and bytes that are no character by themselves."""
    text = engine.tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
    return "␣" * (text == " ") or text.replace("\n", "⏎").replace("\t", "⇥")


def inspect(models: Models, text: str, model: str):
    """A text's summary, its tokens with their classes of probability, and their surprisal."""
    with sentences():
        engine, ids, text = read(models, text, model)
        found = engine.inspect(text, top=0)
    bits = [None if token["logprob"] is None else -token["logprob"] / math.log(2) for token in found]
    scored = [b for b in bits if b is not None]
    size = len(text.encode()) - sum(len(engine.tokenizer.decode_bytes([i])) for i, b in zip(ids, bits) if b is None)
    summary = f"{len(ids):,} tokens of {len(text.encode()):,} bytes"
    if scored:
        mean = sum(scored) / len(scored)
        summary += (f" · {mean * math.log(2):.3f} nats a token · perplexity {2 ** mean:,.2f} · "
                    f"{sum(scored) / size:.3f} bits a byte")
    spans = []
    for token, i, b in zip(found, ids, bits):
        tail = "\n" if token["text"].endswith("\n") else ""
        spans.append((shown(engine, i) + tail, b if b is None else next(c for c, p in BINS.items() if 2 ** -b >= p)))
    rows = [(place, b, shown(engine, i)) for place, (i, b) in enumerate(zip(ids, bits), 1) if b is not None]
    return summary, spans, pd.DataFrame(rows, columns=["token", "bits", "text"])


def at(models: Models, text: str, model: str, place: int | None) -> tuple[Engine, list[int], list[int], int | None]:
    """(engine, what the model reads before the text, the text before the place, the token there or None past the end), in ids."""
    engine, ids, _ = read(models, text, model)
    place = min(max(place or 1, 1), len(ids) + 1)
    first = engine.encode("")[0] if place == 1 or engine.tokenizer.eot is not None else []
    return engine, first, ids[:place - 1], next(iter(ids[place - 1:]), None)


@functools.lru_cache(maxsize=4)
def logprobs_of(engine: Engine, ids: tuple[int, ...]):
    """Log-probabilities (V,) of what follows ids, by a step of the engine, which keeps what it has read of them for a fork.

    The token that it draws means nothing: so hot that it is not `<|endoftext|>`, with which no probabilities come.
    """
    (_, token), *_ = engine.submit(list(ids), max_new_tokens=1, temperature=1e6, seed=0, logprobs=engine.tokenizer.vocab_size)
    logprobs = np.empty(len(token.top), np.float32)
    logprobs[[i for i, _ in token.top]] = [p for _, p in token.top]
    return logprobs


def choices(engine: Engine, logprobs) -> dict[str, int]:
    """The likeliest tokens as one sees them, and their ids; of two that look alike the likelier."""
    ids = top_ids(logprobs, min(CHOICES, len(logprobs)))
    return {shown(engine, int(i)): int(i) for i in ids[::-1]}


def alternatives(models: Models, text: str, model: str, place: int, temperature: float, top_k: int, top_p: float):
    """What stands at a place of a text (past its end: what may follow), and the likeliest tokens there with their probabilities:
    as the model expects them, and as they are drawn with these settings."""
    with sentences():
        engine, first, before, here = at(models, text, model, place)
        logprobs = logprobs_of(engine, tuple((first + before)[-engine.block_size:]))
    weights, ids = weigh(logprobs, temperature, top_k or None, top_p)
    drawn = np.zeros(len(logprobs))
    drawn[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    found = "This is the end of the text: what may follow?"
    if here is not None:
        rank = 1 + (logprobs > logprobs[here]).sum()
        found = (f"“{shown(engine, here)}” has probability {np.exp(logprobs[here]):.2%}, number {rank:,} of {len(logprobs):,}; "
                 f"its surprisal is {-logprobs[here] / math.log(2):.2f} bits. It is drawn with probability {drawn[here]:.2%}, of "
                 f"{(drawn > 0).sum():,} tokens that can be.")
    names = choices(engine, logprobs)
    return found, *({name: float(p[i]) for name, i in names.items()} for p in (np.exp(logprobs), drawn))


def fork_at(models: Models, choice: str, text: str, model: str, place: int, temperature: float, top_k: int, top_p: float):
    """Streams the text up to a place, another token there, and what the model makes of that."""
    with sentences():
        engine, first, before, _ = at(models, text, model, place)
        token = choices(engine, logprobs_of(engine, tuple((first + before)[-engine.block_size:]))).get(choice)
        if token is None:
            raise UserError("Choose one of the alternatives.")
        pieces = [engine.tokenizer.decode([*before, token])]
        for count, piece in enumerate(engine.stream([*first, *before, token], max_new_tokens=LENGTH, temperature=temperature,
                                                    top_k=top_k or None, top_p=top_p)):
            pieces.append(piece)
            if count % REFRESH_TOKENS == 0:
                yield "".join(pieces)
        yield "".join(pieces)
