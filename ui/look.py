"""The Look inside tab: how a model reads a text, token by token.

It shows the probability of each token, what else the model expected at a position, and how the text
would continue from one of these alternatives (a fork).
"""
import functools
import math
from typing import NamedTuple

import gradio as gr
import numpy as np
import pandas as pd

from common.errors import UserError
from engine.sampling import top_ids, weigh
from generate import Engine
from ui import layers, tour
from ui.models import Models, show_user_errors
from ui.reading import MAX_TEXT, SAMPLE, in_text, read, visible
from ui.stream import model_box, slider

MAX_ALTERNATIVES = 10
FORK_LENGTH = 100  # tokens
REFRESH_TOKENS = 4  # update the fork on the page after this many tokens

SAMPLE_POSITION = 13  # the second "fox" for the default model

# The colour of a token, by the probability that the model gave it: label -> (lower bound, colour).
PROBABILITY_CLASSES = {
    "above 50%": (0.5, "#5eead4"),
    "10 to 50%": (0.1, "#bef264"),
    "1 to 10%": (0.01, "#fde047"),
    "0.1 to 1%": (0.001, "#fdba74"),
    "below 0.1%": (0.0, "#fca5a5"),
}

# --------------------------------------------------------------------------------------------------
# The page

class Tab(NamedTuple):
    text: gr.Textbox  # app.py connects both to the Write tab
    model: gr.Dropdown


def build(models: Models) -> Tab:
    """Lays out the tab and connects its events."""
    model = model_box(models, "look-")
    tour.build(models, model)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            text = gr.Textbox(
                SAMPLE, label="Text",
                info="Any text, written by a model or by you. The page updates as you type.",
                lines=4, max_lines=10, max_length=MAX_TEXT, elem_id="look-text")
            summary = plain_box("Summary", "look-summary")
            tokens = gr.HighlightedText(
                label="Tokens, coloured by their probability. Click one to look at it.",
                color_map={label: colour for label, (_, colour) in PROBABILITY_CLASSES.items()},
                show_legend=True, elem_id="look-tokens")
            chosen_mark = gr.HTML()  # the style that marks the chosen token
            surprisal = gr.BarPlot(x="token", y="bits",
                                   label="Surprisal in bits (high: unexpected)", x_title="position",
                                   y_title="bits", height=200, tooltip="all",
                                   elem_id="look-surprisal")
            with gr.Row():
                narrow = {"min_width": 180, "buttons": [], "info": None}
                temperature = slider("temperature", "look-", **narrow)
                top_k = slider("top_k", "look-", **narrow)
                top_p = slider("top_p", "look-", **narrow)
        with gr.Column(scale=4, min_width=320):
            position = gr.Number(
                SAMPLE_POSITION, label="Position",
                info="The token to look at, counted from 1. The arrow keys move through the text.",
                precision=0, minimum=1, maximum=MAX_TEXT, elem_id="look-position")
            token = plain_box("Token", "look-token")
            with gr.Row():
                expected = gr.Label(label="Without the settings", show_heading=False, min_width=150,
                                    elem_id="look-expected")
                sampled = gr.Label(label="With the settings", show_heading=False, min_width=150,
                                   elem_id="look-sampled")
            fork_text = gr.Textbox(label="What if", lines=4, max_lines=10, interactive=False,
                                   placeholder="Click a token in the lists above, and the model "
                                   "continues the text with it.",
                                   buttons=["copy"], elem_id="look-fork")
            again = gr.Button("Look inside the new text", size="sm", elem_id="look-again")

    layers.build(models, text, model, position)

    def fork_at(choice: gr.SelectData, *values):
        yield from fork(models, str(choice.value), *values)

    settings = [text, model, position, temperature, top_k, top_p]
    opened = gr.context.Context.root_block.load
    private = {"api_visibility": "private", "show_progress": "hidden"}
    # while one request runs, remember only the last change
    latest = {"show_progress": "hidden", "concurrency_limit": 2, "concurrency_id": "look",
              "trigger_mode": "always_last"}
    inspected = gr.on([opened, text.change, model.change], functools.partial(inspect, models),
                      inputs=[text, model], outputs=[summary, tokens, surprisal],
                      api_name="inspect", **latest)
    # no tokens of an earlier text stay below a text that cannot be read
    inspected.failure(lambda: ("", [], None), None, [summary, tokens, surprisal], **private)
    gr.on([opened, *(setting.change for setting in settings)],
          functools.partial(alternatives, models), inputs=settings,
          outputs=[token, expected, sampled], api_name="alternatives", **latest)
    tokens.select(position_of, None, position, **private)
    gr.on([opened, position.change], None, position, chosen_mark, js="page.markToken", **private)
    forking = gr.on([expected.select, sampled.select], fork_at, inputs=settings, outputs=fork_text,
                    concurrency_limit=32, concurrency_id="engine", **private)
    # a new text ends the fork of the old one
    gr.on([text.change, model.change], None, None, fork_text, js="() => ''", cancels=forking,
          **private)
    # the browser copies the fork into the text box
    again.click(None, fork_text, text, js="fork => fork", **private)
    return Tab(text, model)


def plain_box(label: str, elem_id: str) -> gr.Textbox:
    """A sentence without a frame."""
    return gr.Textbox(label=label, show_label=False, container=False, interactive=False,
                      max_lines=8, elem_id=elem_id, elem_classes="plain")


def position_of(token: gr.SelectData) -> int:
    return token.index + 1


# --------------------------------------------------------------------------------------------------
# The whole text

def probability_class(bits: float) -> str:
    """The label in PROBABILITY_CLASSES for a token's surprisal."""
    probability = 2 ** -bits
    for label, (lower, _) in PROBABILITY_CLASSES.items():
        if probability >= lower:
            return label


def inspect(models: Models, text: str, model: str):
    """Returns a summary of the text, its tokens with their classes of probability, and a table of
    their surprisal."""
    with show_user_errors():
        engine, ids, text = read(models, text, model)
        tokens = engine.inspect(text, top=0)

    spans, rows = [], []  # of HighlightedText, of BarPlot
    total_bits = 0.0
    scored_bytes = 0
    for position, (i, token) in enumerate(zip(ids, tokens), 1):
        label = None
        # the first token has no probability if the vocabulary has no <|endoftext|> to precede it
        if token["logprob"] is not None:
            bits = -token["logprob"] / math.log(2)
            label = probability_class(bits)
            rows.append((position, bits, visible(engine, i)))
            total_bits += bits
            scored_bytes += len(engine.tokenizer.decode_bytes([i]))
        line_end = "\n" if token["text"].endswith("\n") else ""
        spans.append((in_text(engine, i) + line_end, label))

    summary = f"{len(ids):,} tokens, {len(text.encode()):,} bytes"
    if rows:
        bits_per_token = total_bits / len(rows)
        summary += (f" · {bits_per_token * math.log(2):.3f} nats per token"
                    f" · perplexity {2 ** bits_per_token:,.2f}"
                    f" · {total_bits / scored_bytes:.3f} bits per byte")
    return summary, spans, pd.DataFrame(rows, columns=["token", "bits", "text"])


# --------------------------------------------------------------------------------------------------
# One position

class Position(NamedTuple):
    engine: Engine
    start: list[int]  # ids that the model reads before the text: <|endoftext|>, or none
    before: list[int]  # ids of the text before the position
    token: int | None  # the id at the position; None at the end of the text

    def logprobs(self):
        """Log-probabilities (V,) of the token at this position."""
        context = self.start + self.before
        return next_logprobs(self.engine, tuple(context[-self.engine.block_size:]))


def locate(models: Models, text: str, model: str, position: int | None) -> Position:
    """The position, counted from 1; one past the end of the text means its end."""
    engine, ids, _ = read(models, text, model)
    index = min(max(position or 1, 1), len(ids) + 1) - 1
    # a model without <|endoftext|> still needs something to read before the first token
    start = engine.encode("")[0] if index == 0 or engine.tokenizer.eot is not None else []
    token = ids[index] if index < len(ids) else None
    return Position(engine, start, ids[:index], token)


@functools.lru_cache(maxsize=4)
def next_logprobs(engine: Engine, ids: tuple[int, ...]):
    """Log-probabilities (V,) of the token that follows the ids.

    They come with a token that the engine samples; the engine keeps the KV cache, which a fork then
    reuses. The token itself is ignored. At this temperature all tokens are equally likely, so it is
    practically never <|endoftext|>, which ends the text without log-probabilities.
    """
    events = list(engine.submit(
        list(ids), max_new_tokens=1, temperature=1e6, seed=0, logprobs=engine.tokenizer.vocab_size))
    _, token = events[0]
    logprobs = np.empty(len(token.top), np.float32)
    for i, logprob in token.top:
        logprobs[i] = logprob
    return logprobs


def most_likely(engine: Engine, logprobs) -> dict[str, int]:
    """The most likely tokens as the page shows them, with their ids. Of two that look the same, the
    more likely one."""
    ids = top_ids(logprobs, min(MAX_ALTERNATIVES, len(logprobs)))
    return {visible(engine, int(i)): int(i) for i in ids[::-1]}


def alternatives(models: Models, text: str, model: str, position: int, temperature: float,
                 top_k: int, top_p: float):
    """Returns a sentence about the token at the position, and the most likely tokens there with two
    probabilities: the model's, and the one with which the settings sample them."""
    with show_user_errors():
        place = locate(models, text, model, position)
        logprobs = place.logprobs()  # (V,)

    # the distribution that sampling draws from
    weights, ids = weigh(logprobs, temperature, top_k or None, top_p)
    sampled = np.zeros(len(logprobs))  # (V,)
    sampled[slice(None) if ids is None else ids] = weights / weights.sum(dtype=np.float64)
    expected = np.exp(logprobs)  # (V,)

    if place.token is None:
        sentence = "This is the end of the text. The lists show what could come next."
    else:
        token = place.token
        rank = 1 + (logprobs > logprobs[token]).sum()
        candidates = (sampled > 0).sum()
        name = visible(place.engine, token)
        sentence = (
            f"“{name}” has probability {expected[token]:.2%}, rank {rank:,} of "
            f"{len(logprobs):,} tokens, {-logprobs[token] / math.log(2):.2f} bits. With the "
            f"settings its probability is {sampled[token]:.2%}, and the number of tokens to choose "
            f"from is {candidates:,}. ␣ is a space.")
    names = most_likely(place.engine, logprobs)
    return (sentence, {name: float(expected[i]) for name, i in names.items()},
            {name: float(sampled[i]) for name, i in names.items()})


def fork(models: Models, choice: str, text: str, model: str, position: int, temperature: float,
         top_k: int, top_p: float):
    """Streams the text up to the position, the chosen token, and the model's continuation."""
    with show_user_errors():
        place = locate(models, text, model, position)
        engine = place.engine
        token = most_likely(engine, place.logprobs()).get(choice)
        if token is None:
            raise UserError("Choose one of the alternatives.")
        prompt = [*place.start, *place.before, token]
        written = engine.tokenizer.decode([*place.before, token])
        pieces = engine.stream(prompt, max_new_tokens=FORK_LENGTH, temperature=temperature,
                               top_k=top_k or None, top_p=top_p)
        for count, piece in enumerate(pieces):
            written += piece
            if count % REFRESH_TOKENS == 0:
                yield written
        yield written
